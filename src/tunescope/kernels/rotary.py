"""Rotary position embedding of one tensor in one launch, forward and back, where torch makes ten.

    y = x cos + rotate_half(x) sin        rotate_half((a, b)) = (-b, a), of the halves of each head

As transformers' apply_rotary_pos_emb, but that rounds after each of its products: this once, at the end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

# B batch, H heads, L length, D width of a head

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_NUMBERS = 2048  # of a program, in each half


def rotate(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """In x's dtype and shape, laid out in memory as (B, L, H, D), which is how a linear leaves its heads.

    cos, sin: of one batch entry for all, or of each; without gradients.
    """
    return _Rotate.apply(x_BHLD, cos_BLD, sin_BLD)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernel can: all on a GPU, in a dtype it knows, heads of an even width."""
    return all(tensor.is_cuda and tensor.dtype in DTYPES and tensor.shape[-1] % 2 == 0 for tensor in tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BLD, sin_BLD)
        return launch(x_BHLD, cos_BLD, sin_BLD, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHLD: Tensor) -> tuple[Tensor, None, None]:
        return launch(dy_BHLD, *ctx.saved_tensors, is_backward=True), None, None


def launch(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor, *, is_backward: bool) -> Tensor:
    """is_backward: x is a gradient, and goes back through the rotation."""
    batch, heads, length, width = x_BHLD.shape
    if x_BHLD.stride(-1) != 1:
        x_BHLD = x_BHLD.contiguous()
    cos_BLD, sin_BLD = cos_BLD.contiguous(), sin_BLD.contiguous()
    y_BLHD = torch.empty((batch, length, heads, width), dtype=x_BHLD.dtype, device=x_BHLD.device)
    half = width // 2
    block_half = triton.next_power_of_2(half)
    block_h = max(1, min(triton.next_power_of_2(heads), _BLOCK_NUMBERS // block_half))
    if y_BLHD.numel():
        with torch.cuda.device_of(x_BHLD):
            rotate_kernel[batch * length, triton.cdiv(heads, block_h)](
                x_BHLD, cos_BLD, sin_BLD, y_BLHD, length, x_BHLD.stride(0), x_BHLD.stride(2), x_BHLD.stride(1),
                0 if len(cos_BLD) == 1 else length * width,
                H=heads, HALF=half, BLOCK_H=block_h, BLOCK_HALF=block_half, IS_BACKWARD=is_backward,
            )  # fmt: skip
    return y_BLHD.transpose(1, 2)


@triton.jit(do_not_specialize=["length", "stride_b"])
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, length, stride_b, stride_l, stride_h, stride_cos_b,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """Grid: tokens of the batch, blocks of heads."""
    token = tl.program_id(0).to(tl.int64)
    b, at = token // length, token % length
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d_D = tl.arange(0, BLOCK_HALF)
    inside_D = d_D < HALF
    inside_HD = (h_H < H)[:, None] & inside_D[None, :]
    angle = b * stride_cos_b + at * 2 * HALF + d_D
    cos1_D = tl.load(cos_ptr + angle, inside_D, 0.0).to(tl.float32)[None, :]
    cos2_D = tl.load(cos_ptr + angle + HALF, inside_D, 0.0).to(tl.float32)[None, :]
    sin1_D = tl.load(sin_ptr + angle, inside_D, 0.0).to(tl.float32)[None, :]
    sin2_D = tl.load(sin_ptr + angle + HALF, inside_D, 0.0).to(tl.float32)[None, :]
    from_HD = x_ptr + b * stride_b + at * stride_l + h_H[:, None] * stride_h + d_D[None, :]
    x1_HD = tl.load(from_HD, inside_HD, 0.0).to(tl.float32)
    x2_HD = tl.load(from_HD + HALF, inside_HD, 0.0).to(tl.float32)
    if IS_BACKWARD:
        y1_HD = x1_HD * cos1_D + x2_HD * sin2_D
        y2_HD = x2_HD * cos2_D - x1_HD * sin1_D
    else:
        y1_HD = x1_HD * cos1_D - x2_HD * sin1_D
        y2_HD = x2_HD * cos2_D + x1_HD * sin2_D
    to_HD = y_ptr + (token * H + h_H[:, None]) * (2 * HALF) + d_D[None, :]
    tl.store(to_HD, y1_HD.to(y_ptr.dtype.element_ty), inside_HD)
    tl.store(to_HD + HALF, y2_HD.to(y_ptr.dtype.element_ty), inside_HD)
