"""Experts whose 4-bit weights are written out anyway: two matrices a block, adapters inside them.

For many rows an expert, its weights are decoded to memory and multiplied by torch's grouped matmul. Here they are
decoded into one matrix for the way in and one for the way out, with the adapters beside and below, so that each product
takes its adapters along in a few more columns, where they would else be products and additions over all rows:

    in     [ gate  B_gate    0  ]       [gate | up](x) = [x | u_gate | u_up] in^T       u = scale * x A^T
           [  up     0      B_up ]
           [  A_gate                ]   dx = [d_gate | d_up | du_gate | du_up] in       du = scale * d B
           [  A_up                  ]
    out    [ down  B_down ]             down(act) = [act | u] out^T
           [ A_down       ]             d act = [dy | du] out
"""

# R rows sorted by expert, E experts, D model width, F width of an expert, Q rank of adapters (padded), M adapters in

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunescope.kernels import moe as kernels
from tunescope.kernels.nf4 import Nf4Stack, dequantize, dequantizes
from tunescope.models import fast_moe_ops as ops
from tunescope.models.fast_moe_function import grouped, outer
from tunescope.models.fast_moe_stacks import Adapters, ExpertStacks


def is_wide(stacks: ExpertStacks, num_rows: int, dtype: torch.dtype) -> bool:
    """Whether these experts' weights are 4-bit and, for so many rows, written out in both directions."""
    return all(
        isinstance(base, Nf4Stack) and dequantizes(base, num_rows, dtype)
        for base in (stacks.gate, stacks.up, stacks.down)
    )


def matrix_in(stacks: ExpertStacks, adapters: Adapters | None, dtype: torch.dtype) -> Tensor:
    """(E, 2F + MQ, D + MQ)."""
    gate, up = stacks.gate, stacks.up
    assert isinstance(gate, Nf4Stack)
    assert isinstance(up, Nf4Stack)
    inner, width = stacks.inner, stacks.width
    extra = 0 if adapters is None or adapters.in_A is None else adapters.in_A.shape[1]
    matrix = torch.empty(
        (stacks.num_experts, 2 * inner + extra, width + extra), dtype=dtype, device=gate.packed_ENP.device
    )
    dequantize(gate, dtype, matrix[:, :inner, :width])
    dequantize(up, dtype, matrix[:, inner : 2 * inner, :width])
    if extra and adapters is not None and adapters.in_A is not None:
        matrix[:, 2 * inner :, :width] = adapters.in_A
        matrix[:, : 2 * inner, width:] = 0
        column = width
        for row, b in ((0, adapters.gate_B), (inner, adapters.up_B)):
            if b is not None:
                matrix[:, row : row + inner, column : column + b.shape[2]] = b
                column += b.shape[2]
    return matrix


def matrix_out(stacks: ExpertStacks, adapters: Adapters | None, dtype: torch.dtype) -> Tensor:
    """(E, D + Q, F + Q)."""
    down = stacks.down
    assert isinstance(down, Nf4Stack)
    inner, width = stacks.inner, stacks.width
    extra = 0 if adapters is None or adapters.down_A is None else adapters.down_A.shape[1]
    matrix = torch.empty((stacks.num_experts, width + extra, inner + extra), dtype=dtype, device=down.packed_ENP.device)
    dequantize(down, dtype, matrix[:, :width, :inner])
    if extra and adapters is not None and adapters.down_A is not None and adapters.down_B is not None:
        matrix[:, width:, :inner] = adapters.down_A
        matrix[:, :width, inner:] = adapters.down_B
    return matrix


