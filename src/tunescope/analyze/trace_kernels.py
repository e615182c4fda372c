"""Kernels, the CPU ops that launched them, and busy and idle time of each GPU, from a PyTorch profiler trace.

Times are whole nanoseconds and every sum of them is exact. Of each event a few numbers are kept, some 40 bytes, which
is a thirtieth of its text; names are kept once.
"""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tunescope.analyze.timelines import innermost, span_and_busy
from tunescope.analyze.trace_json import TraceReader
from tunescope.analyze.trace_launches import launching_ops
from tunescope.errors import UserError

# Event category, in lower case -> what it is here. Kineto names the categories of ROCm as those of CUDA; the short
# ones are of PyTorch 1.8, which wrote them with a capital.
GPU_KINDS = ("kernel", "memcpy", "memset")
_CPU_OP, _RUNTIME = len(GPU_KINDS), len(GPU_KINDS) + 1
CATEGORIES = {
    **{kind: number for number, kind in enumerate(GPU_KINDS)},
    "gpu_memcpy": GPU_KINDS.index("memcpy"),
    "gpu_memset": GPU_KINDS.index("memset"),
    **dict.fromkeys(("cpu_op", "operator"), _CPU_OP),
    **dict.fromkeys(("cuda_runtime", "cuda_driver", "hip_runtime", "hip_driver", "runtime"), _RUNTIME),
    **dict.fromkeys(("xpu_runtime", "xpu_driver", "privateuse1_runtime", "privateuse1_driver"), _RUNTIME),
}
NO_OP = "(no op)"
ALL_STREAMS = "all"

KERNEL_COLUMNS = (
    "name", "category", "device", "launches", "total_ns", "mean_ns", "min_ns", "max_ns", "share_pct",
)  # fmt: skip
OP_COLUMNS = ("op", "launches", "total_ns", "mean_ns", "min_ns", "max_ns", "share_pct")
STREAM_COLUMNS = (
    "device", "device_name", "stream", "events", "span_ns", "busy_ns", "idle_ns", "idle_pct", "sum_ns", "overlap_ns",
)  # fmt: skip
CPU_OP_COLUMNS = ("op", "calls", "self_ns", "mean_self_ns", "total_ns", "share_pct")

# Far outside any trace, and small enough that int64 holds a difference of two times.
MAX_TIME_NS = 2**61
MAX_DURATION_NS = 2**53
MAX_NAME_CHARS = 20_000  # C++ kernels reach some thousand
MAX_LABEL_CHARS = 40  # of a device, stream, process or thread
MAX_NAMES_CHARS = 64 * 1024**2  # of all names together
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class TraceTables:
    """What a trace holds. `cpu_ops` is empty unless there is no GPU event; then the other three tables are.

    kernels: one row for each name, category and device. ops: one for each CPU op that launched them, NO_OP where none
    did. streams: one for each stream and, with stream ALL_STREAMS, one for each device. Shares are of the sum of all
    GPU durations, or of all self times. `skipped`: events that should count and cannot, by reason. `problem`: why the
    reading ended before the file did, or None.
    """

    path: Path
    kernels: pd.DataFrame
    ops: pd.DataFrame
    streams: pd.DataFrame
    cpu_ops: pd.DataFrame
    num_events: int
    num_gpu_events: int
    num_cpu_ops: int
    skipped: dict[str, int]
    problem: str | None

    @property
    def is_whole(self) -> bool:
        return self.problem is None and not self.skipped


def trace_tables(path: Path, *, max_decompressed_bytes: int | None = None) -> TraceTables:
    """Reads a trace once, as a stream. Raises UserError for one that cannot be read or holds nothing to count.

    `max_decompressed_bytes` replaces the reader's own limits on what a gzip file may grow to.
    """
    reader = TraceReader(path, max_decompressed_bytes=max_decompressed_bytes)
    found = _collect(reader)
    if reader.num_undecodable:
        found.skipped["not decodable"] += reader.num_undecodable
    problem = reader.problem or found.names.problem
    if not found.gpu and not found.cpu_ops:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items())
        raise UserError(
            f"{path} holds no GPU event and no CPU op" + (f"; reading ended early: {problem}" if problem else ""),
            cause=f"{reader.num_events:,} events, of other kinds" + (f", or skipped: {skipped}" if skipped else ""),
            cure="record with torch.profiler, activities CPU and CUDA (CUDA also means ROCm)",
        )
    return TraceTables(
        path=path,
        kernels=_kernels(found),
        ops=_ops(found),
        streams=_streams(found, _device_names(reader.members.get("deviceProperties"))),
        cpu_ops=_cpu_ops(found) if not found.gpu else pd.DataFrame(columns=list(CPU_OP_COLUMNS)),
        num_events=reader.num_events,
        num_gpu_events=len(found.gpu),
        num_cpu_ops=len(found.cpu_ops),
        skipped=dict(sorted(found.skipped.items())),
        problem=problem,
    )


