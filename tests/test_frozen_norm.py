"""The norm of frozen weights: reference and kernels against transformers' own, and modules of a live model."""

import pytest
import torch
from helpers_fast_moe import FAMILIES, build, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from tunescope.kernels import frozen_norm
from tunescope.models.fast_norms import fuse_norms
from tunescope.models.forwards import unfuse

EPS = 1e-5
shapes = st.tuples(st.integers(1, 7), st.sampled_from([1, 8, 96, 128, 1000]))


def case(
    rows: int, width: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * width)
    x, dy = (torch.randn((rows, width), generator=generator).to(dtype) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(width, generator=generator)).to(weight_dtype or dtype)
    return x, dy.to(torch.promote_types(dtype, weight.dtype)), weight


def stock(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    module = MixtralRMSNorm(len(weight), eps=EPS)
    module.weight.data = weight
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@given(shapes)
@settings(max_examples=20, deadline=None)
def test_kernels_give_what_transformers_gives(shape: tuple[int, int]) -> None:
    x, dy, weight = case(*shape)
    wanted, wanted_dx = stock(x, dy, weight)
    y, rstd = frozen_norm.launch_forward(x, weight, EPS)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    dx = frozen_norm.launch_backward(dy, x, weight, rstd)
    torch.testing.assert_close(dx, wanted_dx, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16_is_rounded_where_transformers_rounds(weight_dtype: torch.dtype) -> None:
    x, dy, weight = case(33, 512, torch.bfloat16, weight_dtype)
    wanted, wanted_dx = stock(x, dy, weight)
    y, rstd = frozen_norm.launch_forward(x, weight, EPS)
    assert y.dtype == wanted.dtype
    # Triton's interpreter cuts bf16 off where a GPU rounds.
    assert (y.float() - wanted.float()).norm() <= 2.0**-7 * wanted.float().norm()
    dx = frozen_norm.launch_backward(dy, x, weight, rstd)
    assert (dx.float() - wanted_dx.float()).norm() <= 2.0**-6 * wanted_dx.float().norm()
    reference = frozen_norm.frozen_rms_norm_ref(x, weight, EPS)
    assert reference.dtype == wanted.dtype
    torch.testing.assert_close(reference, wanted)


def test_no_rows() -> None:
    weight = torch.ones(8)
    y, rstd = frozen_norm.launch_forward(torch.empty(0, 8), weight, EPS)
    assert y.shape == (0, 8)
    assert frozen_norm.launch_backward(y, torch.empty(0, 8), weight, rstd).shape == (0, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_model_and_back(family: str) -> None:
    model = build(FAMILIES[family])
    ids = tokens()
    wanted = model(input_ids=ids).logits
    fused = fuse_norms(model)
    assert len(fused) >= 5
    assert fuse_norms(model) == []
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    unfuse(fused)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)


def test_a_trained_norm_is_left_alone() -> None:
    model = build(FAMILIES["mixtral"])
    for name, parameter in model.named_parameters():
        if "post_attention_layernorm" in name:
            parameter.requires_grad_(True)
    fused = fuse_norms(model)
    names = [name for name, module in model.named_modules() if any(module is one for one in fused)]
    assert any("input_layernorm" in name for name in names)
    assert not any("post_attention" in name for name in names)
