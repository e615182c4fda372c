"""Floating-point operations of training, counted from a config.json: what MFU and HFU divide. Arithmetic only.

A multiply-add is 2 FLOP. Softmax, norms, activations and dequantisation are left out, as is usual (arXiv:2204.02311,
appendix B).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ForwardFlop:
    """FLOP of one token's forward pass.

    frozen, trained: linears of all decoder layers whose weights stay, and whose weights are trained (adapters, or with
    full fine-tuning everything, scans included). head: the logits, trained or not. attention_per_key: scores and their
    product with the values, per token and per key that it sees.
    """

    frozen: float
    trained: float
    head: float
    head_is_trained: bool
    attention_per_key: float


def lora_forward_flop(
    config: dict[str, Any],
    recipe: dict[str, Any],
    *,
    num_experts: int,
    expert_width: int,
    expert_linears: tuple[str, str, str],
) -> ForwardFlop:
    """Of attention and a gated mixture of experts under the recipe's LoRA. Dense and sparse differ by
    `num_experts_per_tok`.

    expert_linears: names of the two linears into an expert's width and of the one back.
    """
    width, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_width = config.get("head_dim") or width // heads
    top_k = config["num_experts_per_tok"]
    attention_weights = width * head_width * (2 * heads + 2 * config["num_key_value_heads"])
    active_weights = attention_weights + width * num_experts + top_k * 3 * width * expert_width
    # name of a linear -> (in + out features, how many run per token and layer)
    linears = dict.fromkeys(expert_linears, (width + expert_width, top_k)) | {
        "gate": (width + num_experts, 1),
        "q_proj": (width + heads * head_width, 1),
        "k_proj": (width + config["num_key_value_heads"] * head_width, 1),
        "v_proj": (width + config["num_key_value_heads"] * head_width, 1),
        "o_proj": (width + heads * head_width, 1),
    }
    rank = int(recipe["lora_rank"])
    targets = [name.strip() for name in str(recipe["lora_target"]).split(",")]
    if targets == ["all"]:
        targets = list(linears)
    lora_weights = sum(rank * size * runs for name, (size, runs) in linears.items() if name in targets)
    return ForwardFlop(
        frozen=2.0 * layers * active_weights,
        trained=2.0 * layers * lora_weights,
        head=2.0 * width * config["vocab_size"],
        head_is_trained=False,
        attention_per_key=4.0 * layers * heads * head_width,
    )


def train_flop(forward: ForwardFlop, tokens: float, token_keys: float, *, recompute_frac: float) -> float:
    """FLOP of training on `tokens` tokens.

    token_keys: keys seen, summed over the tokens; a causal query of n tokens sees about n * n / 2.
    Frozen linears need forward and input gradient (4 FLOP a weight and token), trained ones also weight gradients (6),
    attention twice its forward again. recompute_frac: the share of layers whose forward gradient checkpointing runs
    once more; 0 for MFU, which leaves it out.
    """
    trained_and_attention = forward.trained * tokens + forward.attention_per_key * token_keys
    head = (3 if forward.head_is_trained else 2) * forward.head * tokens
    total = 2 * forward.frozen * tokens + head + 3 * trained_and_attention
    return total + recompute_frac * (forward.frozen * tokens + trained_and_attention)
