"""What grouped experts of one decoder layer ask of a GPU in a step: all experts at once, over NF4 or plain weights.

Counted from tunescope.models.fast_moe_function, fast_moe_wide and tunescope.kernels.nf4, which docs/fast_moe.md
describes.
"""

import math
from dataclasses import dataclass

from tunescope.cost.memory_shapes import BF16, Decoder, Setup
from tunescope.families.family import NF4_BYTES_PER_WEIGHT

# Rows an expert on average up to which 4-bit weights are decoded inside their products, and rows of an expert for which
# they are decoded once there: tunescope.kernels.nf4.MAX_ROWS_PER_EXPERT_TRITON and nf4_triton's largest tile, which the
# tests hold these against.
MAX_ROWS_DECODED_INSIDE = 144
TILE_ROWS = 128

# Kernels of all experts of a layer, from the operators that docs/fast_moe.md counts, without the router's.
_KERNELS_FORWARD, _KERNELS_RECOMPUTE, _KERNELS_BACKWARD = 18, 15, 40
_KERNELS_FROZEN_NORM = 1
# Outside a CUDA graph: the host's part of handing one adapter its gradient, in launches; and what a launch through
# Triton takes beyond one of torch's (bench/nf4_grouped.py's host_us), with the number of them in a pass.
_LAUNCHES_A_GRADIENT = 0.1
_TRITON_LAUNCHES, _LAUNCHES_MORE = 6, 2


@dataclass(frozen=True, kw_only=True)
class ExpertsWork:
    """Of one layer in one micro-step, without its router.

    kernels: launches. weight_bytes: DRAM traffic of the weights. decoded: 4-bit weights that products decode inside,
    each as often as they do. flop: of the frozen matrices, and of their adapters. activation_numbers: numbers in the
    dtype of the matmuls that pass through DRAM, all slots together. host_launches: what the host does besides.
    """

    kernels: float
    weight_bytes: float
    decoded: float
    flop: float
    activation_numbers: float
    host_launches: float


def grouped_experts(shape: Decoder, setup: Setup, slots: float) -> ExpertsWork:
    """setup: whether the layer is recomputed is is_checkpointed. slots: token slots of a micro-step."""
    rows = slots * shape.top_k
    rows_an_expert = rows / shape.num_experts
    num_weights = sum(linear.num_weights for linear in shape.mlp)
    of_down = shape.mlp[2].num_weights
    into = num_weights - of_down
    width, inner = shape.width, shape.mlp_width
    # Products with each weight: gate and up in forward, recompute and backward; nothing needs down's in the recompute.
    again = float(setup.is_checkpointed)
    products = (2 + again) * into + 2 * of_down
    is_inside = setup.is_quantised and rows_an_expert <= MAX_ROWS_DECODED_INSIDE
    tiles = expected_tiles(rows_an_expert, TILE_ROWS) * shape.num_experts
    hit = shape.num_experts * -math.expm1(-rows_an_expert)
    if is_inside:
        weight_bytes, decoded = products * tiles * NF4_BYTES_PER_WEIGHT, products * tiles
    elif setup.is_quantised:
        # Of all experts, in forward and backward; gate and up of a recompute stay decoded for its backward.
        times = 2 * num_weights * shape.num_experts
        weight_bytes, decoded = times * (NF4_BYTES_PER_WEIGHT + BF16) + products * hit * BF16, 0.0
    else:
        weight_bytes, decoded = products * hit * setup.frozen, 0.0
    flop = 2.0 * rows * products
    for linear in shape.mlp:
        if setup.is_adapted(linear):
            # Both small products; their inputs' gradients and their own; what of the recompute is needed.
            runs = 3 + (again if linear is not shape.mlp[2] else again * 0.5)
            flop += 2.0 * rows * runs * setup.rank * (linear.in_width + linear.out_width)
    is_added = not setup.is_quantised  # of 4-bit weights an adapter's product is inside the other
    adapted = [setup.is_adapted(linear) for linear in shape.mlp]
    num_into, num_down = sum(adapted[:2]), int(adapted[2])
    forward = _forward_numbers(shape, num_into, num_down, is_added=is_added)
    recompute = 3 * width + (4 + 4 * is_added * num_into) * inner
    # Gathering; silu and product; their gradients' products with adapters; what is added and gathered up again.
    backward = (7 + 2 * num_down + (num_into > 0) * (1 + 4 * is_added)) * width
    backward += 3 * (is_inside or is_added) * width  # the input's gradient of gate and of up, added
    backward += (6 + 2 * num_into + num_down + 4 * is_added * num_down) * inner
    return ExpertsWork(
        kernels=_KERNELS_FORWARD + again * _KERNELS_RECOMPUTE + _KERNELS_BACKWARD,
        weight_bytes=weight_bytes,
        decoded=decoded,
        flop=flop,
        activation_numbers=rows * (forward + again * recompute + backward),
        host_launches=_LAUNCHES_A_GRADIENT * 2 * sum(adapted) * shape.num_experts
        + (2 + again) * _TRITON_LAUNCHES * _LAUNCHES_MORE,
    )


def norm_kernels(setup: Setup) -> float:
    """Of a norm with frozen weights, which is one kernel beside grouped experts."""
    return _KERNELS_FROZEN_NORM * (3 if setup.is_checkpointed else 2)


def _forward_numbers(shape: Decoder, num_into: int, num_down: int, *, is_added: bool) -> float:
    """Of a row: gathered; read by adapters; adapters' products added; silu and product; output weighted and summed."""
    width, inner = shape.width, shape.mlp_width
    of_width = 3 + (num_into > 0) + 1 / shape.top_k + 4 * is_added * num_down
    return of_width * width + (3 + num_down + 4 * is_added * num_into) * inner


def expected_tiles(mean_rows: float, tile_rows: int) -> float:
    """Tiles of an expert whose rows are Poisson's, as of uniform routing over many experts."""
    tiles, place = -math.expm1(-mean_rows), tile_rows
    while place < mean_rows + 10 * math.sqrt(mean_rows) + 1:
        above = 0.5 * math.erfc((place + 0.5 - mean_rows) / math.sqrt(2 * mean_rows))
        tiles += above
        place += tile_rows
    return tiles
