"""Dispatch of tokens to experts: sorted by expert, one grouped matmul for all of them, brought back.

Nothing here reads a tensor's values on the host, and everything is deterministic: where PyTorch's own indexing would
add gradients with atomics, rows are gathered instead. So nothing waits for the GPU where torch has one kernel for all
groups, which is bf16 on compute capability 9.0 and 10.0. Elsewhere its operator waits, and goes group by group.
"""

# T tokens (batch * seq_len), K top_k, R rows = T * K, X experts, D any width, F width of an expert's output

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunescope.families.family import MOE_PATHS

IMPLEMENTATIONS = MOE_PATHS
# What torch's grouped matmul takes, with rows of whole multiples of so many bytes; anything else goes group by group.
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GROUPED_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Dispatch:
    """Rows are (token, choice) pairs sorted by expert, and within an expert by token.

    token_R: token of each row. choice_R: its place among the T * K pairs, which are ordered by token. row_TK: row of
    each pair. ends_X (int32): row behind the last one of each expert.
    """

    token_R: Tensor
    choice_R: Tensor
    row_TK: Tensor
    ends_X: Tensor


def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    """expert_TK: the experts chosen for each token, all different within a token."""
    sorted_R, choice_R = expert_TK.flatten().sort(stable=True)
    row_R = torch.empty_like(choice_R)
    row_R[choice_R] = torch.arange(len(choice_R), device=choice_R.device)
    experts_X = torch.arange(num_experts, device=sorted_R.device, dtype=sorted_R.dtype)
    ends_X = torch.searchsorted(sorted_R, experts_X, right=True, out_int32=True)
    return Dispatch(choice_R // expert_TK.shape[1], choice_R, row_R.view_as(expert_TK), ends_X)


def gather_rows(x_TD: Tensor, to: Dispatch) -> Tensor:
    """(R, D): every expert's tokens, one expert after another."""
    return _GatherRows.apply(x_TD, to)


def combine_rows(y_RD: Tensor, weight_TK: Tensor, to: Dispatch) -> Tensor:
    """(T, D): each token's rows, weighted and added up."""
    return _CombineRows.apply(y_RD, weight_TK, to)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, to: Dispatch) -> Tensor:
        ctx.row_TK = to.row_TK
        return x_TD[to.token_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return grad_RD[ctx.row_TK].sum(1), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_TK: Tensor, to: Dispatch) -> Tensor:
        ctx.save_for_backward(y_RD, weight_TK)
        ctx.to = to
        weighted_TKD = y_RD[to.row_TK] * weight_TK.unsqueeze(-1)
        return weighted_TKD.sum(1, dtype=weighted_TKD.dtype)  # autocast on a GPU would make it fp32

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weight_TK = ctx.saved_tensors
        grad_RD = grad_TD[ctx.to.token_R]
        weight_R = weight_TK.flatten()[ctx.to.choice_R]
        grad_weight_R = (y_RD * grad_RD).sum(-1)
        return grad_RD * weight_R.unsqueeze(-1), grad_weight_R[ctx.to.row_TK], None


def grouped_linear(x_RD: Tensor, weight_XFD: Tensor, ends_X: Tensor) -> Tensor:
    """(R, F): each expert's rows times its weights, stored as [out, in]. Under autocast in its dtype, as a linear.

    An expert without rows gets a gradient of zeros.
    """
    device = x_RD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_RD, weight_XFD = x_RD.to(dtype), weight_XFD.to(dtype)
    are_aligned = all(width * x_RD.itemsize % _GROUPED_ALIGNMENT_BYTES == 0 for width in weight_XFD.shape[1:])
    if x_RD.dtype in _GROUPED_DTYPES and are_aligned:
        return functional.grouped_mm(x_RD, weight_XFD.transpose(1, 2), offs=ends_X)
    return grouped_linear_reference(x_RD, weight_XFD, ends_X)


def grouped_linear_reference(x_RD: Tensor, weight_XFD: Tensor, ends_X: Tensor) -> Tensor:
    """The same, one expert after another; the host waits for the numbers of rows."""
    sizes = torch.diff(ends_X, prepend=ends_X.new_zeros(1)).tolist()
    parts = zip(x_RD.split(sizes), weight_XFD.unbind(0), strict=True)
    return torch.cat([functional.linear(x_nD, weight_FD) for x_nD, weight_FD in parts])
