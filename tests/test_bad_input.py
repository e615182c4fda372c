"""Whatever is handed in: exit code 2 and one clear paragraph, never a traceback, and nothing overwritten."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import CS_DENSE, CS_SPARSE, REPO, Finished, assert_one_clear_paragraph, run, tunescope

from tunescope import results
from tunescope.analyze.throughput import COLUMNS, throughput
from tunescope.config import MAX_BATCH, Point, parse_points
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL_TINY
from tunescope.report.text import FORMATS
from tunescope.report.throughput import print_throughput

POINT_FILES = (results.POINT_FILE, results.OUTCOME_FILE, results.ENVIRONMENT_FILE, results.STEPS_FILE)
STEPS = results.STEPS_FILE


def parser(folder: Path, *arguments: str) -> Finished:
    return run(sys.executable, REPO / "throughput.py", folder, *arguments)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the parser's DIR ---


def test_a_folder_without_a_single_point_is_refused(recorded: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_clear_paragraph(parser(tmp_path / "nowhere"), "there is no folder", "nowhere", "./mixtral_tp.sh")
    assert_one_clear_paragraph(parser(empty), "holds no measured point", "it is empty")
    assert_one_clear_paragraph(parser(REPO / "throughput.py"), "there is no folder")
    for point_id in (CS_SPARSE, CS_DENSE):
        (recorded / point_id).rename(recorded / (point_id + results.UNFINISHED_SUFFIX))
    assert_one_clear_paragraph(parser(recorded), "holds no measured point", "2 were begun and not finished")


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A way to spoil a point: the JSON file `name` with a change to what it holds."""

    def spoil(point: Path) -> None:
        content = json.loads((point / name).read_bytes())
        change(content)
        (point / name).write_text(json.dumps(content))

    return spoil


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda point: (point / name).write_bytes(content) and None


def cut(name: str, kept_frac: float) -> Callable[[Path], None]:
    def spoil(point: Path) -> None:
        data = (point / name).read_bytes()
        (point / name).write_bytes(data[: int(len(data) * kept_frac)])

    return spoil


def removed(name: str) -> Callable[[Path], None]:
    return lambda point: (point / name).unlink()


def foreign_columns(point: Path) -> None:
    schema = results.GPU_SAMPLES_SCHEMA
    results.write_arrow(point / STEPS, [dict.fromkeys(schema.names) | {"time_unix_ns": 1}], schema)


def only_warmup(point: Path) -> None:
    rows = results.read_arrow(point / STEPS, results.STEPS_SCHEMA).to_pylist()
    results.write_arrow(point / STEPS, [row | {"is_warmup": True} for row in rows], results.STEPS_SCHEMA)


SPOILED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no point.json": (removed("point.json"), ("point.json is missing",)),
    "no steps.arrow": (removed(STEPS), ("steps.arrow is missing", "half written or copied")),
    "no outcome.json": (removed("outcome.json"), ("outcome.json is missing",)),
    "no environment.json": (removed("environment.json"), ("environment.json is missing",)),
    "cut point.json": (cut("point.json", 0.5), ("point.json cannot be read",)),
    "cut outcome.json": (cut("outcome.json", 0.5), ("outcome.json cannot be read",)),
    "json that is no object": (replaced("outcome.json", b"[1, 2]"), ("outcome.json holds no JSON object",)),
    "json of 100,000 levels": (replaced("outcome.json", b"[" * 100_000), ("outcome.json cannot be read",)),
    "cut steps.arrow": (cut(STEPS, 0.7), ("steps.arrow is not a whole Arrow file",)),
    "random steps.arrow": (replaced(STEPS, os.urandom(4096)), ("steps.arrow is not a whole Arrow file",)),
    "steps.arrow of no bytes": (replaced(STEPS, b""), ("steps.arrow is not a whole Arrow file",)),
    "foreign columns": (foreign_columns, ("steps.arrow has columns", "expected")),
    "no timed step": (only_warmup, ("holds no timed step",)),
    "newer schema": (
        edited("point.json", lambda point: point.update(schema_version=results.SCHEMA_VERSION + 1)),
        ("this tunescope reads up to", "a newer version wrote the folder"),
    ),
    "another figure's point": (edited("point.json", lambda p: p.update(kind="latency")), ("kind 'latency'",)),
    "unknown status": (edited("outcome.json", lambda outcome: outcome.update(status="fine")), ("status 'fine'",)),
    "unknown model": (edited("point.json", lambda point: point["point"].update(model="gpt")), ("'gpt'",)),
    "a field too many": (edited("point.json", lambda point: point["point"].update(colour=1)), ("colour",)),
    "a list for an object": (edited("environment.json", lambda e: e.update(packages=[])), ("is not a point",)),
    "no train time": (
        edited("outcome.json", lambda o: o.update(train_runtime_ns=0)),
        ("is not a point",),
    ),
}


