"""What decides how much memory a fine-tuning step takes, read from a config.json and a recipe. No torch.

Model types of the llama kind (attention, then a gated MLP or a mixture of them) are described by Decoder; BlackMamba by
its config itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunescope.errors import UserError

BLACKMAMBA = "blackmamba"
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
# model_type -> (key of the number of experts, of an expert's width, names of its linears: into the width twice, back)
_MOE = {
    "mixtral": ("num_local_experts", "intermediate_size", ("w1", "w3", "w2")),
    "qwen3_moe": ("num_experts", "moe_intermediate_size", ("gate_proj", "up_proj", "down_proj")),
}
KNOWN_MODEL_TYPES = (BLACKMAMBA, *_DENSE, *_MOE)
_BLACKMAMBA_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "state_size", "conv_kernel",
    "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
# Settings that change what is kept, in ways that were not counted.
_NOT_COUNTED = (
    "additional_target", "use_dora", "upcast_layernorm", "upcast_lmhead_output", "enable_liger_kernel", "use_unsloth",
    "use_unsloth_gc", "deepspeed", "fsdp", "use_galore", "use_apollo", "use_badam", "use_muon", "use_adam_mini",
    "moe_aux_loss_coef", "fp16",
)  # fmt: skip
_OPTIMIZERS = {"adamw_torch": False, "adamw_torch_fused": True}  # -> whether it is one kernel, without temporaries

_MAX_SIZE = 2**31
FP32, BF16 = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Linear:
    """One weight of a layer. copies: how many of it a layer has, one an expert."""

    name: str
    in_width: int
    out_width: int
    copies: int = 1
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.in_width * self.out_width


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model of the llama kind.

    num_experts: 0 where the MLP is dense. attention, router, mlp: a layer's linears; mlp is the two into mlp_width and
    the one back.
    """

    width: int
    vocab_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    num_experts: int
    top_k: int
    has_qk_norm: bool
    normalises_routing: bool
    is_tied: bool
    attention: tuple[Linear, ...]
    router: tuple[Linear, ...]
    mlp: tuple[Linear, Linear, Linear]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.attention, *self.router, *self.mlp)

    @property
    def norm_widths(self) -> tuple[int, ...]:
        """Of one layer's RMSNorms."""
        return (self.width, self.width) + (self.head_width,) * (2 if self.has_qk_norm else 0)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a recipe trains.

    targets: linears with adapters; empty under full fine-tuning. Bytes of a number: trained of trained weights, their
    gradients and moments, frozen of weights that are not quantised, compute of the matmuls, stream of the hidden state
    between layers.
    """

    is_lora: bool
    is_quantised: bool
    rank: int
    targets: frozenset[str]
    is_checkpointed: bool
    accumulates: bool
    is_fused_optimizer: bool
    trained: int
    frozen: int
    compute: int
    stream: int

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes a bf16 copy of each trained matrix, and keeps it until the forward ends."""
        return self.trained != self.compute

    @property
    def recasts_inputs(self) -> bool:
        """Whether PEFT makes an fp32 copy of an adapter's input, which autocast turns back: unless the weight beside it
        is quantised."""
        return self.is_lora and not self.is_quantised and self.casts_weights

    def is_adapted(self, linear: Linear) -> bool:
        return linear.name in self.targets

    def keeps_input(self, linear: Linear) -> bool:
        """Whether a weight's gradient needs the linear's input."""
        return not self.is_lora or self.is_adapted(linear)


@dataclass(frozen=True)
class Batch:
    """Queries and their padded length; is_masked: some slots are padding, so that attention gets a mask."""

    size: int
    length_tokens: int
    is_masked: bool

    @property
    def tokens(self) -> int:
        return self.size * self.length_tokens


