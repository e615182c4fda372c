"""Figures 6, 9 and 10 without a GPU, from the launchers to the tables: real processes, every row modelled."""

import csv
import io
import json
from pathlib import Path

import pytest
from launching import REPO, Finished, run, tunescope

from tunescope import results
from tunescope.analyze.kernels import KernelPoint
from tunescope.hardware import find_device

POINTS = "random:sparse:bs=2:seq=32 random:dense:bs=1:seq=32"
SCRIPTS = {
    "mixtral": ("mixtral_pf.sh", "sm_mixtral.py", "mem_mixtral.py"),
    "blackmamba": ("mamba_pf.sh", "sm_mamba.py", "mem_mamba.py"),
}
# Rows of the paper's figures.
FIGURE_ROWS = {
    "mixtral": {
        "matmul(w1)", "matmul(w2)", "matmul(w3)", "w1_dequant", "w2_dequant", "w3_dequant", "activation", "softmax",
        "topk", "matmul(router)", "router_dequant", "matmul(lora)", "gather/scatter/index", "time_weighted",
    },
    "blackmamba": {
        "matmul(w1)", "gelu", "matmul(w2)", "elementwise_mult", "top_k", "sigmoid", "matmul(router)", "time_weighted",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SCRIPTS))
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Finished]:
    out = tmp_path_factory.mktemp(request.param)
    done = run(REPO / SCRIPTS[request.param][0], "--preset", "tiny", "--points", POINTS, "--out", out)
    assert done.code == 0, done.err
    return request.param, out, done


def rows_of(script: str, out: Path, *flags: str) -> list[dict[str, str]]:
    done = run("python3", REPO / script, out, "--format", "csv", *flags)
    assert done.code == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out)))


def test_the_launcher_says_why_there_are_no_counters_once(measured: tuple[str, Path, Finished]) -> None:
    model, out, done = measured
    assert done.err.count("No counters") == 1
    assert f"Table: python3 {SCRIPTS[model][1]} {out}" in done.out
    again = run(REPO / SCRIPTS[model][0], "--preset", "tiny", "--points", POINTS, "--out", out)
    assert "2 of 2 points are measured already" in again.err


def test_every_row_of_the_figure_is_there_and_modelled(measured: tuple[str, Path, Finished]) -> None:
    model, out, _ = measured
    rows = rows_of(SCRIPTS[model][1], out)
    assert {row["source"] for row in rows} == {"modelled"}
    for folder in {row["folder"] for row in rows}:
        over = [row for row in rows if row["folder"] == folder and row["phase"] == "all"]
        assert {row["label"] for row in over} >= FIGURE_ROWS[model]
        for row in over:
            assert 0 <= float(row["sm_percent"]) <= 100
            assert 0 < float(row["memory_percent"]) <= 100.000001
            assert row["memory_percent"] == row["dram_percent"]


def test_sums_and_means_over_time_are_those_of_the_rows(measured: tuple[str, Path, Finished]) -> None:
    model, out, _ = measured
    rows = rows_of(SCRIPTS[model][1], out)
    for folder in {row["folder"] for row in rows}:
        mine = [row for row in rows if row["folder"] == folder]
        total = next(row for row in mine if row["label"] == "time_weighted")
        over = [row for row in mine if row["phase"] == "all" and row is not total]
        by_phase = [row for row in mine if row["phase"] != "all"]
        for group in (over, by_phase):
            busy = sum(float(row["busy_ns"]) for row in group)
            assert busy == pytest.approx(float(total["busy_ns"]))
            mean = sum(float(row["busy_ns"]) * float(row["sm_percent"]) for row in group) / busy
            assert mean == pytest.approx(float(total["sm_percent"]))
        assert sum(float(row["share_frac"]) for row in over) == pytest.approx(1)


def test_one_phase_alone(measured: tuple[str, Path, Finished]) -> None:
    model, out, _ = measured
    everything = rows_of(SCRIPTS[model][2], out)
    forward = rows_of(SCRIPTS[model][2], out, "--phase", "forward")
    for row in forward:
        if row["phase"] != "all" or row["label"] == "time_weighted":
            continue
        same = next(
            other
            for other in everything
            if (other["folder"], other["phase"], other["label"]) == (row["folder"], "forward", row["label"])
        )
        assert float(row["busy_ns"]) == pytest.approx(float(same["busy_ns"]))


