"""Breakdowns as text, csv and json: one set of numbers, of all layers or of one, from any folder and without torch."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import launching
import pandas as pd
import pytest
from helpers_latency import NUM_TIMED_STEPS, RANDOM_DENSE, RANDOM_SPARSE, printed, put, read, tables_in
from launching import REPO

from tunescope import latency_files as files
from tunescope.analyze.latency import KEY
from tunescope.analyze.latency_tables import LatencyTables, latency_tables
from tunescope.errors import UserError
from tunescope.hardware import GIB
from tunescope.report import latency as report
from tunescope.report.latency import print_latency
from tunescope.report.text import FORMATS, number

FIXTURES = Path(__file__).parent / "fixtures" / "latency_h200_tiny"
PASSES = (files.FORWARD, files.RECOMPUTE, files.BACKWARD)
NUM_LAYERS, NUM_EXPERTS = 2, 8


@pytest.fixture(scope="module")
def tables(latency_once: Path) -> LatencyTables:
    return latency_tables(latency_once)


@pytest.fixture
def read_once(tables: LatencyTables, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is printed is of these tables."""
    monkeypatch.setattr(report, "latency_tables", lambda _: tables)


# --- the three formats -----------------------------------------------------------------------------------------------


def as_long(frames: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    """Every number of json's tables under a key."""
    ids = {
        "phases": ("phase",),
        "layers": ("layer", "part", "phase"),
        "operators": ("layer", "part", "label", "phase"),
        "memory": ("layer", "part", "phase"),
        "memory_parts": ("part",),
    }
    found = {}
    for table, names in ids.items():
        for row in frames[table]:
            key = (row["point_id"], table, *(row.pop(name) for name in names))
            for quantity, value in row.items():
                if quantity not in (*KEY, "moment") and value is not None:
                    assert (*key, quantity) not in found
                    found[*key, quantity] = value
    return found


@pytest.mark.usefixtures("read_once")
def test_csv_and_json_agree_in_every_number(latency_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    from_json = json.loads(printed(latency_once, capsys, "json"), parse_constant=refuse)
    wanted = as_long(from_json)
    from_csv = pd.read_csv(io.StringIO(printed(latency_once, capsys, "csv")))
    loads = from_csv[from_csv["table"] == "expert_loads"]
    from_csv = from_csv.drop(index=loads.index)
    found = {}
    for row in from_csv.to_dict("records"):
        layer = () if pd.isna(row["layer"]) else (int(row["layer"]),)
        names = [row[name] for name in ("part", "item", "phase") if isinstance(row[name], str)]
        found[row["point_id"], row["table"], *layer, *names, row["quantity"]] = row["value"]
    assert len(found) == len(from_csv)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert {row["point_id"] for row in from_json["points"]} == {RANDOM_SPARSE, RANDOM_DENSE}
    single = [row["tokens"] for row in from_json["expert_loads"] if row["layer"] != "all"]
    assert sorted(loads.loc[loads["quantity"] == "tokens", "value"]) == sorted(single)


@pytest.mark.usefixtures("read_once")
def test_text_shows_the_numbers_of_json(latency_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = as_long(json.loads(printed(latency_once, capsys, "json")))
    (device,) = {json.loads((latency_once / RANDOM_SPARSE / "environment.json").read_text())["device"]}
    text = tables_in(printed(latency_once, capsys))
    figure4 = text[f"Figure 4: phases of a step (s), mixtral on {device}, preset tiny"]
    memory = text[f"Memory (GiB), mixtral on {device}, preset tiny"]
    for place, (point_id, sparsity) in enumerate([(RANDOM_SPARSE, "sparse"), (RANDOM_DENSE, "dense")]):
        row = dict(zip(figure4.header, figure4.rows[place], strict=True))
        assert [row[name] for name in ("data", "sparsity", "batch")] == ["random len 128", sparsity, "1"]
        of_phase = {
            key[2]: value
            for key, value in numbers.items()
            if key[:2] == (point_id, "phases") and key[3] == "duration_s"
        }
        for phase, value in of_phase.items():
            shown = "of it recompute" if phase == files.RECOMPUTE else phase
            assert figure4.rows[place][figure4.header.index(shown)].split(" ±")[0] == number(value)
        assert row["step"] == number(sum(of_phase.values()) - of_phase[files.RECOMPUTE])
        assert row["steps"] == str(NUM_TIMED_STEPS)

        def summed(table: str, *names: str, point_id: str = point_id) -> float:
            """Over layers. names: the part, of operators the label too, phase and quantity."""
            return sum(
                value for key, value in numbers.items() if (key[0], key[1], *key[3:]) == (point_id, table, *names)
            )

        title = f"mixtral random len 128 {sparsity} batch 1"
        figure5 = text[f"Figure 5: sum of 2 layers (ms a step), {title}"]
        parts = {row[0]: dict(zip(figure5.header, row, strict=True)) for row in figure5.rows}
        assert {"embedding", "moe", "attention", "lm_head + loss", "(optimizer)", "all"} <= parts.keys()
        for part, row in parts.items():
            for phase in PASSES:
                if part != "all":
                    assert row[phase].replace("-", "0") == number(summed("layers", part, phase, "busy_ns") / 1e6)
        all_ns = sum(
            value for key, value in numbers.items() if key[:2] == (point_id, "layers") and key[-1] == "busy_ns"
        )
        assert parts["all"]["total"] == number(all_ns / 1e6)

        figure6 = text[f"Figure 6 from the profiler: operators of moe, sum of 2 layers, {title}"]
        for row in figure6.rows:
            for column, phase in zip((1, 4, 7), PASSES, strict=True):
                busy_ns, launches = (
                    summed("operators", "moe", row[0], phase, name) for name in ("busy_ns", "num_launches")
                )
                each = number(busy_ns / launches / 1e3) if launches else "-"
                shown = [number(busy_ns / 1e6), number(launches), each] if launches else ["-"] * 3
                assert row[column : column + 3] == shown

        row = dict(zip(memory.header, memory.rows[place], strict=True))
        for part in ("frozen_weights", "trained_weights", "gradients", "optimizer"):
            value = numbers[point_id, "memory_parts", part, "allocated_bytes"]
            assert memory.rows[place][memory.header.index(part.replace("_", " "))] == number(value / GIB)
        peaks = {key[4]: [] for key in numbers if key[:2] == (point_id, "memory")}
        for key, value in numbers.items():
            if key[:2] == (point_id, "memory") and key[-1] == "peak_bytes":
                peaks[key[4]].append(value)
        for phase in (*PASSES, files.OPTIMIZER_STEP):
            assert row[f"peak in {phase}"] == number(max(peaks[phase]) / GIB)
        assert row["peak of all"] == number(max(map(max, peaks.values())) / GIB)


@pytest.mark.usefixtures("read_once")
def test_csv_has_the_experts_loads_as_the_text_says(latency_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--format csv has every layer" in " ".join(printed(latency_once, capsys).split())
    assert "expert" in printed(latency_once, capsys, "csv")


@pytest.mark.usefixtures("read_once")
def test_tokens_per_expert_are_beneath(latency_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = json.loads(printed(latency_once, capsys, "json"))
    loads = pd.DataFrame(frames["expert_loads"])
    assert len(loads) == 2 * 2 * 2 * (NUM_LAYERS + 1) * NUM_EXPERTS  # points, probes, moments
    single = loads[loads["layer"] != "all"]
    sums = single.groupby(["point", "probe", "when", "layer"]).agg(
        {"tokens": "sum", "num_tokens": "first", "top_k": "first"}
    )
    assert (sums["tokens"] == sums["num_tokens"] * sums["top_k"]).all()
    text = printed(latency_once, capsys)
    assert "random weights: no conclusion about routing can be drawn" in text
    assert "dense: every token goes to every expert" in text


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
def test_one_layer_by_itself(
    layer: int, latency_once: Path, tables: LatencyTables, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tables_in(printed(latency_once, capsys, layer=layer))
    figure5 = text[f"Figure 5: layer {layer} (ms a step), mixtral random len 128 dense batch 1"]
    assert [row[0] for row in figure5.rows] == [
        "input_norm", "attention", "post_attention_norm", "moe", "layer itself", "all",
    ]  # fmt: skip
    assert not any("paper" in name for name in figure5.header)
    of_layer = tables.layers[(tables.layers["point_id"] == RANDOM_DENSE) & (tables.layers["layer"] == layer)]
    total = figure5.header.index("total")
    assert figure5.rows[-1][total] == number(of_layer["busy_ns"].sum() / 1e6)
    figure6 = text[f"Figure 6 from the profiler: operators of moe, layer {layer}, mixtral random len 128 dense batch 1"]
    products = next(row for row in figure6.rows if row[0] == "matmul(router)")
    whole = tables_in(printed(latency_once, capsys))
    both = whole["Figure 6 from the profiler: operators of moe, sum of 2 layers, mixtral random len 128 dense batch 1"]
    of_both = next(row for row in both.rows if row[0] == "matmul(router)")
    assert float(products[2]) * 2 == float(of_both[2])


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("layer", [NUM_LAYERS, -1, 10**9])
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_that_is_not_there(layer: int, format: str, latency_once: Path) -> None:
    with pytest.raises(UserError, match=f"--layer {layer}: .*layers 0 to 1"):
        print_latency(latency_once, format, layer)


def test_a_layer_that_only_some_points_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A deeper model beside a shallower one: each shows what it has."""
    shallow = shutil.copytree(FIXTURES / "reentrant", tmp_path / "shallow")
    deeper = shutil.copytree(shallow, tmp_path / "deeper")
    modules = read(shallow, files.MODULES_FILE)
    modules["path"] = modules["path"].str.replace("layers.1", "layers.5")
    point_json = json.loads((deeper / "point.json").read_text())
    (deeper / "point.json").write_text(json.dumps(point_json | {"point_id": "deeper"}))
    put(deeper, files.MODULES_FILE, modules)
    for layer in (0, 1, 5):
        assert f"layer {layer} (ms a step)" in printed(tmp_path, capsys, layer=layer)


# --- from the command line -------------------------------------------------------------------------------------------


def test_the_parser_needs_no_torch_and_works_from_either_folder(latency_once: Path, tmp_path: Path) -> None:
    forbidden = "('torch', 'transformers', 'llamafactory', 'datasets', 'peft', 'trl')"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Forbidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        assert name.partition('.')[0] not in {forbidden}, name\n"
        "sys.meta_path.insert(0, Forbidden())\n"
    )
    told = {}
    for folder in (REPO, REPO / "LLaMA-Factory"):
        done = launching.run(sys.executable, "mixtral_latency.py", latency_once, cwd=folder, PYTHONPATH=str(tmp_path))
        assert (done.code, done.err) == (0, "")
        told[folder] = done.out
    assert len(set(told.values())) == 1
    titles = tables_in(told[REPO]).keys()
    assert [title.partition(":")[0].partition(" (")[0].partition(",")[0] for title in titles] == [
        "Figure 4", *["Figure 5"] * 2, *["Figure 6 from the profiler"] * 2, "Memory", "How it was measured",
        "Figure 11",
    ]  # fmt: skip
    one = launching.run(
        sys.executable, REPO / "mixtral_latency.py", latency_once, "--format", "json", "--layer", "1",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert (one.code, one.err) == (0, "")
    assert json.loads(one.out).keys() == {
        "points", "phases", "layers", "operators", "memory", "memory_parts", "expert_loads", "expert_summary",
    }  # fmt: skip
