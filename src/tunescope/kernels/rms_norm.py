"""Residual addition and RMSNorm in one pass, as BlackMamba's blocks begin: the plain reference, and Triton kernels.

    residual_out = hidden + residual                                    in fp32, carried on to the next block
    x            = residual_out, rounded to the weight's dtype
    normed       = x * weight / sqrt(mean(x^2) + eps)                   in fp32, rounded once

The gradient goes through the rounding of x unchanged.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from tunescope.errors import UserError
from tunescope.kernels.common import check_known

IMPLEMENTATIONS = ("auto", "triton", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Programs of backward. Each adds up the weight's gradient over its rows and leaves one row of partial sums: about as
# many as an H200 keeps resident, and few beside the rows. Not asked of the GPU, so that all GPUs add in one order.
_MAX_BACKWARD_PROGRAMS = 512

# T tokens, D width; G groups of V = 4 columns: 16 bytes of fp32, 8 of bf16


def add_rms_norm(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    *,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual_out) in hidden's shape (..., D), with any leading axes; residual None stands for zeros.

    normed has the weight's dtype, whatever hidden and residual have; residual_out is fp32, or float64 for float64
    hidden. Gradients go to hidden, residual and weight in their dtypes, from either output or both. Statistics and
    product are fp32; float64 inputs stay float64. Autocast changes none of this. Rows are copied where they are not
    contiguous.

    implementation: `triton` takes fp32, fp16 and bf16; the same input gives the same bits again. `reference` is plain
    torch. `auto` is `triton` for what it takes on a GPU, else `reference`.

    Raises ValueError for shapes that do not fit, UserError for an implementation that cannot run here.
    """
    if weight_D.dim() != 1 or hidden_TD.shape[-1:] != weight_D.shape:
        raise ValueError(f"hidden {tuple(hidden_TD.shape)} must end in the weight's shape {tuple(weight_D.shape)}")
    if residual_TD is not None and residual_TD.shape != hidden_TD.shape:
        raise ValueError(f"residual {tuple(residual_TD.shape)} must be of hidden's shape {tuple(hidden_TD.shape)}")
    if _choose(implementation, hidden_TD, residual_TD, weight_D) == "reference":
        return add_rms_norm_ref(hidden_TD, residual_TD, weight_D, eps)
    return _AddRmsNorm.apply(hidden_TD, residual_TD, weight_D, eps)


