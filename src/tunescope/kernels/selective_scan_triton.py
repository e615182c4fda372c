"""The selective scan in Triton: how its kernels are launched, and their place in autograd."""

# E channels, B sequences, L time steps, N states per channel

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunescope.kernels.common import time_contiguous
from tunescope.kernels.selective_scan_kernels import (
    backward_kernel,
    carries_kernel,
    forward_kernel,
    sums_kernel,
    tile_ends_kernel,
)

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_STEPS = 8  # of a channel that a thread holds at once
_WARP = 32  # threads, and a program is one warp

# What follows is fitted to 132 multiprocessors. Not asked of the GPU, so that all GPUs add in one order.
_ONE_ROUND = 1056  # programs of backward held at once, by its registers
_MAX_BLOCKS = 8
_MIN_SPLIT_TILES = 4
# Forward's split costs the host two launches more, and pays where one sequence alone leaves most of the GPU idle.
_MAX_SPLIT_PROGRAMS_FORWARD = 528
_MIN_SPLIT_TILES_FORWARD = 16
_SUMMED_AT_ONCE = 4096  # numbers that a program of sums_kernel reads at once
_MAX_ROWS = 128


@dataclass(frozen=True)
class _Launch:
    """What a program does: blocks times block_e channels, in tiles of tile steps.

    is_split: a program has one tile, not all; what passes from tile to tile is then computed beforehand. Where both
    passes are split they have the same tile, as backward reads the states that forward started from.
    """

    block_e: int
    tile: int
    blocks: int = 1
    is_split: bool = False

    @property
    def rows(self) -> int:
        """How many channels the threads cover at once."""
        return _WARP * _STEPS // self.tile


