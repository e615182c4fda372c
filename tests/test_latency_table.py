"""Breakdowns of real steps as tables: nothing lost, nothing twice, and as many launches as the model must make.

Two were recorded just now without a GPU, two on an H200 (tests/fixtures).
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_latency import (
    NUM_RECORDED_STEPS,
    NUM_TIMED_STEPS,
    RANDOM_DENSE,
    RANDOM_SPARSE,
    printed,
    read,
    tables_in,
)
from helpers_tape import random_point, write_breakdown

from tunescope import latency_files as files
from tunescope import paper, results
from tunescope.analyze.latency import ALL_LAYERS, LatencyPoint, latency_point
from tunescope.analyze.latency_tables import LatencyTables, latency_tables, summed_over_layers
from tunescope.report.text import number

FIXTURES = Path(__file__).parent / "fixtures" / "latency_h200_tiny"
SPARSE, DENSE = "cpu sparse", "cpu dense"
NON_REENTRANT, REENTRANT = "h200 non-reentrant", "h200 reentrant"
RECORDED = (SPARSE, DENSE, NON_REENTRANT, REENTRANT)
ON_GPU = (NON_REENTRANT, REENTRANT)
PASSES = (files.FORWARD, files.RECOMPUTE, files.BACKWARD)
NUM_LAYERS, NUM_EXPERTS = 2, 8


@pytest.fixture(scope="module")
def folders(latency_once: Path) -> dict[str, Path]:
    return {
        SPARSE: latency_once / RANDOM_SPARSE,
        DENSE: latency_once / RANDOM_DENSE,
        NON_REENTRANT: FIXTURES / "non-reentrant",
        REENTRANT: FIXTURES / "reentrant",
    }


@pytest.fixture(scope="module")
def points(folders: dict[str, Path]) -> dict[str, LatencyPoint]:
    return {name: latency_point(results.read_point(folder))["point"] for name, folder in folders.items()}


@pytest.fixture(scope="module")
def tables(latency_once: Path) -> LatencyTables:
    return latency_tables(latency_once)


# --- conservation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_phases_of_every_timed_step_add_up_to_it(name: str, folders: dict[str, Path]) -> None:
    steps, phases = (read(folders[name], file) for file in (results.STEPS_FILE, files.PHASES_FILE))
    timed = steps[~steps["is_warmup"]].set_index("step")
    assert len(timed) == (20 if name in ON_GPU else NUM_TIMED_STEPS)
    for clock in ("duration_ns", "host_duration_ns"):
        by_phase = phases.pivot(index="step", columns="phase", values=clock)
        assert set(by_phase.columns) == set(files.PHASES)
        assert (by_phase > 0).all(axis=None)
        assert (by_phase.drop(columns=files.RECOMPUTE).sum(axis=1) == timed[clock]).all()
        # The recompute of the layers, which are most of this model, is about as long as their forward.
        assert (by_phase[files.RECOMPUTE] < by_phase[files.BACKWARD]).all()


@pytest.mark.parametrize("name", RECORDED)
def test_phases_in_the_table_are_means_over_steps(name: str, points: dict[str, LatencyPoint]) -> None:
    point = points[name]
    table = point.phases().set_index("phase")
    assert table.index.tolist() == list(files.PHASES)
    own = point.read(files.PHASES_FILE, files.PHASES_SCHEMA)
    for phase, row in table.iterrows():
        seconds = own.loc[own["phase"] == phase, "duration_ns"].to_numpy() / 1e9
        assert row["duration_s"] == pytest.approx(seconds.mean())
        assert row["num_steps"] == len(point.timed_step_ns)
        assert row["duration_s_low"] <= row["duration_s"] <= row["duration_s_high"]
    parts = table.drop(files.RECOMPUTE)
    assert parts["duration_s"].sum() == pytest.approx(point.timed_step_ns.mean() / 1e9)
    assert parts["share_frac"].sum() == pytest.approx(1)


def innermost_op_ns(events: pd.DataFrame) -> int:
    """Time in which the innermost range that is open on a thread is an operator: a sweep from one edge to the next."""
    ranges = events[(events["device"] < 0) & (events["kind"] != files.LAUNCH) & (events["duration_ns"] > 0)]
    total_ns = 0
    for _, of_thread in ranges.groupby("thread"):
        edges = []
        columns = (of_thread[name].tolist() for name in ("start_ns", "duration_ns", "kind"))
        for start_ns, duration_ns, kind in zip(*columns, strict=True):
            # At one moment ranges end before others begin, and of those that begin the longest is the outermost.
            edges.append((start_ns, 1, -duration_ns, kind == files.OP))
            edges.append((start_ns + duration_ns, 0, 0, False))
        is_op: list[bool] = []
        before_ns = 0
        for time_ns, begins, _, op in sorted(edges):
            total_ns += time_ns - before_ns if is_op and is_op[-1] else 0
            before_ns = time_ns
            is_op.append(op) if begins else is_op.pop()
    return total_ns


@pytest.mark.parametrize("name", RECORDED)
def test_every_nanosecond_of_work_is_in_one_cell(name: str, points: dict[str, LatencyPoint]) -> None:
    """On a GPU the kernels, copies and memsets; without one the operators' self time, counted here in another way."""
    point = points[name]
    layers, events = point.layers(), point.recording.events
    if name in ON_GPU:
        work = events[events["kind"].isin(files.GPU_KINDS)]
        assert set(work["kind"]) == set(files.GPU_KINDS)
        wanted_ns, wanted_launches = work["duration_ns"].sum(), len(work)
    else:
        wanted_ns, wanted_launches = innermost_op_ns(events), (events["kind"] == files.OP).sum()
    assert layers["busy_ns"].sum() * NUM_RECORDED_STEPS == wanted_ns
    assert layers["num_launches"].sum() * NUM_RECORDED_STEPS == wanted_launches
    assert not layers.duplicated(["layer", "part", "phase"]).any()
    assert (layers["busy_ns"] >= 0).all()
    summary = point.summary()
    assert summary["cells_sum_s"] * 1e9 == pytest.approx(wanted_ns / NUM_RECORDED_STEPS)
    assert summary["num_launches"] == wanted_launches / NUM_RECORDED_STEPS
    assert summary["busy_s"] <= summary["cells_sum_s"] * (1 + 1e-9)
    assert summary["attributed_frac"] == 1
    assert 0 < summary["idle_frac"] < 1


