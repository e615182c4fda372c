"""Whatever lies in a folder of breakdowns: a row that says why, the other rows as they are, and never a traceback."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import launching
import pandas as pd
import pytest
from helpers_latency import SCHEMAS, printed, put, read
from helpers_points import GIB, MS, write_point
from helpers_tape import random_point, write_breakdown
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launching import REPO, assert_one_clear_paragraph
from test_bad_input import cut, edited, removed, replaced, spoiled_bytes, spoiled_json

from tunescope import latency_files as files
from tunescope import results
from tunescope.analyze.latency_tables import latency_tables
from tunescope.errors import UserError
from tunescope.expert_tokens import EXPERT_TOKENS_FILE
from tunescope.report import latency as report
from tunescope.report.latency import print_latency
from tunescope.report.text import FORMATS

Spoil = Callable[[Path], None]
GOOD = "good"
ARROW_FILES = tuple(SCHEMAS)
ATTACHED = {
    "name": "run",
    "model_class": "LlamaForCausalLM",
    "num_layers": 2,
    "per_device_train_batch_size": 4,
}


def parser(folder: Path, *arguments: str) -> launching.Finished:
    return launching.run(sys.executable, REPO / "mixtral_latency.py", folder, *arguments)


def changed(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Spoil:
    """A way to spoil a point: an Arrow file whose rows are others."""
    return lambda point: put(point, name, change(read(point, name)))


def emptied(name: str) -> Spoil:
    return changed(name, lambda frame: frame.iloc[:0])


def attached(**changes: Any) -> Spoil:
    """As StepProfiler leaves it, with these entries."""

    def change(content: dict[str, Any]) -> None:
        content["attached"] = ATTACHED | changes

    return edited(results.POINT_FILE, change)


def foreign_columns(name: str) -> Spoil:
    return lambda point: results.write_arrow(point / name, [], results.GPU_SAMPLES_SCHEMA)


def lost_tokens(point: Path) -> None:
    row = {"probe": "cs", "when": "before", "layer": 0, "num_queries": 1, "num_tokens": 9, "padding_tokens": 0}
    row |= {"top_k": 1, "num_experts": 2, "router_entropy_bits": 1.0}
    put(point, EXPERT_TOKENS_FILE, pd.DataFrame([row | {"expert": 0, "tokens": 5}, row | {"expert": 1, "tokens": 3}]))


def without(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    return frame[frame[column] != value]


SPOILED: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    **{f"no {name}": (removed(name), (f"{name} is missing",)) for name in ARROW_FILES},
    **{f"cut {name}": (cut(name, 0.6), (f"{name} is not a whole Arrow file",)) for name in ARROW_FILES},
    **{f"columns of {name}": (foreign_columns(name), (f"{name} has columns", "expected")) for name in ARROW_FILES},
    "random events": (replaced(files.EVENTS_FILE, os.urandom(4096)), ("events.arrow is not a whole Arrow file",)),
    "no events": (emptied(files.EVENTS_FILE), ("is not a point",)),
    "no phases": (emptied(files.PHASES_FILE), ("is not a point",)),
    "a phase missing": (changed(files.PHASES_FILE, lambda f: without(f, "phase", "clip")), ("is not a point",)),
    "negative calls": (changed(files.CALLS_FILE, lambda f: f.assign(call=f["call"] - 10**6)), ("is not a point",)),
    "steps of no time": (changed(results.STEPS_FILE, lambda f: f.assign(duration_ns=0)), ("no timed step",)),
    "lost tokens": (lost_tokens, ("layer 0 gave its experts 8 tokens", "9 tokens x top-1 are 9")),
    "newer schema": (edited("point.json", lambda point: point.update(schema_version=99)), ("has schema 99",)),
    "another figure": (edited("point.json", lambda p: p.update(kind="throughput")), ("'throughput', not latency",)),
    "unknown status": (edited("outcome.json", lambda outcome: outcome.update(status="fine")), ("status 'fine'",)),
    "unknown model": (edited("point.json", lambda point: point["point"].update(model="gpt")), ("'gpt'",)),
    "a list as cause": (edited("outcome.json", lambda o: o.update(status="oom", cause=[1])), ("cause is [1]",)),
    "attached to nothing": (edited("point.json", lambda point: point.update(attached=None)), ("is not a point",)),
    "attached to a list": (edited("point.json", lambda point: point.update(attached=[1])), ("is not a point",)),
    "a layer of 5000 digits": (
        changed(files.MODULES_FILE, lambda f: f.assign(path=f["path"].str.replace("layers.1", f"layers.{'9' * 5000}"))),
        ("is not a point",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_breakdown(tmp_path_factory.mktemp("good") / GOOD, random_point())


@pytest.fixture
def folder(good_once: Path, tmp_path: Path) -> Path:
    """A results folder with one good point."""
    shutil.copytree(good_once, tmp_path / "latency" / GOOD)
    return tmp_path / "latency"


def spoiled(folder: Path, name: str, spoil: Spoil) -> Path:
    """One more point in the folder, with a name of its own, spoilt."""
    point = shutil.copytree(folder / GOOD, folder / name)
    edited(results.POINT_FILE, lambda content: content.update(point_id=name))(point)
    spoil(point)
    return point


def assert_a_table_stands(folder: Path, formats: Sequence[str] = FORMATS) -> None:
    """In every format, with all that the good point has in it. What is in the folder is read once."""
    tables = latency_tables(folder)
    for format in formats:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            patch.setattr(report, "latency_tables", lambda _: tables)
            is_readable = print_latency(folder, format, None)
        out.getvalue().encode()  # a terminal takes it
        unreadable = [line for line in err.getvalue().splitlines() if line.startswith("tunescope: ")]
        assert is_readable == (not unreadable)
        if format == "json":
            frames = json.loads(out.getvalue())
            good = str(folder / GOOD)  # the other may have its name
            (row,) = [row for row in frames["points"] if row["folder"] == good]
            assert row["status"] == "ok"
            assert {row["phase"] for row in frames["phases"] if row["folder"] == good} == set(files.PHASES)
        elif format == "csv":
            assert f",{GOOD},phases," in out.getvalue()
        else:
            assert "Figure 4" in out.getvalue()


def test_a_spoiled_point_is_a_row_with_its_cause_and_the_others_stand(folder: Path) -> None:
    for name, (spoil, _) in SPOILED.items():
        spoiled(folder, name, spoil)
    done = parser(folder)
    assert done.code == 2
    assert "Traceback" not in done.err
    shown = [line.removesuffix("unreadable").strip() for line in done.out.splitlines() if line.endswith("  unreadable")]
    assert sorted(shown) == sorted(SPOILED)
    for name, (_, texts) in SPOILED.items():
        (cause,) = [line for line in done.err.splitlines() if line.startswith(f"tunescope: {name}: ")]
        for text in texts:
            assert text in cause
    assert_a_table_stands(folder)


def test_a_folder_of_nothing_but_unreadable_points(folder: Path) -> None:
    removed(files.EVENTS_FILE)(folder / GOOD)
    done = parser(folder)
    assert done.code == 2
    assert "events.arrow is missing" in done.err
    assert done.out.startswith("Points without a breakdown")
    assert parser(folder, "--format", "csv").code == 2


# --- what is read, though it is odd ----------------------------------------------------------------------------------

ODD: dict[str, Spoil] = {
    "no spans": emptied(files.SPANS_FILE),
    "no modules": emptied(files.MODULES_FILE),
    "no probes and no tokens": edited("point.json", lambda point: point.pop("probes")),
    "no calls": emptied(files.CALLS_FILE),
    "calls of another run": changed(files.CALLS_FILE, lambda f: f.assign(call=f["call"] + 100_000)),
    "calls of modules that are not there": changed(files.CALLS_FILE, lambda f: f.assign(module=f["module"] + 1000)),
    "calls that end before they begin": changed(files.CALLS_FILE, lambda f: f.assign(sequence_end=-1)),
    "the same calls twice": changed(files.CALLS_FILE, lambda f: pd.concat([f, f])),
    "events of unknown kinds": changed(files.EVENTS_FILE, lambda f: f.assign(kind="zebra")),
    "events without marks": changed(files.EVENTS_FILE, lambda f: without(f, "kind", files.MARK)),
    "nothing but marks": changed(files.EVENTS_FILE, lambda f: f[f["kind"] == files.MARK]),
    "nothing but kernels": changed(files.EVENTS_FILE, lambda f: f[f["kind"] == files.KERNEL]),
    "one path for all modules": changed(files.MODULES_FILE, lambda f: f.assign(path="a")),
    "patterns as paths": changed(
        files.MODULES_FILE, lambda f: f.assign(path=f["path"].str.replace("layers", "la(y[ers{0}", regex=False))
    ),
    "own trainer": attached(),
    "own trainer, batch by itself": attached(per_device_train_batch_size=10**9),
    "own trainer without layers": attached(num_layers=0),
}


def test_what_is_odd_is_a_table(folder: Path) -> None:
    for name, spoil in ODD.items():
        spoiled(folder, name, spoil)
    assert_a_table_stands(folder)
    rows = latency_tables(folder).points.set_index("point_id")["status"].to_dict()
    assert rows.keys() == {GOOD, *ODD}


def test_work_without_its_calls_is_still_all_there(folder: Path) -> None:
    """Then nothing is known of modules, and everything is outside of them; not a nanosecond is lost."""
    whole = latency_tables(folder).layers["busy_ns"].sum()
    emptied(files.CALLS_FILE)(folder / GOOD)
    found = latency_tables(folder).layers
    assert found["busy_ns"].sum() == whole
    assert "moe" not in set(found.loc[found["phase"] == files.FORWARD, "part"])


# --- what cannot be shown --------------------------------------------------------------------------------------------


def case(name: str, spoil: Spoil, _was: str) -> Any:
    """_was: how it ended once."""
    return pytest.param(spoil, id=name)


@pytest.mark.parametrize(
    "spoil",
    [
        case("no memory events", emptied(files.MEMORY_EVENTS_FILE), "text: argmax of an empty sequence"),
        case("no memory parts", emptied(files.MEMORY_PARTS_FILE), "text: KeyError 'frozen_weights'"),
        case(
            "a memory part missing",
            changed(files.MEMORY_PARTS_FILE, lambda f: without(f, "part", "optimizer")),
            "text: KeyError 'optimizer'",
        ),
        case(
            "a memory part twice",
            changed(files.MEMORY_PARTS_FILE, lambda f: pd.concat([f, f])),
            "text: the truth value of a Series is ambiguous",
        ),
        case("no device", edited("environment.json", lambda e: e.update(device=None)), "rows cannot be sorted"),
        case("half a character", edited("environment.json", lambda e: e.update(device="\ud800")), "UnicodeEncodeError"),
        case("no name", edited("point.json", lambda p: p.update(point_id=None)), "text: KeyError 'forward'"),
        case("a batch in words", attached(per_device_train_batch_size="auto"), "text: invalid literal for int()"),
        case("no batch", attached(per_device_train_batch_size=None), "text: cannot convert float NaN to integer"),
        case("no model", attached(model_class=None), "rows cannot be sorted"),
        case(
            "sequence numbers beyond all",
            changed(files.CALLS_FILE, lambda f: f.assign(sequence_end=2**44)),
            "MemoryError: a table of all sequence numbers is made",
        ),
    ],
)
def test_what_cannot_be_shown_is_no_traceback(spoil: Spoil, folder: Path) -> None:
    spoiled(folder, "spoilt", spoil)
    assert_a_table_stands(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(changed(results.STEPS_FILE, lambda f: f.assign(is_warmup=True)), id="no timed step"),
        pytest.param(changed(results.STEPS_FILE, lambda f: f.assign(duration_ns=-5)), id="steps of negative time"),
        pytest.param(changed(files.PHASES_FILE, lambda f: f.assign(duration_ns=-5)), id="phases of negative time"),
        pytest.param(changed(files.EVENTS_FILE, lambda f: f.assign(duration_ns=-5)), id="events of negative time"),
    ],
)
def test_steps_that_cannot_be_are_no_numbers(spoil: Spoil, folder: Path) -> None:
    """As throughput.py has it."""
    spoil(folder / GOOD)
    assert latency_tables(folder).points["status"].tolist() == ["unreadable"]


@pytest.mark.parametrize(
    "name",
    [
        results.POINT_FILE,
        results.OUTCOME_FILE,
        results.ENVIRONMENT_FILE,
    ],
)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_a_table_stands_whatever_is_in_the_json_of_one_point(name: str, data: st.DataObject, good_once: Path) -> None:
    original = (good_once / name).read_bytes()
    content = data.draw(st.one_of([spoiled_json(original)] * 3 + [spoiled_bytes(original)]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "latency"
        shutil.copytree(good_once, folder / GOOD)
        (spoiled(folder, "spoilt", lambda point: None) / name).write_bytes(content)
        assert_a_table_stands(folder, [data.draw(st.sampled_from(FORMATS))])


@pytest.mark.parametrize(
    "name", [results.STEPS_FILE, files.PHASES_FILE, files.SPANS_FILE, files.MODULES_FILE, EXPERT_TOKENS_FILE]
)
@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_a_table_stands_whatever_is_in_the_columns_of_one_point(
    name: str, data: st.DataObject, good_once: Path
) -> None:
    content = data.draw(spoiled_bytes((good_once / name).read_bytes()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "latency"
        shutil.copytree(good_once, folder / GOOD)
        (spoiled(folder, "spoilt", lambda point: None) / name).write_bytes(content)
        assert_a_table_stands(folder, [data.draw(st.sampled_from(FORMATS))])


# --- strings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['a,b;\t"c"', "=1+1", "{0} %s \\g<1>|<b>", "../../etc", "é漢🙂", "nan"])
def test_names_come_back_as_they_are(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of somebody's model and run, and of a GPU; csv is quoted where it must be."""
    spoiled(folder, "own", attached(name=text, model_class=text))
    edited(results.ENVIRONMENT_FILE, lambda content: content.update(device=text))(folder / "own")
    changed(files.MODULES_FILE, lambda f: f.assign(class_name=text))(folder / "own")
    frames = json.loads(printed(folder, capsys, "json"))
    (row,) = [row for row in frames["points"] if row["point_id"] == "own"]
    assert [row[name] for name in ("dataset", "model", "device")] == [text] * 3
    from_csv = pd.read_csv(io.StringIO(printed(folder, capsys, "csv")), keep_default_na=False)
    own = from_csv[from_csv["point_id"] == "own"]
    assert set(own["table"]) == {"phases", "layers", "memory", "memory_parts"}  # without layers no operators
    for name in ("dataset", "model", "device"):
        assert set(own[name].astype(str)) == {text}
    assert text in printed(folder, capsys)