@cache
def _config(num_channels: int, batch: int, length: int) -> tuple[_Launch, _Launch]:
    """The launches of forward and of backward.

    A thread with two channels saves a sixth of the instructions per channel, but a GPU must have programs enough. In
    backward a program leaves its sums over channels in memory: the more channels it has, the less there is to add up
    afterwards. Where programs are few and tiles many, the tiles are split, for a third more instructions.
    """
    tile = min(64, max(16, _next_power_of_2(length)))
    num_tiles = _ceil_div(length, tile)
    covered = _WARP * _STEPS // tile
    programs = _ceil_div(num_channels, 2 * covered) * batch
    if programs >= 2 * _ONE_ROUND:
        return _Launch(2 * covered, tile), _Launch(2 * covered, tile, _blocks(programs))
    long_tile = min(128, max(16, _next_power_of_2(length)))
    forward = _Launch(_WARP * _STEPS // long_tile, long_tile)
    if programs <= _MAX_SPLIT_PROGRAMS_FORWARD and num_tiles >= _MIN_SPLIT_TILES_FORWARD:
        forward = _Launch(2 * covered, tile, is_split=True)
    if programs >= _ONE_ROUND or num_tiles < _MIN_SPLIT_TILES:
        return forward, _Launch(covered, tile)
    return forward, _Launch(2 * covered, tile, _blocks(programs * num_tiles), is_split=True)


def _blocks(programs: int) -> int:
    """How many programs can be put together in one, and two rounds of them remain."""
    blocks = _MAX_BLOCKS
    while blocks > 1 and programs < 2 * _ONE_ROUND * blocks:
        blocks //= 2
    return blocks


def selective_scan_triton(
    c_EBL: Tensor,
    delta_EBL: Tensor,
    A_EN: Tensor,
    B_NBL: Tensor,
    C_NBL: Tensor,
    D_E: Tensor | None,
    z_EBL: Tensor | None,
    delta_bias_E: Tensor,
) -> Tensor:
    """As selective_scan of tunescope.kernels.selective_scan, for TRITON_DTYPES; the same input gives the same bits."""
    c_EBL, delta_EBL, B_NBL, C_NBL = (time_contiguous(x) for x in (c_EBL, delta_EBL, B_NBL, C_NBL))
    z_EBL = None if z_EBL is None else time_contiguous(z_EBL)
    D_E = None if D_E is None else D_E.contiguous()
    inputs = (c_EBL, delta_EBL, A_EN.float().contiguous(), B_NBL, C_NBL, D_E, z_EBL, delta_bias_E.contiguous())
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    with torch.cuda.device_of(c_EBL):
        return _SelectiveScan.apply(needs_grad, *inputs)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        needs_grad: bool,
        c_EBL: Tensor,
        delta_EBL: Tensor,
        A_EN: Tensor,
        B_NBL: Tensor,
        C_NBL: Tensor,
        D_E: Tensor | None,
        z_EBL: Tensor | None,
        bias_E: Tensor,
    ) -> Tensor:
        num_channels, batch, length = c_EBL.shape
        num_states = A_EN.shape[1]
        launch, backward = _config(num_channels, batch, length)
        save_every = backward.tile if needs_grad else launch.tile
        unit, strides = _units_and_strides(c_EBL, delta_EBL, z_EBL, B_NBL, C_NBL)
        num_runs = 1
        y_EBL = _empty_like(c_EBL)
        if launch.is_split:
            num_runs = _ceil_div(length, launch.tile)
            states = _carries(launch, c_EBL, delta_EBL, A_EN, B_NBL, None, bias_E, is_reverse=False)
        else:
            states = _empty(c_EBL, batch, _ceil_div(length, save_every) - 1, num_states, num_channels)
        forward_kernel[_ceil_div(num_channels, launch.block_e), batch, num_runs](
            c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E, y_EBL, states,
            *strides, num_channels, length // unit,
            N=num_states, BLOCK_E=launch.block_e, T=launch.tile, R=launch.rows, SAVE=save_every, UNIT=unit,
            EVEN_E=num_channels % launch.block_e == 0, HAS_D=D_E is not None, HAS_Z=z_EBL is not None,
            IS_SPLIT=launch.is_split, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E, states)
        ctx.launch = backward
        return y_EBL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_EBL: Tensor) -> tuple[Tensor | None, ...]:
        c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E, states = ctx.saved_tensors
        num_channels, batch, length = c_EBL.shape
        num_states = A_EN.shape[1]
        launch = ctx.launch
        dy_EBL = time_contiguous(dy_EBL)
        unit, strides = _units_and_strides(c_EBL, delta_EBL, z_EBL, dy_EBL, B_NBL, C_NBL)
        num_blocks = _ceil_div(num_channels, launch.block_e * launch.blocks)
        num_tiles = _ceil_div(length, launch.tile)
        num_runs = num_tiles if launch.is_split else 1
        if launch.is_split:
            carries = _carries(launch, dy_EBL, delta_EBL, A_EN, C_NBL, z_EBL, bias_E, is_reverse=True)
        else:
            carries = _empty(c_EBL, batch, num_tiles - 1, num_states, num_channels)
        dc_EBL, ddelta_EBL = _empty_like(c_EBL), _empty_like(delta_EBL)
        dz_EBL = None if z_EBL is None else _empty_like(z_EBL)
        dBC = _empty(c_EBL, num_blocks, 2, num_states, batch, length)
        per_channel = _empty(c_EBL, batch * num_runs, num_states + 2, num_channels)
        backward_kernel[num_blocks, batch, num_runs](
            c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E, dy_EBL, states, carries,
            dc_EBL, ddelta_EBL, dz_EBL, dBC, per_channel,
            *strides, num_channels, length // unit,
            N=num_states, BLOCK_E=launch.block_e, BLOCKS=launch.blocks, T=launch.tile, R=launch.rows, UNIT=unit,
            EVEN_E=num_channels % (launch.block_e * launch.blocks) == 0, HAS_D=D_E is not None,
            HAS_Z=z_EBL is not None, IS_SPLIT=launch.is_split, num_warps=1,
        )  # fmt: skip
        dA_EN, dB_NBL, dC_NBL, dD_E, dbias_E = _sums(dBC, per_channel, B_NBL, C_NBL, D_E, bias_E)
        return None, dc_EBL, ddelta_EBL, dA_EN, dB_NBL, dC_NBL, dD_E, dz_EBL, dbias_E


