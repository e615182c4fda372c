"""Tables of a GPU's steps of which every kernel is known: each number is computed here from the list of kernels."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers_latency import printed, put, read, tables_in
from helpers_points import MS, gpu_environment
from helpers_tape import (
    COPY_BESIDE_US,
    EVERYTHING_BYTES,
    LAYERS,
    NUM_LAYERS,
    NUM_RECORDED_STEPS,
    RECORDED_STEP_NS,
    TIMED_STEPS_NS,
    UNKNOWN_US,
    US,
    Place,
    Tape,
    mixtral_tape,
    random_point,
    write_breakdown,
)

from tunescope import latency_files as files
from tunescope.analyze.latency_tables import LatencyTables, latency_tables
from tunescope.expert_tokens import EXPERT_TOKENS_FILE
from tunescope.paper import latency as papers
from tunescope.report.text import number

PASSES = (files.FORWARD, files.RECOMPUTE, files.BACKWARD)
MEAN_STEP_NS = 50 * MS  # of 40, 50 and 60
# Kernels of the second recorded step take twice as long as those of the first: a mean is 1.5 times the first.
MEAN_FACTOR = 1.5


@pytest.fixture(scope="module")
def tape() -> Tape:
    return mixtral_tape()


def spans(tape: Tape) -> list[dict[str, Any]]:
    """Of a step of n ms: layer 0 takes n us forward, its MoE n/2; layer 1 four times as long, and in recompute."""
    made = []
    for step, ns in enumerate(TIMED_STEPS_NS, start=3):
        for layer, phase, factor in ((0, files.FORWARD, 1), (1, files.FORWARD, 4), (1, files.RECOMPUTE, 4)):
            for below, part in (("", 1000), (".block_sparse_moe", 2000)):
                module = tape.numbers[f"{LAYERS}.{layer}{below}"]
                made.append({"step": step, "module": module, "phase": phase, "duration_ns": factor * ns // part})
    return made


@pytest.fixture(scope="module")
def folder(tape: Tape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("by_hand") / "latency"
    write_breakdown(out / "point", random_point(), tape=tape, spans=spans(tape))
    return out


@pytest.fixture(scope="module")
def tables(folder: Path) -> LatencyTables:
    return latency_tables(folder)


def totals(tape: Tape, key: Any) -> dict[Any, list[float]]:
    """key(place) -> ns and launches a recorded step."""
    found: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for placed in tape.placed:
        found[key(placed.place)][0] += placed.duration_ns / NUM_RECORDED_STEPS
        found[key(placed.place)][1] += 1 / NUM_RECORDED_STEPS
    return dict(found)


def cells(frame: pd.DataFrame, *names: str) -> dict[Any, list[float]]:
    made = frame[frame["num_launches"] > 0].set_index(list(names))[["busy_ns", "num_launches"]]
    assert made.index.is_unique
    return {key: list(row) for key, row in zip(made.index, made.to_numpy(), strict=True)}


# --- where the work is -----------------------------------------------------------------------------------------------


def test_every_kernel_is_in_its_layer_part_and_phase(tape: Tape, tables: LatencyTables) -> None:
    wanted = totals(tape, lambda place: (place.layer, place.part, place.phase))
    assert cells(tables.layers, "layer", "part", "phase") == wanted
    # Two by hand: q_proj, attention and the copy beside it; gradients' norm and their scaling.
    assert wanted[0, "attention", files.FORWARD] == [MEAN_FACTOR * (300 + 500 + 12) * US, 3]
    assert wanted[-1, "(gradient clipping)", files.CLIP] == [MEAN_FACTOR * (8 + 9) * US, 2]
    assert wanted[-1, "unattributed", "unattributed"] == [UNKNOWN_US * US / 2, 0.5]


def test_every_kernel_of_the_moe_layer_has_its_label(tape: Tape, tables: LatencyTables) -> None:
    wanted = totals(tape, lambda place: (place.layer, place.label, place.phase) if place.part == "moe" else None)
    del wanted[None]
    assert cells(tables.operators, "layer", "label", "phase") == wanted
    assert wanted[1, "w1_dequant", files.RECOMPUTE] == [MEAN_FACTOR * 101 * US, 1]
    assert wanted[0, "topk", files.FORWARD] == [MEAN_FACTOR * (23 + 5) * US, 2]
    each = tables.operators.set_index(["layer", "label", "phase"])["mean_launch_ns"]
    assert each[0, "topk", files.FORWARD] == MEAN_FACTOR * (23 + 5) / 2 * US
    assert each[1, "matmul(w2) decoding", files.FORWARD] == MEAN_FACTOR * 1019 * US


def test_the_text_has_these_numbers(tape: Tape, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tables_in(printed(folder, capsys))
    bar = "mixtral random len 128 sparse batch 1"
    figure5 = text[f"Figure 5: sum of 32 layers (ms a step), {bar}"]
    by_part = totals(tape, lambda place: (place.part, place.phase))
    whole_ns = sum(ns for ns, _ in by_part.values())
    for row in figure5.rows[:-1]:
        of_part = {phase: ns for (part, phase), (ns, _) in by_part.items() if part == row[0]}
        shown = [number(of_part[phase] / 1e6) if phase in of_part else "-" for phase in PASSES]
        assert row[1:4] == shown
        part_ns = sum(of_part.values())
        assert [float(cell) for cell in row[5:7]] == pytest.approx([part_ns / 1e6, 100 * part_ns / whole_ns], rel=0.006)
    assert figure5.rows[-1][5] == number(whole_ns / 1e6)
    assert {row[0] for row in figure5.rows} == {part for part, _ in by_part} | {"all"}
    assert [row[0] for row in figure5.rows[:8]] == [
        "embedding", "input_norm", "attention", "post_attention_norm", "moe", "layer itself", "final_norm",
        "lm_head + loss",
    ]  # fmt: skip

    figure6 = text[f"Figure 6 from the profiler: operators of moe, sum of 32 layers, {bar}"]
    by_label = totals(tape, lambda place: (place.label, place.phase))
    for row in figure6.rows:
        for column, phase in zip((1, 4, 7), PASSES, strict=True):
            ns, launches = by_label.get((row[0], phase), (0, 0))
            shown = [number(ns / 1e6), number(launches), number(ns / launches / 1e3)] if launches else ["-"] * 3
            assert row[column : column + 3] == shown
    assert {row[0] for row in figure6.rows} == {label for label, _ in by_label if label}
    shares = sum(float(row[11]) for row in figure6.rows)
    assert shares == pytest.approx(100, abs=0.5)
    beside = {row[0]: row[12] for row in figure6.rows if row[12] != "-"}
    theirs = papers.kernel_us("mixtral", 2, 1, 128)
    assert beside == {label: number(theirs[label]) for label in beside}
    assert beside.keys() == theirs.keys()


def test_spans_are_means_over_unprofiled_steps(tables: LatencyTables) -> None:
    found = tables.layers.dropna(subset="span_ns").set_index(["layer", "part", "phase"])["span_ns"].to_dict()
    mean_us = 50  # of steps of 40, 50 and 60 ms
    assert found == {
        (0, "layer itself", files.FORWARD): mean_us * 1000,
        (0, "moe", files.FORWARD): mean_us * 500,
        (1, "layer itself", files.FORWARD): 4 * mean_us * 1000,
        (1, "moe", files.FORWARD): 4 * mean_us * 500,
        (1, "layer itself", files.RECOMPUTE): 4 * mean_us * 1000,
        (1, "moe", files.RECOMPUTE): 4 * mean_us * 500,
    }
    assert tables.points["layer_span_s"].tolist() == [pytest.approx((1 + 4 + 4) * mean_us * 1e-6)]


# --- facts of the whole ----------------------------------------------------------------------------------------------


def test_busy_idle_launches_and_what_was_placed(
    tape: Tape, tables: LatencyTables, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = tables.points.to_dict("records")
    total_ns = sum(placed.duration_ns for placed in tape.placed)
    # A copy runs beside attention in forward and recompute of both layers; in the second step twice as long.
    overlap_ns = COPY_BESIDE_US * US * 2 * NUM_LAYERS * (1 + 2)
    busy_step_ns = (total_ns - overlap_ns) / NUM_RECORDED_STEPS
    launches = len(tape.placed) / NUM_RECORDED_STEPS
    wanted = {
        "step_s": MEAN_STEP_NS / 1e9,
        "profiled_step_s": MEAN_FACTOR * RECORDED_STEP_NS / 1e9,
        "profiled_over_unprofiled": 3,
        "cells_sum_s": total_ns / NUM_RECORDED_STEPS / 1e9,
        "busy_s": busy_step_ns / 1e9,
        "idle_frac": 1 - busy_step_ns / MEAN_STEP_NS,
        "num_launches": launches,
        "step_us_per_launch": MEAN_STEP_NS / 1e3 / launches,
        "attributed_frac": 1 - UNKNOWN_US * US / total_ns,
    }
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    assert (row["source"], row["op_part"]) == ("kernels", "moe")
    in_layers = totals(tape, lambda place: (place.layer >= 0, place.part == "moe"))
    moe_ns, rest_ns = in_layers[True, True][0], in_layers[True, False][0]
    assert row["op_part_of_layers_frac"] == pytest.approx(moe_ns / (moe_ns + rest_ns))
    quality = tables_in(printed(folder, capsys))["How it was measured, mixtral on NVIDIA H200, preset full"]
    shown = dict(zip(quality.header, quality.rows[0], strict=True))
    assert shown["idle %"] == number(100 * wanted["idle_frac"])
    assert shown["attributed %"] == f"{100 * wanted['attributed_frac']:.2f}"
    assert shown["us of step a launch"] == number(wanted["step_us_per_launch"])
    assert "point: a profiled step took 3.00 times an unprofiled one" in printed(folder, capsys)


def test_layers_span_from_their_first_work_to_their_last(tape: Tape, tables: LatencyTables) -> None:
    ranges: dict[Any, list[int]] = {}
    gpu = sorted((event for event in tape.events if event["device"] == 0), key=lambda event: event["correlation"])
    for event, placed in zip(gpu, tape.placed, strict=True):
        place = placed.place
        if place.layer >= 0 and place.phase in (files.FORWARD, files.RECOMPUTE):
            end_ns = event["start_ns"] + event["duration_ns"]
            seen = ranges.setdefault((placed.step, place.layer, place.phase), [event["start_ns"], end_ns])
            seen[1] = max(seen[1], end_ns)
    wanted_ns = sum(end_ns - start_ns for start_ns, end_ns in ranges.values()) / NUM_RECORDED_STEPS
    assert len(ranges) == 2 * NUM_LAYERS * NUM_RECORDED_STEPS
    assert tables.points["profiled_layer_span_s"].tolist() == [pytest.approx(wanted_ns / 1e9)]


def test_phases_are_means_with_an_interval(tables: LatencyTables) -> None:
    phases = tables.phases.set_index("phase")
    wanted = {"forward": 15, "recompute": 10, "backward": 25, "clip": 2.5, "optimizer": 5, "rest": 2.5}
    assert {name: 1e3 * seconds for name, seconds in phases["duration_s"].items()} == pytest.approx(wanted)
    assert {name: 2e3 * seconds for name, seconds in phases["host_duration_s"].items()} == pytest.approx(wanted)
    assert {name: 50 * share for name, share in phases["share_frac"].items()} == pytest.approx(wanted)
    assert (phases["num_steps"] == 3).all()
    assert (phases["duration_s_low"] >= phases["duration_s"] * 0.8 - 1e-12).all()  # no step took less than 40 ms of 50
    assert (phases["duration_s_high"] <= phases["duration_s"] * 1.2 + 1e-12).all()
    assert (phases["duration_s_low"] < phases["duration_s_high"]).all()


def test_memory_is_anchored_at_what_the_allocator_said(tables: LatencyTables) -> None:
    """Before the optimizer 5,000 bytes, after changes of 40 + 1,000 - 200 + 500 - 200 + 2,000 - 900 + 150 - 1,100 +
    3,000 - 2,500 = 1,790: the step began with 3,210."""
    found = [(row.phase, row.layer, row.part, row.peak_bytes, row.end_bytes) for row in tables.memory.itertuples()]
    assert EVERYTHING_BYTES - 1_790 == 3_210
    assert found == [
        (files.REST, -1, "(data)", 3_250, 3_250),
        (files.FORWARD, 0, "moe", 4_250, 4_050),
        (files.FORWARD, 1, "moe", 4_550, 4_350),
        (files.FORWARD, -1, "lm_head + loss", 6_350, 5_450),
        (files.BACKWARD, -1, "lm_head + loss", 5_600, 4_500),
        (files.RECOMPUTE, 1, "attention", 7_500, 5_000),
        (files.OPTIMIZER_STEP, -1, "(optimizer)", 5_025, 5_000),
        (files.REST, -1, "(after the optimizer)", 3_010, 3_010),
    ]


def test_the_memory_table_names_the_peaks_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tables_in(printed(folder, capsys))["Memory (GiB), mixtral on NVIDIA H200, preset full"]
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["in phase"], row["in part"], row["in layer"]) == (files.RECOMPUTE, "attention", "1")
    gib = 2**30
    # Weights 1,500 + 300, buffers 100 and optimizer 600 are no activations; what is left of 7,500 is.
    assert (row["peak of all"], row["activations"]) == (number(7_500 / gib), number(5_000 / gib))
    assert row["forward leaves"] == number(5_450 / gib)


# --- what the paper concluded ----------------------------------------------------------------------------------------


def takeaways(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = " ".join(printed(folder, capsys).split())
    return [line.partition(" Figure 6")[0] for line in text.split("Paper's takeaway, ")[1:]]


def test_both_takeaways_hold_where_the_numbers_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_breakdown(tmp_path / "a", random_point(), optimizer_frac=0.02)
    write_breakdown(tmp_path / "b", random_point(8, 10), optimizer_frac=0.05)
    moe, optimizer = takeaways(tmp_path, capsys)
    share = latency_tables(tmp_path).points["op_part_of_layers_frac"]
    assert share.mean() > 0.5
    assert moe.startswith("the MoE layer takes most of the layers' time (85 % on average over both its models, 91.7 %")
    assert "over this one's bars): holds here by busy time" in moe
    assert f"{number(100 * share.mean())} % (sparse 1 {number(100 * share[0])}, dense 10 " in moe
    # The paper's optimizer shares: 0.05 of 1.04 + 1.78 + 0.05 s, and of 2.39 + 4.51 + 0.05 s.
    assert "next to nothing: holds here (sparse 1 2.00 %, paper 1.74 %, dense 10 5.00 %, paper 0.719 %)" in optimizer


def test_neither_holds_where_the_numbers_say_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose attention has all that is the MoE layer's, and one bar whose optimizer is over a twentieth."""
    for name, top_k, optimizer_frac in (("a", 2, 0.02), ("b", 8, 0.06)):
        point = write_breakdown(tmp_path / name, random_point(top_k), optimizer_frac=optimizer_frac)
        modules = read(point, files.MODULES_FILE)
        modules["path"] = modules["path"].str.replace("block_sparse_moe", "self_attn.moe")
        put(point, files.MODULES_FILE, modules)
    moe, optimizer = takeaways(tmp_path, capsys)
    assert "does not hold here by busy time, 0 % (sparse 1 0, dense 1 0)" in moe
    assert "next to nothing: fails here (sparse 1 2.00 %" in optimizer


