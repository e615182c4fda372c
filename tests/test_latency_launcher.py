"""`./mixtral_lt.sh` as a user starts it: the figure's points, the files each leaves, and whatever ends a run."""

import gzip
import json
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import launching
import pandas as pd
import pytest
from helpers_latency import NUM_RECORDED_STEPS, NUM_TIMED_STEPS, RANDOM_DENSE, RANDOM_SPARSE, Launcher, measure, read
from launching import REPO, Finished, assert_one_clear_paragraph

from tunescope import expert_tokens, results
from tunescope import latency_files as files
from tunescope.analyze import experts

BOTH = "random:sparse:bs=1:seq=128 random:dense:bs=1:seq=128"
FILES = {
    results.POINT_FILE, results.ENVIRONMENT_FILE, results.OUTCOME_FILE, results.STEPS_FILE, results.LOG_FILE,
    files.PHASES_FILE, files.SPANS_FILE, files.MODULES_FILE, files.CALLS_FILE, files.EVENTS_FILE,
    files.MEMORY_EVENTS_FILE, files.MEMORY_PARTS_FILE, files.TRACE_FILE, expert_tokens.EXPERT_TOKENS_FILE,
}  # fmt: skip


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH under which nothing of the training stack can be imported."""
    folder = tmp_path_factory.mktemp("without_torch")
    forbidden = "('torch', 'transformers', 'llamafactory', 'datasets', 'peft', 'trl')"
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Forbidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        assert name.partition('.')[0] not in {forbidden}, name\n"
        "sys.meta_path.insert(0, Forbidden())\n"
    )
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(point: Path, name: str) -> dict[str, Any]:
    return json.loads((point / name).read_text())


# --- what it would run -----------------------------------------------------------------------------------------------


def planned(*arguments: str | Path, without_torch: str, folder: Path = REPO) -> list[str]:
    """Names of the points of a dry run."""
    done = launching.run(folder / "mixtral_lt.sh", "--dry-run", *arguments, cwd=folder, PYTHONPATH=without_torch)
    assert (done.code, done.err) == (0, "")
    first, *points = done.out.splitlines()
    assert first.startswith("preset tiny: ")
    assert all(point.endswith("  to run") for point in points)
    return [point.split()[0] for point in points]


def test_a_dry_run_lists_the_five_points_in_the_figures_order(tmp_path: Path, without_torch: str) -> None:
    """Sparse before dense, by batch; from either folder; without a GPU at preset tiny; nothing is written."""
    out = tmp_path / "out"
    five = [f"random-{bar}-s128-tiny-cpu" for bar in ("k2-b1", "k2-b10", "k2-b32", "k8-b1", "k8-b10")]
    assert planned("--out", out, without_torch=without_torch) == five
    shorter = planned("--out", out, "--seq-len", "64", without_torch=without_torch, folder=REPO / "LLaMA-Factory")
    assert shorter == [name.replace("s128", "s64") for name in five]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 64))
    own = planned("--out", out, "--dataset", file, without_torch=without_torch)
    assert own == [name.replace("random", "mine").replace("-s128", "") for name in five]
    chosen = ("--points", "random:k=4:bs=3:seq=32", "--points", "cs:sparse:bs=1", "--out", out)
    assert planned(*chosen, without_torch=without_torch) == ["random-k4-b3-s32-tiny-cpu", "cs-k2-b1-tiny-cpu"]
    assert not out.exists()


def test_help_says_what_it_is_and_which_figures(without_torch: str) -> None:
    done = launching.run(REPO / "mixtral_lt.sh", "--help", PYTHONPATH=without_torch)
    assert (done.code, done.err) == (0, "")
    assert "Figures 4, 5 and 11" in done.out
    assert "--seq-len" in done.out


# --- what it leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RANDOM_SPARSE, RANDOM_DENSE])
def test_a_point_has_its_files_and_nothing_else(name: str, latency_once: Path) -> None:
    assert {entry.name for entry in latency_once.iterdir()} == {RANDOM_SPARSE, RANDOM_DENSE, ".lock"}
    assert {entry.name for entry in (latency_once / name).iterdir()} == FILES
    steps = read(latency_once / name, results.STEPS_FILE)
    assert steps["step"].tolist() == list(range(3 + NUM_TIMED_STEPS))
    assert steps["is_warmup"].tolist() == [True] * 3 + [False] * NUM_TIMED_STEPS
    assert (steps["tokens"] == 128).all()
    phases, spans = (read(latency_once / name, file) for file in (files.PHASES_FILE, files.SPANS_FILE))
    timed = set(range(3, 3 + NUM_TIMED_STEPS))
    assert set(phases["step"]) == set(spans["step"]) == timed
    assert phases["phase"].tolist() == list(files.PHASES) * NUM_TIMED_STEPS


@pytest.mark.parametrize("name", [RANDOM_SPARSE, RANDOM_DENSE])
def test_a_point_says_what_it_is_and_what_it_ran_on(name: str, latency_once: Path) -> None:
    point = content(latency_once / name, results.POINT_FILE)
    assert (point.pop("point_id"), point["kind"]) == (name, "latency")
    assert point.pop("recipe_hash") == results.digest(point)
    assert point["probes"] == {}
    assert point["protocol"]["num_profiled_steps"] == NUM_RECORDED_STEPS
    assert point["data"] == {"kind": "synthetic", "lengths": "fixed"}
    assert point["point"]["seq_len_tokens"] == 128
    assert str(latency_once) not in json.dumps(point)
    outcome = content(latency_once / name, results.OUTCOME_FILE)
    assert (outcome["status"], outcome["clock"]) == ("ok", "host")
    assert (outcome["expert_probe_why_not"], outcome["oom_snapshot"]) == (None, None)
    assert content(latency_once / name, results.ENVIRONMENT_FILE)["packages"]["torch"]


@pytest.mark.parametrize("name", [RANDOM_SPARSE, RANDOM_DENSE])
def test_a_recording_is_of_whole_steps(name: str, latency_once: Path) -> None:
    """Marks in the Trainer's order; every module's forward that is in the events is in the calls."""
    events, calls, modules = (
        read(latency_once / name, file) for file in (files.EVENTS_FILE, files.CALLS_FILE, files.MODULES_FILE)
    )
    one = [files.RESUME, files.STEP_BEGIN, files.PRE_OPTIMIZER, files.OPTIMIZER, files.STEP_END]
    marks = events.loc[events["kind"] == files.MARK, "name"].str.removeprefix(files.MARK_PREFIX)
    assert marks.tolist() == one * NUM_RECORDED_STEPS
    memory = read(latency_once / name, files.MEMORY_EVENTS_FILE)
    of_memory = memory.loc[memory["kind"] == files.MARK, "name"].str.removeprefix(files.MARK_PREFIX)
    assert of_memory.tolist() == one
    assert (memory["kind"] == files.MEMORY).sum() > 100
    assert not (events["kind"] == files.MEMORY).any()
    of_host = {files.OP, files.CALL, files.NODE, files.PARAMETER, files.MARK, files.ANNOTATION, files.LAUNCH}
    assert set(events["kind"]) <= of_host, "there is no GPU here"
    assert events["start_ns"].is_monotonic_increasing
    recorded = events.loc[events["kind"] == files.CALL, "ref"]
    assert recorded.is_unique
    assert set(recorded) < set(calls["call"])  # the profiler's first step is not recorded
    again = calls.set_index("call")["is_recompute"][recorded]
    paths = modules.set_index("module")["path"][calls.set_index("call")["module"][recorded]]
    # Each layer runs forward and again in backward, in each of the steps.
    of_layer = Counter(zip(paths, again, strict=True))
    for layer in (0, 1):
        for is_again in (False, True):
            assert of_layer[f"base_model.model.model.layers.{layer}", is_again] == NUM_RECORDED_STEPS
    assert of_layer["", False] == NUM_RECORDED_STEPS
    assert of_layer["", True] == 0


def test_the_trace_for_viewers_names_every_modules_forward(latency_once: Path) -> None:
    point = latency_once / RANDOM_SPARSE
    trace = json.loads(gzip.decompress((point / files.TRACE_FILE).read_bytes()))
    names = Counter(event.get("name", "") for event in trace["traceEvents"])
    modules, calls = read(point, files.MODULES_FILE), read(point, files.CALLS_FILE).set_index("call")["module"]
    paths = modules.set_index("module")["path"].replace("", modules["class_name"][0])
    seen = set()
    for name, times in names.items():
        if match := re.fullmatch(rf"{files.CALL_PREFIX}(.*) #(\d+)", name):
            assert match[1] == paths[calls[int(match[2])]]
            assert times == 1
            seen.add(int(match[2]))
    events = read(point, files.EVENTS_FILE)
    assert seen == set(events.loc[events["kind"] == files.CALL, "ref"])
    assert names[files.MARK_PREFIX + files.STEP_END] == NUM_RECORDED_STEPS
    assert names["aten::mm"] == (events["name"] == "aten::mm").sum()


def test_tokens_per_expert_of_both_moments_and_of_all_experts(latency_once: Path) -> None:
    for name, top_k in ((RANDOM_SPARSE, 2), (RANDOM_DENSE, 8)):
        schema = expert_tokens.EXPERT_TOKENS_SCHEMA
        rows = results.read_arrow(latency_once / name / expert_tokens.EXPERT_TOKENS_FILE, schema)
        loads = experts.expert_tokens(rows)  # which checks that no token is lost
        assert set(loads["probe"]) == {"cs", "math"}
        assert set(loads["top_k"]) == {top_k}
        assert set(loads["num_queries"]) == {8}


# --- run again -------------------------------------------------------------------------------------------------------


def test_a_second_run_skips_all_and_imports_no_torch(latency: Path, without_torch: str) -> None:
    before = contents(latency)
    done = measure(latency, BOTH, PYTHONPATH=without_torch)
    assert done.code == 0, done.err
    assert "2 of 2 points are measured already and are skipped" in done.err
    assert done.out.strip().endswith(f"mixtral_latency.py {latency}")
    assert contents(latency) | {".lock": b""} == before | {".lock": b""}


def test_throughput_is_another_point_in_the_same_folder(latency: Path) -> None:
    """Of the same bar, and so of the same name: --out of one figure is not that of another."""
    launcher = [REPO / "mixtral_tp.sh", "--preset", "tiny", "--queries", "12", "--dry-run", "--out", latency]
    done = launching.run(*launcher, "--points", "random:sparse:bs=1:seq=128")
    assert done.out.splitlines()[1].startswith(RANDOM_SPARSE)
    assert done.out.splitlines()[1].endswith("to run")


# --- own data, and a point without memory ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A point of somebody's file, with CS queries of a file as a probe; one that runs out of memory; one of which 12
    queries are three steps, too few."""
    folder = tmp_path_factory.mktemp("own")
    for name, rows in (("mine", 40), ("theirs", 5)):
        queries = [{"instruction": "w1 " * (i + 1), "input": "", "output": f"w2 w{i}"} for i in range(rows)]
        (folder / f"{name}.json").write_text(json.dumps(queries))
    datasets = ("--dataset", folder / "mine.json", "--dataset", f"cs={folder / 'theirs.json'}")
    points = "mine:sparse:bs=1 random:sparse:bs=2:seq=64 random:sparse:bs=4:seq=64"
    return folder / "latency", measure(folder / "latency", points, *datasets, fault="step:oom:random-k2-b2")