def test_a_spoiled_point_is_a_row_with_its_cause_and_the_others_stand(recorded: Path) -> None:
    """All at once, each a copy of a good point beside the good ones."""
    for name, (spoil, _) in SPOILED.items():
        spoil(shutil.copytree(recorded / CS_DENSE, recorded / name))
    before = snapshot(recorded)
    done = parser(recorded)
    assert done.code == 2
    assert "Traceback" not in done.err
    ok = [line.split()[:4] for line in done.out.splitlines() if " ok " in line]
    assert ok == [["cs", "dense", "1", "ok"], ["cs", "sparse", "1", "ok"]]
    shown = [line.removesuffix("unreadable").strip() for line in done.out.splitlines() if line.endswith("unreadable")]
    assert sorted(shown) == sorted(SPOILED)
    for name, (_, texts) in SPOILED.items():
        (cause,) = [line for line in done.err.splitlines() if line.startswith(f"tunescope: {name}: ")]
        for text in texts:
            assert text in cause
    rows = json.loads(parser(recorded, "--format", "json").out)
    assert {row["point_id"] for row in rows if row["status"] == "unreadable"} == SPOILED.keys()
    assert snapshot(recorded) == before


def test_a_launcher_measures_a_spoiled_point_again_and_keeps_the_spoiled_one_aside(recorded: Path) -> None:
    dry_run = ("--preset", "tiny", "--queries", "6", "--points", "cs:sparse:bs=1 cs:dense:bs=1", "--dry-run")
    cut(STEPS, 0.7)(recorded / CS_DENSE)
    before = snapshot(recorded)
    done = tunescope("run", "throughput", "--out", recorded, *dry_run)
    assert done.code == 0
    states = {line.split()[0]: line.rpartition(")")[2].strip() for line in done.out.splitlines()[1:]}
    assert states == {CS_SPARSE: "done, skipped", CS_DENSE: "to run"}
    assert snapshot(recorded) == before


# --- a launcher's options ---


def refused(folder: Path, *arguments: str) -> Finished:
    """A launcher with these options, DIR in them standing for `folder`; nothing must have been written."""
    before = snapshot(folder)
    with tempfile.TemporaryDirectory() as elsewhere:
        out = () if "--out" in arguments else ("--out", f"{elsewhere}/out")
        done = tunescope("run", "throughput", *(part.replace("DIR", str(folder)) for part in arguments), *out)
        assert not os.listdir(elsewhere)
    assert snapshot(folder) == before
    return done


TINY = ("--preset", "tiny")
ONE_POINT = ("--points", "cs:sparse:bs=1")
OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*TINY, "--points", "cs:sparse"), ("point 'cs:sparse' is not understood", "bs=N")),
    ((*TINY, "--points", " ; "), ("names no point",)),
    ((*TINY, "--points", "cs:sparse:bs=0"), ("per_device_batch_size is 0", f"1 to {MAX_BATCH}")),
    ((*TINY, "--points", f"cs:sparse:bs={MAX_BATCH + 1}"), (f"per_device_batch_size is {MAX_BATCH + 1}",)),
    ((*TINY, "--points", "cs:k=9:bs=1"), ("top_k is 9", "1 to 8")),
    ((*TINY, "--points", "cs:sparse:bs=1:seq=99999"), ("seq_len_tokens is 99999",)),
    ((*TINY, "--points", "gsm:sparse:bs=1"), ("no data for data set 'gsm'", "--dataset gsm=FILE")),
    ((*TINY, "--queries", "0"), ("--queries is 0",)),
    ((*TINY, "--max-seconds", "nan"), ("--max-seconds is nan",)),
    ((*TINY, "--memory-budget-gib", "nan"), ("--memory-budget-gib is nan",)),
    ((*TINY, "--memory-budget-gib", "0"), ("--memory-budget-gib is 0",)),
    ((*TINY, "--model", "gpt"), ("model 'gpt' is unknown", "mixtral")),
    (("--preset", "huge"), ("preset 'huge' is unknown", "tiny")),
    (("--preset", "full"), ("preset full needs a GPU and none was found", "--preset tiny")),
    (("--gpu", "7"), ("--gpu 7: no GPU was found", "doctor")),
    ((*TINY, "--dataset", "DIR/none.json"), ("there is no data file", "none.json")),
    ((*TINY, "--dataset", "DIR/cut.json"), ("cut.json is not JSON", "alpaca")),
    ((*TINY, "--dataset", "DIR/foreign.json"), ("foreign.json is not in a format of LLaMA-Factory", "'question'")),
    ((*TINY, "--dataset", "DIR/deep.json"), ("deep.json: row 700 has no text", "'output'")),
    (("--preset", "full", "--model-path", "DIR/none"), ("none is not a folder",)),
    (("--preset", "full", "--model-path", "DIR/cut.json"), ("cut.json is not a folder",)),
    (("--preset", "full", "--model-path", "DIR/empty"), ("empty has no config.json",)),
    (("--preset", "full", "--model-path", "DIR/llama"), ("model of type 'llama'", "type mixtral")),
    (("--preset", "full", "--model-path", "DIR/shallow"), ("shallow/config.json", "num_hidden_layers")),
    ((*TINY, *ONE_POINT, "--out", "DIR/cut.json/out"), ("cannot write to", "Not a directory", "--out")),
    ((*TINY, *ONE_POINT, "--out", "DIR/cut.json"), ("cannot write to", "--out")),
]