@pytest.mark.parametrize("name", RECORDED)
def test_operators_add_up_to_their_part(name: str, points: dict[str, LatencyPoint]) -> None:
    point = points[name]
    assert point.op_parts == ("moe",)
    operators, layers = point.operators(), point.layers()
    values = ["busy_ns", "num_launches"]
    of_moe = layers[layers["part"] == "moe"].set_index(["layer", "phase"])[values].sort_index()
    pd.testing.assert_frame_equal(operators.groupby(["layer", "phase"])[values].sum().sort_index(), of_moe)
    assert np.allclose(operators["mean_launch_ns"], operators["busy_ns"] / operators["num_launches"], rtol=1e-12)
    assert set(operators["label"]) <= set(point.division.layout.op_order)
    assert "other" not in set(operators["label"])


@pytest.mark.parametrize("name", RECORDED)
def test_single_layers_and_what_is_outside_add_up_to_the_sum_of_layers(
    name: str, points: dict[str, LatencyPoint]
) -> None:
    layers = points[name].layers()
    assert sorted(set(layers["layer"])) == [ALL_LAYERS, *range(NUM_LAYERS)]
    values = ["busy_ns", "num_launches", "span_ns"]
    everything = summed_over_layers(layers).set_index(["part", "phase"])[values].sort_index()
    singles = pd.concat([summed_over_layers(layers, layer) for layer in (ALL_LAYERS, *range(NUM_LAYERS))])
    added = singles.groupby(["part", "phase"])[values].sum(min_count=1).sort_index()
    pd.testing.assert_frame_equal(added, everything)
    inside = set(summed_over_layers(layers, 0)["part"])
    assert inside == {"input_norm", "attention", "post_attention_norm", "moe", "layer itself"}
    assert not inside & set(summed_over_layers(layers, ALL_LAYERS)["part"])