# --- points that did not end well ------------------------------------------------------------------------------------


def unsuccessful(folder: Path, name: str, status: str, **outcome: Any) -> Path:
    changes = {"kind": "latency", "probes": {}}
    point = random_point(batch=64)
    return write_point(
        folder / name, point, status=status, cause=f"{name}'s cause", point_changes=changes, outcome_changes=outcome
    )


def test_no_point_is_silently_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = unsuccessful(folder, "a", "oom", oom_snapshot="oom_snapshot.pickle", peak_allocated_bytes=44 * GIB)
    unsuccessful(folder, "b", "oom", oom_snapshot=None, peak_allocated_bytes=None)
    unsuccessful(folder, "c", "failed", peak_allocated_bytes=None)
    died = unsuccessful(folder, "d", "failed")
    outer = {"git_revision": None, "device": "NVIDIA A40", "cpu": "a CPU", "packages": {"torch": "2.11.0"}}
    (died / "environment.json").write_text(json.dumps(outer))
    (died / "outcome.json").write_text('{"status": "failed", "cause": "its process was killed"}')
    (folder / "e.unfinished").mkdir()
    text = printed(folder, capsys)
    assert "a: oom (peak 44.0 GiB allocated): a's cause" in text
    assert f"{snapshot}/oom_snapshot.pickle" in " ".join(text.split())
    assert text.count("memory_viz") == 1
    assert "b: oom: b's cause" in text
    assert "c: failed: c's cause" in text
    assert "d: failed: its process was killed" in text
    assert "1 point(s) were begun and not finished" in text
    statuses = {row["point_id"]: row["status"] for row in json.loads(printed(folder, capsys, "json"))["points"]}
    assert statuses == {GOOD: "ok", "a": "oom", "b": "oom", "c": "failed", "d": "failed"}


