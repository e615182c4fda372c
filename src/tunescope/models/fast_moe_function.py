"""Forward and backward of a block's experts, all of them at once: NF4 or plain weights, a LoRA on each, no host waits.

    y = down(silu(gate(x)) * up(x))        of every row, by its expert's weights and adapters
    out_t = sum over k of weight_tk * y_tk

The weight of a row is brought forward of the down projection in backward, where everything is linear in it: so y is not
kept, nor anything else that is as cheap to make again.
"""

# T tokens, K top_k, R rows = T * K sorted by expert, E experts, D model width, F width of an expert, Q rank of adapters
# A linear has N out and K in where it stands for any of the three.

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunescope.kernels import moe as kernels
from tunescope.models import fast_moe_ops as ops
from tunescope.models.fast_moe_stacks import Base, ExpertStacks

_GROUPED_ALIGNMENT_BYTES = 16


def run_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    stacks: ExpertStacks,
    dtype: torch.dtype,
    *,
    needs_output: bool = True,
) -> Tensor:
    """(T, D) in x's dtype: each token's experts, weighted and added up.

    weight_TK: how much of each expert; gets a gradient, as x and the stacks' parameters do. expert_TK: which, all
    different within a token. dtype: of the matmuls, adapters included. needs_output: False gives zeros, with all that
    backward needs, where forward is repeated only for that.
    """
    with_adapters = not stacks.without_adapters()
    parameters = stacks.parameters if with_adapters else ()
    device = x_TD.device.type
    with contextlib.ExitStack() as inside:
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype:
            inside.enter_context(torch.autocast(device, enabled=False))
        from tunescope.models.fast_moe_wide import WideExperts, is_wide

        function: Any = WideExperts if is_wide(stacks, expert_TK.numel(), dtype) else _Experts
        return function.apply(x_TD, weight_TK, expert_TK, stacks, dtype, with_adapters, needs_output, *parameters)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        stacks: ExpertStacks,
        dtype: torch.dtype,
        with_adapters: bool,
        needs_output: bool,
        *parameters: Tensor,
    ) -> Tensor:
        to = kernels.dispatch(expert_TK, stacks.num_experts)
        adapters = stacks.adapters(dtype) if with_adapters and stacks.has_adapters else None
        x_RD = x_TD.to(dtype)[to.token_R]
        gate_u_RQ = up_u_RQ = down_u_RQ = None
        if adapters and adapters.in_A is not None:
            u_RQ = grouped(x_RD, adapters.in_A.transpose(1, 2), to.ends_X)
            gate_u_RQ, up_u_RQ = _scaled_parts(u_RQ, stacks.scale_in, adapters.gate_B, adapters.up_B)
        gate_RF = linear(stacks.gate, x_RD, to.ends_X, gate_u_RQ, adapters and adapters.gate_B)
        up_RF = linear(stacks.up, x_RD, to.ends_X, up_u_RQ, adapters and adapters.up_B)
        del x_RD
        act_RF = None
        if adapters and adapters.down_A is not None:
            act_RF = ops.gated_silu(gate_RF, up_RF)
            down_u_RQ = grouped(act_RF, adapters.down_A.transpose(1, 2), to.ends_X) * stacks.scale_down
        ctx.save_for_backward(
            x_TD, weight_TK, to.token_R, to.choice_R, to.row_TK, to.ends_X,
            gate_RF, up_RF, gate_u_RQ, up_u_RQ, down_u_RQ, adapters and adapters.flat,
        )  # fmt: skip
        ctx.stacks = stacks
        if not needs_output:
            return torch.zeros_like(x_TD)
        if act_RF is None:
            act_RF = ops.gated_silu(gate_RF, up_RF)
        y_RD = linear(stacks.down, act_RF, to.ends_X, down_u_RQ, adapters and adapters.down_B)
        return ops.gather_sum(y_RD, to.row_TK, weight_TK).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        (
            x_TD, weight_TK, token_R, choice_R, row_TK, ends_E,
            gate_RF, up_RF, gate_u_RQ, up_u_RQ, down_u_RQ, flat,
        ) = ctx.saved_tensors  # fmt: skip
        stacks: ExpertStacks = ctx.stacks
        adapters = None if flat is None else stacks.adapters_of(flat)
        dtype = gate_RF.dtype
        trains = adapters is not None and any(ctx.needs_input_grad[7:])
        pieces: dict[str, Tensor] = {}

        grad_RD = grad_TD.to(dtype)[token_R]  # of a row before its weight
        weight_R = weight_TK.flatten()[choice_R]
        du_RQ = None
        if adapters and adapters.down_A is not None:
            du_RQ = grouped(grad_RD, adapters.down_B, ends_E) * stacks.scale_down
        d_act_RF = linear_dx(stacks.down, grad_RD, ends_E, du_RQ, adapters and adapters.down_A)
        d_gate_RF, d_up_RF, act_RF, d_weight_R = ops.gated_silu_backward(gate_RF, up_RF, d_act_RF, weight_R)
        del d_act_RF, gate_RF, up_RF
        if trains and du_RQ is not None:
            weight_R1 = weight_R.unsqueeze(-1).to(dtype)
            pieces["down_A"] = outer(du_RQ * weight_R1, act_RF, ends_E)
            pieces["down_B"] = outer(grad_RD, down_u_RQ * weight_R1, ends_E)
        del act_RF, grad_RD

        du_RQ = None
        if adapters and adapters.in_A is not None:
            parts = []
            for d_RF, B, u_RQ, name in (
                (d_gate_RF, adapters.gate_B, gate_u_RQ, "gate_B"),
                (d_up_RF, adapters.up_B, up_u_RQ, "up_B"),
            ):
                if B is None:
                    continue
                parts.append(grouped(d_RF, B, ends_E))
                if trains:
                    pieces[name] = outer(d_RF, u_RQ, ends_E)
            du_RQ = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]) * stacks.scale_in
            if trains:
                pieces["in_A"] = outer(du_RQ, x_TD.to(dtype)[token_R], ends_E)
        dx_TD = None
        if ctx.needs_input_grad[0]:
            # Both adapters in one go: their A lie one after the other.
            dx_RD = linear_dx(stacks.gate, d_gate_RF, ends_E, du_RQ, adapters and adapters.in_A)
            dx_RD += linear_dx(stacks.up, d_up_RF, ends_E, None, None)
            dx_TD = ops.gather_sum(dx_RD, row_TK).to(x_TD.dtype)
        gradients: tuple[Tensor | None, ...] = (None,) * len(ctx.needs_input_grad[7:])
        if trains:
            gradients = stacks.gradients(pieces.pop, ends_E)
        return dx_TD, d_weight_R[row_TK], None, None, None, None, None, *gradients


