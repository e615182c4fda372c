"""How nf4_kernels' kernels are launched, and with which blocks: the one place that holds what was tuned."""

# E experts, N out, K in, R rows, Q adapter rank, H = K / 2

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunescope.kernels.nf4_kernels import (
    BLOCK_K,
    dequantize_kernel,
    dx_kernel,
    forward_kernel,
    scales_kernel,
)

if TYPE_CHECKING:
    from tunescope.kernels.nf4 import Nf4Stack

_MAX_PROGRAMS_SPLIT = 528  # four for each of 132 multiprocessors: with fewer, sums are split
_DEQUANTIZE_BLOCKS = 128  # of 64 values, a program of dequantize_kernel
_SCALES = 1024  # a program of scales_kernel


@dataclass(frozen=True)
class ForwardConfig:
    """A program's tile: block_r rows by block_n columns of y, unroll blocks of 64 columns of x in a turn of its loop.

    scale_sums: forward_kernel's SCALE_SUMS. max_split: in so many parts at most may the sum over K be split.
    """

    block_r: int
    block_n: int
    unroll: int
    scale_sums: bool
    weights_first: bool
    num_warps: int
    num_stages: int
    max_split: int = 4


@dataclass(frozen=True)
class DxConfig:
    """A program's tile: block_r rows by 64 * block_c columns of dx, block_n columns of dy in a turn of its loop."""

    block_r: int
    block_n: int
    block_c: int
    weights_first: bool
    num_warps: int
    num_stages: int
    max_split: int = 4


# (rows per expert on average, up to which it is taken; the last for all above): the tile is twice the average, since
# an expert with a row more than its tile has the weights decoded again. The fastest on one H200 over Mixtral's and
# Qwen3's shapes, by bench/nf4_grouped.py --tune.
FORWARD_CONFIGS = (
    (8, ForwardConfig(16, 128, 1, True, True, 4, 3)),
    (16, ForwardConfig(32, 128, 1, True, True, 4, 3)),
    (48, ForwardConfig(64, 128, 1, False, True, 4, 3)),
    (0, ForwardConfig(128, 128, 1, False, True, 8, 3, max_split=1)),
)
DX_CONFIGS = (
    (8, DxConfig(16, 64, 2, True, 4, 3)),
    (16, DxConfig(32, 32, 2, True, 4, 4)),
    (48, DxConfig(64, 64, 2, False, 4, 3)),
    (0, DxConfig(128, 64, 2, False, 8, 3, max_split=1)),
)


def forward_config(rows_per_expert: float) -> ForwardConfig:
    return _first(FORWARD_CONFIGS, rows_per_expert)


def dx_config(rows_per_expert: float) -> DxConfig:
    return _first(DX_CONFIGS, rows_per_expert)


def _first(configs: Any, rows_per_expert: float) -> Any:
    return next((config for most, config in configs if rows_per_expert <= most), configs[-1][1])