def test_only_points_that_did_not_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unsuccessful(tmp_path, "a", "oom")
    assert printed(tmp_path, capsys).startswith("Points without a breakdown")
    assert len(printed(tmp_path, capsys, "csv").splitlines()) == 1
    assert json.loads(printed(tmp_path, capsys, "json"))["phases"] == []


def test_a_layer_where_no_point_has_any(tmp_path: Path) -> None:
    unsuccessful(tmp_path, "a", "oom")
    with pytest.raises(UserError) as refusal:
        print_latency(tmp_path, "text", 0)
    assert "-1" not in str(refusal.value)


# --- the wrong folder ------------------------------------------------------------------------------------------------


def test_a_folder_without_a_point_is_refused_and_the_launcher_named(tmp_path: Path) -> None:
    assert_one_clear_paragraph(parser(tmp_path / "nowhere"), "there is no folder", "./mixtral_lt.sh")
    assert_one_clear_paragraph(parser(tmp_path), "holds no measured point", "it is empty")
    assert_one_clear_paragraph(parser(tmp_path, "--layer", "1", "--format", "xml"), "--format 'xml' is unknown")


def test_each_parser_says_that_a_point_is_the_others(folder: Path) -> None:
    write_point(folder / "throughput", random_point(8), [1000 * MS] * 23)
    ours = parser(folder)
    theirs = launching.run(sys.executable, REPO / "throughput.py", folder)
    assert ours.code == theirs.code == 2
    assert "throughput: " in ours.err
    assert "holds a point of kind 'throughput', not latency" in ours.err
    assert "Figure 4" in ours.out
    assert f"tunescope: {GOOD}: " in theirs.err
    assert "holds a point of kind 'latency', not throughput" in theirs.err
    assert "random" in theirs.out
