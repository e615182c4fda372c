"""What one fine-tuning step asks of a host and of a GPU, counted from config.json and recipe: launches, bytes, FLOP.

No seconds here and nothing fitted: time_fit.py knows the speeds that these counts are divided by. Launches were counted
in traces of Mixtral and BlackMamba (docs/results/h200); docs/time_model.md has the sums beside the traces.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tunescope.cost.memory_shapes import (
    BF16,
    BLACKMAMBA,
    FP32,
    Decoder,
    Linear,
    Setup,
    check_blackmamba,
    model_type,
    read_decoder,
    read_setup,
)
from tunescope.cost.time_counts import Launches, StepWork
from tunescope.cost.time_work_grouped import grouped_experts, norm_kernels
from tunescope.errors import UserError
from tunescope.families.blackmamba import BLACKMAMBA as BLACKMAMBA_FAMILY
from tunescope.families.blackmamba_shapes import EXPERTS, delta_rank, inner_width, num_parameters, parameter_shapes
from tunescope.families.family import GROUPED, LOOP, NF4_BYTES_PER_WEIGHT, STOCK
from tunescope.flops import ForwardFlop, train_flop

MOE_PATHS = (STOCK, GROUPED, LOOP)
GRAPHS = "graphs"  # at the end of a code's name


# Counted in traces of Mixtral-8x7B's stock path (transformers 4.57, PEFT 0.18, bitsandbytes 0.50): averages, for
# bitsandbytes has one or several kernels for a product, by its number of rows.
_NORM = Launches(8, 15)
_ATTENTION = Launches(13, 31)  # rotary embedding, scores, values, layouts; without its linears
_RESIDUALS = Launches(2, 0)
_NF4 = Launches(3.5, 4.7)  # scales, decoding, product
_PLAIN = Launches(1, 1)  # a frozen bf16 linear: backward makes only the gradient of its input
_TRAINED = Launches(1, 3)  # and of its weight, which is then accumulated
_CAST = Launches(1, 1)  # of a trained fp32 weight to bf16, and of its gradient back
_LORA = Launches(8, 10)  # casts, two products, scaling, adding; gradients of both matrices
_GATED = Launches(2, 3)  # activation and product of an MLP
_DISPATCH = Launches(14, 23)  # an expert's tokens: found, gathered, weighted, added back
_ROUTER = Launches(6, 4)  # without its linear
_OUTSIDE = 65  # embedding, final norm, head, loss, batch
# Counted in traces of BlackMamba's grouped path.
_GROUPED_DISPATCH = Launches(12, 20)  # sorting by expert, gathering, adding back: once a layer
_MAMBA_NORM = Launches(1, 3)
_MAMBA = Launches(6, 14)  # convolution, scan, gating, layouts; without its four linears
# In no trace: an expert's tokens in the study's BlackMamba, from its code.
_MAMBA_DISPATCH = Launches(9, 20)
# torch works on all tensors at once, in kernels of so many numbers or tensors, several times over.
_NUMBERS_A_LAUNCH, _TENSORS_A_LAUNCH = 320 * 65536, 70
_ADAMW_PASSES, _FUSED_PASSES, _CLIP_PASSES = 7, 1, 2

# Numbers that pass through DRAM for each row of a tensor of the given width, in one forward: read and written by
# elementwise kernels, which the stock path does not fuse.
_PASSES_FUSED_NORM = 2.5  # read and written; in backward its gradient, too
_PASSES_NORM = 8  # in fp32 inside: counted as 16 bf16 numbers would be, half
_PASSES_ATTENTION = 10
_PASSES_GATED = 8
_PASSES_DISPATCH = 8
_PASSES_LORA = 6
_PASSES_MAMBA = 16
_PASSES_LOGITS = 8  # logits in fp32: cast, shifted, logarithms, gradients; forward and backward together
_BACKWARD_OVER_FORWARD = 2

# What the host does around forward and backward, as launches, which shows where these are CUDA graphs: the Trainer and
# its batch; clipping's and the optimizer's lists, tensor by tensor. On an H200 a step of one query took 0.113 s with
# all layers recomputed and 0.116 s with none: that much is the host's. How it divides among the two is assumed.
_LAUNCHES_AROUND, _LAUNCHES_A_TENSOR = 1500, 0.5

# AdamW of torch, one kernel a term (torch/optim/adamw.py, _multi_tensor_adamw), and fused; numbers of a tensor's size.
_ADAMW_NUMBERS, _FUSED_NUMBERS = 20, 7
_CLIP_NUMBERS = 3  # the norm reads gradients, scaling reads and writes them


def step_work(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    *,
    batch_size: int,
    slots: float,
    key_slots: float | None = None,
    moe_path: str = STOCK,
    graphs: bool = False,
    num_recomputed: int | None = None,
    hit_experts: float | None = None,
) -> StepWork:
    """Of a step whose micro-batches have `slots` token slots each, padding included.

    config: of the model, with the depth and top_k that run. recipe: LLaMA-Factory's keys. key_slots: keys seen, summed
    over the slots of a micro-batch; by default as of equally long queries, where a causal one of n tokens sees n n / 2.
    moe_path: `stock`, experts one after another as transformers does and the study's BlackMamba did; `loop`, the same
    by this project's code; `grouped`, all experts in one product. A model without experts ignores it. Of a decoder's
    grouped experts: graphs, whether steps are replayed as CUDA graphs; num_recomputed, decoder layers whose forward
    is run again in backward, None: as the recipe says. hit_experts: of a layer, that get a token; None: as many as
    uniform routing reaches. Raises UserError for a model, a recipe, a path or a size that is not modelled.
    """
    if moe_path not in MOE_PATHS:
        raise UserError(f"MoE path {moe_path!r} is unknown", cure=f"use one of {', '.join(MOE_PATHS)}")
    if batch_size < 1 or not (math.isfinite(slots) and slots > 0):
        raise UserError(f"a batch of {batch_size} queries with {slots:g} token slots cannot be run")
    keys = slots * slots / batch_size / 2 if key_slots is None else key_slots
    if not (math.isfinite(keys) and keys >= 0):
        raise UserError(f"{keys:g} keys cannot be seen")
    if model_type(config) == BLACKMAMBA:
        return _blackmamba(config, recipe, slots, keys, moe_path)
    shape = read_decoder(config)
    if moe_path == GROUPED and shape.num_experts:
        return _grouped_decoder(shape, recipe, slots, keys, graphs=graphs, num_recomputed=num_recomputed)
    return _decoder(shape, recipe, slots, keys, hit_experts)


def code_of(
    config: Mapping[str, Any], recipe: Mapping[str, Any], moe_path: str = STOCK, *, graphs: bool = False
) -> str:
    """Name of the code that a step runs through, whose costs may differ from another's: `mixtral QLoRA, stock`, or
    `mixtral QLoRA, grouped, graphs`."""
    method = str(recipe.get("finetuning_type", "lora"))
    if method == "lora":
        method = "QLoRA" if recipe.get("quantization_bit") else "LoRA"
    has_experts = any(config.get(key) for key in ("num_local_experts", "num_experts"))
    how = f", {moe_path}" + (f", {GRAPHS}" if graphs else "") if has_experts else ""
    return f"{config.get('model_type')} {method}{how}"


def num_hit_experts(num_experts: int, top_k: int, slots: float) -> float:
    """Expected number of experts that at least one of the slots goes to, routing being uniform."""
    if not num_experts:
        return 1.0
    return num_experts * (1 - (1 - top_k / num_experts) ** slots)


def _decoder(
    shape: Decoder, recipe: Mapping[str, Any], slots: float, keys: float, hit_experts: float | None
) -> StepWork:
    """Without experts, or with one after another."""
    setup = read_setup(recipe, shape.linears)
    micro_steps = int(recipe.get("gradient_accumulation_steps", 1))
    hit = num_hit_experts(shape.num_experts, shape.top_k, slots) if hit_experts is None else hit_experts
    flop = train_flop(
        _decoder_flop(shape, setup, shape.linears), slots, keys, recompute_frac=float(setup.is_checkpointed)
    )
    layer_launches = 2 * _NORM.in_step(setup) + _attention_launches(shape, setup) + _mlp_launches(shape, setup, hit)
    layer_bytes = sum(_weight_bytes(linear, setup) * (hit if linear.copies > 1 else 1) for linear in shape.linears)
    numbers = _attention_numbers(shape, setup) + _mlp_numbers(shape, setup)
    activation_bytes = shape.num_layers * slots * _passes(setup) * numbers * setup.compute
    num_trained = _num_trained(shape, setup)
    return StepWork(
        launches=micro_steps * (shape.num_layers * layer_launches + _OUTSIDE)
        + _update_launches(num_trained, _num_tensors(shape, setup), setup),
        weight_bytes=micro_steps * (shape.num_layers * layer_bytes + _head_bytes(shape, setup)),
        matmul_flop=micro_steps * flop,
        activation_bytes=micro_steps * (activation_bytes + slots * shape.vocab_size * _PASSES_LOGITS * FP32),
        scan_bytes=0.0,
        optimizer_bytes=_optimizer_bytes(num_trained, setup),
        is_bf16=setup.compute == BF16,
    )


def _grouped_decoder(
    shape: Decoder,
    recipe: Mapping[str, Any],
    slots: float,
    keys: float,
    *,
    graphs: bool,
    num_recomputed: int | None,
) -> StepWork:
    setup = read_setup(recipe, shape.linears)
    if not setup.is_lora:
        raise UserError(
            "grouped experts of this model, trained in full, are not modelled",
            cause="accelerate_moe() takes frozen experts, with or without adapters",
            cure="use the MoE path stock, or a recipe of LoRA",
        )
    recomputed = checked_recomputed(num_recomputed, shape.num_layers, setup)
    micro_steps = int(recipe.get("gradient_accumulation_steps", 1))
    others = (*shape.attention, *shape.router)
    kernels = weight_bytes = decoded = numbers = flop = host = 0.0
    for num_layers, is_recomputed in ((recomputed, True), (shape.num_layers - recomputed, False)):
        each = replace(setup, is_checkpointed=is_recomputed)
        experts = grouped_experts(shape, each, slots)
        router = _ROUTER.in_step(each) + sum(_linear_launches(linear, each) for linear in shape.router)
        kernels += num_layers * (2 * norm_kernels(each) + _attention_launches(shape, each) + router + experts.kernels)
        weight_bytes += num_layers * (experts.weight_bytes + sum(_weight_bytes(linear, each) for linear in others))
        decoded += num_layers * experts.decoded
        grouped_norms = 2 * _PASSES_FUSED_NORM * shape.width
        of_slots = _attention_numbers(shape, each) - 2 * _PASSES_NORM * shape.width + grouped_norms
        numbers += num_layers * (slots * _passes(each) * of_slots + experts.activation_numbers)
        rest = (
            train_flop(_decoder_flop(shape, each, others), slots, keys, recompute_frac=float(is_recomputed))
            / shape.num_layers
        )
        flop += num_layers * (rest + experts.flop)
        host += num_layers * experts.host_launches
    kernels += _OUTSIDE
    num_trained, num_tensors = _num_trained(shape, setup), _num_tensors(shape, setup)
    update = _update_launches(num_trained, num_tensors, setup) + _LAUNCHES_A_TENSOR * num_tensors
    launches = _LAUNCHES_AROUND + (0.0 if graphs else kernels + host)
    return StepWork(
        launches=micro_steps * launches + update,
        weight_bytes=micro_steps * (weight_bytes + _head_bytes(shape, setup)),
        matmul_flop=micro_steps * flop,
        activation_bytes=micro_steps * (numbers * setup.compute + slots * shape.vocab_size * _PASSES_LOGITS * FP32),
        scan_bytes=0.0,
        optimizer_bytes=_optimizer_bytes(num_trained, setup),
        is_bf16=setup.compute == BF16,
        graph_kernels=micro_steps * kernels if graphs else 0.0,
        decoded_weights=micro_steps * decoded,
    )


def checked_recomputed(num_recomputed: int | None, num_layers: int, setup: Setup) -> int:
    """Layers that are recomputed; None: all or none, as the recipe says. Raises UserError for a number that is none."""
    if num_recomputed is None:
        return num_layers if setup.is_checkpointed else 0
    if not 0 <= num_recomputed <= num_layers:
        raise UserError(f"{num_recomputed} of {num_layers} layers cannot be recomputed")
    return num_recomputed if setup.is_checkpointed else 0


def _decoder_flop(shape: Decoder, setup: Setup, linears: Iterable[Linear]) -> ForwardFlop:
    """As flops.lora_forward_flop, for any recipe that Setup describes, and some of a layer's linears."""
    frozen = trained = 0.0
    for linear in linears:
        runs = shape.top_k if linear.copies > 1 else 1
        if setup.is_lora:
            frozen += 2.0 * runs * linear.num_weights
            if setup.is_adapted(linear):
                trained += 2.0 * runs * setup.rank * (linear.in_width + linear.out_width)
        else:
            trained += 2.0 * runs * linear.num_weights
    return ForwardFlop(
        frozen=shape.num_layers * frozen,
        trained=shape.num_layers * trained,
        head=2.0 * shape.width * shape.vocab_size,
        head_is_trained=not setup.is_lora,
        attention_per_key=4.0 * shape.num_layers * shape.heads * shape.head_width,
    )


