"""Extrapolating from two depths to all layers."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_points import gpu_environment, step_rows, write_point
from hypothesis import assume, given
from hypothesis import strategies as st

from tunescope.analyze.slices import extrapolate
from tunescope.analyze.throughput import throughput
from tunescope.config import Point
from tunescope.report.throughput import throughput_text


def end(num_layers: int, queries_per_s: float, half_frac: float = 0.0, total_layers: int = 32) -> pd.Series:
    return pd.Series(
        {
            "num_layers": num_layers,
            "total_layers": total_layers,
            "queries_per_s": queries_per_s,
            "queries_per_s_low": queries_per_s / (1 + half_frac),
            "queries_per_s_high": queries_per_s / (1 - half_frac),
        }
    )


@given(
    st.floats(1e-4, 10),
    st.floats(1e-4, 10),
    st.integers(1, 8),
    st.integers(1, 23),
    st.integers(1, 64),
    st.floats(0, 0.01),
)
def test_an_affine_model_is_recovered_exactly(
    outside_s: float, per_layer_s: float, shallow: int, step: int, queries: int, half_frac: float
) -> None:
    def rate(depth: int) -> float:
        return queries / (outside_s + depth * per_layer_s)

    ends = end(shallow, rate(shallow), half_frac), end(shallow + step, rate(shallow + step), half_frac)
    value, low, high = extrapolate(*ends)
    assert value == pytest.approx(rate(32), rel=1e-6)
    assert low <= value * (1 + 1e-9)
    assert math.isnan(high) or high >= value * (1 - 1e-9)


def test_all_layers_measured_are_left_as_measured() -> None:
    value, low, high = extrapolate(end(8, 4.0, 0.01), end(32, 1.0, 0.01))
    assert (value, low, high) == pytest.approx((1.0, 1 / 1.01, 1 / 0.99), rel=1e-3)


def test_interval_grows_with_the_reach() -> None:
    """The deeper the measured ends, the closer to 32 layers and the narrower the interval."""

    def relative_width(deep: int) -> float:
        value, low, high = extrapolate(
            end(deep // 4, 1 / (0.1 + deep // 4 * 0.05), 0.01), end(deep, 1 / (0.1 + deep * 0.05), 0.01)
        )
        return (high - low) / value

    widths = [relative_width(deep) for deep in (4, 8, 16, 24, 32)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 1.5 * widths[-1]


@given(st.integers(1, 7), st.integers(8, 31), st.floats(0.001, 0.02))
def test_interval_is_never_narrower_than_the_measured_ones(shallow: int, deep: int, half_frac: float) -> None:
    value, low, high = extrapolate(
        end(shallow, 1 / (0.1 + shallow * 0.05), half_frac), end(deep, 1 / (0.1 + deep * 0.05), half_frac)
    )
    assume(not math.isnan(high))
    width_s, measured_s = 1 / low - 1 / high, 2 * half_frac * (0.1 + deep * 0.05)
    assert width_s >= measured_s * (1 - 1e-6)
    assert value > 0


def test_a_line_through_noise_gives_no_number() -> None:
    """Four layers slower than eight: the line falls below zero seconds at 32, and a rate of -0.3 is not a rate."""
    assert all(math.isnan(number) for number in extrapolate(end(4, 1.0), end(8, 1.25)))


def test_an_interval_that_includes_zero_seconds_has_no_upper_end() -> None:
    value, low, high = extrapolate(end(4, 1 / 0.300, 0.3), end(8, 1 / 0.305, 0.3))
    assert 0 < low < value
    assert math.isnan(high)


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    outside_s, per_layer_s = 0.3, 0.08
    covered = 0
    for _ in range(400):
        ends = []
        for depth in (4, 18):
            true_s = outside_s + depth * per_layer_s
            standard_error_s = 0.005 * true_s
            seen_s = rng.normal(true_s, standard_error_s)
            half_frac = 1.96 * standard_error_s / seen_s
            ends.append(end(depth, 1 / seen_s, half_frac))
        _, low, high = extrapolate(*ends)
        covered += low <= 1 / (outside_s + 32 * per_layer_s) <= high
    assert 0.92 <= covered / 400 <= 0.98


# --- through point folders ---


def write_slice(
    folder: Path, depth: int, *, batch: int = 1, name: str = "", step_s: float | None = None, **more
) -> Path:
    point = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=batch, preset="slice", num_layers=depth)
    seconds = 0.2 + 0.1 * depth if step_s is None else step_s
    rng = np.random.default_rng(depth)
    durations_ns = (seconds * 1e9 * (1 + 0.001 * rng.standard_normal(40))).astype(int)
    return write_point(folder / (name or f"cs-b{batch}-{depth}"), point, durations_ns, **more)


def all_layers(table: pd.DataFrame) -> list[float]:
    return [float(value) for value in table["queries_per_s_all_layers"].dropna()]


def test_two_depths_make_one_figure_for_the_whole_model(tmp_path: Path) -> None:
    write_slice(tmp_path, 4)
    write_slice(tmp_path, 16)
    table = throughput(tmp_path)
    (deep,) = table[table["num_layers"] == 16].to_dict("records")
    (shallow,) = table[table["num_layers"] == 4].to_dict("records")
    assert deep["queries_per_s_all_layers"] == pytest.approx(1 / 3.4, rel=2e-3)
    assert deep["queries_per_s_all_layers_low"] < 1 / 3.4 < deep["queries_per_s_all_layers_high"]
    assert deep["ratio_to_paper"] == pytest.approx(1 / 3.4 / 0.341252845, rel=2e-3)
    assert pd.isna(shallow["queries_per_s_all_layers"])
    assert pd.isna(shallow["ratio_to_paper"])  # four layers are not the paper's model
    assert (deep["is_shallow_end"], shallow["is_shallow_end"]) == (False, True)
    text = throughput_text(table)
    assert "16/32" in text
    assert " 4/32" not in text


def test_one_depth_alone_is_shown_without_a_ratio(tmp_path: Path) -> None:
    write_slice(tmp_path, 16)
    table = throughput(tmp_path)
    assert all_layers(table) == []
    assert table["ratio_to_paper"].isna().all()
    assert "16/32" in throughput_text(table)


def test_bars_are_never_mixed(tmp_path: Path) -> None:
    write_slice(tmp_path, 4, batch=1)
    write_slice(tmp_path, 16, batch=2)
    assert all_layers(throughput(tmp_path)) == []


@pytest.mark.parametrize(
    "other",
    [
        {"environment": gpu_environment("NVIDIA L40S")},
        {"point_changes": {"weights": {"kind": "checkpoint"}}},
        {"point_changes": {"data": {"kind": "file", "name": "cs.json", "sha256": "0"}}},
        {"point_changes": {"recipe": {"lora_rank": 8, "lora_target": "w1,w2,w3,gate"}}},
        {"point_changes": {"stack": {"torch": "2.10.0"}}},
        {"point_changes": {"moe": "fast"}},
        {"environment": gpu_environment() | {"cpu": "another CPU"}},
        {"environment": gpu_environment() | {"git_revision": "1" * 40}},
    ],
)
def test_no_line_through_two_ways_of_running(other: dict, tmp_path: Path) -> None:
    write_slice(tmp_path, 4, **other)
    write_slice(tmp_path, 16)
    assert all_layers(throughput(tmp_path)) == []


def test_no_line_through_two_machines_of_one_kind(tmp_path: Path) -> None:
    for machine, slower in (("here", 1.0), ("there", 2.0)):
        for depth in (4, 16):
            write_slice(tmp_path / machine, depth, step_s=slower * (0.2 + 0.1 * depth))
    rates = sorted(all_layers(throughput(tmp_path)))
    assert rates == pytest.approx([1 / 6.8, 1 / 3.4], rel=3e-3)


def test_an_oom_end_gives_no_figure_and_hides_nothing(tmp_path: Path) -> None:
    write_slice(tmp_path, 4)
    write_slice(tmp_path, 16, status="oom", cause="CUDA out of memory", rows=step_rows([]))
    table = throughput(tmp_path)
    assert all_layers(table) == []
    text = throughput_text(table)
    assert "4/32" in text
    assert "16/32" in text


def test_full_and_slice_of_one_gpu_are_both_shown(tmp_path: Path) -> None:
    """A memory budget on a large GPU: its slices must not vanish beside the full model's rows."""
    write_slice(tmp_path, 4)
    write_slice(tmp_path, 16)
    full = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=1)
    write_point(tmp_path / "full", full, [3_400_000_000] * 30)
    text = throughput_text(throughput(tmp_path))
    assert "preset full" in text
    assert "preset slice" in text
    assert "16/32" in text