def test_the_text_reads_as_a_table_with_its_limits(measured: tuple[str, Path, Finished]) -> None:
    model, out, _ = measured
    for script, title, column in zip(SCRIPTS[model][1:], ("Figure 9", "Figure 10"), ("sparse 2", "DRAM"), strict=True):
        done = run("python3", REPO / script, out)
        assert done.code == 0
        assert done.out.startswith(title)
        for words in (
            column,
            "modelled",
            "No counters: there is no GPU",
            "Without a GPU a kernel's time",
            "Preset tiny",
        ):
            assert words in done.out, words
        content = json.loads(run("python3", REPO / script, out, "--format", "json").out)
        assert {row["status"] for row in content["points"]} == {"ok"}
    other = run("python3", REPO / SCRIPTS[model][1], out, "--metric", "occupancy_percent")
    assert other.out.startswith("occupancy_percent (sm__warps_active")


def test_roofline_is_under_its_ceilings(measured: tuple[str, Path, Finished], tmp_path: Path) -> None:
    _, out, _ = measured
    plot = tmp_path / "roofline.svg"
    done = tunescope("table", "roofline", out, "--format", "csv", "--plot", plot)
    assert done.code == 0, done.err
    assert plot.read_text().count("<svg") == 1
    a40 = find_device("A40")
    for row in csv.DictReader(io.StringIO(done.out)):
        assert float(row["bytes_per_s"]) <= a40.dram_bytes_per_s * 1.000001
        assert float(row["flop_per_s"]) <= a40.peak_bf16_flop_per_s * 1.000001
        assert row["bound"] in ("compute", "memory", "latency")
        near = max(float(row["compute_frac"] or 0), float(row["memory_frac"] or 0))
        assert (row["bound"] == "latency") == (near < 0.4)
    text = tunescope("table", "roofline", out)
    assert "bound by" in text.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("table", "sm", "/nonexistent"),
        ("table", "sm", ".", "--phase", "sideways"),
        ("table", "mem", ".", "--metric", "luck"),
        ("table", "roofline", "/nonexistent"),
        ("run", "kernels", "--preset", "tiny", "--phases", "sideways"),
        ("run", "kernels", "--preset", "tiny", "--layers", "one"),
        ("run", "kernels", "--preset", "tiny", "--launches", "-1"),
        ("run", "kernels", "--preset", "tiny", "--clock-control", "boost"),
        ("run", "kernels", "--preset", "tiny", "--cache-control", "some"),
        ("run", "kernels", "--preset", "tiny", "--points", "cs:sparse:bs=max"),
    ],
)
def test_bad_input_is_said_in_a_paragraph(arguments: tuple[str, ...]) -> None:
    done = tunescope(*arguments)
    assert done.code == 2
    assert done.err.startswith("tunescope: ")
    assert "Traceback" not in done.err


def test_flop_of_the_products_are_those_of_the_config(measured: tuple[str, Path, Finished]) -> None:
    """Counted from tensors while training, against arithmetic on config.json: forward, recompute alike, backward twice
    for a trained weight and once for a frozen one."""
    model, out, _ = measured
    for folder in results.find_point_folders(out):
        found = results.read_point(folder)
        config, point = found.point["model_config"], found.point["point"]
        tokens = point["per_device_batch_size"] * point["seq_len_tokens"]
        rows = tokens * config["num_experts_per_tok"]
        work = KernelPoint(found, {}, None).op_work()
        flop = work.groupby(["phase", "label"])["flop"].sum()
        wide = config["hidden_size"] * config["intermediate_size"]
        layers = config["layers_block_type"].count("moe") if model == "blackmamba" else config["num_hidden_layers"]
        expert = 2 * layers * rows * wide
        if model == "mixtral":
            for name in ("w1", "w2", "w3"):
                for phase in ("forward", "recompute", "backward"):
                    is_cut_short = phase == "recompute" and name == "w2"  # of the last layer that nothing waits for
                    if not is_cut_short:
                        assert flop[phase, f"matmul({name})"] == expert, (phase, name)
            rank = int(found.point["recipe"]["lora_rank"])
            adapters = 2 * layers * rank * (3 * rows * (config["hidden_size"] + config["intermediate_size"]))
            adapters += 2 * layers * rank * tokens * (config["hidden_size"] + config["num_local_experts"])
            assert flop["forward", "matmul(lora)"] == adapters
            assert flop["backward", "matmul(lora)"] == 2 * adapters
        else:  # w1 makes the gate, too
            assert flop["forward", "matmul(w1)"] == 2 * expert
            assert flop["forward", "matmul(w2)"] == expert
            for name in ("w1", "w2"):
                assert flop["backward", f"matmul({name})"] == 2 * flop["forward", f"matmul({name})"]
