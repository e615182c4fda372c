"""The causal convolution: its reference against golden vectors, its kernels against the reference.

golden/causal_conv1d_silu.safetensors: the original model's convolution step in float64, its gradients by autograd.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tunescope.errors import UserError
from tunescope.kernels.causal_conv import IMPLEMENTATIONS, causal_conv1d_silu, causal_conv1d_silu_ref

GOLDEN = Path(__file__).with_name("golden") / "causal_conv1d_silu.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = pytest.mark.parametrize("implementation", ["triton", "reference"])
HALF_ULP_FP16 = 2.0**-11
FP32 = 2e-6  # a GPU's exponential is good for 2e-7


def inputs(
    channels: int, batch: int, length: int, taps: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (channels, batch, length), (channels, taps), (channels,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return x, weight, bias


def run(
    implementation: str, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """y and the gradients of x, weight and bias. x keeps its strides."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (x, weight, bias)]
    y = causal_conv1d_silu(*leaves, implementation=implementation)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Distance relative to the norm; numbers that should be near zero count as if they were of size 1."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        scale = other.double().norm() + other.numel() ** 0.5
        assert (one.double() - other.double()).norm() <= tolerance * scale


# --- against numbers that are known ---


@pytest.mark.parametrize("case", ["main", "len1", "len3", "width2", "width3"])
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-12),
        ("reference", torch.float32, 1e-6),
        ("triton", torch.float32, FP32),
    ],
)
def test_golden_vectors(case: str, implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    golden = {
        name.removeprefix(f"{case}."): tensor.to(DEVICE)
        for name, tensor in load_file(GOLDEN).items()
        if name.startswith(f"{case}.")
    }
    x_EBL, dy_EBL = golden["x"].transpose(0, 1), golden["dout"].transpose(0, 1)
    y, dx, dweight, dbias = run(implementation, x_EBL, golden["weight"], golden["bias"], dy_EBL, dtype)
    assert y.dtype == dtype
    got = {"y": y.transpose(0, 1), "grad_x": dx.transpose(0, 1), "grad_weight": dweight, "grad_bias": dbias}
    for name, tensor in got.items():
        assert (tensor.double() - golden[name]).norm() <= tolerance * golden[name].norm(), name


@RUNS_HERE
def test_the_last_tap_meets_the_current_step(implementation: str) -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]], device=DEVICE)
    weight = torch.tensor([[100.0, 10.0, 1.0]], device=DEVICE)
    y = causal_conv1d_silu(x, weight, torch.tensor([0.5], device=DEVICE), implementation=implementation)
    torch.testing.assert_close(y, functional.silu(torch.tensor([[[1.5, 12.5, 123.5]]], device=DEVICE)))


# --- against the reference ---


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "channels": draw(st.integers(1, 9)),
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.integers(1, 40) | st.integers(1, 10).map(lambda groups: 4 * groups)),
        "taps": draw(st.integers(2, 4)),
        "seed": draw(st.integers(0, 99)),
    }


LAYOUTS = {
    "contiguous": lambda x: x,
    "half of a product": lambda x: torch.cat([x, torch.full_like(x, 7)])[: len(x)],
    "batch outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows with a gap": lambda x: functional.pad(x, (8, 8), value=7.0)[..., 8:-8],
    "rows at odd places": lambda x: functional.pad(x, (3, 2), value=7.0)[..., 3:-2],
    "time outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@given(problem=problems(), x_layout=st.sampled_from(list(LAYOUTS)), dy_layout=st.sampled_from(list(LAYOUTS)))
@settings(max_examples=60, deadline=None)
def test_kernels_equal_the_reference(problem: dict[str, Any], x_layout: str, dy_layout: str) -> None:
    x, weight, bias = inputs(**problem)
    dy = torch.randn_like(x)
    expected = run("reference", x, weight, bias, dy, torch.float64)
    got = run("triton", LAYOUTS[x_layout](x), weight, bias, LAYOUTS[dy_layout](dy))
    assert_near(got, expected, FP32)
    assert got[0].is_contiguous()


def test_parameters_may_have_any_stride() -> None:
    x, weight, bias = inputs(5, 2, 12, 3)
    spread = [weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]]
    assert not any(parameter.is_contiguous() for parameter in spread)
    dy = torch.randn_like(x)
    assert_near(run("triton", x, *spread, dy), run("reference", x, weight, bias, dy, torch.float64), FP32)


