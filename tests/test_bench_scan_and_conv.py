"""The benchmark of scan, convolution and norm, run for real on the CPU with tiny shapes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "bench" / "scan_and_conv.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """Without a GPU also where there is one."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of two runs into one file: the second leaves the scan out."""
    out = tmp_path_factory.mktemp("bench") / "rows.csv"
    for flags in ([], ["--ops", "conv", "add_rms_norm"]):
        done = run("--quick", "--out", str(out), *flags)
        assert done.returncode == 0, done.stderr
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_op_has_a_row_for_each_shape_and_direction(rows: list[dict[str, str]]) -> None:
    def found(part: list[dict[str, str]]) -> list[tuple[str, ...]]:
        return [(row["op"], row["batch"], row["direction"]) for row in part]

    expected = [
        (op, batch, direction)
        for op in ("scan", "conv", "add_rms_norm")
        for batch in ("1", "2")
        for direction in ("forward", "backward", "both")
    ]
    assert found(rows[:18]) == expected
    assert found(rows[18:]) == expected[6:]
    assert {row["implementation"] for row in rows} == {"reference"}  # nothing else runs on a CPU
    assert {row["channels"] for row in rows if row["op"] == "add_rms_norm"} == {"16"}
    assert {row["state"] for row in rows if row["op"] == "scan"} == {"4"}


def test_bytes_are_of_the_inputs_and_outputs(rows: list[dict[str, str]]) -> None:
    """Of 2 sequences of 8 steps in bf16. E 32 channels, N 4 states, 4 taps; the norm's D is 16."""
    moved = {(row["op"], row["direction"]): int(row["bytes_moved"]) for row in rows[:18] if row["batch"] == "2"}
    steps = 2 * 8
    parameters = 32 * 4 + 32
    assert moved["conv", "forward"] == 2 * (2 * 32 * steps + parameters)
    assert moved["conv", "backward"] == 2 * (3 * 32 * steps + 2 * parameters)
    scan_inputs = 2 * (3 * 32 * steps + 2 * 4 * steps + 2 * 32) + 4 * 32 * 4  # A is fp32
    assert moved["scan", "forward"] == scan_inputs + 2 * 32 * steps
    assert moved["scan", "backward"] == 2 * scan_inputs + 2 * 32 * steps
    inputs = (2 + 4) * 16 * steps + 2 * 16  # hidden bf16, residual fp32, weight
    assert moved["add_rms_norm", "forward"] == inputs + (2 + 4) * 16 * steps
    assert moved["add_rms_norm", "backward"] == (4 * 16 * steps + 2 * 16) + (2 + 4) * 16 * steps + inputs
    for op in ("scan", "conv", "add_rms_norm"):
        assert moved[op, "both"] == moved[op, "forward"] + moved[op, "backward"]


def test_what_is_derived_follows_from_what_was_measured(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert int(row["num_repeats"]) >= 10
        bytes_per_s = int(row["bytes_moved"]) / (float(row["median_us"]) / 1e6)
        assert float(row["bytes_per_s"]) == pytest.approx(bytes_per_s, rel=1e-2)
        fraction = bytes_per_s / float(row["copy_bytes_per_s"])
        assert float(row["fraction_of_copy"]) == pytest.approx(fraction, rel=1e-2, abs=6e-4)
        assert row["ratio_to_mamba_ssm"] == ""  # it was not measured: not a number
        assert row["host_ratio_to_mamba_ssm"] == ""
        assert row["timed"] == "eager"  # there are no graphs on a CPU
        assert float(row["host_us"]) > 0
        assert all(row[name] for name in ("device", "torch", "date"))


def test_a_reference_that_would_take_too_long_is_left_out_and_said_so(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = run("--quick", "--ops", "scan", "--reference-seconds", "1e-9", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "--reference-seconds" in done.stderr
    assert not out.exists()


def test_without_a_gpu_and_without_quick_nothing_runs(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "rows.csv"))
    assert done.returncode == 2
    assert "--quick" in done.stderr
