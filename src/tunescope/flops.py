"""Floating-point operations of training, counted from a config.json: what MFU and HFU divide. Arithmetic only.

A multiply-add is 2 FLOP. Softmax, norms, activations and dequantisation are left out, as is usual (arXiv:2204.02311,
appendix B).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ForwardFlop:
    """FLOP of one token's forward pass through a Mixtral-like model.

    layers: frozen linears of all decoder layers. head: the logits. lora: the adapters' matmuls.
    attention_per_key: scores and their product with the values, per token and per key that it sees.
    """

    layers: float
    head: float
    lora: float
    attention_per_key: float


def forward_flop(config: dict[str, Any], recipe: dict[str, Any]) -> ForwardFlop:
    """Counts a Mixtral config with the recipe's LoRA. Dense and sparse differ by `num_experts_per_tok`."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head_width = config.get("head_dim") or width // heads
    experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]
    attention_weights = width * head_width * (2 * heads + 2 * config["num_key_value_heads"])
    active_weights = attention_weights + width * experts + top_k * 3 * width * hidden
    # name of a linear -> (in + out features, how many run per token and layer)
    linears = {
        "w1": (width + hidden, top_k),
        "w2": (width + hidden, top_k),
        "w3": (width + hidden, top_k),
        "gate": (width + experts, 1),
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
        layers=2.0 * layers * active_weights,
        head=2.0 * width * config["vocab_size"],
        lora=2.0 * layers * lora_weights,
        attention_per_key=4.0 * layers * heads * head_width,
    )


def train_flop(forward: ForwardFlop, tokens: float, token_keys: float, *, recompute: bool) -> float:
    """FLOP of training on `tokens` tokens with a frozen base.

    token_keys: keys seen, summed over the tokens; a causal query of n tokens sees about n * n / 2.
    Frozen linears need forward and input gradient (4 FLOP a weight and token, not 6), adapters also weight
    gradients, attention twice its forward again. recompute: gradient checkpointing runs the layers' forward once
    more; leave it out for MFU, count it for HFU.
    """
    adapters_and_attention = forward.lora * tokens + forward.attention_per_key * token_keys
    total = 2 * (forward.layers + forward.head) * tokens + 3 * adapters_and_attention
    if recompute:
        total += forward.layers * tokens + adapters_and_attention
    return total
