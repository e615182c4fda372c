"""The whole path through Nsight Compute, with a stand-in for it: its command line, the real process that trains under
it, its report, and the tables of the counters."""

import csv
import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from launching import REPO, run

from tunescope import results
from tunescope.gpus import Gpu
from tunescope.measure import ncu, ncu_child
from tunescope.measure.plan import Options, PointSpec, make_plan
from tunescope.ncu import reports
from tunescope.ncu.counters import COUNTERS_FILE, METRICS, NCU_LOG_FILE, REPORT_FILE, SAMPLING_FILE
from tunescope.ncu.ranges import place_of
from tunescope.ncu.settings import Settings

POINT = "random:sparse:bs=2:seq=32"
GPU = mock.create_autospec(Gpu, instance=True)
LAUNCHERS = {"mixtral": ("mixtral_pf.sh", "sm_mixtral.py"), "blackmamba": ("mamba_pf.sh", "sm_mamba.py")}


@pytest.fixture(autouse=True)
def read_by_ncu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    ncu.known_metrics.cache_clear()


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    script = tmp_path / "ncu"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{REPO}/tests/fixtures/fake_ncu.py" "$@"\n')
    script.chmod(0o755)
    return script


def spec_of(model: str, tool: Path) -> PointSpec:
    asked = Options(kind="ncu", model=model, preset="tiny", points=POINT, ncu=Settings(path=str(tool)))
    return make_plan(asked).specs[0]


def counters_of(folder: Path) -> list[dict[str, Any]]:
    return list(pa.ipc.open_file(folder / COUNTERS_FILE).read_all().to_pylist())


@pytest.mark.parametrize("model", list(LAUNCHERS))
def test_from_the_launcher_to_the_table(model: str, tool: Path, tmp_path: Path) -> None:
    launcher, table = LAUNCHERS[model]
    out = tmp_path / "out"
    measured = run(REPO / launcher, "--preset", "tiny", "--points", POINT, "--out", out)
    assert measured.code == 0, measured.err
    (folder,) = results.find_point_folders(out)
    (folder / "scratch" / "model").mkdir(parents=True)  # as the run without ncu leaves it until the point is whole

    outcome = ncu.with_counters(spec_of(model, tool), GPU, folder, results.read_json(folder / results.OUTCOME_FILE))
    assert outcome["status"] == "ok", (outcome["cause"], (folder / NCU_LOG_FILE).read_text()[-2000:])
    assert outcome["ncu_why_not"] is None
    assert outcome["ncu_version"] == "2025.3.1.0"
    assert not (folder / ncu_child.SCRATCH).exists()
    assert not (folder / ncu_child.TASK_FILE).exists()

    rows, sampling = counters_of(folder), results.read_json(folder / SAMPLING_FILE)
    places = [place_of(row["ranges"]) for row in rows]
    assert all(row["ranges"][0] == "tunescope" for row in rows)
    found = Counter((place.phase, place.op) for place in places if place)
    expected: Counter[tuple[str, str]] = Counter()
    for kind in sampling["kinds"]:
        expected[kind["phase"], kind["op"]] += len(kind["sampled_calls"])
    assert found == +expected
    assert found
    for row in rows:
        assert all(row[name] is not None for name in METRICS)
        assert (row["grid_blocks"], row["block_threads"]) == (16, 128)
        assert row["duration_ns"] == 4096
        assert row["dram_clock_hz"] == pytest.approx(3.2e9)

    printed = run("python3", REPO / table, out, "--format", "csv")
    assert printed.code == 0, printed.err
    over = [row for row in csv.DictReader(io.StringIO(printed.out)) if row["phase"] == "all"]
    total = next(row for row in over if row["label"] == "time_weighted")
    assert total["source"] == "ncu"
    assert float(total["sm_percent"]) == pytest.approx(41.5)
    assert float(total["num_sampled"]) > 0


def profiled(tool: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return ncu.with_counters(spec_of("blackmamba", tool), GPU, folder, {"status": "ok", "cause": None})


def test_an_ncu_that_knows_less_is_asked_for_less(tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "commands"
    outcome = profiled(
        tool, tmp_path / "a", monkeypatch, FAKE_NCU_RECORD=str(record),
        FAKE_NCU_WITHOUT="--import-sass --nvtx-push-pop-scope sm__pipe_tensor_cycles_active",
    )  # fmt: skip
    assert outcome["status"] == "ok", outcome["cause"]
    assert outcome["ncu_unknown_metrics"] == [METRICS["tensor_percent"]]
    rows = counters_of(tmp_path / "a")
    assert {row["tensor_percent"] for row in rows} == {None}
    assert {row["sm_percent"] for row in rows} == {41.5}
    assert sum(" -- " in line for line in record.read_text().splitlines()) == 4  # one attempt for each


def test_what_is_not_listed_is_not_asked_for(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ncu.known_metrics(ncu.Ncu(str(tool), "1"))
    assert set(known) == set(METRICS.values())
    few = tool.with_name("few")
    few.write_text("#!/bin/sh\necho sm__throughput dram__bytes_read\n")
    few.chmod(0o755)
    assert set(ncu.known_metrics(ncu.Ncu(str(few), "1"))) == {
        METRICS[name] for name in ("duration_ns", "sm_percent", "memory_percent", "dram_percent", "dram_read_bytes")
    }
    for text in ("exit 1", "echo nothing of the kind"):
        other = tool.with_name("other")
        other.write_text(f"#!/bin/sh\n{text}\n")
        other.chmod(0o755)
        ncu.known_metrics.cache_clear()
        assert ncu.known_metrics(ncu.Ncu(str(other), "1")) == tuple(METRICS.values())


def test_a_program_that_ends_badly_after_all_was_counted_is_no_loss(
    tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = profiled(tool, tmp_path / "a", monkeypatch, FAKE_NCU_EXIT="139")
    assert (outcome["status"], outcome["ncu_exit_code"]) == ("ok", 1)
    assert (tmp_path / "a" / COUNTERS_FILE).is_file()


def test_the_exception_of_the_program_is_the_cause(tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / ncu_child.SCRATCH / "model").mkdir(parents=True)  # so that it cannot make its model
    outcome = profiled(tool, tmp_path / "a", monkeypatch)
    assert outcome["status"] == "failed"
    assert "FileExistsError" in outcome["cause"]
    assert "error code (1)" in outcome["cause"]
    assert not (tmp_path / "a" / REPORT_FILE).exists()


def test_ranges_that_cannot_be_read_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a release of ncu makes of ranges, the message says."""
    table = pa.Table.from_pylist([{"kernel": "k", "mangled": "k", "ranges": ["<odd>"]}], reports.COUNTERS_SCHEMA)
    monkeypatch.setattr(ncu, "read_report", lambda *_: table)

    def run_nothing(command: list[str], log: Path) -> int:
        log.write_text("")
        (tmp_path / REPORT_FILE).write_bytes(b"NVR\0")
        return 0

    monkeypatch.setattr(ncu, "_run", run_nothing)
    spec = spec_of("mixtral", Path("ncu"))
    assert spec.ncu is not None
    outcome = ncu._profile(ncu.Ncu(os.devnull, "1"), spec, spec.ncu, tmp_path)
    assert outcome["status"] == "failed"
    assert "<odd>" in outcome["cause"]
