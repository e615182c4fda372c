"""The selective scan's kernels as the GPU runs them, against the reference in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from tunescope.kernels.selective_scan import selective_scan
from tunescope.kernels.selective_scan_triton import _config

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NAMES = ("c", "delta", "A", "B", "C", "D", "z", "delta_bias")
STATES = 16
LENGTHS = (1, 29, 128, 200, 512, 2051)


def inputs(channels: int, batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Laid out as in the model: c and z halves of one product, B and C rows of another's; dy is the gradient of y."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    c, z = normal(2 * channels, batch * length).to(dtype).view(-1, batch, length).chunk(2)
    _, B, C = normal(5 + 2 * STATES, batch * length).to(dtype).view(-1, batch, length).split([5, STATES, STATES])
    return {
        "c": c,
        "delta": normal(channels, batch, length).to(dtype),
        "A": -torch.exp(0.3 * normal(channels, STATES)) * torch.arange(1, STATES + 1, device=DEVICE),
        "B": B,
        "C": C,
        "D": normal(channels).to(dtype),
        "z": z,
        "delta_bias": (normal(channels) - 3).to(dtype),
        "dy": normal(channels, batch, length).to(dtype),
    }


def run(implementation: str, case: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, and the gradient of each input under its name. dtype: of all, None leaves theirs."""
    leaves = {name: case[name].detach().to(dtype or case[name].dtype).requires_grad_() for name in NAMES}
    y = selective_scan(*leaves.values(), implementation=implementation)
    y.backward(case["dy"].to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


# Odd numbers of channels, where nothing is a multiple of a block, and even ones; enough for all kinds of launch.
SIZES = [
    *itertools.product([67], [1, 30], LENGTHS),
    *itertools.product([64, 2944], [1], LENGTHS),
    (67, 84, 29), (200, 84, 128), (2944, 30, 64), (1000, 84, 29), (1000, 20, 200),
]  # fmt: skip


def test_the_sizes_take_every_kind_of_launch() -> None:
    assert {_config(*size)[0].is_split for size in SIZES} == {True, False}
    launches = {_config(*size)[1] for size in SIZES}
    assert {launch.is_split for launch in launches} == {True, False}
    assert {launch.blocks > 1 for launch in launches if launch.is_split} == {True, False}
    assert {launch.blocks > 1 for launch in launches if not launch.is_split} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_equal_the_reference(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = inputs(*size, dtype)
    found, expected = run("auto", case), run("reference", case, torch.float64)
    for name, tensor in expected.items():
        assert found[name].dtype == (torch.float32 if name == "A" else dtype)
        # A GPU's exponentials are good for 2e-7 each; one rounding to bf16 leaves about a fifth of its eps.
        tolerance = 1e-5 if found[name].dtype == torch.float32 else torch.finfo(dtype).eps / 3
        assert (found[name].double() - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("size", [(2944, 1, 128), (2944, 1, 2051), (2944, 30, 128), (67, 3, 29)], ids=str)
def test_the_same_input_gives_the_same_bits(size: tuple[int, int, int]) -> None:
    case = inputs(*size, torch.bfloat16)
    first, second = run("triton", case), run("triton", case)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_nothing_beyond_the_rows_is_read() -> None:
    """NaN lies around every row of every input."""
    case = inputs(67, 3, 29, torch.float32)
    clean = run("triton", case)
    fenced = {
        name: torch.nn.functional.pad(tensor, (8, 8), value=float("nan"))[..., 8:-8] for name, tensor in case.items()
    }
    for name, tensor in run("triton", fenced).items():
        assert torch.equal(tensor, clean[name]), name


def test_a_cuda_graph_of_both_passes_gives_the_same_bits() -> None:
    """Nothing in them waits for the device, nor depends on what the host does in between."""
    case = inputs(2944, 1, 2051, torch.bfloat16)
    eager = run("triton", case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        run("triton", case)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = run("triton", case)
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in eager.items():
        assert torch.equal(captured[name], tensor), name