def test_a_file_of_ones_own_is_trained_on(own_data: tuple[Path, Finished]) -> None:
    point = own_data[0] / "mine-k2-b1-tiny-cpu"
    assert {entry.name for entry in point.iterdir()} == FILES
    data = content(point, results.POINT_FILE)["data"]
    assert (data["kind"], data["name"]) == ("file", "mine.json")
    assert read(point, results.STEPS_FILE)["tokens"].nunique() > 1  # each its own length


def test_a_file_of_the_papers_data_set_is_the_probe(own_data: tuple[Path, Finished], latency_once: Path) -> None:
    point = own_data[0] / "mine-k2-b1-tiny-cpu"
    probes = content(point, results.POINT_FILE)["probes"]
    assert {name: probe["name"] for name, probe in probes.items()} == {"cs": "theirs.json"}
    counted = read(point, expert_tokens.EXPERT_TOKENS_FILE).groupby("probe")["num_queries"].first()
    assert counted.to_dict() == {"cs": 5, "math": 8}
    tokens = {
        folder: read(folder, expert_tokens.EXPERT_TOKENS_FILE).groupby("probe")["num_tokens"].first()
        for folder in (point, latency_once / RANDOM_SPARSE)
    }
    ours, synthetic = tokens.values()
    assert ours["cs"] != synthetic["cs"]
    assert ours["math"] == synthetic["math"]  # the other probe is the same at every point
    table = launching.run(sys.executable, REPO / "mixtral_latency.py", own_data[0], "--format", "json")
    summary = pd.DataFrame(json.loads(table.out)["expert_summary"])
    assert summary.groupby("probe")["probe_data"].first().to_dict() == {"cs": "file", "math": "synthetic"}