def linear(base: Base, x_RK: Tensor, ends_E: Tensor, u_RQ: Tensor | None, b_ENQ: Tensor | None) -> Tensor:
    """(R, N): each row by its expert's weight, plus u @ B^T of its adapter where it has one."""
    if not isinstance(base, Tensor):
        from tunescope.kernels.nf4 import grouped_linear_nf4

        return grouped_linear_nf4(x_RK, base, ends_E, lora_u_RQ=u_RQ, lora_b_ENQ=b_ENQ)
    y_RN = grouped(x_RK, base.to(x_RK.dtype).transpose(1, 2), ends_E)
    if u_RQ is not None and b_ENQ is not None:
        y_RN += grouped(u_RQ, b_ENQ.transpose(1, 2), ends_E)
    return y_RN


def linear_dx(base: Base, dy_RN: Tensor, ends_E: Tensor, du_RQ: Tensor | None, a_EQK: Tensor | None) -> Tensor:
    """(R, K): the gradient of linear()'s input, plus du @ A of an adapter."""
    if not isinstance(base, Tensor):
        from tunescope.kernels.nf4 import grouped_linear_nf4_dx

        return grouped_linear_nf4_dx(dy_RN, base, ends_E, lora_du_RQ=du_RQ, lora_a_EQK=a_EQK)
    dx_RK = grouped(dy_RN, base.to(dy_RN.dtype), ends_E)
    if du_RQ is not None and a_EQK is not None:
        dx_RK += grouped(du_RQ, a_EQK, ends_E)
    return dx_RK


def grouped(x_RK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """(R, N): each expert's rows times its matrix, in any of its two layouts. Autocast has no say."""
    if _is_aligned(x_RK) and _is_aligned(weight_EKN):
        return functional.grouped_mm(x_RK, weight_EKN, offs=ends_E)
    return kernels.grouped_linear_reference(x_RK, weight_EKN.transpose(1, 2), ends_E)


def outer(a_RN: Tensor, b_RK: Tensor, ends_E: Tensor) -> Tensor:
    """(E, N, K): the sum of a_r b_r^T over each expert's rows; of an expert without rows, anything."""
    if _is_aligned(a_RN) and _is_aligned(b_RK):
        return functional.grouped_mm(a_RN.t(), b_RK, offs=ends_E)
    sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    parts = zip(a_RN.split(sizes), b_RK.split(sizes), strict=True)
    return torch.stack([a_nN.t() @ b_nK for a_nN, b_nK in parts])


def _is_aligned(matrix: Tensor) -> bool:
    """Whether torch's grouped matmul takes it: rows, or columns, that begin at whole 16 bytes."""
    *_, rows, columns = matrix.stride()
    long = rows if columns == 1 else columns
    return 1 in (rows, columns) and long * matrix.itemsize % _GROUPED_ALIGNMENT_BYTES == 0


def _scaled_parts(
    u_RQ: Tensor, scale: float, gate_B: Tensor | None, up_B: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The scaled rows of each adapter, contiguous, from those of both side by side."""
    if gate_B is None or up_B is None:
        scaled = u_RQ * scale
        return (scaled, None) if up_B is None else (None, scaled)
    rows, width = u_RQ.shape
    parts = u_RQ.new_empty(2, rows, width // 2)
    torch.mul(u_RQ.view(rows, 2, -1).transpose(0, 1), scale, out=parts)
    return parts[0], parts[1]