def _linear_launches(linear: Linear, setup: Setup) -> float:
    """Of one call of one linear."""
    if not setup.is_lora:
        return _TRAINED.in_step(setup) + (_CAST.in_step(setup) if setup.casts_weights else 0)
    base = _NF4 if setup.is_quantised else _PLAIN
    return base.in_step(setup) + (_LORA.in_step(setup) if setup.is_adapted(linear) else 0)


def _attention_launches(shape: Decoder, setup: Setup) -> float:
    """With the layer's residuals."""
    linears = sum(_linear_launches(linear, setup) for linear in shape.attention)
    return _ATTENTION.in_step(setup) + _RESIDUALS.in_step(setup) + linears


def _mlp_launches(shape: Decoder, setup: Setup, hit: float) -> float:
    of_mlp = sum(_linear_launches(linear, setup) for linear in shape.mlp) + _GATED.in_step(setup)
    if not shape.num_experts:
        return of_mlp
    router = _ROUTER.in_step(setup) + sum(_linear_launches(linear, setup) for linear in shape.router)
    return router + hit * (of_mlp + _DISPATCH.in_step(setup))


def _weight_bytes(linear: Linear, setup: Setup) -> float:
    """DRAM traffic of one weight in all passes of a micro-step."""
    if not setup.is_lora:
        return linear.num_weights * _trained_bytes(setup)
    # Decoded to bf16 in memory, then read by the product.
    a_pass = NF4_BYTES_PER_WEIGHT + 2 * BF16 if setup.is_quantised else setup.frozen
    return linear.num_weights * a_pass * (3 if setup.is_checkpointed else 2)