@pytest.fixture(scope="module")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    rows: list[dict[str, Any]] = [{"instruction": "a", "input": "", "output": "b"} for _ in range(1000)]
    rows[700]["output"] = None
    (folder / "deep.json").write_text(json.dumps(rows))
    (folder / "foreign.json").write_text('[{"question": "a"}]')
    (folder / "cut.json").write_text('[{"instruction": "a", "out')
    configs = {
        "empty": None,
        "llama": MIXTRAL_TINY | {"model_type": "llama"},
        "shallow": {key: value for key, value in MIXTRAL_TINY.items() if key != "num_hidden_layers"},
    }
    for name, content in configs.items():
        (folder / name).mkdir()
        if content is not None:
            (folder / name / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("arguments", "texts"), OPTIONS, ids=[" ".join(arguments) for arguments, _ in OPTIONS])
def test_an_option_that_cannot_be_meant_is_refused(
    given_files: Path, arguments: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    assert_one_clear_paragraph(refused(given_files, *arguments), *texts)


def test_usage_errors_name_the_option(recorded_once: Path, tmp_path: Path) -> None:
    assert_one_clear_paragraph(parser(recorded_once, "--format", "xml"), "--format 'xml' is unknown", "csv, json")
    for arguments, text in ((("--bogus",), "--bogus"), (("--gpu", "x"), "'--gpu'"), (("stray",), "stray")):
        done = refused(tmp_path, *arguments)
        assert (done.code, "Traceback" in done.err) == (2, False)
        assert "Usage: tunescope run throughput" in done.err
        assert text in done.err


# --- recipes ---

RECIPE = REPO / "LLaMA-Factory" / "mixtral_qlora.yaml"


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    """The project's recipe, with a model and data that are here."""
    for name, content in {
        "tiny/config.json": MIXTRAL_TINY,
        "data/few.json": [{"instruction": "a", "input": "", "output": "b"}] * 8,
        "data/dataset_info.json": {"few": {"file_name": "few.json"}},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    settings = {"model_name_or_path": tmp_path / "tiny", "dataset": "few", "output_dir": tmp_path / "output"}
    lines = [line for line in RECIPE.read_text().splitlines() if line.partition(":")[0] not in settings]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in settings.items())]) + "\n")
    return recipe


def test_a_recipe_is_refused_before_anything_heavy_is_imported(tiny_recipe: Path) -> None:
    folder, text = tiny_recipe.parent, tiny_recipe.read_text()
    assert "trust_remote_code: false" in text
    for name, content in {
        "trusting.yaml": text.replace("trust_remote_code: false", "trust_remote_code: true"),
        "list.yaml": "- a\n- b\n",
        "cut.yaml": "a: [\n",
        "object.yaml": "a: !!python/object/apply:os.system ['touch executed']\n",
    }.items():
        (folder / name).write_text(content)
    (folder / "bytes.yaml").write_bytes(b"\x80\x81\x82")
    cases: list[tuple[tuple[str | Path, ...], tuple[str, ...]]] = [
        ((folder / "none.yaml",), ("there is no recipe", "none.yaml")),
        ((folder / "list.yaml",), ("list.yaml is not a recipe",)),
        ((folder / "cut.yaml",), ("cut.yaml is not readable as YAML",)),
        ((folder / "object.yaml",), ("object.yaml is not readable as YAML", "python/object")),
        ((folder / "bytes.yaml",), ("bytes.yaml is not readable as YAML",)),
        ((folder,), ("is not readable as YAML",)),
        ((folder / "trusting.yaml",), ("trusting.yaml sets trust_remote_code: true", "refuses")),
        ((tiny_recipe, "trust_remote_code=true"), ("the command line sets trust_remote_code: true",)),
        ((tiny_recipe, "lora_rank"), ("override 'lora_rank' is not key=value",)),
        ((tiny_recipe, "lora_rank=["), ("override 'lora_rank=['",)),
        ((tiny_recipe, "dataset=many"), ("data set 'many' is not in", "few")),
        ((tiny_recipe, "dataset_dir=nowhere"), ("there is no", "dataset_info.json")),
        (
            (tiny_recipe, "model_name_or_path=mistralai/Mixtral-8x7B-v0.1"),
            ("is not in the Hub cache", "model_download"),
        ),
    ]
    for arguments, texts in cases:
        done = run(sys.executable, "-m", "tunescope", "train", *arguments, cwd=folder)
        assert_one_clear_paragraph(done, *texts)
    assert not (folder / "executed").exists()
    assert not (folder / "output").exists()


