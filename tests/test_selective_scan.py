"""The selective scan: its reference against golden vectors, its kernels against the reference.

golden/selective_scan.safetensors: the original model's scan, step by step in float64, its gradients by autograd.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tunescope.errors import UserError
from tunescope.kernels import selective_scan_triton
from tunescope.kernels.selective_scan import IMPLEMENTATIONS, selective_scan, selective_scan_ref
from tunescope.kernels.selective_scan_triton import _config, _Launch

GOLDEN = Path(__file__).with_name("golden") / "selective_scan.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = pytest.mark.parametrize("implementation", ["triton", "reference"])
FP32 = 2e-6 if DEVICE == "cpu" else 1e-5  # a GPU's exponentials are good for 2e-7 each
NAMES = ("c", "delta", "A", "B", "C", "D", "z", "delta_bias")
OVER_TIME = ("c", "delta", "B", "C", "z")

# Launches of forward and backward that give short sequences several tiles, and few channels several programs.
LAUNCHES = {
    "as chosen": None,
    "tile after tile": (_Launch(16, 16), _Launch(16, 16)),
    "longer tiles forward": (_Launch(8, 32), _Launch(16, 16)),
    "two channels a thread, twice": (_Launch(16, 32), _Launch(16, 32, blocks=2)),
    "split": (_Launch(16, 16), _Launch(16, 16, is_split=True)),
    "split, twice": (_Launch(8, 32), _Launch(32, 16, blocks=2, is_split=True)),
    "both split": (_Launch(32, 16, is_split=True), _Launch(32, 16, is_split=True)),
    "forward split": (_Launch(16, 16, is_split=True), _Launch(16, 16)),
}


def launched(how: str) -> Any:
    return mock.patch.object(selective_scan_triton, "_config", lambda *sizes: LAUNCHES[how] or _config(*sizes))


def inputs(channels: int, batch: int, length: int, states: int, *, seed: int = 0) -> dict[str, Tensor]:
    """As in a model: steps from 0.001 to 1, decays around -1 to -states. dy is the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    by_time = dict.fromkeys(("c", "delta", "z", "dy"), (channels, batch, length))
    shapes = by_time | {"B": (states, batch, length), "C": (states, batch, length)}
    shapes |= {"A": (channels, states), "D": (channels,), "delta_bias": (channels,)}
    case = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    case["delta_bias"] = case["delta_bias"] - 2
    case["A"] = -torch.exp(0.3 * case["A"]) * torch.arange(1, states + 1, device=DEVICE)
    return case


def scan(implementation: str, case: dict[str, Tensor]) -> Tensor:
    return selective_scan(*(case.get(name) for name in NAMES), implementation=implementation)


