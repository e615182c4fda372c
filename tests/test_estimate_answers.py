"""What an answer says of its batch, of calibration and of energy, and the words that it is printed in."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_estimate import FakeTimes, ask, only
from helpers_points import gpu_environment, step_rows, write_point

from tunescope.config import Point
from tunescope.cost import energy
from tunescope.cost.estimate_memory import needed_bytes
from tunescope.cost.estimate_runs import find_gpus
from tunescope.cost.estimate_table import Answer, answer, rows
from tunescope.cost.time_points import RECIPES
from tunescope.errors import UserError
from tunescope.report.estimate import _digits, _money, estimate_text, print_estimate


def write(folder: Path, *, batch_size: int = 4, environment: dict[str, Any] | None = None, seconds: int = 5) -> None:
    point = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=batch_size)
    write_point(
        folder, point, rows=step_rows([seconds * 10**9] * 23, num_queries=batch_size), environment=environment,
        outcome_changes={"gpu_energy_j": 20 * seconds * 250.0},
    )  # fmt: skip


def calibrated(folder: Path, **asked: Any) -> Answer:
    return answer("mixtral", "cs", **{"gpus": ["a40"], "batch": 4, "calibrate": folder} | asked)


# --- calibration ---


def test_what_calibration_changed_is_said_of_the_step_that_is_answered(tmp_path: Path) -> None:
    write(tmp_path / "a")
    found = calibrated(tmp_path, gpus=["a40", "h100"])
    plain = answer("mixtral", "cs", gpus=["a40", "h100"], batch=4)
    text = estimate_text(found)
    for each, base in zip(found.estimates, plain.estimates, strict=True):
        assert each.step is not None
        assert each.step_before is not None
        assert base.step is not None
        assert each.step_before.median_s == base.step.median_s
        (line,) = (
            line for line in text.splitlines() if line.startswith(f"Calibration changed the step on {each.device.name}")
        )
        assert f"its median by {100 * (each.step.median_s / base.step.median_s - 1):+.0f} %" in line
        assert ("no point is of it: the points are of NVIDIA A40" in line) == (each.device.name != "NVIDIA A40")


def test_unusable_points_and_several_hosts_are_said(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", batch_size=8)
    write(tmp_path / "c", environment=gpu_environment() | {"cpu": "another CPU"})
    write(tmp_path / "d", environment=gpu_environment("A GPU of tomorrow"))
    text = estimate_text(calibrated(tmp_path))
    assert "calibrated on 3 points of NVIDIA A40 (1 more cannot be used: d: GPU 'A GPU of tomorrow'" in text
    assert "The points of NVIDIA A40 are of 2 hosts; the answer is for NVIDIA A40 with a CPU." in text


# --- energy ---


def test_measured_energy_has_the_interval_of_the_hours_and_a_bound_its_upper_end(tmp_path: Path) -> None:
    write(tmp_path / "a")
    found = calibrated(tmp_path)
    own, (row,) = only(found), rows(found)
    assert own.hours is not None
    for name, hours in (("", own.hours.median), ("_low", own.hours.low), ("_high", own.hours.high)):
        assert row[f"energy_kwh{name}"] == pytest.approx(0.25 * hours)
    bound = calibrated(tmp_path, batch=16)
    (row,) = rows(bound)
    assert row["power_kind"] == energy.BOUND
    assert row["energy_kwh"] == row["energy_kwh_high"] == pytest.approx(0.3 * row["hours_high"])
    assert row["energy_kwh_low"] is None
    assert "stays a bound: energy was measured at batch 4, more than twice as large or small as 16" in estimate_text(
        bound
    )
    assert "are of another GPU, architecture or top_k" in estimate_text(calibrated(tmp_path, top_k=4))


# --- batches ---


def test_a_batch_that_the_data_cannot_fill_says_what_memory_would_hold() -> None:
    with pytest.raises(UserError) as caught:
        ask(batch=1_000_000)
    assert "NVIDIA A40 would hold 27" in str(caught.value)


def test_the_last_step_of_an_epoch_takes_what_micro_batches_are_left() -> None:
    """FakeTimes knows no accumulation: three micro-batches of four cost a whole step, not three quarters."""
    whole = only(ask(batch=4, queries=16, recipe=RECIPES["mixtral"] | {"gradient_accumulation_steps": 4}))
    partial = only(ask(batch=4, queries=12, recipe=RECIPES["mixtral"] | {"gradient_accumulation_steps": 4}))
    assert (whole.num_steps, partial.num_steps) == (1, 1)
    assert whole.hours is not None
    assert whole.step is not None
    assert whole.hours.median * 3600 == pytest.approx(whole.step.median_s)
    assert partial.hours is not None
    assert partial.step is not None
    assert partial.hours.median * 3600 == pytest.approx(partial.step.median_s)
    text = estimate_text(ask(batch=4, recipe=RECIPES["mixtral"] | {"gradient_accumulation_steps": 4}))
    assert "slots a micro-batch" in text
    assert "optimizer steps in all" in text


# --- words ---


def test_what_would_fit_counts_qlora_on_larger_gpus_too() -> None:
    full = {"finetuning_type": "full", "pure_bf16": True, "optim": "adamw_torch"}
    found = only(ask(gpus=["4090"], recipe=full))
    assert found.why_not is not None
    assert "quantization_bit: 4), on a GPU of 32 GB, as the NVIDIA GeForce RTX 5090" in found.why_not
    assert needed_bytes(found.run.model.config, RECIPES["mixtral"], 1, 1024) < 32 * 2**30


def test_gpus_that_were_meant_are_named() -> None:
    assert find_gpus(["ALL"]) == find_gpus(["all"])
    for name, words in (("a100", "a100-40gb or a100-80gb"), ("h20", "NVIDIA H200"), ("rtx 409", "RTX 4090")):
        with pytest.raises(UserError) as caught:
            find_gpus([name])
        assert words in caught.value.cure


def test_small_costs_and_large_hours_read_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert (_money(0.0), _money(0.001), _money(0.006), _money(12_345.6)) == ("0.00", "< 0.01", "0.01", "12,346")
    assert [_digits(value) for value in (0.0, 0.05997, 0.5, 0.9996, 9.994, 9.996, 99.96, 999.6, 12_345.6)] == [
        "0", "0.0600", "0.500", "1.00", "9.99", "10.0", "100", "1,000", "12,346",
    ]  # fmt: skip
    print_estimate("mixtral", "math", gpus=["a40"], queries=1, step_times=FakeTimes())
    assert "< 0.01 USD" in capsys.readouterr().out.splitlines()[0]
    print_estimate("mixtral", "math", gpus=["a40", "h100"], step_times=FakeTimes())
    assert "above it, the cheapest stays cheaper" in capsys.readouterr().out


def test_json_of_the_largest_run_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    print_estimate("mixtral", "math", gpus=["a40"], epochs=1e6, queries=10**12, format="json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["hours"] > 0
