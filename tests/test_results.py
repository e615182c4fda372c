"""Point folders: what is written is what is read, whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers_points import step_rows, write_point
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import results
from tunescope.config import Point
from tunescope.errors import UserError
from tunescope.locking import locked
from tunescope.results import PointFormatError

POINT = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=2)


def values(field: pa.Field) -> st.SearchStrategy[Any]:
    if pa.types.is_boolean(field.type):
        made: st.SearchStrategy[Any] = st.booleans()
    elif pa.types.is_floating(field.type):
        made = st.floats(allow_nan=False)
    else:
        bits = field.type.bit_width
        made = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return made | st.none() if field.nullable else made


def rows_of(schema: pa.Schema) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(st.fixed_dictionaries({field.name: values(field) for field in schema}), max_size=20)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


# --- round trips ---


@pytest.mark.parametrize("schema", [results.STEPS_SCHEMA, results.GPU_SAMPLES_SCHEMA], ids=["steps", "gpu_samples"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_round_trip(schema: pa.Schema, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = data.draw(rows_of(schema))
    file = tmp_path_factory.mktemp("rows") / "rows.arrow"
    results.write_arrow(file, rows, schema)
    assert results.read_arrow(file, schema).to_pylist() == rows


@settings(max_examples=100, deadline=None)
@given(content=st.dictionaries(st.text(), json_values, max_size=6))
def test_json_round_trip_keeps_values_and_order(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("json") / "content.json"
    results.write_json(file, content)
    found = results.read_json(file)
    assert found == content
    assert list(found) == list(content)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_never_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write_json(tmp_path / "content.json", {"gpu_energy_j": value})


def test_a_missing_or_superfluous_column_is_never_filled_in(tmp_path: Path) -> None:
    rows = step_rows([1, 2])
    for wrong in (
        [{k: v for k, v in row.items() if k != "tokens"} for row in rows],
        [row | {"loss": 1} for row in rows],
    ):
        with pytest.raises(AssertionError, match="other columns"):
            results.write_arrow(tmp_path / "steps.arrow", wrong, results.STEPS_SCHEMA)
    fewer = pa.schema([field for field in results.STEPS_SCHEMA if field.name != "tokens"])
    without = [{k: v for k, v in row.items() if k != "tokens"} for row in rows]
    results.write_arrow(tmp_path / "fewer.arrow", without, fewer)
    with pytest.raises(PointFormatError, match="has columns"):
        results.read_arrow(tmp_path / "fewer.arrow", results.STEPS_SCHEMA)


def test_an_empty_cell_is_refused_where_the_schema_has_none(tmp_path: Path) -> None:
    """Arrow writes and reads it without complaint, and its tokens/s would be nothing."""
    rows = [row | {"tokens": None} for row in step_rows([1, 2])]
    results.write_arrow(tmp_path / "steps.arrow", rows, results.STEPS_SCHEMA)
    with pytest.raises(PointFormatError, match="empty cells in tokens"):
        results.read_arrow(tmp_path / "steps.arrow", results.STEPS_SCHEMA)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    """Durations as float seconds would be read as nanoseconds: a thousand million times too fast."""
    fields = [
        pa.field("duration_ns", pa.float64(), nullable=False) if f.name == "duration_ns" else f
        for f in results.STEPS_SCHEMA
    ]
    results.write_arrow(tmp_path / "steps.arrow", step_rows([1, 2]), pa.schema(fields))
    with pytest.raises(PointFormatError):
        results.read_arrow(tmp_path / "steps.arrow", results.STEPS_SCHEMA)


@pytest.mark.parametrize("keep_frac", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(keep_frac: float, tmp_path: Path) -> None:
    file = tmp_path / "steps.arrow"
    results.write_arrow(file, step_rows(range(1, 200)), results.STEPS_SCHEMA)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep_frac)])
    with pytest.raises(PointFormatError):
        results.read_arrow(file, results.STEPS_SCHEMA)


# --- publishing ---


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_point_has_its_final_name_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the one moment of publishing every file is already there: it is a rename of the folder."""
    seen: list[tuple[list[str], bool]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.append((names(self), Path(target).exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    write_point(tmp_path / "p", POINT, [1, 2, 3, 4])
    assert seen == [([results.ENVIRONMENT_FILE, results.OUTCOME_FILE, results.POINT_FILE, results.STEPS_FILE], False)]


def test_an_earlier_result_is_kept_under_superseded_each_time(tmp_path: Path) -> None:
    for duration_ns in (1_000, 2_000, 3_000):
        write_point(tmp_path / "p", POINT, [duration_ns] * 4)

    def first_ns(folder: Path) -> int:
        steps = results.read_point(folder).steps
        assert steps is not None
        return steps["duration_ns"][0].as_py()

    assert first_ns(tmp_path / "p") == 3_000
    assert first_ns(tmp_path / "superseded" / "p~1") == 1_000
    assert first_ns(tmp_path / "superseded" / "p~2") == 2_000
    assert list(results.find_point_folders(tmp_path)) == [tmp_path / "p"]


def test_a_publish_that_fails_leaves_no_half_point_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_point(tmp_path / "p", POINT, [1_000] * 4)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(results.UNFINISHED_SUFFIX):
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        write_point(tmp_path / "p", POINT, [2_000] * 4)
    monkeypatch.undo()
    assert results.read_point(tmp_path / "superseded" / "p~1").status == "ok"
    assert list(results.find_point_folders(tmp_path)) == []
    assert results.find_unfinished(tmp_path) == [tmp_path / "p.unfinished"]


def test_unfinished_and_hidden_folders_are_never_listed(tmp_path: Path) -> None:
    write_point(tmp_path / "a" / "p", POINT, [1] * 4)
    for name in ("q.unfinished", ".trash", "superseded"):
        (tmp_path / "a" / "p").rename(tmp_path / "a" / name)
        assert list(results.find_point_folders(tmp_path)) == []
        (tmp_path / "a" / name).rename(tmp_path / "a" / "p")
    assert list(results.find_point_folders(tmp_path)) == [tmp_path / "a" / "p"]


def test_starting_anew_clears_what_an_interrupted_run_left(tmp_path: Path) -> None:
    work_dir = results.start_unfinished(tmp_path, "p")
    (work_dir / results.STEPS_FILE).write_text("half")
    assert results.start_unfinished(tmp_path, "p") == work_dir
    assert names(work_dir) == []


def test_points_are_found_at_any_depth_in_a_fixed_order(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("b/y", "b/x", "a/deep/er/z", "c")]
    for folder in made:
        write_point(folder, POINT, [1] * 4)
    assert list(results.find_point_folders(tmp_path)) == sorted(made)
    assert list(results.find_point_folders(tmp_path / "c")) == [tmp_path / "c"]


# --- reading ---


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_schema_or_status_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_point(tmp_path / "p", POINT, [1] * 4)
    edit(folder / results.POINT_FILE, schema_version=results.SCHEMA_VERSION + 1)
    with pytest.raises(PointFormatError, match="reads up to"):
        results.read_point(folder)
    edit(folder / results.POINT_FILE, schema_version=results.SCHEMA_VERSION)
    edit(folder / results.OUTCOME_FILE, status="fine")
    with pytest.raises(PointFormatError, match="status 'fine'"):
        results.read_point(folder)


@pytest.mark.parametrize(
    "name", [results.POINT_FILE, results.ENVIRONMENT_FILE, results.OUTCOME_FILE, results.STEPS_FILE]
)
def test_a_missing_or_foreign_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write_point(tmp_path / "p", POINT, [1] * 4)
    (folder / name).write_text("[1, 2]")
    with pytest.raises(PointFormatError, match=name):
        results.read_point(folder)
    (folder / name).unlink()
    with pytest.raises(PointFormatError, match=name):
        results.read_point(folder)


def test_steps_of_a_point_that_is_not_ok_are_not_read(tmp_path: Path) -> None:
    folder = write_point(tmp_path / "p", POINT, status="oom", cause="CUDA out of memory")
    (folder / results.STEPS_FILE).write_text("left by a step that did not fit")
    found = results.read_point(folder)
    assert (found.status, found.steps) == ("oom", None)


# --- the lock ---


def test_one_writer_per_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path):
        pass
    with locked(tmp_path):  # released at the end of the block
        pass
