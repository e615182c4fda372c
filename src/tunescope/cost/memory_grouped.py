"""Memory of decoder layers whose experts are computed all at once (tunescope.accelerate_moe), and how many of them need
not be recomputed. docs/memory_model.md says how it was held against counted tensors and a GPU."""

from collections.abc import Iterable

from tunescope.cost.memory_layers import INT64, LayerMemory, decoder_layer
from tunescope.cost.memory_shapes import FP32, Batch, Decoder, Linear, Setup
from tunescope.cost.time_work_grouped import MAX_ROWS_DECODED_INSIDE
from tunescope.families.family import NF4_BLOCK_WEIGHTS

_INT32 = 4
_ALIGNED_NUMBERS = 64  # models.fast_moe_stacks lays adapters out at such multiples
_ALIGNED_BYTES = 16  # and a rank is padded to rows of such multiples


def grouped_layer(shape: Decoder, setup: Setup, batch: Batch) -> LayerMemory:
    """A decoder layer whose experts are grouped. Source: what tunescope.models.fast_moe_function, and fast_moe_wide for
    decoded weights, save and make.

    The working set has projections of all experts decoded from NF4 where so many rows need them.
    """
    stock = decoder_layer(shape, setup, batch, holds_nf4_inputs=False)
    tokens, compute = batch.tokens, setup.compute
    rows = tokens * shape.top_k
    inner, outer = rows * shape.mlp_width * compute, rows * shape.width * compute
    hidden = tokens * shape.width * setup.stream
    adapters = adapter_numbers(shape.mlp, setup)
    copies = expert_copies(shape, setup)
    rank = -(-setup.rank * compute // _ALIGNED_BYTES) * _ALIGNED_BYTES
    num_adapted = sum(setup.is_adapted(linear) for linear in shape.mlp)
    experts = 2 * inner + rows * (num_adapted * rank + setup.stream + 3 * INT64) + shape.num_experts * _INT32 + copies
    # The router's adapter keeps the same input, unless it got a copy of its own.
    shares_input = setup.is_adapted(shape.router[0]) and setup.stream == compute and not setup.recasts_inputs
    if not shares_input:
        experts += hidden
    largest = max(shape.mlp, key=lambda linear: linear.num_weights)
    decoded = 0
    if setup.is_quantised and rows > MAX_ROWS_DECODED_INSIDE * shape.num_experts:
        weights = largest.num_weights * shape.num_experts
        decoded = weights * compute + weights // NF4_BLOCK_WEIGHTS * FP32
    gradients = adapters * (compute + setup.trained)  # as their matmuls leave them, and in the adapters' dtype
    backward = max(outer + 4 * inner + 3 * decoded, 3 * outer + 2 * inner + 2 * decoded + gradients)
    return LayerMemory(
        saved={**stock.saved, "experts": experts, "dispatch indices": 0},
        input=stock.input,
        saved_input=stock.saved_input,
        forward_working=max(
            stock.forward_working, 2 * hidden + outer + copies + max(2 * inner + 2 * decoded, 3 * inner + decoded)
        ),
        # Gate and up stay decoded from a recompute to the end of the backward that it is for.
        recompute_working=max(stock.recompute_working, 3 * hidden + outer + inner + 2 * decoded),
        backward_working=max(stock.backward_working, hidden + backward),
    )


def expert_copies(shape: Decoder, setup: Setup) -> int:
    """Bytes of a layer's bf16 copies of the experts' adapters, which autocast neither makes nor keeps here."""
    return adapter_numbers(shape.mlp, setup) * setup.compute if setup.casts_weights else 0


def adapter_numbers(linears: Iterable[Linear], setup: Setup) -> int:
    """Numbers of the experts' adapters as they are laid out, each piece a whole multiple."""
    total = 0
    for linear in linears:
        if setup.is_adapted(linear):
            for width in (linear.in_width, linear.out_width):
                total += -(-linear.copies * setup.rank * width // _ALIGNED_NUMBERS) * _ALIGNED_NUMBERS
    return total
