"""BlackMamba-2.8B (arXiv 2402.01771), all parameters trained: the paper's second model.

Its blocks alternate between a Mamba mixer and a mixture of experts, and are counted singly, as its own config does.
"""

import json
from typing import Any

from tunescope.errors import UserError
from tunescope.families.blackmamba_shapes import delta_rank, inner_width, num_parameters, parameter_shapes
from tunescope.families.family import (
    ACCUMULATION,
    BF16_BYTES,
    COPY,
    GROUPED,
    MATMUL,
    MOE_PATHS,
    Family,
    Layout,
    OpRule,
    Routing,
)
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

EPSILON = 1e-5  # where a config.json says none
# Full fine-tuning in bf16 keeps of every parameter the weight, its gradient and AdamW's two moments.
TRAINED_COPIES = 4


def _check_config(config: dict[str, Any]) -> None:
    num_layers = config["num_hidden_layers"]
    kinds: Any = config.get("layers_block_type")
    epsilon = config.get("layer_norm_epsilon", EPSILON)
    are_kinds = isinstance(kinds, list) and all(kind in ("mamba", "moe") for kind in kinds)
    checks = {
        "layers_block_type": (
            are_kinds and len(kinds) == num_layers, f"mamba or moe for each of the {num_layers} layers",
        ),
        "tie_word_embeddings": (config.get("tie_word_embeddings", True) is True, "true: the head is the embedding"),
        "layer_norm_epsilon": (isinstance(epsilon, float) and 0 < epsilon < 1, "a number between 0 and 1"),
        "moe": (config.get("moe", GROUPED) in MOE_PATHS, " or ".join(MOE_PATHS)),
    }  # fmt: skip
    for key, (is_right, wanted) in checks.items():
        if not is_right:
            raise UserError(
                f"config.json says {key}: {json.dumps(config.get(key))}; it must be {wanted}",
                cure="take the config.json that came with the model",
            )


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


_COPY = COPY + r"|\|aten::cat\|[^|]*$"  # backward puts together what forward took apart
# Without a kernel for all groups torch goes from group to group inside the one operator, by views and copies.
_GROUPED_MATMUL = MATMUL + r"|\|aten::_grouped_mm\|"
# The recipe has no LoRA; somebody's own Trainer may.
_ADAPTED, _ADAPTER = r"(?:\.base_layer)?", r"\.lora_[AB]\b"
_LORA_SUM = r"\|aten::(mul|add)_?\|"
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
    check_config=_check_config,
    parameter_shapes=parameter_shapes,
    resident_bytes=_resident_bytes,
    headroom_gib=2.5,  # activations and logits of one query of the paper's data sets
    forward_flop=_forward_flop,
    moe_path=GROUPED,
    moe_paths=MOE_PATHS,
    is_moe_in_config=True,
    has_scan=True,
    layout=Layout(
        name="blackmamba",
        block_class="BlackMambaMoe",
        parts={"rms_norm": r"^\.norm", "mamba": r"^\.mamba", "moe": r"^\.moe"},
        operators={
            "moe": (
                OpRule("matmul(w1)", r"\.fc1$", _GROUPED_MATMUL),
                OpRule("matmul(w2)", r"\.fc2$", _GROUPED_MATMUL),
                OpRule("matmul(router)", rf"\.router{_ADAPTED}$", MATMUL),
                OpRule("matmul(lora)", _ADAPTER, MATMUL),
                OpRule("gradient accumulation", "", ACCUMULATION),
                OpRule("gelu", r"\.experts$", r"[gG]elu"),
                OpRule("elementwise_mult", r"\.experts$", _ELEMENTWISE_MUL),
                OpRule("sigmoid", r"^\.moe$", r"[sS]igmoid"),
                OpRule("top_k", r"^\.moe$", r"topk|Topk"),
                # Everything else in the block itself sends tokens to experts and brings them back, copies included.
                OpRule("gather/scatter/index", r"^\.moe$"),
                OpRule("casts and copies", "", _COPY),
                OpRule("lora scaling and adding", rf"{_ADAPTER}|\.router$", _LORA_SUM),
                OpRule("other", ""),
            ),
            "mamba": (
                OpRule("matmul({1})", rf"\.(in_proj|x_proj|dt_proj|out_proj){_ADAPTED}$", MATMUL),
                OpRule("matmul(lora)", _ADAPTER, MATMUL),
                OpRule("conv1d + silu", r"\.conv1d$"),
                OpRule("selective scan", r"\.scan$"),
                OpRule("gradient accumulation", "", ACCUMULATION),
                OpRule("casts and copies", "", _COPY),
                OpRule("lora scaling and adding", rf"{_ADAPTER}|\.(in_proj|x_proj|out_proj)$", _LORA_SUM),
                OpRule("other", ""),
            ),
        },
        op_order=(
            "matmul(w1)", "gelu", "matmul(w2)", "elementwise_mult", "top_k", "sigmoid", "matmul(router)",
            "gather/scatter/index", "matmul(in_proj)", "conv1d + silu", "matmul(x_proj)", "matmul(dt_proj)",
            "selective scan", "matmul(out_proj)", "matmul(lora)", "lora scaling and adding", "casts and copies",
            "gradient accumulation", "other",
        ),
        op_note="backward of a matmul is the gradients of its input and of its weights. Where the MoE path is grouped, "
        "matmul(w1) and matmul(w2) are of all experts in one launch in bf16 on compute capability 9.0 and 10.0; "
        "elsewhere a launch is of one expert, as the paper's are.",
    ),
    routing=Routing(path=r"(?:.*\.)?layers\.(\d+)\.moe\.router", score="sigmoid"),
    paper_keys=("hidden_size", "intermediate_size", "state_size", "expand", "num_local_experts", "layers_block_type"),
)  # fmt: skip