def run(implementation: str, case: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, and the gradient of each input under its name. Strides are kept. dtype: of all; None leaves each its own."""
    leaves = {
        name: case[name].detach().to(dtype or case[name].dtype).requires_grad_() for name in NAMES if name in case
    }
    y = scan(implementation, leaves)
    y.backward(case["dy"].to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def assert_near(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, *, least_size: float = 0.0
) -> None:
    """Distance relative to the norm, where numbers count as of least_size at least: sums may cancel."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        scale = tensor.double().norm() + least_size * tensor.numel() ** 0.5
        assert (found[name].double() - tensor.double()).norm() <= tolerance * scale, name


# --- against numbers that are known ---


@pytest.mark.parametrize("case", ["main", "len1", "len3", "long", "noDz"])
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-12), ("reference", torch.float32, FP32), ("triton", torch.float32, FP32)],
)
def test_golden_vectors(case: str, implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    golden = {
        name.removeprefix(f"{case}."): tensor.to(DEVICE)
        for name, tensor in load_file(GOLDEN).items()
        if name.startswith(f"{case}.")
    }
    golden["c"], golden["grad_c"] = golden.pop("u"), golden.pop("grad_u")
    golden["dy"] = golden.pop("dout")
    for name in (*OVER_TIME, "dy", "y", *(f"grad_{name}" for name in OVER_TIME)):
        if name in golden:
            golden[name] = golden[name].transpose(0, 1)
    found = run(implementation, golden, dtype)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    expected = {name: golden[f"grad_{name}"] for name in NAMES if f"grad_{name}" in golden}
    assert_near(found, {"y": golden["y"], **expected}, tolerance)


@RUNS_HERE
def test_an_impulse_decays_by_the_exponential_of_all_steps_since(implementation: str) -> None:
    """Over five tiles, and its gradient back over as many."""
    case = inputs(3, 2, 80, 4)
    del case["D"], case["z"]
    case["c"][:, :, 1:] = 0
    case["A"] *= 0.05  # or nothing would be left of it
    case["dy"][:, :, :-1] = 0
    Delta = functional.softplus(case["delta"].double() + case["delta_bias"].double()[:, None, None])
    since = Delta.cumsum(-1) - Delta[..., :1]
    kernel = torch.einsum(
        "nbl,nb,eb,enbl->ebl",
        case["C"].double(),
        case["B"][..., 0].double(),
        Delta[..., 0],
        torch.exp(case["A"].double()[..., None, None] * since[:, None]),
    )
    assert kernel[..., -1].abs().max() > 0.01
    with launched("tile after tile"):
        found = run(implementation, case)
    assert_near({"y": found["y"]}, {"y": kernel * case["c"][..., :1]}, FP32)
    torch.testing.assert_close(found["c"][..., 0].double(), kernel[..., -1] * case["dy"][..., -1], rtol=1e-4, atol=1e-6)


# --- what must always hold ---


@RUNS_HERE
@pytest.mark.parametrize("changed", [0, 15, 16, 20, 36])
def test_nothing_depends_on_what_comes_later(implementation: str, changed: int) -> None:
    case = inputs(3, 2, 37, 2)
    case["dy"][:, :, changed:] = 0
    other = {name: tensor.clone() for name, tensor in case.items()}
    for name in OVER_TIME:
        other[name][:, :, changed:] += 1
    with launched("tile after tile"):
        one, two = run(implementation, case), run(implementation, other)
    assert torch.equal(one["y"][:, :, :changed], two["y"][:, :, :changed])
    assert not torch.equal(one["y"][:, :, changed], two["y"][:, :, changed])
    assert all((one[name][:, :, changed:] == 0).all() for name in OVER_TIME)


def test_sequences_know_nothing_of_each_other() -> None:
    case = inputs(3, 3, 37, 2)
    with launched("two channels a thread, twice"):
        together = run("triton", case)
        alone = [run("triton", case | {name: case[name][:, [b]] for name in (*OVER_TIME, "dy")}) for b in range(3)]
    for name in ("y", *OVER_TIME):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone], dim=1)), name
    for name in ("A", "D", "delta_bias"):
        torch.testing.assert_close(together[name], sum(one[name] for one in alone), rtol=1e-5, atol=1e-5)


@RUNS_HERE
@pytest.mark.parametrize("border", [16, 21])
@pytest.mark.parametrize("launch", ["tile after tile", "both split"])
def test_a_step_that_forgets_everything_cuts_the_scan_in_two(implementation: str, launch: str, border: int) -> None:
    """At the border of tiles and within one: what follows is the scan of what follows alone."""
    case = inputs(3, 2, 40, 2)
    case["delta"][:, :, border] = 500.0
    parts = [slice(0, border), slice(border, None)]
    with launched(launch):
        whole = run(implementation, case)
        halves = [
            run(implementation, case | {name: case[name][:, :, part] for name in (*OVER_TIME, "dy")}) for part in parts
        ]
    joined = {name: torch.cat([half[name] for half in halves], dim=-1) for name in ("y", *OVER_TIME)}
    summed = {name: halves[0][name] + halves[1][name] for name in ("A", "D", "delta_bias")}
    assert_near(whole, {name: (joined | summed)[name] for name in whole}, FP32)