@pytest.mark.parametrize("length", [1100, 1099])
def test_a_row_longer_than_any_program(length: int) -> None:
    """Forward splits it over programs, backward over turns of its loop."""
    x, weight, bias = inputs(2, 2, length, 4)
    dy = torch.randn_like(x)
    assert_near(run("triton", x, weight, bias, dy), run("reference", x, weight, bias, dy, torch.float64), FP32)


@RUNS_HERE
@pytest.mark.parametrize("length", [19, 24])
def test_output_and_gradients_are_rounded_once(implementation: str, length: int) -> None:
    x, weight, bias = inputs(3, 2, length, 4, dtype=torch.float16)
    dy = torch.randn_like(x)
    exact = run("reference", x, weight, bias, dy, torch.float64)
    for got, true in zip(run(implementation, x, weight, bias, dy), exact, strict=True):
        assert got.dtype == torch.float16
        assert ((got.double() - true).abs() <= 1.001 * HALF_ULP_FP16 * true.abs() + 1e-6).all()


@pytest.mark.parametrize("length", [19, 24])
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32])
def test_bf16_input_with_parameters_of_any_dtype(length: int, parameter_dtype: torch.dtype) -> None:
    x, weight, bias = inputs(5, 2, length, 4, dtype=torch.bfloat16)
    weight, bias, dy = weight.to(parameter_dtype), bias.to(parameter_dtype), torch.randn_like(x)
    got, expected = (run(name, x, weight, bias, dy) for name in ("triton", "reference"))
    assert [tensor.dtype for tensor in got] == [x.dtype, x.dtype, parameter_dtype, parameter_dtype]
    assert [tensor.dtype for tensor in expected] == [tensor.dtype for tensor in got]
    assert_near(got[:2], expected[:2], 2.0**-7)  # the interpreter cuts bf16 off instead of rounding it
    assert_near(got[2:], expected[2:], 2.0**-7 if parameter_dtype == torch.bfloat16 else FP32)