def _trained_bytes(setup: Setup) -> float:
    """Of a trained weight's number: read in forward, recompute and backward, its gradient written; casts beside."""
    reads = 3 if setup.is_checkpointed else 2
    return reads * setup.compute + setup.trained + (setup.trained + 2 * setup.compute if setup.casts_weights else 0)


def _passes(setup: Setup) -> float:
    return (2 if setup.is_checkpointed else 1) + _BACKWARD_OVER_FORWARD


def _attention_numbers(shape: Decoder, setup: Setup) -> float:
    """Numbers that one slot moves in one forward of one layer, in the dtype of the matmuls: norms, attention, adapters
    of attention and router."""
    attention_width = 2 * (shape.heads + shape.kv_heads) * shape.head_width
    numbers = 2 * _PASSES_NORM * shape.width + _PASSES_ATTENTION * (attention_width + shape.width) / 2
    return numbers + _adapter_numbers((*shape.attention, *shape.router), setup)


def _mlp_numbers(shape: Decoder, setup: Setup) -> float:
    """Likewise of the MLP or the experts."""
    dispatched = _PASSES_DISPATCH * shape.width if shape.num_experts else 0
    inside = _PASSES_GATED * shape.mlp_width + dispatched + _adapter_numbers(shape.mlp, setup)
    return shape.top_k * inside


