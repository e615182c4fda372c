"""The selective scan in Triton: how its kernels are launched, and their place in autograd."""

# E channels, B sequences, L time steps, N states per channel

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunescope.kernels.common import time_contiguous
from tunescope.kernels.selective_scan_kernels import (
    backward_kernel,
    carries_kernel,
    forward_kernel,
    tile_gradients_kernel,
)

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_STEPS = 8  # of a channel that a thread holds at once
_WARP = 32  # threads, and a program is one warp

# Programs of backward that 132 multiprocessors hold at once, by its registers. Not asked of the GPU, so that all GPUs
# add in one order.
_ONE_ROUND = 1056
_MAX_BLOCKS = 8
_MIN_SPLIT_TILES = 4


@dataclass(frozen=True)
class _Launch:
    """What a program does: blocks times block_e channels, in tiles of tile steps.

    is_split: a program has one tile, not all; what passes from tile to tile is then computed beforehand.
    """

    block_e: int
    tile: int
    blocks: int = 1
    is_split: bool = False

    @property
    def rows(self) -> int:
        """How many channels the threads cover at once."""
        return _WARP * _STEPS // self.tile


def _config(num_channels: int, batch: int, length: int) -> tuple[_Launch, _Launch]:
    """The launches of forward and of backward.

    A thread with two channels saves a sixth of the instructions per channel, but a GPU must have programs enough. In
    backward a program leaves its sums over channels in memory: the more channels it has, the less there is to add up
    afterwards. Where programs are few and tiles many, backward's tiles are split, for a third more instructions.
    """
    tile = min(64, max(16, triton.next_power_of_2(length)))
    num_tiles = triton.cdiv(length, tile)
    covered = _WARP * _STEPS // tile
    programs = triton.cdiv(num_channels, 2 * covered) * batch
    if programs >= 2 * _ONE_ROUND:
        return _Launch(2 * covered, tile), _Launch(2 * covered, tile, _blocks(programs))
    long_tile = min(128, max(16, triton.next_power_of_2(length)))
    forward = _Launch(_WARP * _STEPS // long_tile, long_tile)
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
        unit = _unit(c_EBL, delta_EBL, z_EBL, B_NBL, C_NBL)
        y_EBL = _empty_like(c_EBL)
        states = _empty(c_EBL, batch, triton.cdiv(length, save_every) - 1, num_states, num_channels)
        forward_kernel[triton.cdiv(num_channels, launch.block_e), batch](
            c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E, y_EBL, states,
            *_strides(unit, c_EBL, delta_EBL, z_EBL, B_NBL, C_NBL), num_channels, length // unit,
            N=num_states, BLOCK_E=launch.block_e, T=launch.tile, R=launch.rows, SAVE=save_every, UNIT=unit,
            EVEN_E=num_channels % launch.block_e == 0, HAS_D=D_E is not None, HAS_Z=z_EBL is not None, num_warps=1,
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
        unit = _unit(c_EBL, delta_EBL, z_EBL, dy_EBL, B_NBL, C_NBL)
        num_blocks = triton.cdiv(num_channels, launch.block_e * launch.blocks)
        num_tiles = triton.cdiv(length, launch.tile)
        num_runs = num_tiles if launch.is_split else 1
        if launch.is_split:
            carries = _carries(launch, unit, delta_EBL, A_EN, C_NBL, z_EBL, bias_E, dy_EBL)
        else:
            carries = _empty(c_EBL, batch, num_tiles - 1, num_states, num_channels)
        dc_EBL, ddelta_EBL = _empty_like(c_EBL), _empty_like(delta_EBL)
        dz_EBL = None if z_EBL is None else _empty_like(z_EBL)
        dBC = _empty(c_EBL, num_blocks, 2, num_states, batch, length)
        per_channel = _empty(c_EBL, batch * num_runs, num_states + 2, num_channels)
        backward_kernel[num_blocks, batch, num_runs](
            c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E, dy_EBL, states, carries,
            dc_EBL, ddelta_EBL, dz_EBL, dBC, per_channel,
            *_strides(unit, c_EBL, delta_EBL, z_EBL, dy_EBL, B_NBL, C_NBL), num_channels, length // unit,
            N=num_states, BLOCK_E=launch.block_e, BLOCKS=launch.blocks, T=launch.tile, R=launch.rows, UNIT=unit,
            EVEN_E=num_channels % (launch.block_e * launch.blocks) == 0, HAS_D=D_E is not None,
            HAS_Z=z_EBL is not None, IS_SPLIT=launch.is_split, num_warps=1,
        )  # fmt: skip
        dB_NBL, dC_NBL = _sum(dBC).to(torch.promote_types(B_NBL.dtype, C_NBL.dtype))
        per_channel = _sum(per_channel)
        return (
            None,
            dc_EBL,
            ddelta_EBL,
            per_channel[:num_states].T,
            dB_NBL.to(B_NBL.dtype),
            dC_NBL.to(C_NBL.dtype),
            None if D_E is None else per_channel[num_states + 1].to(D_E.dtype),
            dz_EBL,
            per_channel[num_states].to(bias_E.dtype),
        )


def _carries(
    launch: _Launch,
    unit: int,
    delta_EBL: Tensor,
    A_EN: Tensor,
    C_NBL: Tensor,
    z_EBL: Tensor | None,
    bias_E: Tensor,
    dy_EBL: Tensor,
) -> Tensor:
    """What passes from each tile to the one before it, so that no tile need wait: (B, tiles - 1, N, E)."""
    num_channels, batch, length = delta_EBL.shape
    num_states = A_EN.shape[1]
    num_carries = triton.cdiv(length, launch.tile) - 1
    carries = _empty(delta_EBL, batch, num_carries, num_states, num_channels)
    tile_delta = _empty(delta_EBL, batch, num_carries, num_channels)
    tile_gradients_kernel[triton.cdiv(num_channels, launch.block_e), batch, num_carries](
        delta_EBL, A_EN, C_NBL, z_EBL, bias_E, dy_EBL, carries, tile_delta,
        *_strides(unit, delta_EBL, z_EBL, dy_EBL, C_NBL), num_channels, length // unit,
        N=num_states, BLOCK_E=launch.block_e, T=launch.tile, R=launch.rows, UNIT=unit,
        EVEN_E=num_channels % launch.block_e == 0, HAS_Z=z_EBL is not None, num_warps=1,
    )  # fmt: skip
    carries_kernel[triton.cdiv(num_channels, _WARP), batch, num_states](
        A_EN, carries, tile_delta, num_channels, num_carries, N=num_states, BLOCK_E=_WARP, num_warps=1
    )
    return carries


def _sum(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else x.sum(0)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _empty_like(x: Tensor) -> Tensor:
    """Contiguous, where torch.empty_like keeps strides."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _strides(unit: int, *tensors: Tensor | None) -> list[int]:
    """Of the two axes before time, in units; 0 for an absent tensor."""
    return [0 if x is None else x.stride(axis) // unit for x in tensors for axis in (0, 1)]


def _unit(*tensors: Tensor | None) -> int:
    """_STEPS if all rows are whole multiples of it long and apart; else 1, and the kernels cannot load vectors."""
    sizes = [size for x in tensors if x is not None for size in (*x.stride()[:2], x.shape[-1])]
    return _STEPS if all(size % _STEPS == 0 for size in sizes) else 1
