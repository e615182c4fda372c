"""Mixtral-8x7B by QLoRA: the paper's first model."""

from typing import Any

from tunescope.families.family import (
    ACCUMULATION,
    BF16_BYTES,
    COPY,
    GROUPED,
    MATMUL,
    NF4_BYTES_PER_WEIGHT,
    STOCK,
    Family,
    Layout,
    OpRule,
    Routing,
)
from tunescope.flops import ForwardFlop, lora_forward_flop

# mistralai/Mixtral-8x7B-v0.1, its published config.json.
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
# The same architecture, small enough for two CPU cores; widths are multiples of NF4's block of 64.
MIXTRAL_TINY = MIXTRAL_8X7B | {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def linear_weights_per_layer(config: dict[str, Any]) -> int:
    """Weights of one decoder layer's linears (attention, router, all experts): those that QLoRA quantises."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    attention = width * head_width * (2 * heads + 2 * config["num_key_value_heads"])
    experts = config["num_local_experts"] * 3 * width * config["intermediate_size"]
    return attention + experts + width * config["num_local_experts"]


def nf4_weight_bytes(config: dict[str, Any], num_layers: int) -> int:
    """GPU bytes of the frozen weights: NF4 linears with double-quantised scales, bf16 embedding and head."""
    per_layer = linear_weights_per_layer(config) * NF4_BYTES_PER_WEIGHT
    outside = 2 * config["vocab_size"] * config["hidden_size"] * BF16_BYTES
    return round(num_layers * per_layer + outside)


def _forward_flop(config: dict[str, Any], recipe: dict[str, Any]) -> ForwardFlop:
    return lora_forward_flop(
        config,
        recipe,
        num_experts=config["num_local_experts"],
        expert_width=config["intermediate_size"],
        expert_linears=("w1", "w3", "w2"),
    )


_EXPERT_LINEAR = r"experts\.\d+\.(w[123])(?:\.base_layer)?$"
_ROUTER = r"\.gate(?:\.base_layer)?$"
# bitsandbytes decodes by an operator of its own in backward, and by bare kernels inside gemm_4bit in forward. The last
# parameter of its kernel is the data type: 0 is 8 bit (the scales), 1 FP4, 2 NF4 (its csrc/common.h).
_DEQUANT = r"\|bitsandbytes::dequantize_4bit\||kDequantizeBlockwise<[^|]*\D[12]>"
# The scales of NF4 are themselves quantised: decoded, and shifted by their mean, before each use.
_SCALES = (
    r"\|bitsandbytes::dequantize_blockwise\||kDequantizeBlockwise<[^|]*\D0>"
    r"|(MatMul4BitBackward\|[^|]*|MatMul4Bit|bitsandbytes::\w+)\|aten::add_?\|(?![^|]*(BFloat16|Half))[^|]*$"
)
_END = r"[^|:]*$"  # of a kernel's name
# For few tokens bitsandbytes has kernels that decode while they multiply.
_FUSED = r"\|[^|:]*gemm_4bit[^|:]*$"


def nf4_moe_rules(expert_linear: str, router: str, block: str, expert: str, linears: str) -> tuple[OpRule, ...]:
    """Operators of a mixture of NF4 experts with LoRA, for one way of naming its modules.

    expert_linear: path of an expert's linear, its name as group 1. router: path of the router. block: of the MoE block
    itself. expert: of an expert itself. linears: names of everything that LoRA may adapt, as alternatives.
    """
    return (
        OpRule("{1}_dequant", expert_linear, _DEQUANT),
        OpRule("scales_dequant", expert_linear, _SCALES),
        OpRule("matmul({1}) decoding", expert_linear, _FUSED),
        OpRule("matmul({1})", expert_linear, MATMUL),
        OpRule("router_dequant", router, _DEQUANT),
        OpRule("scales_dequant", router, _SCALES),
        OpRule("matmul(router) decoding", router, _FUSED),
        OpRule("matmul(router)", router, MATMUL),
        OpRule("matmul(lora)", r"\.lora_[AB]\b", MATMUL),
        OpRule("gradient accumulation", "", ACCUMULATION),
        OpRule("activation", r"\.act_fn$"),
        OpRule("softmax", block, r"[sS]oftmax"),
        OpRule("topk", block, r"topk|Topk"),
        # Of the grouped path, which computes all experts in the block itself.
        OpRule("matmul(experts) decoding", block, rf"\|(forward|dx)_kernel{_END}"),
        OpRule("matmul(experts)", block, r"\|aten::_grouped_mm\|[^|]*$"),
        OpRule("experts_dequant", block, rf"\|dequantize_kernel{_END}"),
        OpRule("scales_dequant", block, rf"\|scales_kernel{_END}"),
        OpRule("activation", block, rf"\|gated_silu_(backward_)?kernel{_END}"),
        # Everything else in the block itself sends tokens to experts and brings them back, copies included.
        OpRule("gather/scatter/index", block),
        OpRule("elementwise_mult", expert),
        OpRule("casts and copies", "", COPY),
        OpRule("rest of the NF4 linears", r"\.base_layer$"),
        OpRule("lora scaling and adding", rf"({linears})(\.|$)"),
        OpRule("other", ""),
    )


def nf4_moe_order(first: str, second: str, third: str) -> tuple[str, ...]:
    """The labels of nf4_moe_rules in the order of a table, for the names of an expert's three linears."""
    names = (first, second, third)
    return (
        *(f"matmul({name})" for name in names), *(f"matmul({name}) decoding" for name in names),
        "matmul(experts)", "matmul(experts) decoding", *(f"{name}_dequant" for name in names), "experts_dequant",
        "scales_dequant", "rest of the NF4 linears", "matmul(lora)",
        "lora scaling and adding", "casts and copies", "activation", "elementwise_mult", "matmul(router)",
        "matmul(router) decoding", "router_dequant", "softmax", "topk", "gather/scatter/index",
        "gradient accumulation", "other",
    )  # fmt: skip


NF4_NOTE = (
    "matmul(experts): of the grouped path, all experts and their adapters in one launch. "
    "backward of a matmul is the gradient of its input, and for LoRA of its weights too. scales_dequant: NF4's scales, "
    "themselves quantised, are decoded before each use."
)

MIXTRAL = Family(
    name="mixtral",
    scripts="mixtral",
    model_type="mixtral",
    registration="tunescope.models.mixtral",
    recipe="mixtral_qlora.yaml",
    full=MIXTRAL_8X7B,
    tiny=MIXTRAL_TINY,
    size_keys=(
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    ),
    resident_bytes=nf4_weight_bytes,
    # Adapters with their optimizer state, checkpointed activations, logits, workspace: 3.6 GiB above the weights at
    # batch 1 and 7 at batch 32 of length 128.
    headroom_gib=5.0,
    forward_flop=_forward_flop,
    moe_paths=(STOCK, GROUPED),
    layout=Layout(
        name="mixtral",
        block_class="MixtralSparseMoeBlock",
        parts={
            "input_norm": r"^\.input_layernorm",
            "attention": r"^\.self_attn",
            "post_attention_norm": r"^\.post_attention_layernorm",
            "moe": r"^\.block_sparse_moe",
        },
        operators={
            "moe": nf4_moe_rules(
                _EXPERT_LINEAR, _ROUTER, r"^\.block_sparse_moe$", r"experts\.\d+$", linears="w[123]|gate"
            )
        },
        op_order=nf4_moe_order("w1", "w2", "w3"),
        op_note=NF4_NOTE,
    ),
    routing=Routing(path=r"(?:.*\.)?layers\.(\d+)\.block_sparse_moe\.gate", score="softmax"),
    paper_keys=(
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_local_experts",
    ),
)  # fmt: skip