def _adapter_numbers(linears: Iterable[Linear], setup: Setup) -> float:
    return float(sum(_PASSES_LORA * linear.out_width for linear in linears if setup.is_adapted(linear)))


def _head_bytes(shape: Decoder, setup: Setup) -> float:
    return shape.width * shape.vocab_size * (2.0 * BF16 if setup.is_lora else _trained_bytes(setup))


def _num_trained(shape: Decoder, setup: Setup) -> float:
    if setup.is_lora:
        adapted = [linear for linear in shape.linears if setup.is_adapted(linear)]
        of_layer = sum(linear.copies * setup.rank * (linear.in_width + linear.out_width) for linear in adapted)
        return float(shape.num_layers * of_layer)
    of_layer = sum(linear.copies * linear.num_weights for linear in shape.linears) + sum(shape.norm_widths)
    return float(shape.num_layers * of_layer + shape.width * shape.vocab_size * (1 if shape.is_tied else 2))


def _num_tensors(shape: Decoder, setup: Setup) -> int:
    """Trained ones; an adapter has two."""
    if setup.is_lora:
        return shape.num_layers * sum(2 * linear.copies for linear in shape.linears if setup.is_adapted(linear))
    return shape.num_layers * (sum(linear.copies for linear in shape.linears) + len(shape.norm_widths)) + 2