def test_the_papers_conclusions_are_only_for_its_model_at_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_breakdown(tmp_path / "tiny", random_point(preset="tiny"))
    write_breakdown(tmp_path / "slice", random_point(preset="slice", num_layers=8, total_layers=32))
    write_breakdown(tmp_path / "shallow", random_point(num_layers=16, total_layers=16))
    other = json.loads((tmp_path / "shallow" / "point.json").read_text())["model_config"] | {"hidden_size": 1024}
    write_breakdown(tmp_path / "narrow", random_point(batch=10), point_changes={"model_config": other})
    assert takeaways(tmp_path, capsys) == []
    write_breakdown(tmp_path / "papers", random_point(batch=32))
    assert all("(sparse 32 " in line for line in takeaways(tmp_path, capsys))


# --- order and blocks ------------------------------------------------------------------------------------------------


def test_bars_stand_as_in_the_figure_and_machines_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch, top_k in ((32, 2), (10, 2), (1, 8), (2, 2), (10, 8), (1, 2)):
        write_breakdown(tmp_path / f"x{batch}{top_k}", random_point(top_k, batch))
    a40 = gpu_environment("NVIDIA A40", 44.4)
    write_breakdown(tmp_path / "y", random_point(), environment=a40)
    one, other = printed(tmp_path, capsys).split("Figure 4: phases of a step (s), mixtral on ")[1:]
    assert one.startswith("NVIDIA A40, preset full")
    assert other.startswith("NVIDIA H200, preset full")
    bars = re.findall(r"^Figure 5: .*, mixtral random len 128 (\w+) batch (\d+) on ", other, re.MULTILINE)
    assert [(sparsity, int(batch)) for sparsity, batch in bars] == [
        ("sparse", 1), ("sparse", 2), ("sparse", 10), ("sparse", 32), ("dense", 1), ("dense", 10),
    ]  # fmt: skip
    for block in (one, other):
        rows = re.findall(r"^random len 128 +(\w+) +(\d+) .*±", block, re.MULTILINE)
        assert rows == re.findall(r"^Figure 6 .*, mixtral random len 128 (\w+) batch (\d+) on ", block, re.MULTILINE)


