"""Tokens to experts and back: the grouped way against the plain loop, for any routing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.families.blackmamba import BLACKMAMBA_TINY
from tunescope.kernels import moe
from tunescope.models.blackmamba.configuration import BlackMambaConfig
from tunescope.models.blackmamba.moe import BlackMambaMoe


@st.composite
def routings(draw: Any) -> tuple[torch.Tensor, int]:
    """Experts of each token (T, K), all different within a token, and the number of experts."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    # Often few of them, so that some get many tokens and others none.
    popular = draw(st.permutations(range(num_experts)))[: max(top_k, draw(st.integers(1, num_experts)))]
    rows = draw(st.lists(st.permutations(popular), min_size=1, max_size=12))
    return torch.tensor([row[:top_k] for row in rows]), num_experts


@given(routings())
def test_every_pair_has_one_row_and_experts_lie_one_after_another(routing: tuple[torch.Tensor, int]) -> None:
    expert_TK, num_experts = routing
    to = moe.dispatch(expert_TK, num_experts)
    num_tokens, top_k = expert_TK.shape
    assert sorted(to.row_TK.flatten().tolist()) == list(range(num_tokens * top_k))
    assert to.ends_X.dtype == torch.int32
    assert to.ends_X.tolist() == [int((expert_TK <= expert).sum()) for expert in range(num_experts)]
    expert_R = expert_TK.flatten()[to.choice_R]
    order = list(zip(expert_R.tolist(), to.token_R.tolist(), strict=True))
    assert order == sorted(order)  # by expert, then by token
    for token in range(num_tokens):
        for choice in range(top_k):
            row = to.row_TK[token, choice]
            assert (to.token_R[row], expert_R[row]) == (token, expert_TK[token, choice])


@given(routings(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_gather_linear_and_combine_equal_the_sum_by_hand(routing: tuple[torch.Tensor, int], seed: int) -> None:
    """Values and all gradients, in float64: out_t = sum over its experts of weight * (W_e x_t)."""
    expert_TK, num_experts = routing
    generator = torch.Generator().manual_seed(seed)
    x, weight, score = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((len(expert_TK), 5), (num_experts, 3, 5), expert_TK.shape)
    )
    to = moe.dispatch(expert_TK, num_experts)
    y = moe.combine_rows(moe.grouped_linear(moe.gather_rows(x, to), weight, to.ends_X), score, to)
    by_hand = torch.einsum("tk,tkfd,td->tf", score, weight[expert_TK], x)
    torch.testing.assert_close(y, by_hand)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((y * upstream).sum(), (x, weight, score))
    wanted = torch.autograd.grad((by_hand * upstream).sum(), (x, weight, score))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert_TK", [[[0], [2], [2]], [[1, 0], [0, 1]], [[2, 1]]])
def test_torchs_grouped_matmul_equals_group_by_group(expert_TK: list[list[int]], dtype: torch.dtype) -> None:
    """Where an expert has no row its weights get zeros."""
    torch.manual_seed(0)
    to = moe.dispatch(torch.tensor(expert_TK), 4)
    results = []
    for linear in (moe.grouped_linear, moe.grouped_linear_reference):
        torch.manual_seed(1)
        x = torch.randn(to.token_R.numel(), 16, dtype=dtype, requires_grad=True)
        weight = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
        y = linear(x, weight, to.ends_X)
        y.backward(torch.ones_like(y))
        results.append((y, x.grad, weight.grad))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    unused = sorted({0, 1, 2, 3} - set(torch.tensor(expert_TK).flatten().tolist()))
    assert unused
    assert not results[0][2][unused].any()


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_layer_is_the_same_grouped_and_in_a_loop(top_k: int) -> None:
    torch.manual_seed(0)
    layers = []
    for implementation in moe.IMPLEMENTATIONS:
        config = BlackMambaConfig(**BLACKMAMBA_TINY | {"num_experts_per_tok": top_k, "moe": implementation})
        layers.append(BlackMambaMoe(config).double())
    for parameter in layers[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layers[1].load_state_dict(layers[0].state_dict())
    hidden = [
        torch.randn(
            2, 9, BLACKMAMBA_TINY["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        for _ in "ab"
    ]
    outputs = [layer(x.requires_grad_()) for layer, x in zip(layers, hidden, strict=True)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)
    for (name, one), (_, other) in zip(layers[0].named_parameters(), layers[1].named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