@RUNS_HERE
@pytest.mark.parametrize("shape", [(3, 12), (3, 2, 12), (3, 2, 2, 12)])
def test_any_batch_axes_stand_between_channels_and_time(implementation: str, shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(3, math.prod(shape[1:-1]), 12, 4)
    dy = torch.randn_like(x)
    got = run(implementation, x.reshape(shape), weight, bias, dy.reshape(shape))
    expected = run("reference", x, weight, bias, dy, torch.float64)
    assert got[0].shape == got[1].shape == shape
    assert_near([got[0].view(x.shape), got[1].view(x.shape), *got[2:]], expected, FP32)


def test_autocast_changes_nothing() -> None:
    x, weight, bias = inputs(3, 2, 12, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = [causal_conv1d_silu(x, weight, bias, implementation=name) for name in ("triton", "reference")]
    for output, name in zip(outputs, ("triton", "reference"), strict=True):
        assert torch.equal(output, causal_conv1d_silu(x, weight, bias, implementation=name))


# --- laws ---


@RUNS_HERE
@given(problem=problems(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_step_reaches_itself_and_the_next_taps_alone(
    implementation: str, problem: dict[str, Any], data: st.DataObject
) -> None:
    """Forward, and backward the same way round: bit for bit."""
    x, weight, bias = inputs(**problem)
    length, taps = problem["length"], problem["taps"]
    step = data.draw(st.integers(0, length - 1))
    changed = x.clone()
    changed[..., step] += 1
    ys = [causal_conv1d_silu(one, weight, bias, implementation=implementation) for one in (x, changed)]
    differs_L = (ys[0] != ys[1]).any(0).any(0).tolist()
    assert [at for at, differs in enumerate(differs_L) if differs] == list(range(step, min(step + taps, length)))

    dy = torch.zeros_like(x)
    dy[..., step] = 1
    dx = run(implementation, x, weight, bias, dy)[1]
    reached_L = (dx != 0).any(0).any(0).tolist()
    assert [at for at, reached in enumerate(reached_L) if reached] == list(range(max(step - taps + 1, 0), step + 1))


@pytest.mark.parametrize("length", [5, 16])
def test_sequences_of_a_batch_know_nothing_of_each_other(length: int) -> None:
    x, weight, bias = inputs(4, 3, length, 4)
    dy = torch.randn_like(x)
    together = run("triton", x, weight, bias, dy)
    alone = [run("triton", x[:, [b]], weight, bias, dy[:, [b]]) for b in range(3)]
    for output in (0, 1):
        assert torch.equal(together[output], torch.cat([each[output] for each in alone], dim=1))
    for output in (2, 3):
        assert_near([together[output]], [torch.stack([each[output] for each in alone]).sum(0)], FP32)


def test_the_gradient_of_a_half_reaches_the_whole() -> None:
    both, weight, bias = inputs(8, 2, 12, 3)
    both.requires_grad_()
    x, _ = both.chunk(2)
    causal_conv1d_silu(x, weight[:4], bias[:4], implementation="triton").sum().backward()  # an expanded gradient
    assert both.grad is not None
    expected = run("reference", x, weight[:4], bias[:4], torch.ones_like(x), torch.float64)[1]
    assert_near([both.grad[:4]], [expected], FP32)
    assert not both.grad[4:].any()


def test_parameters_get_gradients_where_the_input_needs_none() -> None:
    x, weight, bias = inputs(3, 2, 12, 4)
    weight.requires_grad_()
    causal_conv1d_silu(x, weight, bias, implementation="triton").sum().backward()
    assert weight.grad is not None
    assert_near([weight.grad], [run("reference", x, weight, bias, torch.ones_like(x), torch.float64)[2]], FP32)


# --- the choice of an implementation ---


def test_auto_is_the_reference_on_a_cpu() -> None:
    x, weight, bias = (tensor.cpu() for tensor in inputs(3, 1, 12, 4))
    assert torch.equal(causal_conv1d_silu(x, weight, bias), causal_conv1d_silu_ref(x, weight, bias))


def test_mamba_ssm_is_given_batch_first_and_time_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def causal_conv1d_fn(x_BEL: Tensor, weight_EW: Tensor, bias_E: Tensor, activation: str) -> Tensor:
        seen.append((x_BEL.stride(), activation))
        y_BEL = functional.conv1d(x_BEL, weight_EW[:, None], bias_E, padding=3, groups=len(bias_E))
        return functional.silu(y_BEL[..., : x_BEL.shape[-1]])

    monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    x, weight, bias = inputs(3, 2, 12, 4)
    assert_near(
        [causal_conv1d_silu(x, weight, bias, implementation="mamba-ssm")],
        [causal_conv1d_silu_ref(x, weight, bias)],
        FP32,
    )
    assert seen == [((12, 24, 1), "silu")]


def test_a_package_that_is_missing_is_an_error_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(UserError) as raised:
        causal_conv1d_silu(*inputs(3, 1, 12, 4), implementation="mamba-ssm")
    assert raised.value.cause
    assert "requirements/cuda.txt" in raised.value.cure


def test_an_unknown_implementation_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(UserError) as raised:
        causal_conv1d_silu(*inputs(3, 1, 12, 4), implementation="cuda")
    assert all(name in raised.value.cure for name in IMPLEMENTATIONS)


@pytest.mark.parametrize(("dtype", "taps"), [(torch.float64, 4), (torch.float32, 5)])
def test_what_the_kernel_does_not_take_is_an_error(dtype: torch.dtype, taps: int) -> None:
    x, weight, bias = inputs(3, 1, 12, taps, dtype=dtype)
    with pytest.raises(UserError):
        causal_conv1d_silu(x, weight, bias, implementation="triton")
    assert torch.equal(causal_conv1d_silu(x, weight, bias), causal_conv1d_silu_ref(x, weight, bias))


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "num_biases"), [((3, 5), (4, 2), 3), ((3, 5), (3, 2), 1), ((3,), (3, 2), 3)]
)
def test_shapes_that_do_not_fit(x_shape: tuple[int, ...], weight_shape: tuple[int, int], num_biases: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        causal_conv1d_silu(torch.zeros(x_shape), torch.zeros(weight_shape), torch.zeros(num_biases))
