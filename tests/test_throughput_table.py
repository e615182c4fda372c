"""From point folders with known contents to the table: the numbers, the order and what is said about them."""

import csv
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers_points import (
    GIB,
    MS,
    TIMED_UNIX_NS,
    cpu_environment,
    gpu_environment,
    link_copies,
    recipe,
    step_rows,
    write_point,
)

from tunescope import flops, paper
from tunescope.analyze.throughput import COLUMNS, UNREADABLE, throughput
from tunescope.config import Point, paper_points
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL
from tunescope.hardware import find_device
from tunescope.report.text import number, text_table
from tunescope.report.throughput import print_throughput, throughput_text

SRC = Path(__file__).resolve().parents[1] / "src"
# Of a point whose process died before it could speak for itself.
OUTER_ENVIRONMENT = {"git_revision": None, "device": "NVIDIA A40", "cpu": "a CPU", "packages": {"torch": "2.11.0"}}


def point(dataset: str = "cs", top_k: int = 2, batch: int = 1, **more: Any) -> Point:
    return Point(model="mixtral", dataset=dataset, top_k=top_k, per_device_batch_size=batch, **more)


def only_row(folder: Path) -> dict[str, Any]:
    (row,) = throughput(folder).to_dict("records")
    return {str(key): value for key, value in row.items()}


def write_figure(folder: Path, **more: Any) -> None:
    """All eight bars, each at exactly half the paper's speed."""
    for bar in paper_points("mixtral"):
        rate = paper.a40_queries_per_s("mixtral", bar.dataset, bar.top_k, bar.per_device_batch_size)
        assert rate is not None
        step_ns = round(bar.per_device_batch_size / rate * 2e9)
        write_point(folder / bar.point_id("nvidia-a40"), bar, [step_ns] * 23, **more)


# --- rates ---


def test_queries_per_s_is_queries_over_time_without_warm_up(tmp_path: Path) -> None:
    warm_up, timed = [9_000 * MS] * 3, [1_000 * MS, 3_000 * MS] * 10
    write_point(tmp_path / "p", point(batch=4), [*warm_up, *timed], pause_ns=500 * MS)
    row = only_row(tmp_path)
    assert row["queries_per_s"] == 20 * 4 / 40
    assert row["queries_per_s_low"] < 2.0 < row["queries_per_s_high"]
    assert row["step_s"] == 2.0
    assert (row["num_warmup_steps"], row["num_timed_steps"]) == (3, 20)
    width = row["queries_per_s_high"] - row["queries_per_s_low"]
    assert row["interval_width_pct"] == pytest.approx(100 * width / 2.0)
    # The paper's definition: everything, warm-up and the pause of the energy meter too.
    assert row["queries_per_train_runtime_s"] == pytest.approx(23 * 4 / (27 + 40 + 0.5))


def test_a_smaller_last_batch_counts_as_what_it_is(tmp_path: Path) -> None:
    rows = step_rows([1_000 * MS] * 24, num_queries=[8] * 23 + [1])
    write_point(tmp_path / "p", point(batch=8), rows=rows)
    assert only_row(tmp_path)["queries_per_s"] == pytest.approx((20 * 8 + 1) / 21)