def test_a_point_without_memory_is_a_row_that_is_not_run_again(own_data: tuple[Path, Finished]) -> None:
    out, done = own_data
    name = "random-k2-b2-s64-tiny-cpu"
    assert "oom: CUDA out of memory (injected)" in done.err
    assert not {results.STEPS_FILE, files.EVENTS_FILE, files.PHASES_FILE, "scratch"} & {
        entry.name for entry in (out / name).iterdir()
    }
    assert content(out / name, results.OUTCOME_FILE)["oom_snapshot"] is None
    table = launching.run(sys.executable, REPO / "mixtral_latency.py", out)
    assert (table.code, table.err) == (0, "")
    assert f"{name}: oom: CUDA out of memory (injected)" in table.out
    again = launching.run(
        REPO / "mixtral_lt.sh", "--preset", "tiny", "--queries", "12", "--out", out, "--dry-run", "--points",
        "random:sparse:bs=2:seq=64", "--dataset", f"cs={out.parent / 'theirs.json'}",
    )  # fmt: skip
    assert again.out.splitlines()[1].endswith("done, skipped")


# --- what ends badly -------------------------------------------------------------------------------------------------


def test_a_training_too_short_for_the_profiler_says_so(own_data: tuple[Path, Finished]) -> None:
    out, done = own_data
    texts = ("training ended before its steps could be profiled", "too few queries", "use more queries")
    assert_one_clear_paragraph(done, *texts)
    assert {entry.name for entry in out.iterdir()} == {"mine-k2-b1-tiny-cpu", "random-k2-b2-s64-tiny-cpu", ".lock"}


