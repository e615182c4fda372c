"""What is built for each model at each preset: configurations and sizes. Arithmetic only, no torch."""

from dataclasses import dataclass
from typing import Any

from tunescope.errors import UserError
from tunescope.hardware import GIB

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

# What a config.json must say for a model to be built or planned; the rest has defaults in transformers.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip

NF4_BLOCK_WEIGHTS = 64  # weights that share one absmax
NF4_NESTED_BLOCK = 256  # absmax values, one byte each, that share one fp32 scale under double quantisation
NF4_BYTES_PER_WEIGHT = 0.5 + (1 + 4 / NF4_NESTED_BLOCK) / NF4_BLOCK_WEIGHTS
BF16_BYTES = 2

# Besides the weights a step needs adapters with their optimizer state, checkpointed activations, logits and
# workspace. Full Mixtral peaked 3.6 GiB above its weights at batch 1 and 7 above at batch 32 of length 128.
FULL_HEADROOM_GIB = 5.0
SLICE_HEADROOM_GIB = 8.0
MIN_SLICE_LAYERS = 4
SLICE_DEPTH_RATIO = 4


@dataclass(frozen=True)
class Size:
    """A preset with the depths to measure (deepest first) and why it was chosen, for people."""

    preset: str
    depths: tuple[int, ...]
    total_layers: int
    reason: str


def built_in_config(preset: str) -> dict[str, Any]:
    """The config.json that a preset stands for when no checkpoint is there."""
    return MIXTRAL_TINY if preset == "tiny" else MIXTRAL_8X7B


def config_at(config: dict[str, Any], num_layers: int, top_k: int) -> dict[str, Any]:
    """A model's config.json with the point's depth and sparsity."""
    return config | {"num_hidden_layers": num_layers, "num_experts_per_tok": top_k}


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


def choose_size(
    config: dict[str, Any],
    wanted: str,
    gpu_memory_bytes: int | None,
    *,
    gpu_name: str = "",
    own_model: bool = False,
) -> Size:
    """The preset to run: `wanted`, or with `auto` the largest that fits the GPU (None: there is no GPU).

    config: of the model at full depth. own_model: it is one the user named, which tiny would silently replace.
    `auto` takes tiny only where there is no GPU. Raises UserError when nothing fits.
    """
    total = config["num_hidden_layers"]
    if own_model and gpu_memory_bytes is None and wanted == "full":
        return Size("full", (total,), total, "asked for, on the CPU")
    if wanted == "tiny" or (wanted == "auto" and gpu_memory_bytes is None):
        if own_model:
            raise UserError(
                "preset tiny is an architecture of its own and cannot be your model",
                cure="drop --model-path, or use --preset full (without a GPU it runs on the CPU, slowly)",
            )
        layers = MIXTRAL_TINY["num_hidden_layers"]
        return Size("tiny", (layers,), layers, "asked for" if wanted == "tiny" else "no GPU was found")
    if gpu_memory_bytes is None:
        raise UserError(
            f"preset {wanted} needs a GPU and none was found",
            cause="there is no NVIDIA driver, or CUDA_VISIBLE_DEVICES hides the GPUs",
            cure="use --preset tiny (or auto), or see `python3 -m tunescope doctor`",
        )
    return _gpu_size(config, wanted, gpu_memory_bytes, gpu_name)


def _gpu_size(config: dict[str, Any], wanted: str, gpu_memory_bytes: int, gpu_name: str) -> Size:
    total = config["num_hidden_layers"]
    memory_gib = gpu_memory_bytes / GIB
    full_need_gib = nf4_weight_bytes(config, total) / GIB + FULL_HEADROOM_GIB
    who = f"{gpu_name or 'the GPU'} ({memory_gib:.1f} GiB)"
    if wanted == "full" or (wanted == "auto" and memory_gib >= full_need_gib):
        return Size("full", (total,), total, f"{who}; all {total} layers need about {full_need_gib:.0f} GiB")
    per_layer_gib = (nf4_weight_bytes(config, 1) - nf4_weight_bytes(config, 0)) / GIB
    room_gib = memory_gib - SLICE_HEADROOM_GIB - nf4_weight_bytes(config, 0) / GIB
    deepest = min(total, int(room_gib / per_layer_gib))
    if deepest < MIN_SLICE_LAYERS:
        raise UserError(
            f"{who} is too small for preset slice",
            cause=f"{MIN_SLICE_LAYERS} full-width layers and their activations need about "
            f"{SLICE_HEADROOM_GIB + (MIN_SLICE_LAYERS + 1) * per_layer_gib:.0f} GiB",
            cure="use a larger GPU, or --preset tiny to see that everything works",
        )
    # Two depths: step time is affine in depth, and a line needs two points. The further apart they are, the less
    # their errors grow on the way to all layers.
    return Size(
        "slice", (deepest, max(deepest // SLICE_DEPTH_RATIO, 1)), total, f"{who}; {deepest} of {total} layers fit"
    )


def with_budget(size_memory_bytes: int | None, budget_gib: float | None) -> int | None:
    """GPU memory to plan with: the GPU's own, or less where the user sets a budget to imitate a smaller GPU."""
    if size_memory_bytes is None or budget_gib is None:
        return size_memory_bytes
    return min(size_memory_bytes, round(budget_gib * GIB))
