"""What grouped experts do between their matmuls, each as plain torch and as one Triton kernel.

    act = silu(gate) * up                         on the way in, and its whole gradient
    out_t = sum over k of weight_tk * y[row_tk]   on the way back to tokens

Triton takes what lies on a GPU, plain torch everything else. Inside, both count in fp32 at least.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

# T tokens, K top_k, R rows = T * K, D model width, F width of an expert

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

_BLOCK_F = 1024
_BLOCK_D = 512


def gated_silu(gate_RF: Tensor, up_RF: Tensor, out_RF: Tensor | None = None) -> Tensor:
    """(R, F): silu(gate) * up, in their dtype. Of any tensor here rows may be apart, and values of a row follow each
    other; gate's rows are as far apart as up's. out: where to write.
    """
    out_RF = gate_RF.new_empty(gate_RF.shape) if out_RF is None else out_RF
    if not gate_RF.is_cuda:
        return out_RF.copy_(gated_silu_ref(gate_RF, up_RF))
    return launch_gated_silu(gate_RF, up_RF, out_RF)


def gated_silu_ref(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    return functional.silu(gate_RF) * up_RF


def gated_silu_backward(
    gate_RF: Tensor, up_RF: Tensor, grad_RF: Tensor, weight_R: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d gate, d up, act), each (R, F), and d weight (R,), of sum(grad * weight * act) with act = silu(gate) * up.

    act is made again here, so that forward need not keep it. grad contiguous. out: where to write d gate and d up, of
    rows as far apart in both.
    """
    d_gate_RF, d_up_RF = (gate_RF.new_empty(gate_RF.shape) for _ in range(2)) if out is None else out
    if not gate_RF.is_cuda:
        d_gate, d_up, act_RF, d_weight_R = gated_silu_backward_ref(gate_RF, up_RF, grad_RF, weight_R)
        return d_gate_RF.copy_(d_gate), d_up_RF.copy_(d_up), act_RF, d_weight_R
    return launch_gated_silu_backward(gate_RF, up_RF, grad_RF, weight_R, d_gate_RF, d_up_RF)


