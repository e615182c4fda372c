"""The mixture of experts of BlackMamba: sigmoid scores, not normalised; gated GELU experts; nothing is dropped."""

# B batch, L seq_len, T = B * L tokens, K top_k, R rows = T * K, X experts, H hidden size, F width of an expert

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunescope.families.family import LOOP
from tunescope.kernels import moe as kernels
from tunescope.models.blackmamba.configuration import BlackMambaConfig


class ExpertMatrices(nn.Module):
    """The same linear of every expert, without bias: weight (X, out, in).

    Not called a linear, because LLaMA-Factory would take it for one by its name and ask PEFT to adapt it.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x: Tensor, ends_X: Tensor | None = None, weight_FD: Tensor | None = None) -> Tensor:
        """All experts' rows, which end at ends_X; or one expert's, by its weights."""
        if ends_X is not None:
            return kernels.grouped_linear(x, self.weight, ends_X)
        assert weight_FD is not None
        return functional.linear(x, weight_FD)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


class BlackMambaExperts(nn.Module):
    """GELU(first half of fc1) times its second half, through fc2. The GELU is the exact one."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        self.fc1 = ExpertMatrices(config.num_local_experts, config.hidden_size, 2 * config.intermediate_size)
        self.fc2 = ExpertMatrices(config.num_local_experts, config.intermediate_size, config.hidden_size)

    def forward(self, x_RH: Tensor, ends_X: Tensor) -> Tensor:
        a_RF, b_RF = self.fc1(x_RH, ends_X).chunk(2, dim=-1)
        return self.fc2(functional.gelu(a_RF) * b_RF, ends_X)

    def one_by_one(self, x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The plain loop over experts, from tokens to their weighted sum. The host waits for every expert's tokens."""
        out_TH = torch.zeros_like(x_TH)
        experts = zip(self.fc1.weight.unbind(0), self.fc2.weight.unbind(0), strict=True)
        for expert, (w1, w2) in enumerate(experts):
            token_n, choice_n = (expert_TK == expert).nonzero(as_tuple=True)
            a_nF, b_nF = self.fc1(x_TH[token_n], weight_FD=w1).chunk(2, dim=-1)
            y_nH = self.fc2(functional.gelu(a_nF) * b_nF, weight_FD=w2)
            out_TH = out_TH.index_add(0, token_n, (y_nH * weight_TK[token_n, choice_n, None]).to(out_TH.dtype))
        return out_TH


class BlackMambaMoe(nn.Module):
    """(B, L, H) -> (B, L, H). Each token goes to its top_k experts, weighted by the sigmoids of their scores."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.implementation = config.moe
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=True)
        self.experts = BlackMambaExperts(config)

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        x_TH = hidden_BLH.flatten(0, 1)
        scores_TX = self.router(x_TH).sigmoid()
        weight_TK, expert_TK = scores_TX.topk(self.top_k, dim=-1)
        if self.implementation == LOOP:
            return self.experts.one_by_one(x_TH, expert_TK, weight_TK).view_as(hidden_BLH)
        to = kernels.dispatch(expert_TK, scores_TX.shape[1])
        y_RH = self.experts(kernels.gather_rows(x_TH, to), to.ends_X)
        return kernels.combine_rows(y_RH, weight_TK, to).view_as(hidden_BLH)