def test_sizes_that_fill_a_gpu_and_sizes_that_do_not() -> None:
    """The kernels rely on all of this; E is the model's, and others."""
    for channels in (1, 7, 2304, 2944):
        for batch in (1, 2, 6, 30, 84):
            for length in (1, 3, 16, 29, 64, 128, 200, 512, 2051):
                forward, backward = _config(channels, batch, length)
                assert backward.tile <= forward.tile <= max(16, 2 * length)
                assert forward.tile % backward.tile == 0
                for launch in (forward, backward):
                    assert launch.tile in (16, 32, 64, 128)
                    assert 2 <= launch.rows <= 16
                    assert launch.block_e % launch.rows == 0
                assert not forward.is_split or forward.tile == backward.tile  # the states are backward's too
    assert all(launch.is_split for launch in _config(2944, 1, 2048))
    assert not any(launch.is_split for launch in _config(2944, 1, 128))
    assert not any(launch.is_split for launch in _config(2944, 84, 2048))
    assert _config(2944, 84, 128)[1].blocks > 1


# --- kernels against the reference ---

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "rows of a product": lambda x: torch.cat([torch.full_like(x, 7), x, torch.full_like(x, 7)])[len(x) : -len(x)],
    "batch outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows with a gap": lambda x: functional.pad(x, (8, 8), value=7.0)[..., 8:-8],
    "rows at odd places": lambda x: functional.pad(x, (3, 2), value=7.0)[..., 3:-2],
    "time outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@given(
    channels=st.integers(1, 9) | st.sampled_from([16, 32, 33]),
    batch=st.integers(1, 3),
    length=st.integers(1, 40) | st.integers(1, 5).map(lambda blocks: 8 * blocks),
    states=st.integers(1, 3),
    seed=st.integers(0, 99),
    launch=st.sampled_from(list(LAUNCHES)),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 6),
    absent=st.sets(st.sampled_from(["D", "z"])),
)
@settings(max_examples=25, deadline=None)
def test_kernels_equal_the_reference(
    channels: int,
    batch: int,
    length: int,
    states: int,
    seed: int,
    launch: str,
    layouts: tuple[str, ...],
    absent: set[str],
) -> None:
    case = inputs(channels, batch, length, states, seed=seed)
    case = {name: tensor for name, tensor in case.items() if name not in absent}
    expected = run("reference", case, torch.float64)
    for name, layout in zip((*OVER_TIME, "dy"), layouts, strict=True):
        if name in case:
            case[name] = LAYOUTS[layout](case[name])
    with launched(launch):
        found = run("triton", case)
    assert_near(found, expected, FP32, least_size=0.1)
    assert found["y"].is_contiguous()


@pytest.mark.parametrize("layout", ["rows at odd places", "time outermost"])
@pytest.mark.parametrize("name", [*OVER_TIME, "dy"])
def test_one_tensor_may_be_laid_out_otherwise(name: str, layout: str) -> None:
    """Not as vectors, or copied: where all others could be read as they are."""
    case = inputs(3, 2, 16, 2)
    expected = run("reference", case, torch.float64)
    case[name] = LAYOUTS[layout](case[name])
    assert_near(run("triton", case), expected, FP32)


@pytest.mark.parametrize(("launch", "length"), [*((launch, 42) for launch in LAUNCHES), ("both split", 170)])
def test_every_launch_equals_the_reference(launch: str, length: int) -> None:
    """Programs, tiles and sequences: several of each, none whole. The longest has more tiles than are read at once."""
    case = inputs(35, 2, length, 2)
    with launched(launch):
        assert_near(run("triton", case), run("reference", case, torch.float64), FP32)


