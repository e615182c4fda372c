"""Kernels, launching ops and idle time of a profiler trace, as text, csv or json."""

import csv
import io
import json
import math
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope.analyze.trace_kernels import NO_OP, TraceTables, trace_tables
from tunescope.errors import UserError
from tunescope.report.text import check_format, number, text_table

DEFAULT_LIMIT = 30
MAX_STREAM_ROWS = 100
_NAME_WIDTH = 60
_FOOTER_WIDTH = 120
_NOISE = ("(anonymous namespace)::", "at::native::")  # in most kernels of PyTorch, and telling none apart
CSV_COLUMNS = (
    "table", "name", "category", "device", "device_name", "stream", "count", "total_ns", "mean_ns", "min_ns", "max_ns",
    "self_ns", "mean_self_ns", "share_pct", "span_ns", "busy_ns", "idle_ns", "idle_pct", "overlap_ns", "is_partial",
)  # fmt: skip
# One csv holds all the tables, so what is counted and summed has one name there.
_CSV_NAMES = {"op": "name", "launches": "count", "events": "count", "calls": "count", "sum_ns": "total_ns"}

Row = dict[str, Any]


def print_kernels(trace: Path, format: str, limit: int | None = None) -> bool:
    """Prints the tables of a trace to stdout. False if it could be read only in part: they and stderr say so.

    `limit`: rows of kernels and of ops by time, the rest summed in one row; if None, 30 in text and all in csv and
    json. Raises UserError for a trace that cannot be read at all.
    """
    check_format(format)
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no row", cure="use 1 or more")
    tables = trace_tables(trace)
    if format == "csv":
        text = _csv(tables, limit)
    elif format == "json":
        text = _json(tables, limit)
    else:
        text = kernels_text(tables, DEFAULT_LIMIT if limit is None else limit)
    _write(text + "\n")
    if not tables.is_whole:
        print(f"tunescope: {_printable(str(trace))}: {_partial(tables)}", file=sys.stderr)
    return tables.is_whole


def kernels_text(tables: TraceTables, limit: int) -> str:
    """The whole text: what it is of, a table each for kernels, ops and devices, and how to read them."""
    name = _printable(str(tables.path))
    top = [f"PARTIAL: {_partial(tables)}. What could be read:", ""] if not tables.is_whole else []
    if not tables.num_gpu_events:
        title = f"CPU ops of {name} (it holds no GPU event): {tables.num_cpu_ops:,} calls, {tables.num_events:,} events"
        return "\n\n".join(["\n".join([*top, title]), _cpu_op_table(tables, limit), _wrap(_cpu_footer())])
    gpus = ", ".join(dict.fromkeys(_printable(row["device_name"] or "GPU") for row in _records(tables.streams)))
    title = (
        f"GPU time of {name}: {gpus}; {tables.num_gpu_events:,} GPU events, {tables.num_cpu_ops:,} CPU ops, "
        f"{tables.num_events:,} events"
    )
    return "\n\n".join(
        [
            "\n".join([*top, title]),
            _kernel_table(tables, limit),
            _op_table(tables, limit),
            _stream_table(tables),
            _wrap(_footer(tables)),
        ]
    )


def short_name(name: str) -> str:
    """A kernel's name for a table: without its return type, parameters and common namespaces, cut at 60 characters."""
    text = _printable(name).removeprefix("void ")
    if text.endswith(")"):
        depth = 0
        for at in range(len(text) - 1, -1, -1):
            depth += (text[at] == ")") - (text[at] == "(")
            if depth == 0:
                # A blank stands before what is no parameter: "Memcpy HtoD (Pinned -> Device)".
                text = text[:at] if at and text[at - 1] != " " else text
                break
    for noise in _NOISE:
        text = text.replace(noise, "")
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 3] + "..."


# --- text ---


def _kernel_table(tables: TraceTables, limit: int) -> str:
    rows = _top(_records(tables.kernels), limit, "name", "launches", "total_ns")
    several = tables.kernels["device"].nunique() > 1
    names = _distinct(short_name(row["name"]) for row in rows)
    header = ["kernel", "kind", *["device"] * several, "launches", "total ms", "share %", "mean us", "min us", "max us"]
    cells = [
        [name, row["category"], *[_printable(row["device"])] * several, *_duration_cells(row)]
        for name, row in zip(names, rows, strict=True)
    ]
    return text_table(header, cells, left_columns=2)


def _op_table(tables: TraceTables, limit: int) -> str:
    rows = _top(_records(tables.ops), limit, "op", "launches", "total_ns")
    names = _distinct(short_name(row["op"]) for row in rows)
    header = ["CPU op that launched it", "launches", "total ms", "share %", "mean us", "min us", "max us"]
    return text_table(
        header, [[name, *_duration_cells(row)] for name, row in zip(names, rows, strict=True)], left_columns=1
    )


def _duration_cells(row: Row) -> list[str]:
    return [
        f"{row['launches']:,}",
        _ms(row["total_ns"]),
        _pct(row["share_pct"]),
        *(number(row[column] / 1e3, 4) for column in ("mean_ns", "min_ns", "max_ns")),
    ]


