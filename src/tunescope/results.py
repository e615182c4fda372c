"""Point folders: what one measured run leaves on disk, written whole or not at all, read back with care.

A folder under its final name is whole; work in progress has a name ending in UNFINISHED_SUFFIX. Nothing here
computes a result: rows are written once per step, summaries are made by whoever reads them.
profile_data/README.md describes every file and column.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunescope.errors import UserError

SCHEMA_VERSION = 1
UNFINISHED_SUFFIX = ".unfinished"
SUPERSEDED_FOLDER = "superseded"
STATUSES = ("ok", "oom", "failed", "skipped")

POINT_FILE = "point.json"
ENVIRONMENT_FILE = "environment.json"
OUTCOME_FILE = "outcome.json"
STEPS_FILE = "steps.arrow"
GPU_SAMPLES_FILE = "gpu_samples.arrow"
LOG_FILE = "log.txt"

_COMPRESS_ABOVE_BYTES = 1 << 16

STEPS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("is_warmup", pa.bool_(), nullable=False),
        pa.field("duration_ns", pa.int64(), nullable=False),
        pa.field("host_duration_ns", pa.int64(), nullable=False),
        pa.field("num_queries", pa.int32(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("padded_tokens", pa.int64(), nullable=False),
        pa.field("seq_len_tokens", pa.int32(), nullable=False),
        pa.field("micro_steps", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("world_size", pa.int32(), nullable=False),
    ]
)
GPU_SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("time_unix_ns", pa.int64(), nullable=False),
        pa.field("sm_clock_mhz", pa.int32()),
        pa.field("memory_clock_mhz", pa.int32()),
        pa.field("power_w", pa.float64()),
        pa.field("temperature_c", pa.int32()),
        pa.field("throttle_reasons_bitmask", pa.int64()),
        pa.field("memory_used_bytes", pa.int64()),
        pa.field("num_other_processes", pa.int32()),
    ]
)


class PointFormatError(UserError):
    """A point folder, or a file in it, is not what this version can read."""


@dataclass(frozen=True)
class PointFolder:
    """One point as read. steps: None unless the point is `ok`; why it is not stands in outcome["cause"]."""

    path: Path
    point: dict[str, Any]
    environment: dict[str, Any]
    outcome: dict[str, Any]
    steps: pa.Table | None

    @property
    def status(self) -> str:
        return self.outcome["status"]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes and syncs; keys keep their order so that two folders can be compared with diff."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_arrow(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as one Arrow IPC file (read 5 times faster than Parquet at this size) and syncs it."""
    assert all(row.keys() == set(schema.names) for row in rows), "a row has other columns than its schema"
    write_arrow_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_arrow_table(path: Path, table: pa.Table) -> None:
    """Writes a table as one Arrow IPC file and syncs it. Large ones are compressed: a trace to a tenth."""
    compression = "zstd" if table.nbytes > _COMPRESS_ABOVE_BYTES else None
    with path.open("wb") as file:
        with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())


def start_unfinished(out_dir: Path, point_id: str) -> Path:
    """An empty work folder beside the final one; what an interrupted run left under that name is removed.

    The caller holds the lock of `out_dir` (locking.py), so nobody else can be writing there.
    """
    work_dir = out_dir / (point_id + UNFINISHED_SUFFIX)
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    return work_dir


def publish(work_dir: Path, final_dir: Path) -> None:
    """Gives a whole work folder its final name. An earlier result is kept, under `superseded/`."""
    if final_dir.exists():
        retire(final_dir)
    work_dir.rename(final_dir)
    _sync_folder(final_dir.parent)


def retire(final_dir: Path) -> Path:
    """Moves a result aside into `superseded/NAME~N`, which no table reads. Returns the new place."""
    shelf = final_dir.parent / SUPERSEDED_FOLDER
    shelf.mkdir(exist_ok=True)
    number = 1
    while (target := shelf / f"{final_dir.name}~{number}").exists():
        number += 1
    final_dir.rename(target)
    return target


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(content: Mapping[str, Any]) -> str:
    """16 hex digits that change when anything in a JSON-like mapping does, whatever its order."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def disk_full(folder: Path) -> UserError:
    return UserError(
        f"no space is left on the disk of {folder}",
        cause="a point needs a few MB while it runs",
        cure="free some space, or name another disk with --out; finished points are kept",
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def find_point_folders(folder: Path) -> Iterator[Path]:
    """Every finished point folder at or below `folder`, sorted by path; unfinished and superseded ones are not."""
    for root, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not _is_set_aside(name))
        if not {POINT_FILE, OUTCOME_FILE, STEPS_FILE}.isdisjoint(files):
            names.clear()
            yield Path(root)


def find_unfinished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*" + UNFINISHED_SUFFIX) if path.is_dir())


def _is_set_aside(name: str) -> bool:
    return name.endswith(UNFINISHED_SUFFIX) or name == SUPERSEDED_FOLDER or name.startswith(".")


def read_json(path: Path) -> dict[str, Any]:
    """Raises PointFormatError if the file is missing, is not JSON or is not an object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PointFormatError(
            f"{path} is missing",
            cause="the folder was copied in part, or files in it were deleted",
            cure="copy it again, or delete the folder and run the launcher again",
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise PointFormatError(f"{path} cannot be read: {error}", cure=_RERUN) from None
    if not isinstance(content, dict):
        raise PointFormatError(f"{path} holds no JSON object", cure=_RERUN)
    return content


def read_point(folder: Path) -> PointFolder:
    """One point, checked: schema version, status, and that the steps of an `ok` point are there and have its columns.

    Raises PointFormatError; never fills in a default for something that is missing.
    """
    point = read_json(folder / POINT_FILE)
    version = point.get("schema_version")
    if not isinstance(version, int):
        raise PointFormatError(f"{folder / POINT_FILE} names no schema_version", cure=_RERUN)
    if version > SCHEMA_VERSION:
        raise PointFormatError(
            f"{folder / POINT_FILE} has schema {version}; this tunescope reads up to {SCHEMA_VERSION}",
            cause="a newer version wrote the folder, usually on another machine",
            cure="upgrade tunescope, or run the launcher again here with another --out",
        )
    outcome = read_json(folder / OUTCOME_FILE)
    if outcome.get("status") not in STATUSES:
        raise PointFormatError(
            f"{folder / OUTCOME_FILE} has status {outcome.get('status')!r}; known: {', '.join(STATUSES)}"
        )
    steps = read_arrow(folder / STEPS_FILE, STEPS_SCHEMA) if outcome["status"] == "ok" else None
    return PointFolder(folder, point, read_json(folder / ENVIRONMENT_FILE), outcome, steps)


def read_arrow(path: Path, schema: pa.Schema) -> pa.Table:
    """An Arrow file whose columns must be exactly `schema`. Raises PointFormatError."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
        table.validate(full=True)
    except FileNotFoundError:
        raise PointFormatError(
            f"{path} is missing", cause="the point was only half written or copied", cure=_RERUN
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PointFormatError(f"{path} is not a whole Arrow file: {reason}", cure=_RERUN) from None
    if not table.schema.equals(schema):
        raise PointFormatError(f"{path} has columns {table.schema.names}; expected {schema.names}", cure=_RERUN)
    # Arrow itself keeps no promise of a schema that a column is never empty.
    gaps = [field.name for field in schema if not field.nullable and table[field.name].null_count]
    if gaps:
        raise PointFormatError(f"{path} has empty cells in {', '.join(gaps)}", cure=_RERUN)
    return table


_RERUN = "delete the point's folder and run the launcher again; the other points stay"