def test_a_setting_that_the_engine_does_not_know_is_named(tiny_recipe: Path) -> None:
    done = tunescope("train", tiny_recipe, "lora_rnk=4")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "setting that LLaMA-Factory does not know" in done.err
    assert "'lora_rnk'" in done.err
    assert "Cure:  check the spelling" in done.err


# --- anything at all ---

NUMBERS = st.one_of(st.integers(0, 70_000).map(str), st.text("0123456789,", max_size=6), st.just("9" * 5000))
ITEMS = st.builds(
    "{}:{}:bs={}{}".format,
    st.one_of(st.sampled_from(["cs", "math", "own", "paper", ""]), st.text(max_size=4)),
    st.one_of(st.sampled_from(["sparse", "dense", "k="]), NUMBERS.map("k={}".format), st.text(max_size=4)),
    NUMBERS,
    st.one_of(st.just(""), NUMBERS.map(":seq={}".format)),
)


@given(st.lists(st.one_of(ITEMS, st.text(max_size=8)), max_size=4), st.sampled_from([" ", ";", "\n", ",", ""]))
def test_what_almost_names_points_gives_points_or_a_user_error(items: list[str], between: str) -> None:
    with contextlib.suppress(UserError):
        points = parse_points(between.join(items), "mixtral")
        assert points
        assert all(type(point) is Point for point in points)


@st.composite
def spoiled_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a part of it cut off, replaced, put in or left out."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(start + draw(st.sampled_from([0, 1, 8, len(data)])), len(data))))
    return data[:start] + draw(st.one_of(st.binary(max_size=16), st.just(data[end:start:-1]))) + data[end:]


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([0, -1, 2**63, 10**400, "ok", "oom", "throughput", "NVIDIA A40"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def spoiled_json(draw: st.DrawFn, data: bytes) -> bytes:
    """The JSON `data` with one value, at any depth, replaced by another or left out."""
    content = json.loads(data)
    node, places = content, list(places_in(content))
    *path, last = draw(st.sampled_from(places))
    for key in path:
        node = node[key]
    if draw(st.booleans()) and isinstance(node, dict):
        del node[last]
    else:
        node[last] = draw(JSON_VALUES)
    return json.dumps(content).encode()


def places_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places_in(value, (*path, key))


@pytest.mark.parametrize("name", POINT_FILES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_table_stands_whatever_is_in_the_files_of_one_point(
    name: str, data: st.DataObject, recorded_once: Path
) -> None:
    original = (recorded_once / CS_DENSE / name).read_bytes()
    ways = [spoiled_bytes(original)] + ([spoiled_json(original)] * 3 if name.endswith(".json") else [])
    content = data.draw(st.one_of(ways))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(recorded_once, Path(temporary) / "throughput"))
        (folder / CS_DENSE / name).write_bytes(content)
        with contextlib.suppress(results.PointFormatError):
            assert type(results.read_point(folder / CS_DENSE)) is results.PointFolder
        table = throughput(folder)
        assert sorted(Path(path).name for path in table["folder"]) == sorted([CS_SPARSE, CS_DENSE])
        assert list(table.columns) == list(COLUMNS)
        assert "ok" in set(table["status"][table["folder"] == str(folder / CS_SPARSE)])
        for format in FORMATS:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
                is_readable = print_throughput(folder, format)
            assert is_readable == ("unreadable" not in set(table["status"]))
            assert CS_SPARSE in out.getvalue() or format == "text"