@pytest.mark.parametrize("name", RECORDED)
def test_spans_hold_what_happens_in_them(name: str, points: dict[str, LatencyPoint]) -> None:
    """Parts of a layer lie in it, layers in their phase, and forward and recompute of a layer do the same work."""
    point = points[name]
    spans = point.layers().dropna(subset="span_ns").set_index(["phase", "part", "layer"])["span_ns"]
    phases_ns = point.phases().set_index("phase")["duration_s"] * 1e9
    for phase in (files.FORWARD, files.RECOMPUTE):
        of_layers = spans[phase]["layer itself"]
        assert len(of_layers) == NUM_LAYERS
        assert of_layers.sum() <= phases_ns[phase] * (1 + 1e-6)
        for layer in range(NUM_LAYERS):
            parts = [spans[phase, part, layer] for part in ("input_norm", "attention", "post_attention_norm", "moe")]
            assert 0 < sum(parts) < of_layers[layer]
    assert spans[files.RECOMPUTE]["layer itself"].sum() == pytest.approx(phases_ns[files.RECOMPUTE])
    backward_ns = spans[files.BACKWARD]["layer itself"].sum() + phases_ns[files.RECOMPUTE]
    assert backward_ns < phases_ns[files.BACKWARD]


# --- as many launches as the architecture has it ---------------------------------------------------------------------


def matrix_products(point: LatencyPoint) -> Counter[tuple[str, str, int, int]]:
    """(label, pass, layer, step) -> calls of the operator that multiplies, whose kernels are one each at this size."""
    work = point.attribution.work
    work = work[(work["part"] == "moe") & (work["op"] == "aten::mm")]
    return Counter(zip(work["label"], work["phase"], work["layer"], work["step"], strict=True))


@pytest.mark.parametrize("name", RECORDED)
def test_every_frozen_matrix_is_multiplied_once_a_pass(name: str, points: dict[str, LatencyPoint]) -> None:
    """The router once a layer, w1 to w3 once an expert that got tokens: which did is in the calls."""
    point = points[name]
    recording = point.recording
    recorded = recording.calls[
        recording.calls["call"].isin(recording.events["ref"][recording.events["kind"] == files.CALL])
    ]
    paths = recording.modules.set_index("module")["path"]
    hit: Counter[tuple[int, bool]] = Counter()
    for module, again in zip(recorded["module"], recorded["is_recompute"], strict=True):
        if match := re.search(r"layers\.(\d+)\.block_sparse_moe\.experts\.\d+$", paths[module]):
            hit[int(match[1]), again] += 1
    products = matrix_products(point)
    for layer in range(NUM_LAYERS):
        assert hit[layer, False] == hit[layer, True]
        assert 0 < hit[layer, False] <= NUM_EXPERTS * NUM_RECORDED_STEPS
        for phase in PASSES:
            of_steps = [products["matmul(router)", phase, layer, step] for step in range(NUM_RECORDED_STEPS)]
            assert of_steps == [1] * NUM_RECORDED_STEPS, phase
            for matrix in ("w1", "w2", "w3"):
                counted = [products[f"matmul({matrix})", phase, layer, step] for step in range(NUM_RECORDED_STEPS)]
                assert sum(counted) == hit[layer, False], (matrix, phase)
    if name == DENSE:  # every token goes to every expert
        assert set(hit.values()) == {NUM_EXPERTS * NUM_RECORDED_STEPS}


@pytest.mark.parametrize("name", RECORDED)
def test_adapters_multiply_twice_forward_and_four_times_backward(name: str, points: dict[str, LatencyPoint]) -> None:
    """A and B of each adapter; backward has the gradients of their weights and of their inputs."""
    products = matrix_products(points[name])
    for layer in range(NUM_LAYERS):
        for step in range(NUM_RECORDED_STEPS):
            adapters = 1 + 3 * products["matmul(w1)", files.FORWARD, layer, step]
            counted = [products["matmul(lora)", phase, layer, step] for phase in PASSES]
            assert counted == [2 * adapters, 2 * adapters, 4 * adapters]