@pytest.mark.parametrize("num_runs", [1, 5])
@pytest.mark.parametrize("num_blocks", [1, 5, 300])
@pytest.mark.parametrize("has_D", [True, False])
def test_what_programs_leave_is_summed(num_blocks: int, num_runs: int, has_D: bool) -> None:
    """More than a program reads at once, and less; each gradient in the dtype of its input."""
    channels, batch, length, states = 67, 2, 19, 3
    generator = torch.Generator().manual_seed(0)
    dBC = torch.randn(num_blocks, 2, states, batch, length, generator=generator).to(DEVICE)
    per_channel = torch.randn(num_runs, states + 2, channels, generator=generator).to(DEVICE)
    B, C = dBC.new_empty(states, batch, length, dtype=torch.float16), dBC.new_empty(states, batch, length)
    D, bias = dBC.new_empty(channels) if has_D else None, dBC.new_empty(channels, dtype=torch.float16)
    dA, dB, dC, dD, dbias = selective_scan_triton._sums(dBC, per_channel, B, C, D, bias)
    shared, own = dBC.double().sum(0), per_channel.double().sum(0)
    assert dB.dtype == dbias.dtype == torch.float16
    torch.testing.assert_close(dB.double(), shared[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dC.double(), shared[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dA.double(), own[:states].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias.double(), own[states], rtol=1e-3, atol=1e-3)
    assert (dD is None) == (D is None)
    if dD is not None:
        torch.testing.assert_close(dD.double(), own[states + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("step", [-60.0, -30.0, 19.9, 20.1, 80.0])
def test_extreme_steps_and_gates(step: float) -> None:
    """Beyond 20, torch's softplus is its input; far below, it is tiny but not zero."""
    case = inputs(3, 1, 9, 2)
    case["delta"][:, :, ::2] = step - case["delta_bias"][:, None, None]
    case["z"][:, :, 1] = 200.0
    case["z"][:, :, 2] = -200.0
    expected, found = run("reference", case, torch.float64), run("triton", case)
    assert_near(found, expected, 2 * FP32)
    of_steps = [{"delta": gradients["delta"][:, :, ::2]} for gradients in (found, expected)]
    assert_near(*of_steps, 1e-5)  # among the others they might be lost


@RUNS_HERE
@pytest.mark.parametrize("length", [19, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_and_gradients_are_rounded_once(implementation: str, length: int, dtype: torch.dtype) -> None:
    case = {name: tensor if name == "A" else tensor.to(dtype) for name, tensor in inputs(5, 2, length, 3).items()}
    exact = run("reference", case, torch.float64)
    is_cut = (
        dtype == torch.bfloat16 and DEVICE == "cpu" and implementation == "triton"
    )  # so Triton's interpreter does it
    rounding = torch.finfo(dtype).eps * (1 if is_cut else 0.5)
    for name, found in run(implementation, case).items():
        assert found.dtype == (torch.float32 if name == "A" else dtype)
        if implementation == "reference" and name not in ("y", "A"):
            continue  # autograd rounds on the way
        allowed = 1e-5 + rounding * 1.01 * exact[name].abs()
        assert ((found.double() - exact[name]).abs() <= allowed).all(), name


def test_gradients_of_slices_arrive_where_they_were_taken() -> None:
    """c and z are halves of one product, B and C rows of another: as the model calls it."""
    channels, batch, length, states = 8, 2, 16, 2
    case = inputs(channels, batch, length, states)

    def gradients(implementation: str) -> list[Tensor]:
        c_and_z = torch.cat([case["c"], case["z"]]).flatten(1).requires_grad_()
        rows = torch.cat([case["delta"], case["B"], case["C"]]).flatten(1).requires_grad_()
        c, z = c_and_z.view(-1, batch, length).chunk(2)
        delta, B, C = rows.view(-1, batch, length).split([channels, states, states])
        y = scan(implementation, case | {"c": c, "z": z, "delta": delta, "B": B, "C": C})
        y.sum().backward()
        return [leaf.grad for leaf in (c_and_z, rows) if leaf.grad is not None]

    for found, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@RUNS_HERE
def test_only_what_asks_for_a_gradient_gets_one(implementation: str) -> None:
    case = inputs(3, 1, 20, 2)
    everything = run(implementation, case)
    for name in NAMES:
        leaf = case[name].clone().requires_grad_()
        scan(implementation, case | {name: leaf}).backward(case["dy"])
        assert torch.equal(leaf.grad, everything[name])


@pytest.mark.parametrize("launch", ["as chosen", "longer tiles forward", "both split"])
def test_without_gradients_the_output_is_the_same(launch: str) -> None:
    case = inputs(3, 2, 140, 2)
    with launched(launch):
        y = scan("triton", case)
        assert not y.requires_grad
        assert torch.equal(y, run("triton", case)["y"])
        case["c"].requires_grad_()
        with torch.no_grad():
            assert torch.equal(y, scan("triton", case))


def test_parameters_may_have_any_stride() -> None:
    case = inputs(5, 2, 12, 3)
    spread = {name: torch.stack([case[name], case[name]], -1)[..., 0] for name in ("A", "D", "delta_bias")}
    assert not any(tensor.is_contiguous() for tensor in spread.values())
    assert_near(run("triton", case | spread), run("reference", case, torch.float64), FP32)


# --- the choice ---


def test_auto_is_the_reference_where_there_is_no_gpu_and_in_float64() -> None:
    case = {name: tensor.cpu() for name, tensor in inputs(2, 1, 5, 2).items()}
    with mock.patch("tunescope.kernels.selective_scan_triton.selective_scan_triton", side_effect=AssertionError):
        assert torch.equal(scan("auto", case), selective_scan_ref(*(case[name] for name in NAMES)))
        double = {name: tensor.to(DEVICE, torch.float64) for name, tensor in case.items()}
        assert scan("auto", double).dtype == torch.float64


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(UserError, match="'cuda'") as caught:
        scan("cuda", inputs(2, 1, 5, 2))
    assert all(name in caught.value.cure for name in IMPLEMENTATIONS)


def test_float64_is_not_for_triton() -> None:
    with pytest.raises(UserError, match="float64"):
        scan("triton", {name: tensor.double() for name, tensor in inputs(2, 1, 5, 2).items()})


def test_a_cpu_is_not_for_triton_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="on cpu"):
        scan("triton", {name: tensor.cpu() for name, tensor in inputs(2, 1, 5, 2).items()})


def test_triton_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="Triton") as caught:
        scan("triton", inputs(2, 1, 5, 2))
    assert "reference" in caught.value.cure


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    case = inputs(2, 1, 5, 2)
    case[name] = torch.cat([case[name], case[name]])
    with pytest.raises(ValueError, match="must be"):
        scan("reference", case)


def test_a_package_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(UserError, match="mamba-ssm") as caught:
        scan("mamba-ssm", inputs(2, 1, 5, 2))
    assert "triton" in caught.value.cure


@pytest.mark.parametrize("absent", [(), ("D", "z")])
def test_the_package_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]) -> None:
    """Batch first, parameters of a channel in fp32, the step's bias and softplus left to it."""

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, delta_bias: Tensor, **how: Any
    ) -> Tensor:
        assert how == {"delta_softplus": True}
        assert u.shape == delta.shape == (3, 2, 5)
        assert B.shape == C.shape == (3, 4, 5)
        assert {tensor.dtype for tensor in (A, D, delta_bias) if tensor is not None} == {torch.float32}
        u, delta, B, C = (tensor.transpose(0, 1) for tensor in (u, delta, B, C))
        z = None if z is None else z.transpose(0, 1)
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias).transpose(0, 1)

    interface = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    case = {name: tensor.half() for name, tensor in inputs(2, 3, 5, 4).items() if name not in absent}
    y = scan("mamba-ssm", case)
    assert torch.equal(y, scan("reference", case))
    assert y.dtype == torch.float16
