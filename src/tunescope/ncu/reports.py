"""Reads `.ncu-rep` files: launches, with their counters and the NVTX ranges around them, as one Arrow table.

By NVIDIA's `ncu-report` package if it is installed, else by `ncu --import --csv`. The package opens any file without
complaint and runs native code over it, so it works in a process of its own, with limits of time and memory, and a
report without a kernel is an error.
"""

import csv
import importlib.util
import io
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunescope.errors import UserError
from tunescope.ncu.counters import COUNTERS_SCHEMA, LAUNCH_METRICS, METRICS, in_column_unit
from tunescope.ncu.names import demangled

MAX_SECONDS = 300.0
MAX_MEMORY_BYTES = 8 * 2**30
# Of addresses: ncu itself reserves more of them than it uses.
MAX_NCU_MEMORY_BYTES = 64 * 2**30
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
        rows = _by_ncu(path, tool)
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


def _by_ncu(path: Path, tool: str) -> list[dict[str, Any]]:
    command = [
        tool, "--import", str(path), "--csv", "--page", "raw", "--print-units", "base",
        "--print-kernel-base", "mangled",
    ]  # fmt: skip
    text = _run(command, path, MAX_NCU_MEMORY_BYTES)
    rows = rows_of_csv(text)
    if rows and not any(row[column] is not None for row in rows for column in METRICS):
        raise UserError(
            f"{path} holds {len(rows)} launches without any metric that is known here",
            cause=f"ncu printed: {start_of_csv(text)}",
            cure="report it with this text: this release of Nsight Compute prints otherwise",
        )
    return rows


def start_of_csv(text: bytes, max_chars: int = 1500) -> str:
    """Head, units and first launch of what ncu printed, for a message."""
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    head = next((number for number, line in enumerate(lines) if _is_head(line)), 0)
    return " // ".join(lines[head : head + 3])[:max_chars]


def _run(command: list[str], path: Path, max_memory_bytes: int | None = None) -> bytes:
    """What a reader prints, if it ends well, in time and in its memory."""
    package_folder = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    }
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=MAX_SECONDS, check=False, env=environment, stdin=subprocess.DEVNULL,
            preexec_fn=partial(_limit_memory, max_memory_bytes or MAX_MEMORY_BYTES),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{path} could not be read in {MAX_SECONDS:g} s", cause="it is very large, or damaged"
        ) from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}", cure=_INSTALL) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()[-2000:]  # ncu complains on stdout
        lines = said.decode(errors="replace").splitlines()
        ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise UserError(
            f"{path} could not be read: {lines[-1][:300] if lines else ended}",
            cause=f"it is damaged, or of a newer Nsight Compute than the reader knows ({ended})",
            cure="profile again, or update the reader",
        )
    return done.stdout


def _limit_memory(max_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def _is_head(line: str) -> bool:
    return line.startswith(('"ID"', "ID,"))


def rows_of_csv(text: bytes) -> list[dict[str, Any]]:
    """Rows of COUNTERS_SCHEMA from ncu's raw page: a line of names, one of units (not of every release), one a launch.

    Kernels are taken to be printed by the names that the compiler gave them. ncu prints percentages and clocks to two
    decimals: the package has all their digits. Raises UserError for a text that was cut off or is damaged.
    """
    lines = text.decode(errors="replace").split("\n")
    start = next((number for number, line in enumerate(lines) if _is_head(line)), None)
    if start is None:
        return []
    if lines[-1]:  # a line without its end may lack digits, too
        raise UserError("ncu's CSV ends within a line", cause="it was cut off")
    try:
        rows = [row for row in csv.reader(io.StringIO("\n".join(lines[start:]), newline="")) if row]
    except csv.Error as error:
        raise UserError(f"ncu's CSV cannot be read: {error}", cause="it is damaged") from None
    names, rows = rows[0], rows[1:]
    units = [""] * len(names)
    if rows and not rows[0][0]:
        units, rows = rows[0], rows[1:]
    found = []
    for row in rows:
        if len(row) == 1 and row[0].startswith("=="):  # what ncu says besides
            continue
        if not len(row) == len(names) == len(units):
            raise UserError("a line of ncu's CSV has more or fewer fields than its head", cause="it was cut off")
        cells = dict(zip(names, zip(row, units, strict=True), strict=True))
        found.append(_row_of_csv(cells))
    return found


def _row_of_csv(cells: dict[str, tuple[str, str]]) -> dict[str, Any]:
    mangled = cells.get("Kernel Name", ("", ""))[0]
    row: dict[str, Any] = {"kernel": demangled(mangled) or mangled, "mangled": mangled, "ranges": ranges_of_csv(cells)}
    for column, metric in (METRICS | LAUNCH_METRICS).items():
        text, unit = cells.get(metric, ("", ""))
        # Not a number: n/a, where a GPU has no such counter. After one may come the values of a metric's instances.
        number = re.match(r"\s*(-?[\d,]*\.?\d+(?:[eE][+-]?\d+)?)(?=$|[\s;({])", text)
        row[column] = in_column_unit(column, float(number[1].replace(",", "")), unit) if number else None
    for column, name in (("grid_blocks", "Grid Size"), ("block_threads", "Block Size")):
        sizes = re.findall(r"\d+", cells.get(name, ("", ""))[0])
        if row[column] is None and len(sizes) == 3:  # as (8, 1, 1)
            row[column] = float(math.prod(map(int, sizes)))
    return row


def ranges_of_csv(cells: dict[str, tuple[str, str]]) -> list[str]:
    """Names of the push/pop ranges, outermost first.

    ncu 2025.3.1 prints them as `1936  "<default domain>:name:none:none:none:none:none:none"  "CCCL:cub::Sort:..." `: a
    thread, and of each range its domain, name, payload, colour and message, without escaping the colons of any. Other
    releases may print a range a line.
    """
    names: list[str] = []
    for column, (text, _) in cells.items():
        if not re.search(r"push.?pop", column, re.IGNORECASE):
            continue
        quoted = re.findall(r'"([^"]+)"', text)
        names += [_name_of_range(part) for part in quoted or text.split("\n") if part.strip()]
    return names


# Domain, name, types and values of payload and colour, type and text of the message; a registered name is its message.
_RANGE = re.compile(r"[^:]*:(?P<name>.+):\w*:[^:]*:\w*:[^:]*:\w*:(?:none|(?P=name))")


def _name_of_range(text: str) -> str:
    text = text.strip()
    if match := _RANGE.fullmatch(text):
        return match["name"]
    text = re.sub(r"^(?:\d+\s+)?<default domain>:", "", text)
    fields = text.split(":")
    return ":".join(fields[:-6]) if len(fields) > 6 else text
