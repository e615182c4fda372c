"""Residual addition and RMSNorm: reference and kernels against the formula in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunescope.errors import UserError
from tunescope.kernels import rms_norm
from tunescope.kernels.rms_norm import IMPLEMENTATIONS, add_rms_norm, add_rms_norm_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = pytest.mark.parametrize("implementation", ["triton", "reference"])
EPS = 1e-5
FP32 = 2e-6
FP16 = 2.0**-10
OUTPUTS = ("normed", "residual_out")
GRADIENTS = ("hidden", "residual", "weight")
ALL = OUTPUTS + tuple(f"d{name}" for name in GRADIENTS)


def inputs(
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    hidden_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Inputs, and gradients of the outputs. No number of hidden is small; the residual is large, as deep in a model."""
    generator = torch.Generator().manual_seed(seed)
    normal = {name: torch.randn(shape, generator=generator).to(DEVICE) for name in ("hidden", "residual", *OUTPUTS)}
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator).to(DEVICE)
    return {
        "hidden": (normal["hidden"] + normal["hidden"].sign()).to(hidden_dtype),
        "residual": (8 * normal["residual"]).to(residual_dtype),
        "weight": weight.to(weight_dtype),
        "dnormed": normal["normed"].to(weight_dtype),
        "dresidual_out": normal["residual_out"],
    }


def run(
    implementation: str, case: dict[str, Tensor], dtype: torch.dtype | None = None, outputs: tuple[str, ...] = OUTPUTS
) -> dict[str, Tensor]:
    """Outputs and gradients, where only `outputs` go into the loss. dtype: for all inputs; None leaves theirs."""
    case = {name: tensor.to(dtype or tensor.dtype) for name, tensor in case.items()}
    leaves = {name: case[name].detach().requires_grad_() for name in GRADIENTS if name in case}
    made = add_rms_norm(leaves["hidden"], leaves.get("residual"), leaves["weight"], EPS, implementation=implementation)
    found = dict(zip(OUTPUTS, made, strict=True))
    torch.autograd.backward([found[name] for name in outputs], [case[f"d{name}"] for name in outputs])
    found |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: tensor.detach() for name, tensor in found.items()}


def formula(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything in float64 by hand, except for the rounding of the norm's input."""
    hidden, weight, dnormed, dresidual_out = (
        case[name].double() for name in ("hidden", "weight", "dnormed", "dresidual_out")
    )
    exact = hidden + case["residual"].double() if "residual" in case else hidden
    residual_out = exact.to(torch.promote_types(case["hidden"].dtype, torch.float32))
    x = residual_out.to(case["weight"].dtype).double()
    rstd = ((x**2).mean(-1, keepdim=True) + EPS) ** -0.5
    dunit = dnormed * weight
    dx = rstd * dunit - rstd**3 * x * (dunit * x).mean(-1, keepdim=True)
    dhidden = dx + dresidual_out
    return {
        "normed": x * rstd * weight,
        "residual_out": exact,
        "dhidden": dhidden,
        **({"dresidual": dhidden} if "residual" in case else {}),
        "dweight": (dnormed * x * rstd).flatten(0, -2).sum(0),
    }


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    """Distance relative to the norm; numbers that should be near zero count as if they were of size 1.

    One tolerance for each name; `all` for those not named.
    """
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        true = expected[name].double()
        assert tensor.shape == true.shape, name
        tolerance = tolerances.get(name, tolerances["all"])
        assert (tensor.double() - true).norm() <= tolerance * (true.norm() + true.numel() ** 0.5), name


# --- against the formula ---


@RUNS_HERE
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    seed=st.integers(0, 99),
    has_residual=st.booleans(),
    outputs=st.sampled_from([OUTPUTS, OUTPUTS[:1], OUTPUTS[1:]]),
)
@settings(max_examples=40, deadline=None)
def test_outputs_and_gradients_equal_the_formula(
    implementation: str, shape: tuple[int, int], seed: int, has_residual: bool, outputs: tuple[str, ...]
) -> None:
    case = inputs(shape, seed=seed)
    if not has_residual:
        del case["residual"]
    in_loss = {name: tensor if name[1:] in outputs or name[0] != "d" else 0 * tensor for name, tensor in case.items()}
    expected = formula(in_loss)
    if "normed" not in outputs:  # the weight had no part in the loss
        del expected["dweight"]
    assert_near(run(implementation, case, outputs=outputs), expected, all=FP32)