def _stream_table(tables: TraceTables) -> str:
    header = ["device", "stream", "events", "span ms", "busy ms", "idle ms", "idle %", "sum ms", "overlap ms"]
    times = ("span_ns", "busy_ns", "idle_ns", "idle_pct", "sum_ns", "overlap_ns")
    rows = _records(tables.streams)
    cells = [
        [
            _printable(row["device"]),
            _printable(row["stream"]),
            f"{row['events']:,}",
            *(_pct(row[time]) if time.endswith("_pct") else _ms(row[time]) for time in times),
        ]
        for row in rows[:MAX_STREAM_ROWS]
    ]
    more = len(rows) - MAX_STREAM_ROWS
    return text_table(header, cells, left_columns=2) + (f"\n({more:,} more; csv and json have them)" * (more > 0))


def _cpu_op_table(tables: TraceTables, limit: int) -> str:
    rows = _top(_records(tables.cpu_ops), limit, "op", "calls", "self_ns")
    names = _distinct(short_name(row["op"]) for row in rows)
    cells = [
        [
            name,
            f"{row['calls']:,}",
            _ms(row["self_ns"]),
            _pct(row["share_pct"]),
            number(row["mean_self_ns"] / 1e3, 4),
            _ms(row["total_ns"]),
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    header = ["CPU op", "calls", "self ms", "share %", "mean self us", "with inner ops ms"]
    return text_table(header, cells, left_columns=1)


def _footer(tables: TraceTables) -> list[str]:
    lines = [
        "share: of the sum of all GPU durations. Kernel names are shortened; --format csv and json have them in full.",
        "busy: at least one kernel, copy or fill ran (the union over streams); idle: the rest of the span from the "
        "first start to the last end; overlap: sum less busy.",
    ]
    if any(str(op).startswith(NO_OP) for op in tables.ops["op"]):
        lines.append(
            f"{NO_OP}: no recorded CPU op launched it, by External id, correlation or time; the runtime call that did "
            "follows where it is known. A CUDA graph is launched outside of the ops it was captured from."
        )
    return lines


def _cpu_footer() -> list[str]:
    return [
        "No GPU event: the profiler ran without ProfilerActivity.CUDA (which also means ROCm), or without a GPU.",
        "self: an op's time less that of the ops inside it on the same thread; share: of all self time. An op inside "
        "one of its own name counts twice with its inner ops.",
    ]


def _partial(tables: TraceTables) -> str:
    reasons = [tables.problem] if tables.problem else []
    if tables.skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in tables.skipped.items())
        reasons.append(f"{sum(tables.skipped.values()):,} events skipped ({counts})")
    return "; ".join(reasons)


# --- csv and json ---


def _csv(tables: TraceTables, limit: int | None) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table, rows in _all_rows(tables, limit).items():
        for row in rows:
            renamed = {_CSV_NAMES.get(key, key): value for key, value in row.items()}
            writer.writerow({"table": table, **renamed, "is_partial": not tables.is_whole})
    return file.getvalue().removesuffix("\n")


def _json(tables: TraceTables, limit: int | None) -> str:
    content = {
        "trace": str(tables.path).encode("utf-8", "replace").decode(),
        "is_partial": not tables.is_whole,
        "problem": tables.problem,
        "skipped_events": tables.skipped,
        "num_events": tables.num_events,
        "num_gpu_events": tables.num_gpu_events,
        "num_cpu_ops": tables.num_cpu_ops,
        **_all_rows(tables, limit),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _all_rows(tables: TraceTables, limit: int | None) -> dict[str, list[Row]]:
    return {
        "kernels": _top(_records(tables.kernels), limit, "name", "launches", "total_ns", with_total=False),
        "ops": _top(_records(tables.ops), limit, "op", "launches", "total_ns", with_total=False),
        "streams": _records(tables.streams),
        "cpu_ops": _top(_records(tables.cpu_ops), limit, "op", "calls", "self_ns", with_total=False),
    }


# --- rows ---


def _top(rows: list[Row], limit: int | None, name: str, count: str, time: str, *, with_total: bool = True) -> list[Row]:
    """The first rows, the rest as one row, and the total: both sum to what all the rows sum to."""
    shown = rows if limit is None else rows[:limit]
    rest = rows[len(shown) :]
    return [
        *shown,
        *([_summed(rest, f"({len(rest):,} more)", name, count, time)] if rest else []),
        *([_summed(rows, "total", name, count, time)] if with_total and rows else []),
    ]


def _summed(rows: list[Row], label: str, name: str, count: str, time: str) -> Row:
    summed: Row = {}
    for column, value in rows[0].items():
        values = [row[column] for row in rows]
        if column.startswith("min_"):
            summed[column] = min(values)
        elif column.startswith("max_"):
            summed[column] = max(values)
        elif column.startswith("mean_"):
            summed[column] = sum(row[time] for row in rows) / sum(row[count] for row in rows)
        else:
            summed[column] = "" if isinstance(value, str) else sum(values)
    return summed | {name: label}


def _records(table: pd.DataFrame) -> list[Row]:
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}
        for record in table.to_dict("records")
    ]


def _distinct(names: Iterable[str]) -> list[str]:
    """Names cut short may be the same: the second becomes `NAME #2`."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return result


def _ms(time_ns: int) -> str:
    return f"{time_ns / 1e6:,.3f}"


def _pct(share: float) -> str:
    return f"{share:.1f}"


def _wrap(lines: list[str]) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _FOOTER_WIDTH))


def _printable(text: str) -> str:
    """A trace's own text must neither break the table nor steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _write(text: str) -> None:
    """To stdout, whatever characters it can take."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