# --- collecting ---


class _Kinds(dict[str, int | None]):
    """Category as a trace spells it -> its value in CATEGORIES, None for one that does not count."""

    def __missing__(self, category: str) -> int | None:
        kind = CATEGORIES.get(category.lower())
        if len(self) < 1000:
            self[category] = kind
        return kind


class _Names(dict[str, int]):
    """Name -> its number, given at the first use. Bounded: a long name is cut, and past a total all are one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.problem: str | None = None
        self._num_chars = 0

    def __missing__(self, name: str) -> int:
        if type(name) is not str:
            raise TypeError("a name is text")
        text = name.encode("utf-8", "replace").decode()  # a lone surrogate cannot be printed
        if len(text) > MAX_NAME_CHARS:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            text = f"{text[:MAX_NAME_CHARS]}... ({len(text)} characters, sha256 {digest})"
        if text not in self:
            if self._num_chars + len(text) > MAX_NAMES_CHARS:
                self.problem = f"its names are longer than {MAX_NAMES_CHARS:,} characters together; the last are one"
                text = "(other names)"
            self._num_chars += len(text)
        number = self.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


class _Pairs(dict[tuple[Any, Any], int]):
    """(device, stream) or (process, thread) as a trace names them -> number; 7 and "7" are one."""

    def __init__(self) -> None:
        self.labels: list[tuple[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def __missing__(self, pair: tuple[Any, Any]) -> int:
        label = (_label(pair[0]), _label(pair[1]))
        number = self._numbers.setdefault(label, len(self.labels))
        if number == len(self.labels):
            self.labels.append(label)
        if not any(isinstance(part, str) and len(part) > MAX_LABEL_CHARS for part in pair):
            self[pair] = number
        return number


class _Rows:
    """Rows of 64-bit integers, in one growing array; `rows["column"]` is a view of a column."""

    def __init__(self, *columns: str) -> None:
        self._columns, self._values = columns, array("q")
        self.add = self._values.extend  # takes one whole row

    def __len__(self) -> int:
        return len(self._values) // len(self._columns)

    def __getitem__(self, column: str) -> np.ndarray:
        values = np.frombuffer(self._values, np.int64) if self._values else np.empty(0, np.int64)
        return values.reshape(-1, len(self._columns))[:, self._columns.index(column)]


class _Found:
    """The events that count. External ids and correlations are 0 where there is none."""

    def __init__(self) -> None:
        self.gpu = _Rows("start", "duration", "name", "kind", "place", "external", "correlation")
        self.cpu_ops = _Rows("start", "duration", "name", "thread", "external")
        self.launches = _Rows("start", "name", "thread", "external", "correlation")
        self.names, self.places, self.threads = _Names(), _Pairs(), _Pairs()
        self.skipped: Counter[str] = Counter()


def _collect(reader: TraceReader) -> _Found:
    found = _Found()
    kinds, names, places, threads = _Kinds(), found.names, found.places, found.threads
    add_gpu, add_op, add_launch = found.gpu.add, found.cpu_ops.add, found.launches.add
    for batch in reader.batches():
        for event in batch:
            try:
                kind = kinds[event["cat"]]
                if kind is None:
                    continue
                if (phase := event["ph"]) != "X":
                    if type(phase) is str:
                        continue
                    raise TypeError
                start, duration = time_ns(event["ts"]), time_ns(event["dur"])
                if not (0 <= duration <= MAX_DURATION_NS and -MAX_TIME_NS <= start <= MAX_TIME_NS):
                    raise ValueError
                name = names[event["name"]]
                args = event.get("args")
                if type(args) is not dict:
                    args = {}
                external = args.get("External id")
                if type(external) is not int or not 0 <= external <= _INT64_MAX:
                    external = _id(external if external is not None else args.get("external id"))
                if kind == _CPU_OP:
                    add_op((start, duration, name, threads[event.get("pid"), event.get("tid")], external))
                    continue
                correlation = args.get("correlation")
                if type(correlation) is not int or not 0 <= correlation <= _INT64_MAX:
                    correlation = _id(correlation)
                if kind == _RUNTIME:
                    if correlation:
                        thread = threads[event.get("pid"), event.get("tid")]
                        add_launch((start, name, thread, external, correlation))
                    continue
                place = places[args.get("device", event.get("pid")), args.get("stream", event.get("tid"))]
                add_gpu((start, duration, name, kind, place, external, correlation))
            except (LookupError, TypeError, ValueError, AttributeError):
                if reason := _why_skipped(event):
                    found.skipped[reason] += 1
    return found


def _why_skipped(event: Any) -> str:
    """In words; empty for an event that was never meant to count."""
    if not isinstance(event, dict):
        return "not an object"
    if "cat" not in event:
        return ""
    if not isinstance(event["cat"], str) or not isinstance(event.get("ph"), str):
        return "of no usable category or phase"
    if not isinstance(event.get("name"), str):
        return "without a name"
    try:
        start, duration = time_ns(event["ts"]), time_ns(event["dur"])
    except (KeyError, ValueError):
        return "without a usable time"
    if duration < 0:
        return "of negative duration"
    if duration > MAX_DURATION_NS or abs(start) > MAX_TIME_NS:
        return "with a time out of range"
    return "of an unusable device, stream or thread"


def time_ns(value: Any) -> int:
    """Microseconds, as an integer or as the text of a number, in whole nanoseconds (half to even). Or ValueError."""
    if type(value) is str:
        if value[-4:-3] == ".":
            return int(value[:-4] + value[-3:])
        try:
            number = Decimal(value)
        except InvalidOperation:
            raise ValueError("no number") from None
        if not number.is_finite() or number.adjusted() > 18:
            raise ValueError("no time")
        return int(number.scaleb(3).quantize(Decimal(1))) if number.adjusted() > -18 else 0
    if type(value) is int:
        return value * 1000
    raise ValueError("no number")


def _id(value: Any) -> int:
    """A positive id of 64 bits, also from its text; 0 for anything else."""
    if type(value) is str and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    return value if type(value) is int and 0 <= value <= _INT64_MAX else 0


def _label(value: Any) -> str:
    return (value if type(value) is str else str(int(value)) if isinstance(value, int) else "?")[:MAX_LABEL_CHARS]


# --- tables ---


def _kernels(found: _Found) -> pd.DataFrame:
    gpu = found.gpu
    devices = sorted({device for device, _ in found.places.labels}, key=_natural)
    number_of = {device: number for number, device in enumerate(devices)}
    device_of_place = np.array([number_of[device] for device, _ in found.places.labels], np.int64)
    key = (device_of_place[gpu["place"]] * len(GPU_KINDS) + gpu["kind"]) * len(found.names.texts) + gpu["name"]
    keys, stats = _durations_by(key, gpu["duration"])
    rest, names = np.divmod(keys, max(len(found.names.texts), 1))
    device, kind = np.divmod(rest, len(GPU_KINDS))
    table = pd.DataFrame(
        {
            "name": [found.names.texts[i] for i in names],
            "category": [GPU_KINDS[i] for i in kind],
            "device": [devices[i] for i in device],
            **stats,
        },
        columns=list(KERNEL_COLUMNS),
    )
    return _longest_first(table, "total_ns", ["name", "category", "device"])


def _ops(found: _Found) -> pd.DataFrame:
    op, launch = launching_ops(found.gpu, found.cpu_ops, found.launches)
    num_names = len(found.names.texts)
    # Key: number of the op's name; without an op, of the call that launched it, past all of those; or the last.
    key = np.full(len(op), 2 * num_names)
    key[launch >= 0] = num_names + found.launches["name"][launch[launch >= 0]]
    key[op >= 0] = found.cpu_ops["name"][op[op >= 0]]
    keys, stats = _durations_by(key, found.gpu["duration"])
    labels = [*found.names.texts, *(f"{NO_OP} {name}" for name in found.names.texts), NO_OP]
    table = pd.DataFrame({"op": [labels[i] for i in keys], **stats}, columns=list(OP_COLUMNS))
    return _longest_first(table, "total_ns", ["op"])


def _streams(found: _Found, device_names: dict[str, str]) -> pd.DataFrame:
    gpu, labels = found.gpu, found.places.labels
    order = np.argsort(gpu["place"], kind="stable")
    cuts = np.flatnonzero(np.diff(gpu["place"][order])) + 1
    by_place = {labels[gpu["place"][rows[0]]]: rows for rows in np.split(order, cuts) if len(rows)}
    by_device: dict[str, list[np.ndarray]] = {}
    for (device, _), rows in by_place.items():
        by_device.setdefault(device, []).append(rows)
    groups = {(device, ALL_STREAMS): np.concatenate(parts) for device, parts in by_device.items()} | by_place
    table = []
    for device, stream in sorted(groups, key=lambda at: (_natural(at[0]), at[1] != ALL_STREAMS, _natural(at[1]))):
        rows = groups[device, stream]
        start, duration = gpu["start"][rows], gpu["duration"][rows]
        span_ns, busy_ns, sum_ns = *span_and_busy(start, start + duration), exact_sum(duration)
        table.append(
            (
                *(device, device_names.get(device), stream, len(rows), span_ns, busy_ns, span_ns - busy_ns),
                *(100 * (span_ns - busy_ns) / span_ns if span_ns else 0.0, sum_ns, sum_ns - busy_ns),
            )
        )
    return pd.DataFrame(table, columns=list(STREAM_COLUMNS))


def _cpu_ops(found: _Found) -> pd.DataFrame:
    ops = found.cpu_ops
    start, duration = ops["start"], ops["duration"]
    parent = innermost(start, start + duration, ops["thread"])
    is_child = parent >= 0
    above = parent[is_child]
    inside = np.minimum((start + duration)[is_child], (start + duration)[above]) - start[is_child]
    self_ns = duration.copy()
    np.subtract.at(self_ns, above, inside)
    keys, stats = _durations_by(ops["name"], duration)
    _, of_self = _durations_by(ops["name"], self_ns)
    table = pd.DataFrame(
        {
            "op": [found.names.texts[i] for i in keys],
            "calls": stats["launches"],
            "self_ns": of_self["total_ns"],
            "mean_self_ns": of_self["mean_ns"],
            "total_ns": stats["total_ns"],
            "share_pct": of_self["share_pct"],
        },
        columns=list(CPU_OP_COLUMNS),
    )
    return _longest_first(table, "self_ns", ["op"])


def _durations_by(key: np.ndarray, duration: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The distinct keys and, for each, the columns about its durations."""
    keys, group = np.unique(key, return_inverse=True)
    total_ns = exact_sum(duration)
    # Only absurd durations add up to more than 292 years.
    totals = np.zeros(len(keys), np.int64 if total_ns <= _INT64_MAX else object)
    np.add.at(totals, group, duration.astype(totals.dtype))
    low, high = np.full(len(keys), _INT64_MAX), np.zeros(len(keys), np.int64)
    np.minimum.at(low, group, duration)
    np.maximum.at(high, group, duration)
    count = np.bincount(group, minlength=len(keys))
    return keys, {
        "launches": count,
        "total_ns": totals,
        "mean_ns": (totals / np.maximum(count, 1)).astype(float),
        "min_ns": low,
        "max_ns": high,
        "share_pct": (100 * (totals / total_ns)).astype(float) if total_ns else np.zeros(len(keys)),
    }


def exact_sum(values: np.ndarray) -> int:
    """The sum of integers that are not negative, of any size."""
    if not len(values) or int(values.max()) <= _INT64_MAX // len(values):
        return int(values.sum())
    return sum(values.tolist())


def _longest_first(table: pd.DataFrame, by: str, ties: list[str]) -> pd.DataFrame:
    return table.sort_values([by, *ties], ascending=[False] + [True] * len(ties), kind="stable", ignore_index=True)


def _natural(label: str) -> tuple[bool, int, str]:
    """Numbers in their order, then the rest."""
    is_number = label.isascii() and label.isdigit()
    return (not is_number, int(label) if is_number else 0, label)


def _device_names(properties: Any) -> dict[str, str]:
    known = [entry for entry in properties if isinstance(entry, dict)] if isinstance(properties, list) else []
    return {_label(entry.get("id")): entry["name"][:80] for entry in known if isinstance(entry.get("name"), str)}