def test_the_reference_in_float64_is_the_formula_without_any_rounding() -> None:
    case = {name: tensor.double() for name, tensor in inputs((3, 92)).items()}
    found = run("reference", case)
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    expected = formula(case)
    assert_near(found, expected, all=1e-14)


@RUNS_HERE
def test_the_widths_of_the_two_models_in_half_precision(implementation: str) -> None:
    """fp16, which the interpreter rounds as a GPU does. The gradient of the weight is a sum of what is not rounded."""
    for width in (1472, 1152):
        case = inputs((3, width), hidden_dtype=torch.float16, weight_dtype=torch.float16)
        found = run(implementation, case)
        dtypes = {"residual_out": torch.float32, "dresidual": torch.float32}
        assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(ALL, torch.float16) | dtypes
        assert_near(found, formula(case), all=FP16, residual_out=1e-7, dresidual=FP32)


@RUNS_HERE
def test_the_output_is_rounded_once(implementation: str) -> None:
    case = inputs((4, 60), hidden_dtype=torch.float16, weight_dtype=torch.float16)
    found, true = run(implementation, case), formula(case)
    for name in ("normed", "dhidden", "dweight"):
        assert ((found[name].double() - true[name]).abs() <= 1.001 * 2.0**-11 * true[name].abs() + 2e-6).all(), name


@pytest.mark.parametrize(
    "dtypes",
    [
        {"hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16},
        {"hidden_dtype": torch.bfloat16},  # fp32 weights under autocast
        {"weight_dtype": torch.bfloat16},
        {"hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "residual_dtype": torch.bfloat16},
    ],
)
def test_mixed_dtypes(dtypes: dict[str, Any]) -> None:
    case = inputs((3, 92), **dtypes)
    found, expected = run("triton", case), run("reference", case)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert found["normed"].dtype == case["weight"].dtype
    assert found["residual_out"].dtype == torch.float32
    assert_near(found, expected, all=2.0**-7, residual_out=1e-7)  # the interpreter cuts bf16 off instead of rounding it


@RUNS_HERE
def test_the_norm_sees_the_sum_rounded_to_the_weights_dtype(implementation: str) -> None:
    """The first number, 1 + 0.49 ulp, is 1 to the norm, which scales by 1 + 0.25 ulp. Unrounded it would end higher."""
    ulp = 2.0**-10
    residual = torch.ones(1, 64, device=DEVICE)
    residual[0, 32:] -= ulp / 2
    hidden = torch.zeros_like(residual)
    hidden[0, 0] = 0.49 * ulp
    weight = torch.ones(64, device=DEVICE, dtype=torch.float16)
    normed, residual_out = add_rms_norm(hidden, residual, weight, 0.0, implementation=implementation)
    assert residual_out[0, 0].item() == pytest.approx(1 + 0.49 * ulp, abs=1e-7)
    assert normed[0, 0].item() == 1


# --- laws ---


@RUNS_HERE
def test_rows_know_nothing_of_each_other(implementation: str) -> None:
    case = inputs((3, 20))
    together = run(implementation, case)
    for row in range(3):
        alone = run(implementation, {n: t if n == "weight" else t[[row]] for n, t in case.items()})
        for name in ("normed", "residual_out", "dhidden", "dresidual"):
            assert torch.equal(alone[name], together[name][[row]]), name


@RUNS_HERE
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (2, 1, 3, 20)])
def test_any_leading_axes(implementation: str, shape: tuple[int, ...]) -> None:
    case = inputs(shape)
    flat = {name: tensor if name == "weight" else tensor.reshape(-1, 20) for name, tensor in case.items()}
    found, expected = run(implementation, case), run(implementation, flat)
    for name, tensor in found.items():
        assert tensor.shape == case[name.removeprefix("d") if name.startswith("d") else "hidden"].shape, name
        assert torch.equal(tensor.view(expected[name].shape), expected[name]), name


