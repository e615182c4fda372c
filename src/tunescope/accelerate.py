"""For somebody's own training script: accelerate_moe(), and how much memory it may spend on not recomputing.

No torch until accelerate_moe() is called.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tunescope.cost import memory
from tunescope.cost.memory_layers import INT64, LayerMemory, decoder_layer
from tunescope.cost.memory_shapes import FP32, Batch, Decoder, Linear, Setup, read_batch, read_decoder, read_setup
from tunescope.cost.padding import PAD_MULTIPLE
from tunescope.families.family import NF4_BLOCK_WEIGHTS
from tunescope.models.fast_moe_recompute import StepMemory

if TYPE_CHECKING:
    from torch import nn

    from tunescope.models.fast_moe import AcceleratedMoe

_INT32 = 4
_ALIGNED_NUMBERS = 64  # models.fast_moe_stacks lays adapters out at such multiples
_ALIGNED_BYTES = 16  # and a rank is padded to rows of such multiples


def accelerate_moe(
    model: "nn.Module",
    *,
    recompute: str | tuple[int, ...] = "all",
    step_memory: StepMemory | None = None,
    graphs: bool = False,
) -> "AcceleratedMoe":
    """Computes every MoE block of a live Mixtral or Qwen3-MoE grouped. See tunescope.models.fast_moe."""
    from tunescope.models import fast_moe

    return fast_moe.accelerate_moe(model, recompute=recompute, step_memory=step_memory, graphs=graphs)


def step_memory(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    batch_size: int,
    seq_len_tokens: int,
    gpu_memory_bytes: int,
    *,
    context_bytes: int = memory.CONTEXT_BYTES,
    fragmentation_frac: float = memory.FRAGMENTATION_FRAC,
    **settings: Any,
) -> StepMemory:
    """What a step with grouped experts takes, for recompute="auto": by tunescope.cost.memory, with its layers' experts
    replaced by the grouped ones.

    config, recipe, batch_size, seq_len_tokens: of the largest batch to come, as for cost.memory.memory_terms, and so
    are further arguments and errors. gpu_memory_bytes, context_bytes, fragmentation_frac: as for max_batch_size there.
    The working set counts projections of all experts decoded from NF4, which many tokens need and few do not.
    """
    recipe = dict(recipe) | {"disable_gradient_checkpointing": False}
    moments = memory.memory_terms(config, recipe, batch_size, seq_len_tokens, **settings)
    shape = read_decoder(config)
    setup = read_setup(recipe, shape.linears)
    batch = read_batch(batch_size, seq_len_tokens, PAD_MULTIPLE, is_masked=settings.get("is_masked", True))
    layer = grouped_layer(shape, setup, batch)
    copies = _adapter_numbers(shape.mlp, setup) * setup.compute if setup.casts_weights else 0
    grouped = {
        memory.FORWARD: copies * shape.num_layers,  # autocast keeps them no longer
        memory.LOSS: copies * shape.num_layers,
        memory.LOGITS_GRADIENT: 0,
        memory.RECOMPUTE: copies,
        memory.BACKWARD: copies,
        memory.OPTIMIZER: 0,
    }
    working = {
        memory.FORWARD: layer.forward_working,
        memory.RECOMPUTE: layer.recompute_working,
        memory.BACKWARD: layer.backward_working,
    }
    totals = {}
    for moment, terms in moments.items():
        terms = dict(terms)
        if moment in (memory.RECOMPUTE, memory.BACKWARD):
            terms |= layer.saved | {"dispatch indices": 0}
        if moment in working:
            terms["working set"] = max(terms["working set"], working[moment])
        totals[moment] = sum(terms.values()) - grouped[moment]
    return StepMemory(
        room_bytes=int((gpu_memory_bytes - context_bytes) / (1 + fragmentation_frac)),
        saved_bytes=layer.saved_bytes,
        input_bytes=layer.input,
        moments_bytes=totals,
        growing=frozenset((memory.FORWARD, memory.LOSS, memory.LOGITS_GRADIENT, memory.BACKWARD)),
    )


def grouped_layer(shape: Decoder, setup: Setup, batch: Batch) -> LayerMemory:
    """A decoder layer whose experts are grouped. Source: what tunescope.models.fast_moe_function saves and makes."""
    stock = decoder_layer(shape, setup, batch, holds_nf4_inputs=False)
    tokens, compute = batch.tokens, setup.compute
    rows = tokens * shape.top_k
    inner, outer = rows * shape.mlp_width * compute, rows * shape.width * compute
    hidden = tokens * shape.width * setup.stream
    adapters = _adapter_numbers(shape.mlp, setup)
    copies = adapters * compute if setup.casts_weights else 0
    rank = -(-setup.rank * compute // _ALIGNED_BYTES) * _ALIGNED_BYTES
    num_adapted = sum(setup.is_adapted(linear) for linear in shape.mlp)
    experts = 2 * inner + rows * (num_adapted * rank + setup.stream + 3 * INT64) + shape.num_experts * _INT32 + copies
    # The router's adapter keeps the same input, unless it got a copy of its own.
    shares_input = setup.is_adapted(shape.router[0]) and setup.stream == compute and not setup.recasts_inputs
    if not shares_input:
        experts += hidden
    largest = max(shape.mlp, key=lambda linear: linear.num_weights)
    decoded = 0
    if setup.is_quantised:
        weights = largest.num_weights * shape.num_experts
        decoded = weights * compute + weights // NF4_BLOCK_WEIGHTS * FP32
    gradients = adapters * (compute + setup.trained)  # as their matmuls leave them, and in the adapters' dtype
    return LayerMemory(
        saved={**stock.saved, "experts": experts, "dispatch indices": 0},
        input=stock.input,
        saved_input=stock.saved_input,
        forward_working=2 * hidden + outer + 3 * inner + copies + decoded,
        # Gate and up stay decoded from a recompute to the end of the backward that it is for.
        recompute_working=3 * hidden + outer + inner + 2 * decoded,
        backward_working=hidden + max(outer + 4 * inner + 3 * decoded, 3 * outer + 2 * inner + 2 * decoded + gradients),
    )


def _adapter_numbers(linears: Iterable[Linear], setup: Setup) -> int:
    """Numbers of the experts' adapters as they are laid out, each piece a whole multiple."""
    total = 0
    for linear in linears:
        if setup.is_adapted(linear):
            for width in (linear.in_width, linear.out_width):
                total += -(-linear.copies * setup.rank * width // _ALIGNED_NUMBERS) * _ALIGNED_NUMBERS
    return total
