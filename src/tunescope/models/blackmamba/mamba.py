"""The Mamba-1 mixer (arXiv 2312.00752) as BlackMamba has it.

Inside, tensors are channel-major with time contiguous, as the kernels want them: linears into the mixer write that
layout as the matmul's own, and nothing is transposed in memory.
"""

# B batch, L seq_len, T = B * L tokens, H hidden size, E channels, N states, R rank of the step sizes, W taps

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunescope.kernels.causal_conv import causal_conv1d_silu
from tunescope.kernels.selective_scan import selective_scan
from tunescope.models.blackmamba.configuration import BlackMambaConfig

DELTA_MIN, DELTA_MAX, DELTA_FLOOR = 1e-3, 0.1, 1e-4  # of the step sizes that a fresh model starts with


class TimeContiguousLinear(nn.Linear):
    """A linear from (T, in) to (T, out) whose output has time contiguous, strides (1, T). Otherwise an nn.Linear."""

    def forward(self, x_TD: Tensor) -> Tensor:
        y_OT = functional.linear(self.weight, x_TD)
        return y_OT.t() if self.bias is None else y_OT.t() + self.bias


class DeltaProjection(nn.Module):
    """Step sizes before their bias: the scan adds it, in fp32.

    No nn.Linear, so that nobody who replaces linears (a quantiser does) puts one here that adds the bias, too.
    """

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.inner_size, config.delta_rank))
        self.bias = nn.Parameter(torch.empty(config.inner_size))

    def forward(self, x_TR: Tensor) -> Tensor:
        return functional.linear(self.weight, x_TR).t()


class CausalConvolution(nn.Module):
    """Depthwise, then SiLU. weight (E, 1, W), bias (E,), as nn.Conv1d would hold them."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.inner_size, 1, config.conv_kernel))
        self.bias = nn.Parameter(torch.empty(config.inner_size))
        self.implementation = config.scan

    def forward(self, x_EBL: Tensor) -> Tensor:
        return causal_conv1d_silu(x_EBL, self.weight.squeeze(1), self.bias, implementation=self.implementation)


class SelectiveScan(nn.Module):
    """Without parameters of its own: a name for the scan in whatever looks at modules."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        self.implementation = config.scan

    def forward(
        self, c_EBL: Tensor, delta_EBL: Tensor, A_EN: Tensor, B_NBL: Tensor, C_NBL: Tensor, D_E: Tensor, z_EBL: Tensor,
        delta_bias_E: Tensor,
    ) -> Tensor:  # fmt: skip
        return selective_scan(
            c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, delta_bias_E, implementation=self.implementation
        )


class BlackMambaMixer(nn.Module):
    """(B, L, H) -> (B, L, H). No token sees a later one. There is no mask: padding is an ordinary token."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        hidden, inner, rank = config.hidden_size, config.inner_size, config.delta_rank
        self.split = [rank, config.state_size, config.state_size]
        self.in_proj = TimeContiguousLinear(hidden, 2 * inner, bias=False)
        self.conv1d = CausalConvolution(config)
        self.x_proj = TimeContiguousLinear(inner, sum(self.split), bias=False)
        self.dt_proj = DeltaProjection(config)
        self.scan = SelectiveScan(config)
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self.A_log = nn.Parameter(torch.empty(inner, config.state_size))
        self.D = nn.Parameter(torch.empty(inner))

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        batch, length, _ = hidden_BLH.shape

        def by_channel(y_TD: Tensor) -> Tensor:
            """(D, B, L), a view where time is contiguous already (it is not under LoRA's sum, say)."""
            return y_TD.t().contiguous().view(-1, batch, length)

        x_EBL, z_EBL = by_channel(self.in_proj(hidden_BLH.flatten(0, 1))).chunk(2)
        c_EBL = self.conv1d(x_EBL)
        rank_TR, B_TN, C_TN = self.x_proj(c_EBL.flatten(1).t()).split(self.split, dim=-1)
        delta_TE = self.dt_proj(rank_TR)
        # The decay is computed in fp32 from whatever A_log is kept in.
        A_EN = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        g_EBL = self.scan(
            c_EBL, by_channel(delta_TE), A_EN, by_channel(B_TN), by_channel(C_TN), self.D, z_EBL, self.dt_proj.bias
        )
        return self.out_proj(g_EBL.flatten(1).t()).view(batch, length, -1)

    @torch.no_grad()
    def reset_parameters(self, num_layers: int) -> None:
        """Random, as the original initialises it. num_layers: of the model; the output is scaled down by its root."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound)
        self.out_proj.weight /= math.sqrt(num_layers)
        for parameter in self.conv1d.parameters():
            bound = self.conv1d.weight.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        bound = self.dt_proj.weight.shape[1] ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        # Step sizes log-uniform: the inverse of softplus of what they shall be.
        log_range = math.log(DELTA_MIN), math.log(DELTA_MAX)
        delta_E = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(*log_range).exp()
        delta_E = delta_E.clamp(min=DELTA_FLOOR)
        self.dt_proj.bias.copy_(delta_E + torch.log(-torch.expm1(-delta_E)))
        states_N = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(states_N.log().expand_as(self.A_log))
        self.D.fill_(1)