def forward_triton(
    x_RK: Tensor, stack: "Nf4Stack", ends_E: Tensor, u_RQ: Tensor | None, b_ENQ: Tensor | None
) -> Tensor:
    """As nf4.grouped_linear_nf4, whose checks come before."""
    num_experts, num_out, num_in = stack.shape_ENK
    num_rows = len(x_RK)
    config = forward_config(_rows_per_expert(x_RK, num_experts))
    blocks = num_in // BLOCK_K
    unroll = config.unroll if blocks % config.unroll == 0 else 1
    tiles = _ceil_div(num_out, config.block_n)
    split = _split(tiles * num_experts, config.max_split, blocks // unroll)
    y_SRN = _parts(x_RK, split, num_rows, num_out)
    if num_rows == 0:
        return y_SRN[0]
    x_R2H = x_RK.reshape(num_rows, num_in // 2, 2).transpose(1, 2).contiguous()
    with torch.cuda.device_of(x_RK):
        forward_kernel[_slots(num_rows, num_experts, config.block_r), tiles, split](
            x_R2H, *_weights(stack), ends_E, _contiguous(u_RQ), _contiguous(b_ENQ), y_SRN, num_rows,
            E=num_experts, N=num_out, K=num_in, **_rank(u_RQ), BLOCK=stack.block,
            BLOCK_E=_next_power_of_2(num_experts), BLOCK_R=config.block_r, BLOCK_N=config.block_n,
            UNROLL=unroll, SPLIT=split, SCALE_SUMS=config.scale_sums, WEIGHTS_FIRST=config.weights_first,
            USE_ASM=_uses_asm(x_RK),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return _sum(y_SRN, x_RK.dtype)


def dx_triton(dy_RN: Tensor, stack: "Nf4Stack", ends_E: Tensor, du_RQ: Tensor | None, a_EQK: Tensor | None) -> Tensor:
    """As nf4.grouped_linear_nf4_dx, whose checks come before."""
    num_experts, num_out, num_in = stack.shape_ENK
    num_rows = len(dy_RN)
    config = dx_config(_rows_per_expert(dy_RN, num_experts))
    tiles = _ceil_div(num_in // BLOCK_K, config.block_c)
    split = _split(tiles * num_experts, config.max_split, _ceil_div(num_out, config.block_n))
    dx_SRK = _parts(dy_RN, split, num_rows, num_in)
    if num_rows == 0:
        return dx_SRK[0]
    with torch.cuda.device_of(dy_RN):
        dx_kernel[_slots(num_rows, num_experts, config.block_r), tiles, split](
            dy_RN.contiguous(), *_weights(stack), ends_E, _contiguous(du_RQ), _contiguous(a_EQK), dx_SRK, num_rows,
            E=num_experts, N=num_out, K=num_in, **_rank(du_RQ), BLOCK=stack.block,
            BLOCK_E=_next_power_of_2(num_experts), BLOCK_R=config.block_r, BLOCK_N=config.block_n,
            BLOCK_C=config.block_c, SPLIT=split, WEIGHTS_FIRST=config.weights_first, USE_ASM=_uses_asm(dy_RN),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return _sum(dx_SRK, dy_RN.dtype)


def dequantize_triton(stack: "Nf4Stack", out_ENK: Tensor) -> Tensor:
    """As nf4.dequantize, whose checks come before."""
    num_experts, num_out, num_in = stack.shape_ENK
    numbers = num_out * num_in
    tiles = _ceil_div(numbers // BLOCK_K, _DEQUANTIZE_BLOCKS)
    uses_asm = _uses_asm(out_ENK)
    with torch.cuda.device_of(out_ENK):
        dequantize_kernel[tiles, num_experts](
            *_weights(stack), out_ENK.view(torch.int32) if uses_asm else out_ENK,
            NUMBERS=numbers, K=num_in, EXPERT=out_ENK.stride(0), ROW=out_ENK.stride(1),
            BLOCK=stack.block, BLOCK_B=_DEQUANTIZE_BLOCKS, USE_ASM=uses_asm,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out_ENK


def scales_triton(stack: "Nf4Stack") -> Tensor:
    """As nf4.scales of a nested stack."""
    num_experts, num_scales = stack.absmax_ES.shape
    scale_ES = torch.empty((num_experts, num_scales), dtype=torch.float32, device=stack.absmax_ES.device)
    with torch.cuda.device_of(scale_ES):
        scales_kernel[_ceil_div(num_scales, _SCALES), num_experts](
            stack.absmax_ES, stack.absmax2_EB, stack.offset_E, stack.code2, scale_ES, S=num_scales, BLOCK_S=_SCALES,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return scale_ES


def _rows_per_expert(rows: Tensor, num_experts: int) -> float:
    """On average. 0 for fp32, which has no matrix instructions: larger tiles than the smallest do not fit registers."""
    return 0 if rows.dtype == torch.float32 and rows.is_cuda else len(rows) / num_experts


def _weights(stack: "Nf4Stack") -> tuple[Tensor | None, ...]:
    """In the order of the kernels' arguments."""
    nested = (stack.absmax2_EB, stack.offset_E, stack.code2) if stack.is_nested else (None, None, None)
    return stack.packed_ENP, stack.absmax_ES, *nested, stack.code_16


def _slots(num_rows: int, num_experts: int, block_r: int) -> int:
    """The most tiles that rows can make, however they are routed: each expert may have one that is not full.

    Of fewer rows than experts each makes one at most.
    """
    return min(num_rows // block_r + num_experts, num_rows)


def _split(programs: int, max_split: int, steps: int) -> int:
    """In how many parts to sum: a power of two that divides the steps, so that none is of another length."""
    split = 1
    while 2 * split <= max_split and programs * 2 * split <= _MAX_PROGRAMS_SPLIT and steps % (2 * split) == 0:
        split *= 2
    return split


def _parts(like: Tensor, split: int, num_rows: int, width: int) -> Tensor:
    """Of one part in the dtype that is wanted; of several in fp32, to be added up."""
    return like.new_empty((split, num_rows, width), dtype=like.dtype if split == 1 else torch.float32)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def _rank(u_RQ: Tensor | None) -> dict[str, int]:
    """16 is the least that a matrix instruction adds up."""
    rank = 1 if u_RQ is None else u_RQ.shape[1]
    return {"Q": rank, "BLOCK_Q": max(16, _next_power_of_2(rank))}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _uses_asm(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_cuda and torch.version.hip is None


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