def _carries(
    launch: _Launch,
    x_EBL: Tensor,
    delta_EBL: Tensor,
    A_EN: Tensor,
    B_NBL: Tensor,
    z_EBL: Tensor | None,
    bias_E: Tensor,
    *,
    is_reverse: bool,
) -> Tensor:
    """What passes from each tile to the one after it, so that no tile need wait: (B, tiles - 1, N, E), the states.

    is_reverse: from each to the one before it, their gradients; x is then dy, and B is C.
    """
    num_channels, batch, length = delta_EBL.shape
    num_states = A_EN.shape[1]
    num_ends = _ceil_div(length, launch.tile) - 1
    unit, strides = _units_and_strides(delta_EBL, x_EBL, z_EBL, B_NBL)
    ends = _empty(delta_EBL, batch, num_ends, num_states, num_channels)
    tile_delta = _empty(delta_EBL, batch, num_ends, num_channels)
    if num_ends == 0:
        return ends
    tile_ends_kernel[_ceil_div(num_channels, launch.block_e), batch, num_ends](
        delta_EBL, A_EN, B_NBL, x_EBL, z_EBL, bias_E, ends, tile_delta, *strides, num_channels, length // unit,
        N=num_states, BLOCK_E=launch.block_e, T=launch.tile, R=launch.rows, UNIT=unit,
        EVEN_E=num_channels % launch.block_e == 0, HAS_Z=z_EBL is not None, REVERSE=is_reverse, num_warps=1,
    )  # fmt: skip
    carries_kernel[_ceil_div(num_channels, _WARP), batch, num_states](
        A_EN, ends, tile_delta, num_channels, num_ends,
        N=num_states, BLOCK_E=_WARP, REVERSE=is_reverse, num_warps=1,
    )  # fmt: skip
    return ends


def _sums(
    dBC: Tensor, per_channel: Tensor, B_NBL: Tensor, C_NBL: Tensor, D_E: Tensor | None, bias_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of A, B, C, D and the bias from what the programs of backward have left, in one launch."""
    num_blocks, num_runs = len(dBC), len(per_channel)
    num_states, batch, length = B_NBL.shape
    num_channels = len(bias_E)
    has_A = num_runs > 1
    dB_NBL, dC_NBL, dbias_E = _empty_like(B_NBL), _empty_like(C_NBL), _empty_like(bias_E)
    dD_E = None if D_E is None else _empty_like(D_E)
    dA_NE = _empty(bias_E, num_states, num_channels) if has_A else per_channel[0, :num_states]
    rows = min(_MAX_ROWS, _next_power_of_2(num_blocks))
    columns = _SUMMED_AT_ONCE // rows
    wanted = (num_states + 2 if has_A else 2) * num_channels
    sums_kernel[_ceil_div(2 * B_NBL.numel(), columns) + _ceil_div(wanted, columns),](
        dBC, per_channel, dB_NBL, dC_NBL, dA_NE, dbias_E, dD_E, num_blocks, batch * length, num_runs, num_channels,
        N=num_states, ROWS=rows, COLUMNS=columns, HAS_A=has_A, HAS_D=D_E is not None, num_warps=4,
    )  # fmt: skip
    return dA_NE.T, dB_NBL, dC_NBL, dD_E, dbias_E


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Triton's own cost the host more than a microsecond each.
def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _units_and_strides(*tensors: Tensor | None) -> tuple[int, list[int]]:
    """The unit of strides and length, and each tensor's strides of the two axes before time; 0 for an absent one.

    The unit is _STEPS if all rows are whole multiples of it long and apart. Else it is 1, and the kernels cannot load
    vectors.
    """
    strides: list[int] = []
    is_whole = True
    for x in tensors:
        if x is None:
            strides += 0, 0
            continue
        row, batch_row, _ = x.stride()
        is_whole = is_whole and row % _STEPS == batch_row % _STEPS == x.shape[-1] % _STEPS == 0
        strides += row, batch_row
    return (_STEPS, [stride // _STEPS for stride in strides]) if is_whole else (1, strides)
