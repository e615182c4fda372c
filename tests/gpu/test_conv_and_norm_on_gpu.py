"""Convolution and norm compiled for this GPU, against their references on it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunescope.kernels.causal_conv import causal_conv1d_silu
from tunescope.kernels.rms_norm import add_rms_norm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CHANNELS, WIDTH = 2944, 1472  # of BlackMamba-2.8B
GIB = 2**30
FP32, BF16 = 5e-6, 2.0**-8
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
BATCHES = pytest.mark.parametrize("batch", [1, 30, 84])
LENGTHS = pytest.mark.parametrize("length", [1, 29, 128, 200, 512, 2051])


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], upstream: list[Tensor]
) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    made = function(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    torch.autograd.backward(outputs, upstream)
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Distance relative to the norm; numbers that should be near zero count as if they were of size 1."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = torch.linalg.vector_norm(other.float()) + other.numel() ** 0.5
        assert torch.linalg.vector_norm(one.float() - other.float()) <= tolerance * scale


def convolve(implementation: str) -> Callable[..., Tensor]:
    return lambda x, weight, bias: causal_conv1d_silu(x, weight, bias, implementation=implementation)


def convolution_inputs(
    channels: int, batch: int, length: int, dtype: torch.dtype, taps: int = 4
) -> tuple[list[Tensor], list[Tensor]]:
    """x is the first half of a product's output, as in the model."""
    torch.manual_seed(0)
    both = torch.randn(2 * channels, batch, length, device=DEVICE, dtype=dtype)
    weight, bias = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in ((channels, taps), (channels,)))
    return [both[:channels], weight, bias], [torch.randn(channels, batch, length, device=DEVICE, dtype=dtype)]


@DTYPES
@BATCHES
@LENGTHS
def test_convolution_equals_the_reference(dtype: torch.dtype, tolerance: float, batch: int, length: int) -> None:
    inputs, upstream = convolution_inputs(96, batch, length, dtype)
    expected = run(convolve("reference"), inputs, upstream)
    assert_near(run(convolve("triton"), inputs, upstream), expected, tolerance)
    assert_near(run(convolve("auto"), inputs, upstream), expected, tolerance)


@DTYPES
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("length", [128, 131])
def test_convolution_of_any_width(dtype: torch.dtype, tolerance: float, taps: int, length: int) -> None:
    inputs, upstream = convolution_inputs(CHANNELS, 3, length, dtype, taps)
    assert_near(run(convolve("triton"), inputs, upstream), run(convolve("reference"), inputs, upstream), tolerance)


@pytest.mark.parametrize("batch", [1, 30])
def test_convolution_equals_the_cuda_kernel(batch: int) -> None:
    pytest.importorskip("causal_conv1d", reason="the package causal-conv1d is not installed")
    inputs, upstream = convolution_inputs(CHANNELS, batch, 200, torch.bfloat16)
    assert_near(run(convolve("triton"), inputs, upstream), run(convolve("mamba-ssm"), inputs, upstream), BF16)


def test_convolution_beyond_two_thousand_million_numbers() -> None:
    """Offsets do not fit 32 bits; the last channel and the last sequence lie behind them."""
    channels, batch, length = CHANNELS, 360, 2056
    if torch.cuda.mem_get_info()[0] < 24 * GIB:
        pytest.skip("needs 24 GiB of free GPU memory")
    assert channels * batch * length > 2**31
    x = torch.zeros(channels, batch, length, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = torch.randn(batch, length, device=DEVICE)
    weight, bias = (torch.randn(shape, device=DEVICE, dtype=x.dtype) for shape in ((channels, 4), (channels,)))
    dy = torch.zeros_like(x)
    dy[-1] = torch.randn(batch, length, device=DEVICE)
    y, dx, dweight, dbias = run(convolve("triton"), [x, weight, bias], [dy])
    expected = run(convolve("reference"), [x[-1:], weight[-1:], bias[-1:]], [dy[-1:]])
    assert_near([y[-1:], dx[-1:], dweight[-1:], dbias[-1:]], expected, BF16)
    assert not dx[:-1].any()


def normalise(implementation: str) -> Callable[..., tuple[Tensor, ...]]:
    """Of (hidden, weight), or of (hidden, weight, residual)."""

    def function(hidden: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        return add_rms_norm(hidden, residual, weight, 1e-5, implementation=implementation)

    return function


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    hidden = torch.randn(shape, device=DEVICE, dtype=dtype)
    weight = torch.randn(shape[-1], device=DEVICE, dtype=dtype)
    residual = 8 * torch.randn(shape, device=DEVICE)
    return [hidden, weight, residual], [torch.randn_like(hidden), torch.randn_like(residual)]


@DTYPES
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("shape", [(1, WIDTH), (128, WIDTH), (30, 200, WIDTH), (84, 128, 1152), (5, 4097), (3, 2, 40)])
def test_norm_equals_the_reference(
    dtype: torch.dtype, tolerance: float, has_residual: bool, shape: tuple[int, ...]
) -> None:
    inputs, upstream = norm_inputs(shape, dtype)
    inputs = inputs[: 2 + has_residual]
    expected = run(normalise("reference"), inputs, upstream)
    assert_near(run(normalise("triton"), inputs, upstream), expected, tolerance)
    assert_near(run(normalise("auto"), inputs, upstream), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    for function, (inputs, upstream) in (
        (convolve("triton"), convolution_inputs(CHANNELS, 30, 200, dtype)),
        (normalise("triton"), norm_inputs((30, 200, WIDTH), dtype)),
    ):
        first, second = (run(function, inputs, upstream) for _ in range(2))
        assert all(map(torch.equal, first, second))
