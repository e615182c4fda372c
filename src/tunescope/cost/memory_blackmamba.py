"""What one block of BlackMamba keeps for backward with this project's kernels (models/blackmamba, kernels/), as bytes.

On a GPU: the plain references that run on a CPU keep far more.
"""

from collections.abc import Mapping
from typing import Any

from tunescope.cost.memory_layers import INT64, LayerMemory
from tunescope.cost.memory_shapes import FP32, Batch, Setup
from tunescope.families.blackmamba_shapes import delta_rank, inner_width

_INT32 = 4
# The scan's launches, as kernels/selective_scan_triton.py chooses them.
_MIN_TILE, _MAX_TILE = 16, 64
_ELEMENTS_OF_A_PROGRAM = 256
_MOST_PARTIAL_SUMS = 4 * 1056
_MAX_BLOCKS = 8


def blackmamba_block(config: Mapping[str, Any], kind: str, setup: Setup, batch: Batch) -> LayerMemory:
    """kind: mamba or moe, as layers_block_type names it."""
    tokens, width = batch.tokens, config["hidden_size"]
    norm = tokens * (width + 1) * FP32
    in_stream = tokens * width * (FP32 + setup.compute)  # the residual, and what the block before adds to it
    mixer, forward_working, backward_working = (_mamba if kind == "mamba" else _moe)(config, setup, batch)
    return LayerMemory(
        saved={"norms": norm, **mixer},
        input=in_stream,
        saved_input=0,
        forward_working=in_stream + forward_working,
        recompute_working=2 * in_stream + forward_working,
        backward_working=in_stream + backward_working,
    )


def final_norm_saved(config: Mapping[str, Any], tokens: int, setup: Setup) -> int:
    """A LayerNorm, which autocast computes in fp32, and its output in the dtype of the head."""
    width = config["hidden_size"]
    return tokens * (width * FP32 + 2 * FP32 + width * setup.compute)


def loss_rows(config: Mapping[str, Any], batch: Batch) -> int:
    """Positions that the loss is computed of (models/blackmamba/loss.py)."""
    return batch.tokens - (1 if config.get("loss") == "study" else batch.size)


def scan_states(config: Mapping[str, Any], batch: Batch) -> int:
    """Bytes of the states kept between the scan's tiles."""
    tile = min(_MAX_TILE, max(_MIN_TILE, _power_of_2(batch.length_tokens)))
    num_states = -(-batch.length_tokens // tile) - 1
    return batch.size * num_states * config["state_size"] * inner_width(config) * FP32


def _mamba(config: Mapping[str, Any], setup: Setup, batch: Batch) -> tuple[dict[str, int], int, int]:
    """(saved, forward's working set, backward's)."""
    tokens, compute = batch.tokens, setup.compute
    width, inner, states = config["hidden_size"], inner_width(config), config["state_size"]
    channel = tokens * inner * compute  # one number a channel and token
    projected = tokens * (delta_rank(config) + 2 * states) * compute
    decay = 2 * inner * states * FP32  # exp(A_log) and its negative
    saved = {
        "mamba projections": tokens * width * compute + 2 * channel + projected,
        "mamba convolution": channel,
        "mamba scan": channel + decay + scan_states(config, batch) + channel,  # step sizes, and the gated output
    }
    # Gradients of the step sizes, of both halves of the input and of the halves together, of the convolved input.
    gradients = 7 * channel
    tile = min(_MAX_TILE, max(_MIN_TILE, _power_of_2(batch.length_tokens)))
    programs = -(-inner * tile // (2 * _ELEMENTS_OF_A_PROGRAM)) * batch.size
    # A program's channels leave one sum, and so fewer where there are many programs; at most these.
    partial_sums = min(programs, max(_MOST_PARTIAL_SUMS, programs // _MAX_BLOCKS))
    scan = partial_sums * 2 * states * batch.length_tokens * FP32 + scan_states(config, batch)
    return saved, tokens * width * compute + channel, gradients + scan


def _moe(config: Mapping[str, Any], setup: Setup, batch: Batch) -> tuple[dict[str, int], int, int]:
    """(saved, forward's working set, backward's)."""
    tokens, compute = batch.tokens, setup.compute
    width, expert_width = config["hidden_size"], config["intermediate_size"]
    num_experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]
    rows = tokens * top_k
    saved = {
        # The input, the sigmoids, the choices and their weights.
        "router": tokens * (width + num_experts) * compute + rows * (INT64 + compute),
        # Into the experts; both halves, the GELU, the product; out of the experts.
        "experts": rows * (2 * width + 4 * expert_width) * compute,
        "dispatch indices": 3 * rows * INT64 + num_experts * _INT32,
    }
    combine = (2 * rows + tokens) * width * compute
    weighted_gradients = 3 * rows * width * compute
    inner_gradients = rows * (2 * expert_width + width) * compute
    return saved, combine, max(weighted_gradients, inner_gradients)


def _power_of_2(number: int) -> int:
    """The next one that is not below."""
    return 1 << (number - 1).bit_length()
