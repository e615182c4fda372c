"""Reads `.ncu-rep` files: launches, with their counters and the NVTX ranges around them, as one Arrow table.

By NVIDIA's `ncu-report` package if it is installed, else by `ncu --import --csv`. The package opens any file without
complaint and runs native code over it, so it works in a process of its own, with limits of time and memory, and a
report without a kernel is an error.
"""

import csv
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunescope.errors import UserError
from tunescope.ncu.counters import COUNTERS_SCHEMA, LAUNCH_METRICS, METRICS, in_column_unit

MAX_SECONDS = 300.0
MAX_MEMORY_BYTES = 8 * 2**30
_MAGIC = b"NVR\0"
_INSTALL = "install the reader (pip install 'tunescope[ncu]'), or put Nsight Compute's ncu on the PATH"


def read_report(path: Path, ncu: str | None = None) -> pa.Table:
    """Rows of COUNTERS_SCHEMA, in the order of the launches.

    ncu: its path, where it is known. Raises UserError for a file that is no report, holds no kernel, or cannot be read
    here.
    """
    _check_file(path)
    if importlib.util.find_spec("ncu_report") is not None:
        rows = _by_package(path)
    elif (tool := ncu or shutil.which("ncu")) is not None:
        rows = rows_of_csv(_run([tool, "--import", str(path), "--csv", "--page", "raw", "--print-units", "base"], path))
    else:
        raise UserError(f"{path} cannot be read on this machine", cause="nothing here reads reports", cure=_INSTALL)
    if not rows:
        raise UserError(
            f"{path} holds no kernel",
            cause="it is of another tool, damaged, or nothing that was launched fell into the profiled range",
            cure="profile again, and see ncu's own output",
        )
    return pa.Table.from_pylist(rows, COUNTERS_SCHEMA)


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if start != _MAGIC:
        what = "is empty" if not start else "is no Nsight Compute report"
        raise UserError(f"{path} {what}", cure="give a file that `ncu --export` has written, which ends in .ncu-rep")


def _by_package(path: Path) -> list[dict[str, Any]]:
    text = _run([sys.executable, "-m", "tunescope.ncu.dump", str(path)], path)
    with pa.ipc.open_stream(pa.py_buffer(text)) as reader:
        return list(reader.read_all().to_pylist())


def _run(command: list[str], path: Path) -> bytes:
    """What a reader prints, if it ends well, in time and in its memory."""
    package_folder = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    }
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=MAX_SECONDS, check=False, env=environment, stdin=subprocess.DEVNULL,
            preexec_fn=_limit_memory,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{path} could not be read in {MAX_SECONDS:g} s", cause="it is very large, or damaged"
        ) from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}", cure=_INSTALL) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise UserError(
            f"{path} could not be read: {lines[-1][:300] if lines else ended}",
            cause=f"it is damaged, or of a newer Nsight Compute than the reader knows ({ended})",
            cure="profile again, or update the reader",
        )
    return done.stdout


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def rows_of_csv(text: bytes) -> list[dict[str, Any]]:
    """Rows of COUNTERS_SCHEMA from ncu's raw page: a line of names, one of units, one a launch."""
    lines = text.decode(errors="replace").splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    if len(rows) < 3:
        return []
    names, units = rows[0], rows[1]
    found = []
    for row in rows[2:]:
        if len(row) != len(names):
            raise UserError("a line of ncu's CSV has more or fewer fields than its head", cause="it was cut off")
        cells = dict(zip(names, zip(row, units, strict=True), strict=True))
        found.append(_row_of_csv(cells))
    return found


def _row_of_csv(cells: dict[str, tuple[str, str]]) -> dict[str, Any]:
    name = cells["Kernel Name"][0]
    row: dict[str, Any] = {"kernel": name, "mangled": name, "ranges": ranges_of_csv(cells)}
    for column, metric in (METRICS | LAUNCH_METRICS).items():
        text, unit = cells.get(metric, ("", ""))
        try:
            row[column] = in_column_unit(column, float(text.replace(",", "")), unit)
        except ValueError:  # n/a, where a GPU has no such counter
            row[column] = None
    return row


def ranges_of_csv(cells: dict[str, tuple[str, str]]) -> list[str]:
    """Names of the push/pop ranges, outermost first: the column is `thread: domain: <name, ...>`, a range a line."""
    names: list[str] = []
    for column, (text, _) in cells.items():
        if "Push/Pop_Stack" in column or "push_pop" in column.lower():
            names += [part.strip().strip('"') for part in text.split("\n") if part.strip()]
    return names
