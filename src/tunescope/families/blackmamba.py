"""BlackMamba-2.8B (arXiv 2402.01771), all parameters trained: the paper's second model.

Its blocks alternate between a Mamba mixer and a mixture of experts, and are counted singly, as its own config does.
"""

from typing import Any

from tunescope.families.blackmamba_shapes import delta_rank, inner_width, num_parameters
from tunescope.families.family import ACCUMULATION, BF16_BYTES, COPY, MATMUL, Family, Layout, OpRule, Routing
from tunescope.flops import ForwardFlop

# Zyphra/BlackMamba-2.8B: its published config.json in the names of models/blackmamba.
BLACKMAMBA_2_8B: dict[str, Any] = {
    "architectures": ["BlackMambaForCausalLM"],
    "model_type": "blackmamba",
    "vocab_size": 50304,
    "hidden_size": 1472,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "intermediate_size": 3872,
    "num_hidden_layers": 36,
    "layers_block_type": ["mamba", "moe"] * 18,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": True,
    # Of the tokens that the study added to the tokenizer of GPT-NeoX-20B; its text begins with no BOS.
    "pad_token_id": 50277,
    "eos_token_id": 50278,
    "bos_token_id": 50279,
    "torch_dtype": "bfloat16",
}
# The same architecture, small enough for two CPU cores.
BLACKMAMBA_TINY = BLACKMAMBA_2_8B | {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "moe"] * 2,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "float32",
}

# Full fine-tuning in bf16 keeps of every parameter the weight, its gradient and AdamW's two moments.
TRAINED_COPIES = 4


def _at_depth(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    return config | {"num_hidden_layers": num_layers, "layers_block_type": config["layers_block_type"][:num_layers]}


def _mixer_linears(config: dict[str, Any]) -> int:
    """Weights of a Mamba mixer's linears."""
    width, inner, rank = config["hidden_size"], inner_width(config), delta_rank(config)
    return width * 2 * inner + inner * (rank + 2 * config["state_size"]) + rank * inner + inner * width


def _resident_bytes(config: dict[str, Any], num_layers: int) -> int:
    return num_parameters(_at_depth(config, num_layers)) * TRAINED_COPIES * BF16_BYTES


def _forward_flop(config: dict[str, Any], recipe: dict[str, Any]) -> ForwardFlop:
    """The scan counts 6 FLOP a channel and state (decay, input, state, output), the convolution 2 a tap."""
    width, inner, experts = config["hidden_size"], inner_width(config), config["num_local_experts"]
    mamba = 2.0 * _mixer_linears(config) + 6.0 * inner * config["state_size"] + 2.0 * inner * config["conv_kernel"]
    of_expert = 3 * width * config["intermediate_size"]
    moe = 2.0 * (width * experts + config["num_experts_per_tok"] * of_expert)
    kinds = config["layers_block_type"]
    return ForwardFlop(
        frozen=0.0,
        trained=kinds.count("mamba") * mamba + kinds.count("moe") * moe,
        head=2.0 * width * config["vocab_size"],
        head_is_trained=True,
        attention_per_key=0.0,
    )


# On a CPU torch goes from group to group inside the one operator, by views and copies.
_GROUPED_MATMUL = MATMUL + r"|\|aten::_grouped_mm\|"
_ELEMENTWISE_MUL = r"MulBackward\d*\||\|aten::mul_?\|"
BLACKMAMBA = Family(
    name="blackmamba",
    scripts="mamba",
    model_type="blackmamba",
    registration="tunescope.models.blackmamba",
    recipe="blackmamba_full.yaml",
    launch_config={"loss": "study"},  # with label smoothing; see models/blackmamba/loss.py
    full=BLACKMAMBA_2_8B,
    tiny=BLACKMAMBA_TINY,
    size_keys=(
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "state_size", "conv_kernel", "expand",
    ),
    depth_step=2,
    at_depth=_at_depth,
    resident_bytes=_resident_bytes,
    headroom_gib=2.5,  # activations and logits of one query of the paper's data sets
    forward_flop=_forward_flop,
    moe_path="grouped",
    has_scan=True,
    layout=Layout(
        name="blackmamba",
        block_class="BlackMambaMoe",
        parts={"rms_norm": r"^\.norm", "mamba": r"^\.mamba", "moe": r"^\.moe"},
        operators={
            "moe": (
                OpRule("matmul(w1)", r"\.fc1$", _GROUPED_MATMUL),
                OpRule("matmul(w2)", r"\.fc2$", _GROUPED_MATMUL),
                OpRule("matmul(router)", r"\.router$", MATMUL),
                OpRule("gradient accumulation", "", ACCUMULATION),
                OpRule("gelu", r"\.experts$", r"[gG]elu"),
                OpRule("elementwise_mult", r"\.experts$", _ELEMENTWISE_MUL),
                OpRule("sigmoid", r"^\.moe$", r"[sS]igmoid"),
                OpRule("top_k", r"^\.moe$", r"topk|Topk"),
                # Everything else in the block itself sends tokens to experts and brings them back, copies included.
                OpRule("gather/scatter/index", r"^\.moe$"),
                OpRule("casts and copies", "", COPY),
                OpRule("other", ""),
            ),
            "mamba": (
                OpRule("matmul({1})", r"\.(in_proj|x_proj|dt_proj|out_proj)$", MATMUL),
                OpRule("conv1d + silu", r"\.conv1d$"),
                OpRule("selective scan", r"\.scan$"),
                OpRule("gradient accumulation", "", ACCUMULATION),
                OpRule("casts and copies", "", COPY),
                OpRule("other", ""),
            ),
        },
        op_order=(
            "matmul(w1)", "gelu", "matmul(w2)", "elementwise_mult", "top_k", "sigmoid", "matmul(router)",
            "gather/scatter/index", "matmul(in_proj)", "conv1d + silu", "matmul(x_proj)", "matmul(dt_proj)",
            "selective scan", "matmul(out_proj)", "casts and copies", "gradient accumulation", "other",
        ),
        op_note="backward of a matmul is the gradients of its input and of its weights. Where the MoE path is grouped, "
        "matmul(w1) and matmul(w2) are of all experts in one launch; the paper's are of one expert.",
    ),
    routing=Routing(path=r"(?:.*\.)?layers\.(\d+)\.moe\.router", score="sigmoid"),
    paper_keys=("hidden_size", "intermediate_size", "state_size", "expand", "num_local_experts", "layers_block_type"),
)  # fmt: skip
