"""RMSNorm whose weight is not trained, as adapters leave it: one launch forward and one back, where torch makes twenty.

    y = weight * (x / sqrt(mean(x^2) + eps), rounded to x's dtype)

The order and the rounding are those of transformers' MixtralRMSNorm, sums in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

# T rows, D width

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def frozen_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """In x's shape (..., D) and the dtype that weight * x would have. Only x gets a gradient.

    On a GPU by Triton for fp32, fp16 and bf16, else by plain torch.
    """
    is_taken = x_TD.is_cuda and x_TD.dtype in DTYPES and weight_D.dtype in DTYPES
    return _FrozenRmsNorm.apply(x_TD, weight_D, eps) if is_taken else frozen_rms_norm_ref(x_TD, weight_D, eps)


def frozen_rms_norm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """What the kernels must equal."""
    exact_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    unit_TD = exact_TD * torch.rsqrt(exact_TD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D.detach() * unit_TD.to(x_TD.dtype)


class _FrozenRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.detach().contiguous()
        y, rstd_T = launch_forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd_T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D, rstd_T = ctx.saved_tensors
        return launch_backward(dy.contiguous(), x, weight_D, rstd_T), None, None


def launch_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean(x^2) + eps) of each row)."""
    width = len(weight_D)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight_D.dtype), device=x.device)
    rstd_T = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
    if len(rstd_T):
        with torch.cuda.device_of(x):
            forward_kernel[(len(rstd_T),)](x, weight_D, y, rstd_T, eps, D=width, **_blocks(width))
    return y, rstd_T


def launch_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd_T: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    width = len(weight_D)
    if len(rstd_T):
        with torch.cuda.device_of(x):
            backward_kernel[(len(rstd_T),)](dy, x, weight_D, rstd_T, dx, D=width, **_blocks(width))
    return dx


@triton.jit
def forward_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < D
    at_D = row.to(tl.int64) * D + d_D
    x_D = tl.load(x_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_D * x_D) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    unit_D = (x_D * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_D, (weight_D * unit_D).to(y_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def backward_kernel(dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: rows. The gradient goes through the rounding of the unit vector unchanged."""
    row = tl.program_id(0)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < D
    at_D = row.to(tl.int64) * D + d_D
    rstd = tl.load(rstd_ptr + row)
    unit_D = tl.load(x_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32) * rstd
    weight_D = tl.load(weight_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
    dunit_D = tl.load(dy_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32) * weight_D
    dunit_D = dunit_D.to(x_ptr.dtype.element_ty).to(tl.float32)
    dx_D = (dunit_D - unit_D * (tl.sum(dunit_D * unit_D) / D)) * rstd
    tl.store(dx_ptr + at_D, dx_D.to(dx_ptr.dtype.element_ty), mask=inside_D)


def _blocks(width: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(width)
    return {"BLOCK_D": block_d, "num_warps": min(max(block_d // 512, 1), 8)}