def gated_silu_backward_ref(
    gate_RF: Tensor, up_RF: Tensor, grad_RF: Tensor, weight_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    silu_RF = functional.silu(gate_RF)
    act_RF = silu_RF * up_RF
    d_weight_R = (grad_RF * act_RF).sum(-1)
    d_act_RF = grad_RF * weight_R.unsqueeze(-1).to(grad_RF.dtype)
    d_gate_RF = torch.ops.aten.silu_backward(d_act_RF * up_RF, gate_RF)
    return d_gate_RF, d_act_RF * silu_RF, act_RF, d_weight_R.to(weight_R.dtype)


def gather_sum(y_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """(T, D): each token's rows of y, weighted if weights are given, added up in y's dtype. y contiguous."""
    if not y_RD.is_cuda:
        return gather_sum_ref(y_RD, row_TK, weight_TK)
    return launch_gather_sum(y_RD, row_TK, weight_TK)


def gather_sum_ref(y_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    y_TKD = y_RD[row_TK]
    if weight_TK is not None:
        y_TKD = y_TKD * weight_TK.unsqueeze(-1).to(y_RD.dtype)
    return y_TKD.sum(1, dtype=y_RD.dtype)  # autocast on a GPU would make it fp32


def launch_gated_silu(gate_RF: Tensor, up_RF: Tensor, act_RF: Tensor) -> Tensor:
    rows, width = gate_RF.shape
    grid = (rows, triton.cdiv(width, _BLOCK_F))
    if rows:
        with torch.cuda.device_of(gate_RF):
            gated_silu_kernel[grid](
                gate_RF, up_RF, act_RF, F=width, ROW=_row(gate_RF, up_RF), ROW_OUT=_row(act_RF), BLOCK_F=_BLOCK_F
            )
    return act_RF


def launch_gated_silu_backward(
    gate_RF: Tensor, up_RF: Tensor, grad_RF: Tensor, weight_R: Tensor, d_gate_RF: Tensor, d_up_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    act_RF = gate_RF.new_empty(gate_RF.shape)
    d_weight_R = torch.empty_like(weight_R)
    rows, width = gate_RF.shape
    if rows:
        with torch.cuda.device_of(gate_RF):
            gated_silu_backward_kernel[(rows,)](
                gate_RF, up_RF, grad_RF, weight_R, d_gate_RF, d_up_RF, act_RF, d_weight_R,
                F=width, ROW=_row(gate_RF, up_RF), ROW_OUT=_row(d_gate_RF, d_up_RF), BLOCK_F=_BLOCK_F,
            )  # fmt: skip
    return d_gate_RF, d_up_RF, act_RF, d_weight_R


def _row(*tensors: Tensor) -> int:
    """How far apart the rows of all of them are."""
    (row,) = {tensor.stride(0) for tensor in tensors}
    if any(tensor.stride(1) != 1 for tensor in tensors):
        raise ValueError("values of a row must follow each other")
    return row


def launch_gather_sum(y_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    tokens, top_k = row_TK.shape
    width = y_RD.shape[1]
    out_TD = y_RD.new_empty(tokens, width)
    grid = (tokens, triton.cdiv(width, _BLOCK_D))
    with torch.cuda.device_of(y_RD):
        gather_sum_kernel[grid](
            y_RD, row_TK, row_TK if weight_TK is None else weight_TK, out_TD,
            D=width, K=top_k, HAS_WEIGHT=weight_TK is not None, BLOCK_D=_BLOCK_D,
        )  # fmt: skip
    return out_TD


# Widths are a model's own, so that constants of the kernels; the number of rows is the grid's, and compiles nothing.


@triton.jit
def gated_silu_kernel(
    gate_ptr, up_ptr, act_ptr, F: tl.constexpr, ROW: tl.constexpr, ROW_OUT: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Grid: rows, blocks of columns."""
    number = tl.program_id(0).to(tl.int64)
    row = number * ROW
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = f_F < F
    gate_F = tl.load(gate_ptr + row + f_F, inside_F).to(tl.float32)
    up_F = tl.load(up_ptr + row + f_F, inside_F).to(tl.float32)
    act_F = gate_F * tl.sigmoid(gate_F) * up_F
    tl.store(act_ptr + number * ROW_OUT + f_F, act_F.to(act_ptr.dtype.element_ty), inside_F)


@triton.jit
def gated_silu_backward_kernel(
    gate_ptr, up_ptr, grad_ptr, weight_ptr, d_gate_ptr, d_up_ptr, act_ptr, d_weight_ptr,
    F: tl.constexpr, ROW: tl.constexpr, ROW_OUT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid: rows."""
    number = tl.program_id(0).to(tl.int64)
    row, plain, out = number * ROW, number * F, number * ROW_OUT
    weight = tl.load(weight_ptr + number).to(tl.float32)
    sums_F = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, F, BLOCK_F):
        f_F = start + tl.arange(0, BLOCK_F)
        inside_F = f_F < F
        gate_F = tl.load(gate_ptr + row + f_F, inside_F, 0.0).to(tl.float32)
        up_F = tl.load(up_ptr + row + f_F, inside_F, 0.0).to(tl.float32)
        grad_F = tl.load(grad_ptr + plain + f_F, inside_F, 0.0).to(tl.float32)
        sigmoid_F = tl.sigmoid(gate_F)
        silu_F = gate_F * sigmoid_F
        # Rounded, because forward's was: the weight's gradient is that of what the down projection got.
        act_F = (silu_F * up_F).to(act_ptr.dtype.element_ty)
        sums_F += grad_F * act_F.to(tl.float32)
        d_act_F = grad_F * weight
        d_gate_F = d_act_F * up_F * (sigmoid_F + silu_F * (1.0 - sigmoid_F))
        tl.store(act_ptr + plain + f_F, act_F, inside_F)
        tl.store(d_up_ptr + out + f_F, (d_act_F * silu_F).to(d_up_ptr.dtype.element_ty), inside_F)
        tl.store(d_gate_ptr + out + f_F, d_gate_F.to(d_gate_ptr.dtype.element_ty), inside_F)
    tl.store(d_weight_ptr + number, tl.sum(sums_F).to(d_weight_ptr.dtype.element_ty))


@triton.jit
def gather_sum_kernel(
    y_ptr, row_ptr, weight_ptr, out_ptr,
    D: tl.constexpr, K: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, blocks of columns. One order of adding, so the same bits every time."""
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = d_D < D
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for k in range(K):
        row = tl.load(row_ptr + token * K + k).to(tl.int64)
        y_D = tl.load(y_ptr + row * D + d_D, inside_D, 0.0).to(tl.float32)
        if HAS_WEIGHT:
            y_D *= tl.load(weight_ptr + token * K + k).to(tl.float32)
        sum_D += y_D
    tl.store(out_ptr + token * D + d_D, sum_D.to(out_ptr.dtype.element_ty), inside_D)