def test_tokens_are_conserved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = step_rows(rng.integers(1e9, 4e9, 40).tolist(), num_queries=4)
    for row in rows:
        row["seq_len_tokens"] = int(rng.integers(10, 64)) * 8
        row["padded_tokens"] = row["num_queries"] * row["seq_len_tokens"]
        row["tokens"] = int(rng.integers(row["padded_tokens"] // 2, row["padded_tokens"]))
    write_point(tmp_path / "p", point(batch=4), rows=rows)
    found = only_row(tmp_path)
    timed = rows[3:]
    timed_s = sum(row["duration_ns"] for row in timed) / 1e9
    assert found["tokens_per_s"] * timed_s == pytest.approx(sum(row["tokens"] for row in timed), rel=1e-12)
    assert found["padded_tokens_per_s"] * timed_s == pytest.approx(
        sum(row["padded_tokens"] for row in timed), rel=1e-12
    )
    assert found["step_s"] * found["num_timed_steps"] == pytest.approx(timed_s, rel=1e-12)
    assert found["tokens_per_s"] <= found["padded_tokens_per_s"]


def test_energy_is_that_of_the_timed_steps(tmp_path: Path) -> None:
    outcome = {"gpu_energy_j": 6000.0}
    write_point(tmp_path / "p", point(batch=2), [1_000 * MS] * 23, outcome_changes=outcome)
    row = only_row(tmp_path)
    assert row["gpu_energy_j_per_query"] == 6000 / 40
    assert row["gpu_power_w"] == 300


def test_memory_is_in_gib(tmp_path: Path) -> None:
    write_point(tmp_path / "p", point(), [1_000 * MS] * 23)
    row = only_row(tmp_path)
    assert (row["peak_allocated_gib"], row["peak_reserved_gib"]) == (26, 28)


# --- MFU and HFU ---


def test_mfu_by_hand(tmp_path: Path) -> None:
    """Batch 4 of 100 real in 104 slots, 2 s a step, on an A40 of 149.7 dense TFLOP/s."""
    write_point(tmp_path / "p", point(batch=4), [2_000 * MS] * 23)
    row = only_row(tmp_path)
    forward = MIXTRAL.forward_flop(MIXTRAL.config_at(MIXTRAL.full, 32, 2), recipe())
    peak = 149.7e12 * 2
    model = flops.train_flop(forward, 400, 4 * 100**2 / 2, recompute_frac=0)
    hardware = flops.train_flop(forward, 416, 4 * 104**2 / 2, recompute_frac=1)
    assert row["mfu_pct"] == pytest.approx(100 * model / peak)
    assert row["hfu_pct"] == pytest.approx(100 * hardware / peak)
    assert row["mfu_pct"] < row["hfu_pct"] < 100


def test_warm_up_changes_no_rate(tmp_path: Path) -> None:
    write_point(tmp_path / "a" / "p", point(), [1_000 * MS] * 3 + [2_000 * MS] * 20)
    write_point(tmp_path / "b" / "p", point(), [99_000 * MS] * 3 + [2_000 * MS] * 20)
    one, other = only_row(tmp_path / "a"), only_row(tmp_path / "b")
    rates = ("queries_per_s", "tokens_per_s", "padded_tokens_per_s", "step_s", "mfu_pct", "hfu_pct")
    assert {name: one[name] for name in rates} == {name: other[name] for name in rates}
    assert one["queries_per_train_runtime_s"] > other["queries_per_train_runtime_s"]


def test_without_checkpointing_the_hardware_recomputes_nothing(tmp_path: Path) -> None:
    unpadded = step_rows([2_000 * MS] * 23, tokens_per_query=104)
    changed = recipe() | {"disable_gradient_checkpointing": True}
    write_point(tmp_path / "p", point(), rows=unpadded, point_changes={"recipe": changed})
    row = only_row(tmp_path)
    assert row["hfu_pct"] == pytest.approx(row["mfu_pct"])


@pytest.mark.parametrize(
    "environment",
    [
        cpu_environment(),
        gpu_environment("NVIDIA GeForce RTX 9090", 44.4),
        gpu_environment("NVIDIA A40-12Q", 12.0),
        gpu_environment("NVIDIA A40", 11.0),  # a slice of one: not the board's peak
        OUTER_ENVIRONMENT,
    ],
)
def test_no_mfu_where_the_peak_is_not_known(environment: dict[str, Any], tmp_path: Path) -> None:
    write_point(tmp_path / "p", point(), [2_000 * MS] * 23, environment=environment | {"gpu": environment.get("gpu")})
    row = only_row(tmp_path)
    assert pd.isna(row["mfu_pct"])
    assert pd.isna(row["hfu_pct"])
    assert row["queries_per_s"] == 0.5


# --- beside the paper ---


def test_ratios_of_the_whole_figure(tmp_path: Path) -> None:
    write_figure(tmp_path)
    table = throughput(tmp_path)
    assert table["ratio_to_paper"].tolist() == pytest.approx([0.5] * 8, rel=1e-6)
    sparse3 = table[(table["dataset"] == "math") & (table["per_device_batch_size"] == 3)]
    assert sparse3["paper_a40_queries_per_s"].tolist() == [0.8325194069]
    assert "math sparse 3" in throughput_text(table)


def test_tiny_has_the_papers_value_beside_it_but_no_ratio(tmp_path: Path) -> None:
    tiny = point(preset="tiny", num_layers=2, total_layers=2)
    write_point(tmp_path / "p", tiny, [50 * MS] * 23, environment=cpu_environment())
    row = only_row(tmp_path)
    assert row["paper_a40_queries_per_s"] == 0.341252845
    assert pd.isna(row["ratio_to_paper"])


def test_another_model_under_the_same_bar_has_no_ratio(tmp_path: Path) -> None:
    """`--model-path` of a small Mixtral runs in preset full: 20 times faster than the paper, and not at all."""
    small = MIXTRAL.full | {"hidden_size": 1024, "intermediate_size": 3584}
    write_point(tmp_path / "p", point(), [50 * MS] * 23, point_changes={"model_config": small})
    write_point(tmp_path / "q", point(num_layers=16, total_layers=16), [50 * MS] * 23)
    assert throughput(tmp_path)["ratio_to_paper"].isna().all()


def test_a_fixed_length_or_another_batch_has_no_value_of_the_paper(tmp_path: Path) -> None:
    write_point(tmp_path / "p", point(seq_len_tokens=128), [50 * MS] * 23)
    write_point(tmp_path / "q", point(batch=9), [50 * MS] * 23)
    write_point(tmp_path / "r", point(dataset="mine"), [50 * MS] * 23)
    table = throughput(tmp_path)
    assert table["paper_a40_queries_per_s"].isna().all()
    assert table["ratio_to_paper"].isna().all()


def test_queries_cut_at_spaces_have_no_ratio_and_say_so(tmp_path: Path) -> None:
    """A data file without a checkpoint's tokenizer: a word is a token, so its queries are shorter than real."""
    data = {"data": {"kind": "file", "name": "math_14k.json", "sha256": "0"}}
    write_point(tmp_path / "p", point("math"), [3_000 * MS] * 23, point_changes=data)
    table = throughput(tmp_path)
    assert table["ratio_to_paper"].isna().all()
    assert "cut at spaces" in throughput_text(table)
    write_point(
        tmp_path / "p",
        point("math"),
        [3_000 * MS] * 23,
        point_changes=data,
        outcome_changes={"tokenizer": "checkpoint"},
    )
    table = throughput(tmp_path)
    assert table["ratio_to_paper"].notna().all()
    assert "cut at spaces" not in throughput_text(table)


# --- points that are not ok ---


def test_no_point_is_silently_missing(tmp_path: Path) -> None:
    write_point(tmp_path / "a", point(batch=1), [1_000 * MS] * 23)
    oom = {"peak_allocated_bytes": 44 * GIB}
    write_point(tmp_path / "b", point(batch=2), status="oom", cause="CUDA out of memory", outcome_changes=oom)
    write_point(tmp_path / "c", point(batch=8), status="failed", cause="its process was ended by SIGKILL")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "point.json").write_text("not json")
    table = throughput(tmp_path)
    assert table["status"].tolist() == ["ok", "oom", "failed", UNREADABLE]
    assert table["queries_per_s"].notna().tolist() == [True, False, False, False]
    text = throughput_text(table)
    for wanted in ("CUDA out of memory", "44", "SIGKILL", "unreadable"):
        assert wanted in text


def test_a_point_that_died_early_has_a_row(tmp_path: Path) -> None:
    folder = write_point(
        tmp_path / "p",
        point(),
        status="failed",
        cause="its process was killed",
        environment={**OUTER_ENVIRONMENT, "gpu": None},
    )
    (folder / "outcome.json").write_text('{"status": "failed", "cause": "its process was killed"}')
    (folder / "environment.json").write_text(json.dumps(OUTER_ENVIRONMENT))
    row = only_row(tmp_path)
    assert (row["status"], row["device"], row["cause"]) == ("failed", "NVIDIA A40", "its process was killed")
    assert "failed" in throughput_text(throughput(tmp_path))


BREAKAGES: dict[str, dict[str, Any]] = {
    "top_k out of range": {"point": point().to_json() | {"top_k": 9}},
    "no such model": {"point": point().to_json() | {"model": "llama"}},
    "a field of a later version": {"point": point().to_json() | {"expert_parallel": 2}},
    "point is a list": {"point": [1, 2]},
    "model_config is text": {"model_config": "mixtral"},
    "no experts": {"model_config": {}},
    "another kind": {"kind": "latency"},
    "weights missing": {"weights": None},
    "no LoRA rank": {"recipe": {"lora_target": "w1"}},
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_foreign_point_costs_its_own_row_only(name: str, tmp_path: Path) -> None:
    write_point(tmp_path / "good", point(), [1_000 * MS] * 23)
    write_point(tmp_path / "strange", point(batch=2), [1_000 * MS] * 23, point_changes=BREAKAGES[name])
    table = throughput(tmp_path)
    assert table["status"].tolist() == ["ok", UNREADABLE]
    assert table["queries_per_s"][0] == 1
    assert "good" not in str(table["cause"][1])
    throughput_text(table)


@pytest.mark.parametrize(
    "change",
    [{"duration_ns": 0}, {"duration_ns": -5}, {"num_queries": 0}, {"world_size": 2}, {"is_warmup": True}],
    ids=str,
)
def test_steps_that_cannot_be_are_no_numbers(change: dict[str, Any], tmp_path: Path) -> None:
    rows = [row | change for row in step_rows([1_000 * MS] * 23)]
    write_point(tmp_path / "p", point(), rows=rows)
    assert throughput(tmp_path)["status"].tolist() == [UNREADABLE]


def test_no_points_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        throughput(tmp_path / "none")
    with pytest.raises(UserError, match="holds no measured point"):
        throughput(tmp_path)
    (tmp_path / "p.unfinished").mkdir()
    with pytest.raises(UserError, match="1 were begun"):
        throughput(tmp_path)


# --- order, blocks, folders ---


def bars(table: pd.DataFrame) -> list[tuple[str, int, int]]:
    return [(row.dataset, int(row.top_k), int(row.per_device_batch_size)) for row in table.itertuples()]


def test_order_is_the_figures_then_the_rest(tmp_path: Path) -> None:
    extra = [point(batch=4), point("aaa"), point(seq_len_tokens=128), point(top_k=4)]
    for number_, bar in enumerate([*paper_points("mixtral")[::-1], *extra]):
        write_point(tmp_path / f"{number_:02d}", bar, [1_000 * MS] * 23)
    found = bars(throughput(tmp_path))
    assert found[:8] == paper.figure8_order("mixtral")
    assert found[8:] == [("aaa", 2, 1), ("cs", 4, 1), ("cs", 2, 4), ("cs", 2, 1)]


def test_names_and_places_of_folders_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for bar in [*paper_points("mixtral"), point(batch=4), point("mine", batch=2)]:
        write_point(tmp_path / "one" / bar.point_id("x"), bar, (rng.gamma(50, 2e7, 30)).astype(int))
    folders = sorted((tmp_path / "one").iterdir())
    random.Random(1).shuffle(folders)
    for number_, folder in enumerate(folders):
        shutil.copytree(folder, tmp_path / "other" / str(number_ % 3) / f"{number_:02d}")
    one, other = throughput(tmp_path / "one"), throughput(tmp_path / "other")
    pd.testing.assert_frame_equal(one.drop(columns="folder"), other.drop(columns="folder"), rtol=1e-12)
    assert throughput_text(one) == throughput_text(other)


def test_copies_of_sub_folders_are_found(tmp_path: Path) -> None:
    write_figure(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "from" / "another" / "machine")
    assert len(throughput(tmp_path)) == 16


def test_two_devices_make_two_blocks(tmp_path: Path) -> None:
    write_figure(tmp_path / "a")
    write_figure(tmp_path / "b", environment=gpu_environment("NVIDIA H200", 139.8))
    text = throughput_text(throughput(tmp_path))
    titles = [line for line in text.splitlines() if line.startswith("Figure 8")]
    assert [title.partition(" on ")[2] for title in titles] == [
        "NVIDIA A40, preset full",
        "NVIDIA H200, preset full",
    ]
    assert sum(line.startswith(("cs ", "math ")) for line in text.splitlines()) >= 16


def test_peaks_of_two_devices_are_not_mixed(tmp_path: Path) -> None:
    for name, memory_gib in (("NVIDIA A40", 44.4), ("NVIDIA H200", 139.8)):
        write_point(tmp_path / name, point(), [2_000 * MS] * 23, environment=gpu_environment(name, memory_gib))
    table = throughput(tmp_path).set_index("device")
    peaks = {name: find_device(name).peak_bf16_flop_per_s for name in table.index}
    assert table["mfu_pct"]["NVIDIA A40"] / table["mfu_pct"]["NVIDIA H200"] == pytest.approx(
        peaks["NVIDIA H200"] / peaks["NVIDIA A40"]
    )


# --- the state of the GPU ---


def sample(**more: Any) -> dict[str, Any]:
    return {
        "time_unix_ns": TIMED_UNIX_NS[0] + 1,
        "sm_clock_mhz": 1740,
        "memory_clock_mhz": 7251,
        "power_w": 290.0,
        "temperature_c": 70,
        "throttle_reasons_bitmask": 0,
        "memory_used_bytes": 1,
        "num_other_processes": 0,
        **more,
    }


def test_a_gpu_held_back_is_named(tmp_path: Path) -> None:
    samples = [sample(throttle_reasons_bitmask=0x4)] * 3 + [sample(throttle_reasons_bitmask=0x1)] * 7
    write_point(tmp_path / "p", point(), [1_000 * MS] * 23, gpu_samples=samples)
    row = only_row(tmp_path)
    assert (row["slowed_frac"], row["slowed_by"], row["num_other_processes"]) == (0.3, "power cap", 0)
    text = throughput_text(throughput(tmp_path))
    assert "power cap in 30 % of samples" in text
    assert "shared the GPU" not in text


def test_only_samples_of_the_timed_steps_count(tmp_path: Path) -> None:
    """While the weights are made the clock idles, and that is no state the steps were timed in."""
    before, after = TIMED_UNIX_NS[0] - 1, TIMED_UNIX_NS[1] + 1
    idle = {"sm_clock_mhz": 210, "throttle_reasons_bitmask": 0x8, "num_other_processes": 3}
    samples = [sample(time_unix_ns=before, **idle), sample(), sample(time_unix_ns=after, **idle)]
    write_point(tmp_path / "p", point(), [1_000 * MS] * 23, gpu_samples=samples)
    row = only_row(tmp_path)
    assert (row["sm_clock_mhz"], row["slowed_frac"], row["num_other_processes"]) == (1740, 0, 0)


def test_too_short_for_a_sample_is_no_fault(tmp_path: Path) -> None:
    write_point(tmp_path / "p", point(), [1 * MS] * 23, gpu_samples=[sample(time_unix_ns=1)])
    row = only_row(tmp_path)
    assert row["status"] == "ok"
    assert pd.isna(row["sm_clock_mhz"])
    throughput_text(throughput(tmp_path))


def test_company_on_the_gpu_is_said(tmp_path: Path) -> None:
    write_point(tmp_path / "p", point(), [1_000 * MS] * 23, gpu_samples=[sample(), sample(num_other_processes=2)])
    assert "1 point(s) shared the GPU" in throughput_text(throughput(tmp_path))


def test_a_board_that_answers_nothing_is_no_fault(tmp_path: Path) -> None:
    silent = {key: None for key in sample() if key != "time_unix_ns"} | {"time_unix_ns": TIMED_UNIX_NS[0]}
    write_point(tmp_path / "p", point(), [1_000 * MS] * 23, gpu_samples=[silent] * 3)
    row = only_row(tmp_path)
    assert row["status"] == "ok"
    assert row["slowed_frac"] is None or pd.isna(row["slowed_frac"])
    throughput_text(throughput(tmp_path))


# --- the three formats ---


def printed(folder: Path, format: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert print_throughput(folder, format)
    return capsys.readouterr().out


def test_formats_agree_in_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    for bar in paper_points("mixtral"):
        write_point(tmp_path / bar.point_id("x"), bar, rng.gamma(50, 2e7, 33).astype(int))
    write_point(tmp_path / "oom", point(batch=16), status="oom", cause='CUDA out of memory, "really"\nsecond line')
    from_csv = list(csv.DictReader(io.StringIO(printed(tmp_path, "csv", capsys))))
    from_json = json.loads(printed(tmp_path, "json", capsys))
    text = printed(tmp_path, "text", capsys)
    assert tuple(from_csv[0]) == tuple(from_json[0]) == COLUMNS
    assert len(from_csv) == len(from_json) == 9
    for in_csv, in_json in zip(from_csv, from_json, strict=True):
        for name in COLUMNS:
            if in_json[name] is None:
                assert in_csv[name] == ""
            elif isinstance(in_json[name], bool | str):
                assert in_csv[name] == str(in_json[name])
            else:
                assert float(in_csv[name]) == pytest.approx(in_json[name], rel=1e-12)
    lines = [line.split() for line in text.splitlines() if line.startswith(("cs ", "math "))]
    for in_json, cells in zip(from_json, lines, strict=False):
        assert cells[:3] == [in_json["dataset"], in_json["sparsity"], str(int(in_json["per_device_batch_size"]))]
        if in_json["status"] == "ok":
            shown = [number(in_json[name]) for name in ("queries_per_s", "tokens_per_s", "mfu_pct", "ratio_to_paper")]
            assert all(value in cells for value in shown)


def test_json_has_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_point(tmp_path / "p", point(), status="oom", cause="out of memory")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(printed(tmp_path, "json", capsys), parse_constant=refuse)


def test_an_unreadable_point_is_said_on_stderr_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_point(tmp_path / "good", point(), [1_000 * MS] * 23)
    (write_point(tmp_path / "bad", point(batch=2), [1_000 * MS] * 23) / "steps.arrow").unlink()
    assert not print_throughput(tmp_path, "text")
    output = capsys.readouterr()
    assert "bad" in output.err
    assert "steps.arrow" in output.err
    assert "good" not in output.err


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format"):
        print_throughput(tmp_path, "xml")


# --- numbers as text ---


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "-"),
        (float("nan"), 3, "-"),
        (0, 3, "0"),
        (0.3412, 3, "0.341"),
        (1.005477, 3, "1.01"),
        (1.005477, 4, "1.005"),
        (12.345, 3, "12.3"),
        (123.45, 3, "123"),
        (123456.7, 3, "123457"),
        (0.0012345, 3, "0.00123"),
        (0.00001234, 3, "0.000012"),
        (-0.5, 3, "-0.5"),
        (-12.345, 3, "-12.3"),
    ],
)
def test_number(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_number_keeps_its_significant_digits() -> None:
    for exponent, mantissa in itertools.product(range(-3, 7), (1.0, 1.2345, 4.9999, 9.994)):
        value = mantissa * 10.0**exponent
        assert float(number(value)) == pytest.approx(value, rel=0.005)


def test_text_table_lines_up() -> None:
    lines = text_table(["a", "number"], [["x", "1"], ["long name", "12345678"]], left_columns=1).splitlines()
    assert lines == ["a            number", "---------  --------", "x                 1", "long name  12345678"]


# --- scale ---


@pytest.fixture(scope="module")
def five_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 points of 200 different lengths, 20 to 1,000 steps, as stopping rules and protocols leave them."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    sources = [
        write_point(
            folder / "sources" / f"{count}", point(batch=count), rng.gamma(100, 3e7, 23 + 5 * count).astype(int)
        )
        for count in range(1, 201)
    ]
    link_copies(sources, folder / "points", 5000)
    return folder / "points"


def test_five_thousand_points(five_thousand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "sys.argv = ['tunescope', 'table', 'throughput', sys.argv[1]]\n"
        "runpy.run_module('tunescope', run_name='__main__')"
    )
    start_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(five_thousand)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    elapsed_s = time.perf_counter() - start_s
    with capsys.disabled():
        print(f"\n[5,000 points as a table: {elapsed_s:.1f} s; the target is 5]", end=" ")
    assert done.stderr.split() == ["False"]
    assert sum(line.startswith("cs ") for line in done.stdout.splitlines()) >= 5000
    assert elapsed_s < 20