@pytest.mark.parametrize("name", ON_GPU)
def test_launches_of_the_operators_are_those_of_the_kernels(name: str, points: dict[str, LatencyPoint]) -> None:
    """All 8 experts of both layers were hit; each weight is decoded before each use."""
    operators = points[name].operators().groupby(["label", "phase"])["num_launches"].sum()
    for phase in PASSES:
        for matrix in ("w1", "w2", "w3"):
            assert operators[f"matmul({matrix})", phase] == operators[f"{matrix}_dequant", phase] == 2 * NUM_EXPERTS
        assert operators["matmul(router)", phase] == operators["router_dequant", phase] == 2
    for phase in (files.FORWARD, files.RECOMPUTE):
        # NF4's scales are decoded and shifted: two launches for each of 3 x 8 + 1 matrices in 2 layers.
        assert operators["scales_dequant", phase] == 2 * (3 * NUM_EXPERTS + 1) * NUM_LAYERS


@pytest.mark.parametrize("name", ON_GPU)
def test_backward_decodes_as_many_scales_as_forward(name: str, points: dict[str, LatencyPoint]) -> None:
    operators = points[name].operators().groupby(["label", "phase"])["num_launches"].sum()
    assert operators["scales_dequant", files.BACKWARD] == operators["scales_dequant", files.FORWARD]


@pytest.mark.parametrize("name", ON_GPU)
def test_a_launch_of_an_adapters_product_is_no_copy(name: str, points: dict[str, LatencyPoint]) -> None:
    work = points[name].attribution.work
    assert set(work.loc[work["label"] == "matmul(lora)", "op"]) == {"aten::mm"}


def test_recompute_runs_what_forward_ran(points: dict[str, LatencyPoint]) -> None:
    """All but a few: a non-reentrant recompute may stop early, and a reentrant one has gradients on."""
    for name in ON_GPU:
        launches = points[name].layers().groupby(["part", "phase"])["num_launches"].sum()
        for part in ("input_norm", "attention", "post_attention_norm"):
            assert launches[part, files.FORWARD] == launches[part, files.RECOMPUTE]
        assert abs(launches["moe", files.FORWARD] - launches["moe", files.RECOMPUTE]) <= 2 * NUM_LAYERS


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_peaks_of_memory_are_peaks(name: str, points: dict[str, LatencyPoint]) -> None:
    memory = points[name].memory()
    assert (memory["peak_bytes"] >= memory["end_bytes"]).all()
    peak = memory.loc[memory["peak_bytes"].idxmax()]
    assert peak["phase"] in PASSES
    parts = points[name].memory_parts().set_index("part")["allocated_bytes"]
    assert parts["gradients"] == parts["trained_weights"]
    # AdamW keeps two numbers a weight, in fp32 as the adapters are; and a step count for each tensor.
    num_tensors = 2 * NUM_LAYERS * (3 * NUM_EXPERTS + 1)
    assert parts["optimizer"] == 2 * parts["trained_weights"] + 4 * num_tensors
    modules = points[name].recording.modules
    assert modules["trained_bytes"].sum() == parts["trained_weights"]
    assert modules["frozen_bytes"].sum() == parts["frozen_weights"]
    ends = memory.groupby("phase", sort=False)["end_bytes"].last()
    # Gradients are made in backward and freed at the end of the step; what forward leaves is freed by then.
    assert ends[files.BACKWARD] - ends[files.REST] >= parts["gradients"]
    assert ends[files.FORWARD] > ends[files.REST]


@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_the_peak_is_the_allocators_own_to_the_byte(name: str, points: dict[str, LatencyPoint]) -> None:
    point = points[name]
    memory = point.memory()
    assert memory["peak_bytes"].max() == point.found.outcome["peak_allocated_bytes"]
    parts = point.memory_parts().set_index("part")["allocated_bytes"]
    at_optimizer = memory.loc[memory["phase"] == files.CLIP, "end_bytes"].iloc[-1]
    assert at_optimizer == parts["everything"]
    assert parts["everything"] >= parts.drop("everything").sum()