def model_type(config: Mapping[str, Any]) -> str:
    """Raises UserError if memory of this architecture is not modelled."""
    name = config.get("model_type")
    if name not in KNOWN_MODEL_TYPES:
        raise UserError(
            f"the memory of model_type {name!r} is not modelled",
            cause="what a layer keeps for backward was counted for certain architectures only",
            cure=f"known are {', '.join(KNOWN_MODEL_TYPES)}",
        )
    return str(name)


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """Raises UserError if config.json lacks a size, mixes layers of two kinds, or has the routers' balance trained."""
    kind = model_type(config)
    if config.get("output_router_logits"):
        raise UserError(
            "the memory of training with a loss of the routers' balance is not modelled",
            cause="output_router_logits of its config.json is true",
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            "the memory of a model with both dense and sparse layers is not modelled",
            cause="mlp_only_layers or decoder_sparse_step of its config.json",
        )
    width, heads = size_of(config, "hidden_size"), size_of(config, "num_attention_heads")
    head_width = width // heads if config.get("head_dim") is None else size_of(config, "head_dim")
    kv_heads = heads if config.get("num_key_value_heads") is None else size_of(config, "num_key_value_heads")
    if heads % kv_heads or not head_width:
        raise UserError(
            f"config.json has {heads} heads, {kv_heads} for keys and values, in a width of {width}",
            cause="num_key_value_heads must divide num_attention_heads, and a head must have some width",
            cure="use the config.json that came with the checkpoint",
        )
    has_qkv_bias = kind == "qwen2" or bool(config.get("attention_bias"))
    has_out_bias = kind != "qwen2" and bool(config.get("attention_bias"))
    experts_key, width_key, names = _MOE.get(kind, ("", "intermediate_size", ("gate_proj", "up_proj", "down_proj")))
    num_experts = size_of(config, experts_key) if experts_key else 0
    mlp_width = size_of(config, width_key)
    has_mlp_bias = kind == "llama" and bool(config.get("mlp_bias"))
    copies = num_experts or 1
    top_k = size_of(config, "num_experts_per_tok") if num_experts else 1
    if num_experts and top_k > num_experts:
        raise UserError(f"num_experts_per_tok is {top_k}, and there are {num_experts} experts")
    return Decoder(
        width=width,
        vocab_size=size_of(config, "vocab_size"),
        num_layers=size_of(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=mlp_width,
        num_experts=num_experts,
        top_k=top_k,
        has_qk_norm=kind.startswith("qwen3"),
        normalises_routing=kind == "mixtral" or bool(config.get("norm_topk_prob")),
        is_tied=bool(config.get("tie_word_embeddings")),
        attention=(
            Linear("q_proj", width, heads * head_width, has_bias=has_qkv_bias),
            Linear("k_proj", width, kv_heads * head_width, has_bias=has_qkv_bias),
            Linear("v_proj", width, kv_heads * head_width, has_bias=has_qkv_bias),
            Linear("o_proj", heads * head_width, width, has_bias=has_out_bias),
        ),
        router=(Linear("gate", width, num_experts),) if num_experts else (),
        mlp=(
            Linear(names[0], width, mlp_width, copies, has_mlp_bias),
            Linear(names[1], width, mlp_width, copies, has_mlp_bias),
            Linear(names[2], mlp_width, width, copies, has_mlp_bias),
        ),
    )


def check_blackmamba(config: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json that lacks a size, or asks for other ways to compute than those counted."""
    for key in _BLACKMAMBA_SIZES:
        size_of(config, key)
    kinds: Any = config.get("layers_block_type")
    are_kinds = isinstance(kinds, list) and all(kind in ("mamba", "moe") for kind in kinds)
    expand: Any = config.get("expand")
    if not are_kinds or type(expand) not in (int, float) or not 0 < expand < _MAX_SIZE:
        raise UserError(
            "config.json has no usable expand or layers_block_type",
            cause="expand must be a number above 0, and layers_block_type a list of mamba and moe, one a layer",
            cure="use the config.json that came with the checkpoint",
        )
    for key, counted in {"scan": ("auto", "triton"), "moe": ("grouped",)}.items():
        if config.get(key, counted[0]) not in counted:
            raise UserError(
                f"the memory of BlackMamba with {key}: {config[key]} is not modelled",
                cure=f"known is {' or '.join(counted)}",
            )


def read_setup(recipe: Mapping[str, Any], linears: tuple[Linear, ...]) -> Setup:
    """linears: what adapters may be put on; none where the model is only trained in full.

    Raises UserError for a way of training whose memory is not modelled.
    """
    method = recipe.get("finetuning_type", "lora")  # LLaMA-Factory's default
    is_lora, is_quantised = method == "lora", bool(recipe.get("quantization_bit"))
    is_pure, is_bf16 = bool(recipe.get("pure_bf16")), bool(recipe.get("bf16") or recipe.get("pure_bf16"))
    optimizer = str(recipe.get("optim", "adamw_torch_fused"))  # transformers' default
    faults = {
        f"finetuning_type {method}": method not in ("lora", "full"),
        f"optim {optimizer}": optimizer not in _OPTIMIZERS,
        "flash_attn disabled": recipe.get("flash_attn") == "disabled",
        "quantisation other than NF4 by bitsandbytes": is_quantised
        and (
            recipe["quantization_bit"] != 4
            or recipe.get("quantization_type", "nf4") != "nf4"
            or not recipe.get("double_quantization", True)
        ),
        "a quantised model trained in full": is_quantised and not is_lora,
        "a quantised model without bf16": is_quantised and not is_bf16,
        "LoRA in pure_bf16": is_lora and is_pure,
        f"lora_dropout {recipe.get('lora_dropout')}": is_lora and recipe.get("lora_dropout") not in (None, 0),
        "LoRA on this model": is_lora and not linears,
    } | {key: bool(recipe.get(key)) for key in _NOT_COUNTED}
    for fault, is_present in faults.items():
        if is_present:
            raise UserError(
                f"the memory of training with {fault} is not modelled",
                cure="known are NF4 QLoRA and LoRA under bf16, full fine-tuning in bf16, pure_bf16 or fp32, with "
                f"{' or '.join(_OPTIMIZERS)}",
            )
    compute = BF16 if is_bf16 else FP32
    return Setup(
        is_lora=is_lora,
        is_quantised=is_quantised,
        rank=whole_number(recipe, "lora_rank", 8) if is_lora else 0,
        targets=_targets(recipe, linears) if is_lora else frozenset(),
        is_checkpointed=not recipe.get("disable_gradient_checkpointing", False),
        accumulates=whole_number(recipe, "gradient_accumulation_steps", 1) > 1,
        is_fused_optimizer=_OPTIMIZERS[optimizer],
        trained=BF16 if is_pure else FP32,
        frozen=compute,
        compute=compute,
        stream=compute if is_lora or is_pure else FP32,
    )


def read_batch(batch_size: int, seq_len_tokens: int, pad_multiple: int, *, is_masked: bool) -> Batch:
    """Raises UserError for sizes below 1."""
    if batch_size < 1 or seq_len_tokens < 1:
        raise UserError(f"a batch of {batch_size} queries of {seq_len_tokens} tokens cannot be run")
    return Batch(batch_size, -(-seq_len_tokens // pad_multiple) * pad_multiple, is_masked)


def whole_number(recipe: Mapping[str, Any], key: str, default: int) -> int:
    """A positive whole number of a recipe. default: LLaMA-Factory's. Raises UserError for anything else."""
    value = recipe.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"the recipe's {key} is {value!r}", cure="it must be a whole number from 1")
    return value


def _targets(recipe: Mapping[str, Any], linears: tuple[Linear, ...]) -> frozenset[str]:
    known = frozenset(linear.name for linear in linears)
    given = recipe.get("lora_target", "all")
    names = given if isinstance(given, list) else str(given).split(",")
    wanted = {str(name).strip() for name in names}
    if wanted == {"all"}:
        return known
    if unknown := sorted(wanted - known):
        raise UserError(
            f"lora_target names {', '.join(unknown)}, which the model has not",
            cure=f"its linears are {', '.join(sorted(known))}; or say all",
        )
    return frozenset(wanted)


def size_of(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number of a config.json. Raises UserError for anything else, and for one that no model has."""
    value = config.get(key)
    if type(value) is not int or not 1 <= value < _MAX_SIZE:
        raise UserError(
            f"config.json has no usable {key}: {value!r}",
            cause="the file is cut short, or of another kind of model",
            cure="use the config.json that came with the checkpoint",
        )
    return value
