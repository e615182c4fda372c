"""BlackMamba and Qwen3-MoE by the same launchers' code as Mixtral: real runs, and what their tables say."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_latency import tables_in
from launching import REPO, assert_one_clear_paragraph, run, tunescope

from tunescope import latency_files as files
from tunescope.analyze.latency_tables import latency_tables
from tunescope.families.blackmamba import BLACKMAMBA, BLACKMAMBA_TINY
from tunescope.families.blackmamba_shapes import num_parameters

TINY = ("--preset", "tiny", "--queries", "12")


@pytest.fixture(scope="module")
def breakdown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`./mamba_lt.sh`, sparse and dense."""
    out = tmp_path_factory.mktemp("blackmamba") / "latency"
    points = "random:sparse:bs=1:seq=32 random:dense:bs=1:seq=32"
    done = run(REPO / "mamba_lt.sh", *TINY, "--out", out, "--points", points)
    assert done.code == 0, done.err
    assert f"Table: python3 mamba_latency.py {out}" in done.out
    return out


def test_throughput_of_blackmamba(tmp_path: Path) -> None:
    """Both data sets, by its own launcher; the rows say how it ran."""
    points = "cs:sparse:bs=6 math:dense:bs=1"
    done = run(REPO / "mamba_tp.sh", *TINY, "--out", tmp_path, "--points", points)
    assert done.code == 0, done.err
    assert f"Table: python3 throughput.py {tmp_path}" in done.out
    rows = json.loads(run(sys.executable, REPO / "throughput.py", tmp_path, "--format", "json").out)
    assert [(row["model"], row["dataset"], row["sparsity"], row["status"]) for row in rows] == [
        ("blackmamba", "cs", "sparse", "ok"),
        ("blackmamba", "math", "dense", "ok"),
    ]
    for row in rows:
        assert (row["moe"], row["scan"], row["compute_dtype"]) == ("grouped", "reference", "float32")
        assert row["attention"] is None
        assert row["paper_a40_queries_per_s"] == {"cs": 10.46236322, "math": 2.218754555}[row["dataset"]]
        assert row["ratio_to_paper"] is None
    point = json.loads((tmp_path / rows[0]["point_id"] / "point.json").read_text())
    assert point["model_config"]["loss"] == "study"
    assert point["recipe"]["pure_bf16"] is True


def test_layers_and_operators_of_blackmamba(breakdown: Path) -> None:
    tables = latency_tables(breakdown)
    assert tables.points["status"].tolist() == ["ok", "ok"]
    inside = tables.layers[tables.layers["layer"] >= 0]
    assert set(inside["part"]) == {"rms_norm", "mamba", "moe", "layer itself"}
    for part, layers in (("mamba", {0, 2}), ("moe", {1, 3}), ("rms_norm", {0, 1, 2, 3})):
        assert set(inside.loc[inside["part"] == part, "layer"]) == layers
    assert files.RECOMPUTE not in set(tables.layers["phase"])
    assert (tables.points["attributed_frac"] > 0.99).all()
    labels = tables.operators.groupby("part")["label"].agg(set)
    assert labels["moe"] >= {
        "matmul(w1)", "gelu", "matmul(w2)", "elementwise_mult", "top_k", "sigmoid", "matmul(router)",
    }  # fmt: skip
    assert labels["mamba"] >= {
        "matmul(in_proj)", "matmul(x_proj)", "matmul(dt_proj)", "matmul(out_proj)", "conv1d + silu", "selective scan",
    }  # fmt: skip
    # What nobody has named is little of either part, in each direction.
    for (part, phase), cells in tables.operators.groupby(["part", "phase"]):
        other = cells.loc[cells["label"] == "other", "busy_ns"].sum()
        assert other < 0.15 * cells["busy_ns"].sum(), (part, phase)
    matmuls = tables.operators[tables.operators["label"].isin(["matmul(w1)", "matmul(in_proj)"])]
    assert set(matmuls["phase"]) == {files.FORWARD, files.BACKWARD}


def test_memory_of_full_fine_tuning_is_that_of_its_parameters(breakdown: Path) -> None:
    """fp32 here: weights and gradients once, AdamW's moments twice, nothing frozen."""
    parts = latency_tables(breakdown).memory_parts
    total_bytes = 4 * num_parameters(BLACKMAMBA_TINY)
    for _, of_point in parts.groupby("folder"):
        held = of_point.set_index("part")["allocated_bytes"]
        assert held["frozen_weights"] == 0
        assert held["trained_weights"] == held["gradients"] == total_bytes
        assert held["optimizer"] == pytest.approx(2 * total_bytes, rel=1e-3)  # and a step count a tensor