# --- beside the paper ------------------------------------------------------------------------------------------------


def csv_values(table: str, key: str, value: str, top_k: int, batch: int) -> dict[str, float]:
    return {
        row[key]: float(row[value])
        for row in paper.rows(table)
        if (row["model"], row["top_k"], row["batch_size"]) == ("mixtral", str(top_k), str(batch))
    }


def test_the_papers_numbers_stand_beside_their_bar(tables: LatencyTables) -> None:
    for top_k, point_id in ((2, RANDOM_SPARSE), (8, RANDOM_DENSE)):
        phases = tables.phases[tables.phases["point_id"] == point_id].set_index("phase")["paper_a40_s"].dropna()
        assert phases.to_dict() == csv_values("phase_latency", "phase", "latency_s", top_k, 1)
        assert len(phases) == 3
        operators = tables.operators[tables.operators["point_id"] == point_id]
        beside = operators.dropna(subset="paper_a40_us_per_launch").drop_duplicates(["label", "phase"])
        wanted = csv_values("kernel_latency", "kernel", "latency_us", top_k, 1)
        assert set(beside["label"]) == wanted.keys()  # every row of Figure 6 has its operator
        assert (beside["paper_a40_us_per_launch"] == beside["label"].map(wanted)).all()
    assert tables.points["paper_a40_ablation_s"].isna().all()  # its batches at length 128 are 10 and 32


def test_the_papers_layers_stand_beside_their_parts(latency_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tables_in(printed(latency_once, capsys))
    for top_k, sparsity in ((2, "sparse"), (8, "dense")):
        figure5 = text[f"Figure 5: sum of 2 layers (ms a step), mixtral random len 128 {sparsity} batch 1"]
        paper_column, share_column = figure5.header.index("A40 paper"), figure5.header.index("its share %")
        wanted = csv_values("layer_latency", "layer", "latency_s", top_k, 1)
        shown = {row[0]: (row[paper_column], row[share_column]) for row in figure5.rows if row[paper_column] != "-"}
        whole_s = sum(wanted.values())
        assert shown.pop("all") == (number(1e3 * whole_s), "100")
        assert shown == {part: (number(1e3 * s), number(100 * s / whole_s)) for part, s in wanted.items()}
        assert len(shown) == 4


def test_another_bar_or_length_has_nothing_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [random_point(batch=2), random_point(8, 32), random_point(top_k=4), random_point(seq_len_tokens=64)]
    others.append(random_point(dataset="cs", seq_len_tokens=None))
    for number_, point in enumerate(others):
        write_breakdown(tmp_path / f"p{number_}", point)
    found = latency_tables(tmp_path)
    assert (found.points["status"] == "ok").all()
    assert found.phases["paper_a40_s"].isna().all()
    assert found.operators["paper_a40_us_per_launch"].isna().all()
    assert found.points["paper_a40_ablation_s"].isna().all()
    for title, table in tables_in(printed(tmp_path, capsys)).items():
        assert not any("paper" in name for name in table.header), title


def test_the_length_ablation_is_told_at_the_two_batches_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for point in (random_point(2, 32), random_point(8, 10), random_point(2, 10)):
        write_breakdown(tmp_path / point.point_id("x"), point)
    ablation = {
        (int(row["top_k"]), int(row["batch_size"])): float(row["latency_s"])
        for row in paper.rows("seq_len_ablation")
        if row["model"] == "mixtral" and row["batch_size"]
    }
    assert ablation.keys() == {(2, 32), (8, 10)}
    told = latency_tables(tmp_path).points.set_index(["top_k", "per_device_batch_size"])["paper_a40_ablation_s"]
    assert told.dropna().to_dict() == ablation
    text = " ".join(printed(tmp_path, capsys).split())
    assert "at this length and batch: sparse 32 6.88 s; dense 10 6.93 s." in text