def add_rms_norm_ref(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels must equal."""
    residual_out_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    if residual_TD is not None:
        residual_out_TD = residual_out_TD + residual_TD
    # Adding what rounding takes away, a number that is exact: autograd through `.to` would round the gradient too.
    lost_TD = (residual_out_TD.to(weight_D.dtype) - residual_out_TD).detach()
    x_TD = (residual_out_TD + lost_TD).to(torch.promote_types(weight_D.dtype, torch.float32))
    rstd_T1 = torch.rsqrt((x_TD * x_TD).mean(-1, keepdim=True) + eps)
    return (x_TD * rstd_T1 * weight_D.to(x_TD.dtype)).to(weight_D.dtype), residual_out_TD


def _choose(implementation: str, hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> str:
    check_known(implementation, IMPLEMENTATIONS, "norm")
    dtypes = [tensor.dtype for tensor in (hidden, residual, weight) if tensor is not None]
    is_taken = set(dtypes) <= set(TRITON_DTYPES)
    if implementation == "auto":
        return "triton" if hidden.is_cuda and is_taken else "reference"
    if implementation == "triton" and not (is_taken and (hidden.is_cuda or triton.knobs.runtime.interpret)):
        raise UserError(
            f"the Triton kernel cannot normalise {', '.join(map(str, dtypes))} on {hidden.device.type}",
            cause="it takes fp32, fp16 and bf16, on a GPU",
            cure="take the implementation auto or reference",
        )
    return implementation


@triton.jit
def _columns(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Column numbers and which exist, (G, 4). A plain range would give each thread 8 columns, for bf16's sake, and the
    compiler would then send fp32 values through shared memory before it stores them.
    """
    column_GV = tl.arange(0, BLOCK_D // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return column_GV, column_GV < D


@triton.jit
def _forward_kernel(
    hidden_ptr, residual_ptr, weight_ptr, normed_ptr, residual_out_ptr, rstd_ptr, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: tokens."""
    token = tl.program_id(0)
    column_GV, mask_GV = _columns(D, BLOCK_D)
    at_GV = token.to(tl.int64) * D + column_GV
    residual_GV = tl.load(hidden_ptr + at_GV, mask=mask_GV, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_GV += tl.load(residual_ptr + at_GV, mask=mask_GV, other=0.0).to(tl.float32)
    tl.store(residual_out_ptr + at_GV, residual_GV, mask=mask_GV)
    weight_GV = tl.load(weight_ptr + column_GV, mask=mask_GV, other=0.0)
    x_GV = residual_GV.to(weight_GV.dtype).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_GV * x_GV) / D + eps)
    tl.store(rstd_ptr + token, rstd)
    normed_GV = x_GV * rstd * weight_GV.to(tl.float32)
    tl.store(normed_ptr + at_GV, normed_GV.to(weight_GV.dtype), mask=mask_GV)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_program"])
def _backward_kernel(
    residual_out_ptr, weight_ptr, rstd_ptr, dnormed_ptr, dresidual_out_ptr, dhidden_ptr, dresidual_ptr, dweight_ptr,
    num_tokens, tokens_per_program, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens. dweight_ptr: (programs, D) fp32, each program's sum over its tokens."""
    column_GV, mask_GV = _columns(D, BLOCK_D)
    weight_GV = tl.load(weight_ptr + column_GV, mask=mask_GV, other=0.0)
    dweight_GV = tl.zeros((BLOCK_D // 4, 4), tl.float32)
    token = tl.program_id(0) * tokens_per_program
    end = tl.minimum(token + tokens_per_program, num_tokens)
    while token < end:  # not a range: under NumPy 2.4 the interpreter cannot count to a value of its own
        at_GV = token.to(tl.int64) * D + column_GV
        residual_GV = tl.load(residual_out_ptr + at_GV, mask=mask_GV, other=0.0)
        rstd = tl.load(rstd_ptr + token)
        unit_GV = residual_GV.to(weight_GV.dtype).to(tl.float32) * rstd
        dnormed_GV = tl.load(dnormed_ptr + at_GV, mask=mask_GV, other=0.0).to(tl.float32)
        dweight_GV += dnormed_GV * unit_GV
        dunit_GV = dnormed_GV * weight_GV.to(tl.float32)
        dx_GV = (dunit_GV - unit_GV * (tl.sum(dunit_GV * unit_GV) / D)) * rstd
        if dresidual_out_ptr is not None:
            dx_GV += tl.load(dresidual_out_ptr + at_GV, mask=mask_GV, other=0.0)
        tl.store(dhidden_ptr + at_GV, dx_GV.to(dhidden_ptr.dtype.element_ty), mask=mask_GV)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at_GV, dx_GV.to(dresidual_ptr.dtype.element_ty), mask=mask_GV)
        token += 1
    if dweight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + column_GV, dweight_GV, mask=mask_GV)


class _AddRmsNorm(torch.autograd.Function):
    """Keeps residual_out, which the next block holds anyway, and one number per token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, residual: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
        ctx.hidden_dtype, ctx.residual_dtype = hidden.dtype, None if residual is None else residual.dtype
        hidden, weight_D = hidden.contiguous(), weight_D.contiguous()
        residual = None if residual is None else residual.contiguous()
        width = len(weight_D)
        num_tokens = hidden.numel() // width
        normed = torch.empty(hidden.shape, dtype=weight_D.dtype, device=hidden.device)
        residual_out = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        rstd_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        with torch.cuda.device_of(hidden):
            _forward_kernel[(num_tokens,)](
                hidden, residual, weight_D, normed, residual_out, rstd_T, eps, D=width, **_blocks(width)
            )
        ctx.save_for_backward(residual_out, weight_D, rstd_T)
        return normed, residual_out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dnormed: torch.Tensor | None, dresidual_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        residual_out, weight_D, rstd_T = ctx.saved_tensors
        if dnormed is None:
            if dresidual_out is None:
                return None, None, None, None
            dresidual = None if ctx.residual_dtype is None else dresidual_out.to(ctx.residual_dtype)
            return dresidual_out.to(ctx.hidden_dtype), dresidual, None, None
        dnormed = dnormed.contiguous()
        dresidual_out = None if dresidual_out is None else dresidual_out.contiguous()
        num_tokens, width = len(rstd_T), len(weight_D)
        dhidden = torch.empty_like(residual_out, dtype=ctx.hidden_dtype)
        dresidual = None if ctx.residual_dtype is None else torch.empty_like(residual_out, dtype=ctx.residual_dtype)
        tokens_per_program = max(triton.cdiv(num_tokens, _MAX_BACKWARD_PROGRAMS), 1)
        num_programs = triton.cdiv(num_tokens, tokens_per_program)
        dweight_PD = None
        if ctx.needs_input_grad[2]:
            dweight_PD = torch.empty(num_programs, width, dtype=torch.float32, device=weight_D.device)
        with torch.cuda.device_of(dnormed):
            _backward_kernel[(num_programs,)](
                residual_out, weight_D, rstd_T, dnormed, dresidual_out, dhidden, dresidual, dweight_PD,
                num_tokens, tokens_per_program, D=width, **_blocks(width),
            )  # fmt: skip
        dweight_D = None if dweight_PD is None else dweight_PD.sum(0).to(weight_D.dtype)
        return dhidden, dresidual, dweight_D, None


def _blocks(width: int) -> dict[str, int]:
    """A row in one block, 16 columns to a thread where it is wide enough."""
    block_d = max(triton.next_power_of_2(width), 4)
    return {"BLOCK_D": block_d, "num_warps": min(max(block_d // 512, 1), 16)}