def test_tokens_per_expert_of_blackmamba(breakdown: Path) -> None:
    """Every token that is not padding goes to top_k experts of each MoE block; the paper's bars stand beside."""
    loads = latency_tables(breakdown).expert_loads
    assert set(loads["layer"]) == {"1", "3"}
    for _, group in loads.groupby(["point_id", "probe", "when", "layer"]):
        assert group["expert"].tolist() == list(range(8))
        assert set(group["num_tokens"] * group["top_k"]) == {group["tokens"].sum()}


def test_tables_of_blackmamba_read_like_mixtrals(breakdown: Path) -> None:
    done = run(sys.executable, REPO / "mamba_latency.py", breakdown)
    assert done.code == 0, done.err
    titles = list(tables_in(done.out))
    for figure in (
        "Figure 4",
        "Figure 5",
        "Figure 6 from the profiler: operators of moe",
        "Operators of mamba",
        "Figure 11",
    ):
        assert any(title.startswith(figure) for title in titles), (figure, titles)
    assert "scan: reference" in done.out
    assert "NF4" not in done.out


def test_qwen3_moe_is_a_third_model_by_data_alone(tmp_path: Path) -> None:
    done = tunescope(
        "run", "latency", "--model", "qwen3_moe", *TINY, "--out", tmp_path, "--points", "random:k=2:bs=1:seq=32"
    )
    assert done.code == 0, done.err
    tables = latency_tables(tmp_path)
    (row,) = tables.points.to_dict("records")
    assert (row["status"], row["model"], row["sparsity"]) == ("ok", "qwen3_moe", "top-2")
    assert row["attributed_frac"] > 0.99
    assert {"matmul(gate_proj)", "down_proj_dequant", "matmul(lora)", "softmax", "topk"} <= set(
        tables.operators["label"]
    )
    used = tables.expert_loads.groupby(["probe", "when", "layer"])["tokens"].agg(["size", "sum"])
    assert set(used["size"]) == {128}
    assert (used["sum"] > 0).all()
    assert np.isnan(tables.operators["paper_a40_us_per_launch"].to_numpy(dtype=float)).all()


@pytest.mark.parametrize(
    ("model", "arguments", "texts"),
    [
        ("blackmamba", ["--scan", "fast"], ["--scan fast is unknown", "auto, triton, mamba-ssm, reference"]),
        ("blackmamba", ["--scan", "triton"], ["needs a GPU", "--scan reference"]),
        ("blackmamba", ["--reentrant"], ["--reentrant", "does not checkpoint"]),
        ("mixtral", ["--scan", "reference"], ["mixtral has no selective scan"]),
        ("qwen3_moe", ["--points", "cs:k=129:bs=1"], ["top_k is 129; it must be from 1 to 128"]),
        ("gpt2", [], ["'gpt2' is unknown", "mixtral, blackmamba, qwen3_moe"]),
    ],
)
def test_flags_that_mean_nothing_for_a_model_are_refused(
    model: str, arguments: list[str], texts: list[str], tmp_path: Path
) -> None:
    done = tunescope("run", "throughput", "--model", model, "--preset", "tiny", "--out", tmp_path, *arguments)
    assert_one_clear_paragraph(done, *texts)
    assert not list(tmp_path.iterdir())


def test_a_model_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BLACKMAMBA.full))
    done = tunescope("run", "throughput", "--model", "mixtral", "--model-path", folder, "--out", tmp_path / "out")
    assert_one_clear_paragraph(done, "a model of type 'blackmamba' with 8 experts", "type mixtral with 8 experts")


def test_an_own_blackmamba_runs_from_its_config_alone(tmp_path: Path) -> None:
    """Preset full on the CPU, of whatever size the folder says; what the study asks of a config reaches the run."""
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    own: dict[str, Any] = BLACKMAMBA_TINY | {"hidden_size": 48, "intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(own))
    flags = ["--preset", "full", "--queries", "4", "--points", "cs:k=1:bs=1", "--out", out, "--model-path", folder]
    done = tunescope("run", "throughput", "--model", "blackmamba", *flags)
    assert done.code == 0, done.err
    (row,) = json.loads(tunescope("table", "throughput", out, "--format", "json").out)
    assert (row["status"], row["sparsity"], row["weights"], row["ratio_to_paper"]) == ("ok", "top-1", "random", None)