def test_figure_11_has_the_order_of_the_other_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bars = [("sparse", 2, 2), ("sparse", 2, 10), ("dense", 8, 1)]
    for sparsity, top_k, batch in bars:
        point = write_breakdown(tmp_path / f"{sparsity}{batch}", random_point(top_k, batch))
        of_probe = {"probe": "cs", "when": "before", "layer": 0, "num_queries": 1, "num_tokens": 8, "padding_tokens": 0}
        rows = [
            of_probe | {"expert": e, "tokens": top_k, "top_k": top_k, "num_experts": 8, "router_entropy_bits": 1.0}
            for e in range(8)
        ]
        put(point, EXPERT_TOKENS_FILE, pd.DataFrame(rows))
    figure = printed(tmp_path, capsys).partition("Figure 11")[2]
    shown = re.findall(r"^random (\w+) batch (\d+)", figure, re.MULTILINE)
    assert [(sparsity, int(batch)) for sparsity, batch in shown] == [(sparsity, batch) for sparsity, _, batch in bars]


def test_titles_tell_two_machines_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_breakdown(tmp_path / "x", random_point())
    write_breakdown(tmp_path / "y", random_point(), environment=gpu_environment("NVIDIA A40", 44.4))
    titles = re.findall("^Figure .*$", printed(tmp_path, capsys), re.MULTILINE)
    assert len(set(titles)) == len(titles)


def test_results_of_two_machines_of_a_kind_lie_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """profile_data/README.md promises it; the point's name is the same on both."""
    for machine, optimizer_frac in (("one", 0.1), ("other", 0.02)):
        write_breakdown(tmp_path / machine / "random-k2-b1", random_point(), optimizer_frac=optimizer_frac)
    text = printed(tmp_path, capsys)
    shown = [line.split() for line in text.splitlines() if line.startswith("random len 128") and "±" in line]
    assert len(shown) == 2
    assert shown[0] != shown[1]


def test_place_of_the_tape_is_what_it_says() -> None:
    """The oracle's own sum, so that an empty tape proves nothing."""
    tape = mixtral_tape()
    assert len({placed.place for placed in tape.placed}) > 60
    assert Place(-1, "unattributed", "unattributed") in {placed.place for placed in tape.placed}
