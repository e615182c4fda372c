"""The rotary embedding in one launch: against transformers' own, forward and back, and in a live model."""

import inspect

import pytest
import torch
from helpers_fast_moe import FAMILIES, build, step, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, apply_rotary_pos_emb

from tunescope.kernels import rotary
from tunescope.models import fast_rotary
from tunescope.models.fast_rotary import fuse_rotary
from tunescope.models.forwards import unfuse


def angles(batch: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    """As transformers makes them, both halves alike; then not, so that no half can be taken for the other."""
    generator = torch.Generator().manual_seed(length)
    found = torch.randn(batch, length, width, generator=generator)
    return found.cos(), found.sin()


def stock(x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y, _ = apply_rotary_pos_emb(leaf, leaf, cos, sin)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 17), st.sampled_from([2, 8, 12, 128]), st.booleans(),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_kernels_give_what_transformers_gives(
    batch: int, heads: int, length: int, width: int, is_view: bool, has_own_angles: bool
) -> None:
    generator = torch.Generator().manual_seed(width)
    shape = (batch, length, heads, width) if is_view else (batch, heads, length, width)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    if is_view:  # as a linear leaves its heads
        x, dy = x.transpose(1, 2), dy.transpose(1, 2)
    cos, sin = angles(batch if has_own_angles else 1, length, width)
    wanted, wanted_dx = stock(x, cos, sin, dy)
    y = rotary.launch(x, cos, sin, is_backward=False)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(rotary.launch(dy, cos, sin, is_backward=True), wanted_dx, rtol=1e-6, atol=1e-6)


def test_nothing_and_odd_strides() -> None:
    cos, sin = angles(1, 5, 8)
    assert rotary.launch(torch.empty(0, 2, 5, 8), cos, sin, is_backward=False).shape == (0, 2, 5, 8)
    x = torch.randn(2, 3, 8, 5).transpose(2, 3)
    torch.testing.assert_close(rotary.launch(x, cos, sin, is_backward=False), stock(x, cos, sin, x)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_attention_calls_it_and_gets_its_own_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU by letting it take what is there: Triton's interpreter runs the kernel."""
    model = build(FAMILIES[family])
    stock_out, wanted = step(model, tokens())
    fused = fuse_rotary(model)
    assert len(fused) == 2
    assert fuse_rotary(model) == []
    calls: list[int] = []
    monkeypatch.setattr(fast_rotary, "takes", lambda *tensors: [calls.append(len(tensors))] == [None])  # type: ignore[func-returns-value]
    out, found = step(model, tokens())
    assert calls == [4, 4]
    torch.testing.assert_close(out.logits, stock_out.logits, rtol=1e-5, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    unfuse(fused)
    out, _ = step(model, tokens())
    assert len(calls) == 2
    torch.testing.assert_close(out.logits, stock_out.logits, rtol=0, atol=0)


def test_what_the_kernel_does_not_take_goes_the_stock_way() -> None:
    model = build(FAMILIES["mixtral"])
    wanted, _ = step(model, tokens())
    fuse_rotary(model)  # on a CPU, and without the interpreter's help above
    found, _ = step(model, tokens())
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=0)


def test_attention_still_calls_the_rotary_function_by_its_name() -> None:
    assert "apply_rotary_pos_emb" in inspect.unwrap(MixtralAttention.forward).__code__.co_names