def _update_launches(num_trained: float, num_tensors: int, setup: Setup) -> float:
    """Of clipping and the optimizer."""
    a_pass = max(num_trained / _NUMBERS_A_LAUNCH, num_tensors / _TENSORS_A_LAUNCH)
    return a_pass * (_CLIP_PASSES + (_FUSED_PASSES if setup.is_fused_optimizer else _ADAMW_PASSES))


def _optimizer_bytes(num_trained: float, setup: Setup) -> float:
    adamw = _FUSED_NUMBERS if setup.is_fused_optimizer else _ADAMW_NUMBERS
    return num_trained * (adamw + _CLIP_NUMBERS) * setup.trained


def _blackmamba(
    config: Mapping[str, Any], recipe: Mapping[str, Any], slots: float, keys: float, moe_path: str
) -> StepWork:
    # Its experts' path is the argument's; scans differ in time, and are not told apart.
    check_blackmamba({**config, "moe": GROUPED, "scan": "auto"})
    # The study's model and this project's ignore the recipe's checkpointing: no block is ever run twice.
    setup = read_setup({**recipe, "disable_gradient_checkpointing": True}, ())
    micro_steps = int(recipe.get("gradient_accumulation_steps", 1))
    width, inner, experts = config["hidden_size"], inner_width(config), config["num_local_experts"]
    kinds = config["layers_block_type"]
    num_mamba, num_moe = kinds.count("mamba"), kinds.count("moe")
    top_k = config["num_experts_per_tok"]
    hit = num_hit_experts(experts, top_k, slots)
    linear = _TRAINED.in_step(setup) + (_CAST.in_step(setup) if setup.casts_weights else 0)
    an_expert = 2 * linear + _GATED.in_step(setup)
    router = _ROUTER.in_step(setup) + linear
    if moe_path == GROUPED:
        moe = router + an_expert + _GROUPED_DISPATCH.in_step(setup)
    else:
        moe = router + hit * (an_expert + _MAMBA_DISPATCH.in_step(setup))
    launches = (num_mamba + num_moe) * _MAMBA_NORM.in_step(setup) + num_moe * moe
    launches += num_mamba * (4 * linear + _MAMBA.in_step(setup)) + _OUTSIDE
    of_experts = sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if EXPERTS in name)
    num_trained = num_parameters(config)
    read = num_trained - of_experts * (1 - hit / experts)
    moved = slots * setup.compute * _passes(setup)
    mamba_numbers = _PASSES_MAMBA * inner + 4 * (delta_rank(config) + 2 * config["state_size"])
    moe_numbers = top_k * (_PASSES_GATED * config["intermediate_size"] + _PASSES_DISPATCH * width)
    numbers = num_moe * moe_numbers + len(kinds) * _PASSES_NORM * width
    activation_bytes = moved * numbers + slots * config["vocab_size"] * _PASSES_LOGITS * FP32
    forward = BLACKMAMBA_FAMILY.forward_flop(dict(config), dict(recipe))
    return StepWork(
        launches=micro_steps * launches + _update_launches(num_trained, len(parameter_shapes(config)), setup),
        weight_bytes=micro_steps * read * _trained_bytes(setup),
        matmul_flop=micro_steps * train_flop(forward, slots, keys, recompute_frac=0),
        activation_bytes=micro_steps * activation_bytes,
        scan_bytes=micro_steps * moved * num_mamba * mamba_numbers,
        optimizer_bytes=_optimizer_bytes(num_trained, setup),
        is_bf16=setup.compute == BF16,
    )
