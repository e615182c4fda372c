"""The benchmark of grouped 4-bit linears, run for real on the CPU with a tiny shape."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "nf4_grouped.py"
E, N, K = 4, 128, 192  # of shape tiny


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """Without a GPU also where there is one."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("bench") / "rows.csv"
    done = run("--quick", "--rows-per-expert", "8", "--out", str(out))
    assert done.returncode == 0, done.stderr
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_direction_has_what_runs_on_a_cpu(rows: list[dict[str, str]]) -> None:
    products = ["dequantize", "bitsandbytes-dequantize", "bf16"]
    assert [(row["direction"], row["implementation"]) for row in rows] == [
        ("dequantize", "bitsandbytes-dequantize"),
        *(("forward", name) for name in products),
        *(("dx", name) for name in products),
    ]


def test_what_is_derived_follows_from_what_was_measured(rows: list[dict[str, str]]) -> None:
    scales = N * K // 64
    weights = E * (N * K // 2 + scales + 4 * -(-scales // 256))
    for row in rows:
        if row["direction"] == "dequantize":
            expected = weights + 2 * E * N * K
        else:
            expected = (2 * E * N * K if row["implementation"] == "bf16" else weights) + 2 * E * 8 * (N + K)
            flop_per_s = 2 * E * 8 * N * K / (float(row["median_us"]) / 1e6)
            assert float(row["flop_per_s"]) == pytest.approx(flop_per_s, rel=1e-2)
            assert float(row["relative_error"]) < 4e-3  # weights and results are rounded to bf16
        assert int(row["bytes_moved"]) == expected
        assert float(row["bytes_per_s"]) == pytest.approx(expected / (float(row["median_us"]) / 1e6), rel=1e-2)
        assert row["timed"] == "eager"  # there are no graphs on a CPU
        assert all(row[name] for name in ("device", "torch", "bitsandbytes", "date"))


@pytest.mark.parametrize("flags", [(), ("--quick", "--tune")], ids=str)
def test_what_needs_a_gpu_says_so(flags: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*flags, "--out", str(tmp_path / "rows.csv"))
    assert done.returncode == 2
    assert "no GPU was found" in done.stderr