def test_rows_that_are_not_contiguous() -> None:
    case = inputs((4, 20))
    expected = run("triton", case)
    wide = {
        name: torch.stack([tensor, -tensor], -1)[..., 0] if name != "weight" else torch.stack([tensor] * 2, 1)[:, 0]
        for name, tensor in case.items()
    }
    assert not any(tensor.is_contiguous() for tensor in wide.values())
    found = run("triton", wide)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 9])
def test_the_weights_gradient_when_programs_walk_several_rows(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "_MAX_BACKWARD_PROGRAMS", 4)
    case = inputs((num_tokens, 20))
    assert_near(run("triton", case), formula(case), all=FP32)


def test_a_frozen_weight_gets_no_gradient_and_the_rest_does() -> None:
    case = inputs((3, 20))
    hidden = case["hidden"].requires_grad_()
    normed, _ = add_rms_norm(hidden, None, case["weight"], EPS, implementation="triton")
    normed.backward(case["dnormed"])
    del case["residual"]
    case["dresidual_out"] = torch.zeros_like(hidden)
    assert hidden.grad is not None
    assert_near({"dhidden": hidden.grad}, {"dhidden": formula(case)["dhidden"]}, all=FP32)


def test_autocast_changes_nothing() -> None:
    case = inputs((3, 20))
    with torch.autocast(DEVICE, torch.bfloat16):
        under = [run(name, case) for name in ("triton", "reference")]
    for found, name in zip(under, ("triton", "reference"), strict=True):
        expected = run(name, case)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_chain_of_norms_has_the_gradient_of_the_references_chain() -> None:
    """As in a model: each block's residual goes on to the next, and of the last one only the norm is used."""
    case = inputs((3, 20))
    gradients = []
    for implementation in ("triton", "reference"):
        hidden = case["hidden"].detach().requires_grad_()
        normed, residual = add_rms_norm(hidden, None, case["weight"], EPS, implementation=implementation)
        normed, residual = add_rms_norm(normed.sin(), residual, case["weight"], EPS, implementation=implementation)
        normed, _ = add_rms_norm(normed.cos(), residual, case["weight"], EPS, implementation=implementation)
        normed.backward(case["dnormed"])
        gradients.append(hidden.grad)
    assert gradients[0] is not None
    assert_near({"hidden": gradients[0]}, {"hidden": gradients[1]}, all=FP32)


# --- the choice of an implementation ---


def test_auto_is_the_reference_on_a_cpu() -> None:
    hidden, weight = torch.randn(3, 1472), torch.randn(1472)
    found, expected = add_rms_norm(hidden, None, weight, EPS), add_rms_norm_ref(hidden, None, weight, EPS)
    assert all(map(torch.equal, found, expected))


def test_an_unknown_implementation_is_an_error_that_names_those_there_are() -> None:
    case = inputs((3, 20))
    with pytest.raises(UserError) as raised:
        add_rms_norm(case["hidden"], None, case["weight"], EPS, implementation="cuda")
    assert all(name in raised.value.cure for name in IMPLEMENTATIONS)


@pytest.mark.parametrize("in_double", ["hidden", "residual", "weight"])
def test_float64_is_not_for_the_kernel(in_double: str) -> None:
    case = inputs((3, 20))
    case[in_double] = case[in_double].double()
    arguments = (*(case[name] for name in GRADIENTS), EPS)
    with pytest.raises(UserError):
        add_rms_norm(*arguments, implementation="triton")
    assert all(map(torch.equal, add_rms_norm(*arguments), add_rms_norm_ref(*arguments)))


@pytest.mark.parametrize("shapes", [((3, 20), (3, 20), (19,)), ((3, 20), (3, 1), (20,)), ((3, 20), (3, 20), (1, 20))])
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="must"):
        add_rms_norm(*map(torch.zeros, shapes), EPS)