class WideExperts(torch.autograd.Function):
    """As fast_moe_function's, for what is_wide()."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stacks: ExpertStacks, dtype: torch.dtype,
        with_adapters: bool, needs_output: bool, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        to = kernels.dispatch(expert_TK, stacks.num_experts)
        adapters = stacks.adapters(dtype) if with_adapters and stacks.has_adapters else None
        inner, width = stacks.inner, stacks.width
        matrix = matrix_in(stacks, adapters, dtype)
        extra = matrix.shape[2] - width
        x_RX = torch.empty((len(to.token_R), width + extra), dtype=dtype, device=x_TD.device)
        x_RX[:, :width] = x_TD[to.token_R]
        u_RQ = None
        if extra and adapters is not None and adapters.in_A is not None:
            u_RQ = grouped(x_RX[:, :width], adapters.in_A.transpose(1, 2), to.ends_X)
            u_RQ = torch.mul(u_RQ, stacks.scale_in, out=x_RX[:, width:]).contiguous()
        hidden_RF2 = grouped(x_RX, matrix[:, : 2 * inner].transpose(1, 2), to.ends_X)
        if not needs_output:  # backward of this block comes next, and wants the same matrix
            stacks.decoded = matrix
        del matrix, x_RX
        gate_RF, up_RF = hidden_RF2[:, :inner], hidden_RF2[:, inner:]
        down_u_RQ = act_RX = None
        has_down = adapters is not None and adapters.down_A is not None
        if needs_output or has_down:
            extra = adapters.down_A.shape[1] if adapters is not None and adapters.down_A is not None else 0
            act_RX = torch.empty((len(hidden_RF2), inner + extra), dtype=dtype, device=x_TD.device)
            ops.gated_silu(gate_RF, up_RF, act_RX[:, :inner])
            if extra and adapters is not None and adapters.down_A is not None:
                down_u_RQ = grouped(act_RX[:, :inner], adapters.down_A.transpose(1, 2), to.ends_X)
                down_u_RQ = torch.mul(down_u_RQ, stacks.scale_down, out=act_RX[:, inner:]).contiguous()
        ctx.save_for_backward(
            x_TD, weight_TK, to.token_R, to.choice_R, to.row_TK, to.ends_X,
            hidden_RF2, u_RQ, down_u_RQ, adapters and adapters.flat,
        )  # fmt: skip
        ctx.stacks = stacks
        if not needs_output:
            return torch.zeros_like(x_TD)
        assert act_RX is not None
        matrix = matrix_out(stacks, adapters, dtype)
        y_RD = grouped(act_RX, matrix[:, :width].transpose(1, 2), to.ends_X)
        return ops.gather_sum(y_RD, to.row_TK, weight_TK).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        (
            x_TD, weight_TK, token_R, choice_R, row_TK, ends_E, hidden_RF2, u_RQ, down_u_RQ, flat,
        ) = ctx.saved_tensors  # fmt: skip
        stacks: ExpertStacks = ctx.stacks
        matrix_of_recompute, stacks.decoded = stacks.decoded, None
        adapters = None if flat is None else stacks.adapters_of(flat)
        dtype, inner, width = hidden_RF2.dtype, stacks.inner, stacks.width
        trains = adapters is not None and any(ctx.needs_input_grad[7:])
        pieces: dict[str, Tensor] = {}

        matrix = matrix_out(stacks, adapters, dtype)
        extra = matrix.shape[1] - width
        dy_RX = torch.empty((len(token_R), width + extra), dtype=dtype, device=x_TD.device)
        dy_RX[:, :width] = grad_TD.to(dtype)[token_R]  # of a row before its weight
        if extra and adapters is not None and adapters.down_B is not None:
            du_RQ = grouped(dy_RX[:, :width], adapters.down_B, ends_E)
            torch.mul(du_RQ, stacks.scale_down, out=dy_RX[:, width:])
        d_act_RF = grouped(dy_RX, matrix[:, :, :inner], ends_E)
        del matrix

        extra = 0 if u_RQ is None else u_RQ.shape[1]
        d_RX = torch.empty((len(token_R), 2 * inner + extra), dtype=dtype, device=x_TD.device)
        d_gate_RF, d_up_RF = d_RX[:, :inner], d_RX[:, inner : 2 * inner]
        weight_R = weight_TK.flatten()[choice_R]
        *_, act_RF, d_weight_R = ops.gated_silu_backward(
            hidden_RF2[:, :inner], hidden_RF2[:, inner:], d_act_RF, weight_R, (d_gate_RF, d_up_RF)
        )
        del d_act_RF, hidden_RF2
        if trains and down_u_RQ is not None:
            weight_R1 = weight_R.unsqueeze(-1).to(dtype)
            pieces["down_A"] = outer(dy_RX[:, width:] * weight_R1, act_RF, ends_E)
            pieces["down_B"] = outer(dy_RX[:, :width], down_u_RQ * weight_R1, ends_E)
        del act_RF, dy_RX

        if extra and adapters is not None and u_RQ is not None:
            column = 2 * inner
            for d_RF, b, name in ((d_gate_RF, adapters.gate_B, "gate_B"), (d_up_RF, adapters.up_B, "up_B")):
                if b is None:
                    continue
                rank = b.shape[2]
                torch.mul(grouped(d_RF, b, ends_E), stacks.scale_in, out=d_RX[:, column : column + rank])
                if trains:
                    pieces[name] = outer(d_RF, u_RQ[:, column - 2 * inner :][:, :rank], ends_E)
                column += rank
            if trains:
                pieces["in_A"] = outer(d_RX[:, 2 * inner :], x_TD.to(dtype)[token_R], ends_E)
        dx_TD = None
        if ctx.needs_input_grad[0]:
            matrix = matrix_in(stacks, adapters, dtype) if matrix_of_recompute is None else matrix_of_recompute
            dx_RD = grouped(d_RX, matrix[:, :, :width], ends_E)
            dx_TD = ops.gather_sum(dx_RD, row_TK).to(x_TD.dtype)
        gradients: tuple[Tensor | None, ...] = (None,) * len(ctx.needs_input_grad[7:])
        if trains:
            gradients = stacks.gradients(pieces.pop, ends_E)
        return dx_TD, d_weight_R[row_TK], None, None, None, None, None, *gradients