def test_a_point_that_fails_is_a_row_that_is_tried_again(tmp_path: Path) -> None:
    out, name = tmp_path / "latency", "random-k2-b1-s32-tiny-cpu"
    points = "random:sparse:bs=1:seq=32"
    done = measure(out, points, fault="start:error")
    assert done.code == 1
    assert "failed: RuntimeError: injected error; log: " in done.err
    assert content(out / name, results.OUTCOME_FILE)["cause"] == "RuntimeError: injected error"
    table = launching.run(sys.executable, REPO / "mixtral_latency.py", out)
    assert table.code == 0
    assert f"{name}: failed: RuntimeError: injected error" in table.out
    assert measure(out, points, "--dry-run").out.strip().endswith("to run")


def test_killed_while_writing_or_stopped_before_training_nothing_half_made_counts(latency: Path) -> None:
    """Two points are done; of the third the first launcher is killed, the second stopped by Ctrl-C."""
    points, third = f"{BOTH} random:sparse:bs=2:seq=32", "random-k2-b2-s32-tiny-cpu"
    before = contents(latency)
    with Launcher(latency, points, fault="writing:hang") as launcher:
        launcher.wait_until_hanging("writing", third)
        assert (latency / f"{third}.unfinished" / files.TRACE_FILE).is_file()  # the trace is there before the rest
        launcher.kill()
        launcher.assert_no_process_left()
    killed = contents(latency)
    assert {name: killed[name] for name in before} == before | {".lock": killed[".lock"]}
    table = launching.run(sys.executable, REPO / "mixtral_latency.py", latency, "--format", "text")
    assert table.code == 0
    assert "1 point(s) were begun and not finished" in table.out
    assert third not in table.out
    with Launcher(latency, points, fault="start:hang") as launcher:
        launcher.wait_until_hanging("start", third)
        log = (latency / f"{third}.unfinished" / results.LOG_FILE).read_text()
        assert "hanging at writing" not in log  # what the killed one left was removed
        done = launcher.interrupt(signal.SIGINT, group=True)
        launcher.assert_no_process_left()
    assert done.code == 130
    assert "stopped; finished points are kept" in done.err
    assert "Traceback" not in done.err
    assert contents(latency) | {".lock": b""} == before | {".lock": b""}
