"""Qwen3-30B-A3B by QLoRA: 128 small experts, 8 a token. The paper does not have it; users ask for it most."""

from typing import Any

from tunescope.families.family import BF16_BYTES, GROUPED, NF4_BYTES_PER_WEIGHT, STOCK, Family, Layout, Routing
from tunescope.families.mixtral import NF4_NOTE, nf4_moe_order, nf4_moe_rules
from tunescope.flops import ForwardFlop, lora_forward_flop

# Qwen/Qwen3-30B-A3B, its published config.json.
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
# The same architecture, small enough for two CPU cores; widths are multiples of NF4's block of 64. Its 128 experts stay
# 128: they are what is special about it.
QWEN3_TINY = QWEN3_30B_A3B | {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _nf4_weight_bytes(config: dict[str, Any], num_layers: int) -> int:
    """GPU bytes of the frozen weights, and of the adapters with gradients and optimizer state in fp32.

    The adapters count here, because 128 experts have many: 0.8 billion parameters at rank 16.
    """
    width, heads, experts = config["hidden_size"], config["num_attention_heads"], config["num_experts"]
    attention = width * config["head_dim"] * (2 * heads + 2 * config["num_key_value_heads"])
    of_expert = 3 * width * config["moe_intermediate_size"]
    per_layer = (attention + experts * of_expert + width * experts) * NF4_BYTES_PER_WEIGHT
    adapters = experts * 3 * _ADAPTER_RANK * (width + config["moe_intermediate_size"]) * _FP32_COPIES * 4
    return round(num_layers * (per_layer + adapters) + 2 * config["vocab_size"] * width * BF16_BYTES)


_ADAPTER_RANK = 16  # the recipe's
_FP32_COPIES = 4  # weight, gradient and AdamW's two moments


def _forward_flop(config: dict[str, Any], recipe: dict[str, Any]) -> ForwardFlop:
    return lora_forward_flop(
        config,
        recipe,
        num_experts=config["num_experts"],
        expert_width=config["moe_intermediate_size"],
        expert_linears=("gate_proj", "up_proj", "down_proj"),
    )


_LINEARS = "gate_proj|up_proj|down_proj"
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    registration="tunescope.models.qwen3_moe",
    recipe="qwen3_moe_qlora.yaml",
    full=QWEN3_30B_A3B,
    tiny=QWEN3_TINY,
    size_keys=(
        "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim",
    ),
    experts_key="num_experts",
    resident_bytes=_nf4_weight_bytes,
    headroom_gib=4.0,
    forward_flop=_forward_flop,
    moe_paths=(STOCK, GROUPED),
    layout=Layout(
        name="qwen3_moe",
        block_class="Qwen3MoeSparseMoeBlock",
        parts={
            "input_norm": r"^\.input_layernorm",
            "attention": r"^\.self_attn",
            "post_attention_norm": r"^\.post_attention_layernorm",
            "moe": r"^\.mlp",
        },
        operators={
            "moe": nf4_moe_rules(
                rf"experts\.\d+\.({_LINEARS})(?:\.base_layer)?$",
                r"\.gate(?:\.base_layer)?$",
                r"^\.mlp$",
                r"experts\.\d+$",
                linears=f"{_LINEARS}|gate",
            )
        },
        op_order=nf4_moe_order("gate_proj", "down_proj", "up_proj"),
        op_note=NF4_NOTE,
    ),
    routing=Routing(path=r"(?:.*\.)?layers\.(\d+)\.mlp\.gate", score="softmax"),
    sparse_top_k=8,
    points={
        "throughput": "cs:sparse:bs=1,8 math:sparse:bs=1,4",
        "latency": "random:sparse:bs=1,10:seq=128",
    },
)  # fmt: skip
