"""Kernels, launching ops and idle time of traces: against a slow reckoning of the same, and for hostile events."""

import csv
import gzip
import io
import itertools
import json
import math
import random
import runpy
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.analyze import trace_kernels
from tunescope.analyze.timelines import innermost, span_and_busy
from tunescope.analyze.trace_kernels import TraceTables, time_ns, trace_tables
from tunescope.errors import UserError
from tunescope.report.trace_kernels import CSV_COLUMNS, kernels_text, print_kernels, short_name

FIXTURES = Path(__file__).parent / "fixtures" / "traces"
GPU_TRACES = ("cuda.json.gz", "rocm.json.gz", "pytorch18.json")
KINDS = {
    "kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset",
    "Kernel": "kernel", "Memcpy": "memcpy", "Memset": "memset",
}  # fmt: skip

Event = dict[str, Any]


def events_of(path: Path) -> list[Event]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return json.loads(text, parse_float=Decimal)["traceEvents"]


def write(folder: Path, events: list[Any], name: str = "trace.json", **more: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"schemaVersion": 1, **more, "traceEvents": events}))
    return path


def kernel(start_us: Any = 0, dur_us: Any = 1, *, name: Any = "gemm", stream: Any = 7, **more: Any) -> Event:
    args = {"device": 0, "stream": stream, **more.pop("args", {})}
    event = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start_us, "dur": dur_us}
    return {**event, "args": args, **more}


def op(start_us: Any, dur_us: Any, name: str, external: Any = None, tid: Any = 1) -> Event:
    args = {} if external is None else {"External id": external}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": tid, "ts": start_us, "dur": dur_us, "args": args}


def call(start_us: Any, correlation: Any, name: str = "cudaLaunchKernel", tid: Any = 1, **args: Any) -> Event:
    args = {"correlation": correlation, **args}
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": name,
        "pid": 1,
        "tid": tid,
        "ts": start_us,
        "dur": 1,
        "args": args,
    }


def ops_of(tables: TraceTables) -> dict[str, tuple[int, int]]:
    return {row.op: (row.launches, row.total_ns) for row in tables.ops.itertuples()}


def ns(us: Any) -> int:
    exact = Decimal(us) * 1000
    assert exact == int(exact)
    return int(exact)


def covered(intervals: list[tuple[int, int]]) -> int:
    total, reached = 0, -math.inf
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached)) if reached > -math.inf else end - start
        reached = max(reached, end)
    return total


# --- whole traces ---


def test_the_made_fixtures_are_what_their_script_makes() -> None:
    make = runpy.run_path(str(FIXTURES / "make.py"))
    for name, text in (
        ("cuda.json.gz", make["gpu_trace"](rocm=False, num_layers=16, with_stack=True)),
        ("rocm.json.gz", make["gpu_trace"](rocm=True, num_layers=3, with_stack=False)),
    ):
        assert gzip.decompress((FIXTURES / name).read_bytes()).decode() == text
    assert (FIXTURES / "pytorch18.json").read_text() == make["pytorch18_trace"]()


@pytest.mark.parametrize("name", GPU_TRACES)
def test_kernels_of_a_trace_are_the_sums_of_its_events(name: str) -> None:
    found: dict[tuple[str, str, str], list[int]] = {}
    for event in events_of(FIXTURES / name):
        if event["ph"] == "X" and event["cat"] in KINDS:
            key = (event["name"], KINDS[event["cat"]], str(event["args"]["device"]))
            found.setdefault(key, []).append(ns(event["dur"]))
    tables = trace_tables(FIXTURES / name)
    rows = {(row.name, row.category, row.device): row for row in tables.kernels.itertuples(index=False)}
    assert rows.keys() == found.keys()
    for key, durations in found.items():
        row = rows[key]
        assert (row.launches, row.total_ns) == (len(durations), sum(durations))
        assert (row.min_ns, row.max_ns) == (min(durations), max(durations))
        assert row.mean_ns == pytest.approx(sum(durations) / len(durations))
    every = list(itertools.chain(*found.values()))
    assert tables.num_gpu_events == len(every)
    assert tables.ops["total_ns"].sum() == tables.kernels["total_ns"].sum() == sum(every)
    assert tables.kernels["share_pct"].sum() == pytest.approx(100)
    assert list(tables.kernels["total_ns"]) == sorted(tables.kernels["total_ns"], reverse=True)
    assert tables.is_whole


@pytest.mark.parametrize("name", GPU_TRACES)
def test_busy_and_idle_of_a_trace(name: str) -> None:
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for event in events_of(FIXTURES / name):
        if event["ph"] == "X" and event["cat"] in KINDS:
            interval = (ns(event["ts"]), ns(event["ts"]) + ns(event["dur"]))
            for stream in (str(event["args"]["stream"]), "all"):
                places.setdefault((str(event["args"]["device"]), stream), []).append(interval)
    rows = {(row.device, row.stream): row for row in trace_tables(FIXTURES / name).streams.itertuples(index=False)}
    assert rows.keys() == places.keys()
    for key, intervals in places.items():
        row = rows[key]
        span = max(end for _, end in intervals) - min(start for start, _ in intervals)
        assert (row.events, row.span_ns, row.busy_ns) == (len(intervals), span, covered(intervals))
        assert (row.idle_ns, row.sum_ns) == (span - covered(intervals), sum(end - start for start, end in intervals))
        assert row.overlap_ns == row.sum_ns - row.busy_ns
        assert row.idle_pct == pytest.approx(100 * row.idle_ns / span)


def test_ops_of_a_cuda_trace() -> None:
    tables = trace_tables(FIXTURES / "cuda.json.gz")
    launches = {name: count for name, (count, _) in ops_of(tables).items()}
    assert launches == {
        "aten::mm": 48, "aten::add": 32, "(no op) cudaGraphLaunch": 10, "aten::copy_": 1,
        **dict.fromkeys(("aten::_softmax", "aten::topk", "aten::mul", "aten::cat", "aten::fill_"), 16),
    }  # fmt: skip
    assert set(tables.streams["device_name"]) == {"NVIDIA H200"}
    assert list(tables.streams["stream"]) == ["all", "7", "20"]


def test_ops_of_a_rocm_trace_come_through_the_hip_calls() -> None:
    kernels = [event for event in events_of(FIXTURES / "rocm.json.gz") if event.get("cat") == "kernel"]
    assert {"External id" in event["args"] for event in kernels} == {True, False}
    launches = {name: count for name, (count, _) in ops_of(trace_tables(FIXTURES / "rocm.json.gz")).items()}
    assert launches == {
        "aten::mm": 9, "aten::add": 6, "(no op) hipGraphLaunch": 10, "aten::copy_": 1,
        **dict.fromkeys(("aten::_softmax", "aten::topk", "aten::mul", "aten::cat", "aten::fill_"), 3),
    }  # fmt: skip


def test_ops_of_pytorch_18() -> None:
    found = ops_of(trace_tables(FIXTURES / "pytorch18.json"))
    assert found == {"aten::mm": (2, 60_000), "aten::zero_": (1, 30_000), "aten::to": (1, 10_000)}


def test_a_recorded_cpu_trace() -> None:
    tables = trace_tables(FIXTURES / "cpu.json.gz")
    ops = [event for event in events_of(FIXTURES / "cpu.json.gz") if event.get("cat") == "cpu_op"]
    assert tables.num_cpu_ops == len(ops) == tables.cpu_ops["calls"].sum()
    assert tables.cpu_ops["total_ns"].sum() == sum(ns(event["dur"]) for event in ops)
    # Ops of a thread nest, so their self times fill what the ops cover.
    by_thread: dict[Any, list[tuple[int, int]]] = {}
    for event in ops:
        by_thread.setdefault(event["tid"], []).append((ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])))
    assert tables.cpu_ops["self_ns"].sum() == sum(map(covered, by_thread.values()))
    linear = tables.cpu_ops.set_index("op").loc["aten::linear"]
    assert 0 < linear["self_ns"] < linear["total_ns"]
    assert tables.kernels.empty
    assert tables.streams.empty


# --- times ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (12, 12_000),
        (-3, -3_000),
        ("1712195495505543.223", 1_712_195_495_505_543_223),
        ("0.001", 1),
        ("-0.001", -1),
        ("4.93", 4_930),
        ("18.2", 18_200),
        ("1e3", 1_000_000),
        ("1.5E-3", 2),
        ("2.5E-3", 2),
        ("0.0015", 2),
        ("0.00149", 1),
        ("1e-400", 0),
        ("1e-999999999", 0),
        ("1748.1234567", 1_748_123),
        ("12", 12_000),
    ],
)
def test_time_ns(value: Any, expected: int) -> None:
    assert time_ns(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        math.nan,
        math.inf,
        1.5,
        [],
        {},
        "",
        "x",
        "1e99",
        "1e999999999",
        "NaN",
        "-Infinity",
        "9" * 5000,
        "x.123",
    ],
)
def test_what_is_no_time(value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        time_ns(value)


@given(st.integers(-(2**60), 2**60))
def test_a_time_with_three_decimals_is_exact(value: int) -> None:
    sign = "-" if value < 0 else ""
    assert time_ns(f"{sign}{abs(value) // 1000}.{abs(value) % 1000:03}") == value


def test_a_unix_time_keeps_its_nanoseconds(tmp_path: Path) -> None:
    """As floats these two would start at the same time: a float of 1.7e15 has steps of a quarter."""
    path = tmp_path / "trace.json"
    event = '{"ph": "X", "cat": "kernel", "name": "k", "ts": 1712195495505543.%s, "dur": 0.100}'
    path.write_text(f"[{event % '001'}, {event % '099'}]")
    (row, _) = trace_tables(path).streams.to_dict("records")
    assert (row["span_ns"], row["busy_ns"], row["overlap_ns"]) == (198, 198, 2)


# --- unions ---

INTERVALS = st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 30)), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(intervals=INTERVALS, seed=st.integers(0, 99))
def test_union_of_intervals(intervals: list[tuple[int, int]], seed: int) -> None:
    start, length = (np.array(column, np.int64) for column in zip(*intervals, strict=True))
    span_ns, busy_ns = span_and_busy(start, start + length)
    points = {at for begin, size in intervals for at in range(begin, begin + size)}
    assert busy_ns == len(points)
    assert span_ns == max(begin + size for begin, size in intervals) - min(begin for begin, _ in intervals)
    assert busy_ns <= min(span_ns, int(length.sum()))
    order = np.array(random.Random(seed).sample(range(len(start)), len(start)))
    assert span_and_busy(start[order], (start + length)[order]) == (span_ns, busy_ns)


def test_no_interval() -> None:
    assert span_and_busy(np.empty(0, np.int64), np.empty(0, np.int64)) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(intervals=INTERVALS, threads=st.integers(1, 3))
def test_innermost(intervals: list[tuple[int, int]], threads: int) -> None:
    start, length = (np.array(column, np.int64) for column in zip(*intervals, strict=True))
    end, thread = start + length, np.arange(len(start)) % threads
    parent = innermost(start, end, thread)
    for row, above in enumerate(parent):
        around = [
            other
            for other in range(len(start))
            if thread[other] == thread[row] and start[other] <= start[row] < end[other] and other != row
            if (start[other], -end[other], other) < (start[row], -end[row], row)
        ]
        if not around:
            assert above == -1
        else:
            # Of those around it, the last to begin.
            assert above == max(around, key=lambda other: (start[other], -end[other], other))


# --- generated traces ---

GPU_EVENTS = st.builds(
    kernel,
    st.integers(0, 200).map(lambda value: value / 4),
    st.integers(0, 80).map(lambda value: value / 4),
    name=st.sampled_from("abc"),
    stream=st.sampled_from([7, 20, "7", "side"]),
    cat=st.sampled_from(list(KINDS)),
    args=st.fixed_dictionaries(
        {"device": st.sampled_from([0, 1])},
        optional={"External id": st.integers(0, 9), "correlation": st.integers(0, 9)},
    ),
)
OTHER_EVENTS = st.one_of(
    st.builds(op, st.integers(0, 40), st.integers(0, 30), st.sampled_from("xyz"), st.integers(0, 9)),
    st.builds(call, st.integers(0, 40), st.integers(0, 9)),
)


@settings(max_examples=100, deadline=None)
@given(gpu=st.lists(GPU_EVENTS, min_size=1, max_size=25), other=st.lists(OTHER_EVENTS, max_size=15), data=st.data())
def test_nothing_is_lost_in_any_trace(gpu: list[Event], other: list[Event], data: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("t")
    tables = trace_tables(write(folder, gpu + other))
    total_ns = sum(ns(Decimal(event["dur"])) for event in gpu)
    assert tables.kernels["total_ns"].sum() == tables.ops["total_ns"].sum() == total_ns
    assert tables.kernels["launches"].sum() == tables.ops["launches"].sum() == len(gpu)
    whole = tables.streams[tables.streams["stream"] == "all"]
    parts = tables.streams[tables.streams["stream"] != "all"]
    assert whole["sum_ns"].sum() == parts["sum_ns"].sum() == total_ns
    assert (tables.streams["busy_ns"] <= tables.streams[["span_ns", "sum_ns"]].min(axis=1)).all()
    assert (whole["busy_ns"].to_numpy() <= parts.groupby("device")["busy_ns"].sum().to_numpy()).all()
    assert tables.is_whole
    # GPU events in any order, before or after what launched them: the same tables.
    mixed = data.draw(st.permutations(gpu))
    again = trace_tables(write(folder, [*other[:5], *mixed, *other[5:]]))
    for name in ("kernels", "ops", "streams"):
        assert getattr(again, name).equals(getattr(tables, name)), name


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = ("ph", "cat", "name", "pid", "tid", "ts", "dur", "args")
ARGS = ("External id", "external id", "correlation", "device", "stream")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_wrong_types_anywhere(data: Any, tmp_path_factory: Any) -> None:
    events = [op(0, 10, "aten::mm", 1), call(1, 5), kernel(2, 3, args={"correlation": 5, "External id": 1})]
    for event in events:
        for field in data.draw(st.sets(st.sampled_from(FIELDS), max_size=2)):
            event[field] = data.draw(ANYTHING)
        if isinstance(event["args"], dict):
            for key in data.draw(st.sets(st.sampled_from(ARGS), max_size=2)):
                event["args"][key] = data.draw(ANYTHING)
        if data.draw(st.booleans()):
            del event[data.draw(st.sampled_from(FIELDS))]
    good = kernel(20, 4, name="good")
    tables = trace_tables(write(tmp_path_factory.mktemp("t"), [*events, data.draw(ANYTHING), good]))
    assert 1 <= tables.num_gpu_events <= 3
    assert "good" in set(tables.kernels["name"])
    assert tables.kernels["total_ns"].sum() == tables.ops["total_ns"].sum()
    kernels_text(tables, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (kernel(0, -1), "of negative duration"),
        (kernel(0, None), "without a usable time"),
        (kernel(math.nan, 1), "without a usable time"),
        (kernel(0, math.inf), "without a usable time"),
        (kernel(10**30, 1), "with a time out of range"),
        (kernel(0, 10**15), "with a time out of range"),
        (kernel(0, "x"), "without a usable time"),
        (kernel(json.loads("[" * 900 + "]" * 900), 1), "without a usable time"),
        (kernel(name=None), "without a name"),
        (kernel(name=["x"]), "without a name"),
        (kernel(cat=["kernel"]), "of no usable category or phase"),
        (kernel(ph=None), "of no usable category or phase"),
        ("kernel", "not an object"),
        (None, "not an object"),
        ([kernel()], "not an object"),
        (kernel(args={"device": [1]}), "of an unusable device, stream or thread"),
    ],
)
def test_what_is_skipped_is_counted(bad: Any, reason: str, tmp_path: Path) -> None:
    tables = trace_tables(write(tmp_path, [kernel(), bad, kernel()]))
    assert tables.skipped == {reason: 1}
    assert (tables.num_gpu_events, tables.num_events, tables.is_whole) == (2, 3, False)


def test_events_that_never_count(tmp_path: Path) -> None:
    other = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "pid": 0, "tid": 7, "ts": 0, "dur": 99},
        {"ph": "X", "cat": "python_function", "name": "f", "ts": None},
        {"name": "flow", "cat": "ac2g", "ph": "s", "ts": 0, "id": 1},
        kernel(ph="B"),
    ]
    tables = trace_tables(write(tmp_path, [*other, kernel(0, 5)]))
    assert (tables.num_gpu_events, tables.num_events, tables.skipped) == (1, 7, {})


def test_durations_past_64_bits_add_up_exactly(tmp_path: Path) -> None:
    longest_us = 2**53 // 1000
    tables = trace_tables(
        write(tmp_path, [kernel(0, longest_us), *[kernel(number, longest_us) for number in range(1100)]])
    )
    assert tables.kernels["total_ns"].iat[0] == 1101 * longest_us * 1000 > 2**63
    assert tables.streams["sum_ns"].iat[0] == 1101 * longest_us * 1000
    assert tables.ops["total_ns"].iat[0] == 1101 * longest_us * 1000


# --- which op launched a kernel ---


def test_correlation_stands_in_for_a_missing_external_id(tmp_path: Path) -> None:
    events = [
        op(0, 10, "by id", 1),
        op(20, 10, "by call", 2),
        op(40, 10, "by time", 3),
        op(42, 5, "inner", 4),
        call(21, 102, **{"External id": 2}),
        call(43, 103),
        call(48, 104),
        call(60, 105, "hipGraphLaunch"),
        kernel(1, 1, args={"External id": 1}),
        kernel(2, 2, args={"External id": "0", "correlation": 102}),
        kernel(3, 4, args={"correlation": 103}),
        kernel(3, 5, args={"correlation": 104}),
        kernel(4, 8, args={"correlation": 105}),
        kernel(4, 9, args={"correlation": 105}),
        kernel(5, 16, args={"correlation": 999}),
        kernel(6, 32, args={"External id": 77}),
        kernel(6, 64, args={"external id": "1"}),
    ]
    assert ops_of(trace_tables(write(tmp_path, events))) == {
        "by id": (2, 65_000),
        "by call": (1, 2_000),
        "inner": (1, 4_000),
        "by time": (1, 5_000),
        "(no op) hipGraphLaunch": (2, 17_000),
        "(no op)": (2, 48_000),
    }


def test_a_correlation_in_place_of_an_external_id_links_to_no_stranger(tmp_path: Path) -> None:
    """As Kineto of 2022 and 2023 wrote them: see _by_external_id."""
    events = [
        op(0, 10, "stranger", 15),
        op(20, 10, "real", 16),
        call(21, 15, **{"External id": 15}),
        kernel(30, 1, args={"External id": 15, "correlation": 15}),
        # The same ids, and rightly so.
        op(40, 10, "same", 17),
        call(41, 17, **{"External id": 17}),
        kernel(50, 1, args={"External id": 17, "correlation": 17}),
    ]
    assert ops_of(trace_tables(write(tmp_path, events))) == {"real": (1, 1_000), "same": (1, 1_000)}


def test_an_op_of_another_thread_launched_nothing_here(tmp_path: Path) -> None:
    events = [op(0, 10, "other thread", 1, tid=2), call(5, 9, tid=1), kernel(6, 1, args={"correlation": 9})]
    assert ops_of(trace_tables(write(tmp_path, events))) == {"(no op) cudaLaunchKernel": (1, 1_000)}


def test_duplicate_ids_lose_nothing(tmp_path: Path) -> None:
    events = [op(0, 10, "first", 1), op(0, 10, "second", 1), call(1, 5), call(2, 5), call(3, 5)]
    events += [kernel(at, 1, args={"External id": 1, "correlation": 5}) for at in range(4)]
    assert ops_of(trace_tables(write(tmp_path, events))) == {"first": (4, 4_000)}


def test_self_time_of_nested_ops(tmp_path: Path) -> None:
    events = [
        op(0, 100, "outer"),
        op(10, 30, "middle"),
        op(20, 10, "inner"),
        op(50, 20, "middle"),
        op(100, 5, "next"),
        op(0, 50, "outer", tid=2),
        op(40, 30, "sticks out", tid=2),
    ]
    rows = {
        row.op: (row.calls, row.self_ns, row.total_ns)
        for row in trace_tables(write(tmp_path, events)).cpu_ops.itertuples()
    }
    assert rows == {
        "outer": (2, 90_000, 150_000),
        "middle": (2, 40_000, 50_000),
        "inner": (1, 10_000, 10_000),
        "next": (1, 5_000, 5_000),
        "sticks out": (1, 30_000, 30_000),
    }


# --- bounds ---


def test_names_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, other = "x" * 10**6, "x" * 10**6 + "y"
    tables = trace_tables(write(tmp_path, [kernel(name=long), kernel(name=long), kernel(name=other)]))
    assert list(tables.kernels["launches"]) == [2, 1]
    assert tables.kernels["name"].str.len().max() < 21_000
    streams = ["s" * 10**6, "s" * 10**6, "t" * 10**6]
    tables = trace_tables(write(tmp_path, [kernel(stream=stream) for stream in streams]))
    assert list(tables.streams["events"]) == [3, 2, 1]
    assert tables.streams["stream"].str.len().max() == 40
    monkeypatch.setattr(trace_kernels, "MAX_NAMES_CHARS", 100)
    tables = trace_tables(write(tmp_path, [kernel(name=f"name {number:09}") for number in range(50)]))
    assert tables.kernels["launches"].sum() == 50
    assert "(other names)" in set(tables.kernels["name"])
    assert "names are longer than" in str(tables.problem)


def test_a_trace_with_nothing_to_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no GPU event and no CPU op"):
        trace_tables(write(tmp_path, [{"ph": "M", "name": "process_name"}]))
    with pytest.raises(UserError, match="1 of negative duration"):
        trace_tables(write(tmp_path, [kernel(0, -5)]))
    path = write(tmp_path, [call(0, 1), kernel()])
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match="reading ended early: the file ends before its JSON does"):
        trace_tables(path)


# --- printing ---


def printed(path: Path, capsys: pytest.CaptureFixture[str], format: str = "text", limit: int | None = None) -> str:
    assert print_kernels(path, format, limit)
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_text_adds_up(limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(FIXTURES / "cuda.json.gz", capsys, limit=limit)
    title, kernels, ops, streams, footer = text.strip().split("\n\n")
    assert title.startswith("GPU time of ")
    assert "NVIDIA H200; 171 GPU events, 275 CPU ops, 1,362 events" in title
    for block in (kernels, ops):
        lines = block.splitlines()[2:]
        assert len(lines) == min(limit, 8 if block is kernels else 9) + 1 + (limit < 8)
        # Counted from the right: launches, total ms, share and three times stand last.
        shown = [(int(cells[-6]), float(cells[-5])) for cells in map(str.split, lines)]
        assert sum(count for count, _ in shown[:-1]) == shown[-1][0] == 171
        assert sum(ms for _, ms in shown[:-1]) == pytest.approx(shown[-1][1], abs=0.0005 * len(shown))
    assert "idle %" in streams
    assert "(no op)" in footer
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize("name", [*GPU_TRACES, "cpu.json.gz"])
def test_csv_and_json_say_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    in_json = json.loads(printed(FIXTURES / name, capsys, "json"))
    assert (in_json["is_partial"], in_json["problem"], in_json["skipped_events"]) == (False, None, {})
    reader = csv.DictReader(io.StringIO(printed(FIXTURES / name, capsys, "csv")))
    assert tuple(reader.fieldnames or ()) == CSV_COLUMNS
    rows = list(reader)
    renamed = {"op": "name", "launches": "count", "events": "count", "calls": "count", "sum_ns": "total_ns"}
    for table in ("kernels", "ops", "streams", "cpu_ops"):
        of_table = [row for row in rows if row["table"] == table]
        assert len(of_table) == len(in_json[table])
        for in_csv, row in zip(of_table, in_json[table], strict=True):
            assert in_csv["is_partial"] == "False"
            for key, value in row.items():
                assert in_csv[renamed.get(key, key)] == ("" if value is None else str(value))


def test_a_limit_keeps_the_sums_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    every = json.loads(printed(FIXTURES / "cuda.json.gz", capsys, "json"))
    few = json.loads(printed(FIXTURES / "cuda.json.gz", capsys, "json", 2))
    for table in ("kernels", "ops"):
        assert len(few[table]) == 3 < len(every[table])
        for column in ("launches", "total_ns"):
            assert sum(row[column] for row in few[table]) == sum(row[column] for row in every[table])


def test_a_cpu_trace_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(FIXTURES / "cpu.json.gz", capsys, limit=5)
    assert "(it holds no GPU event)" in text
    assert "aten::addmm" in text
    assert "ProfilerActivity.CUDA" in text
    assert "kernel " not in text


def test_a_cut_trace_is_a_marked_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (FIXTURES / "cuda.json.gz").read_bytes()
    for size in range(200, len(data), 977):
        path = tmp_path / "cut.json.gz"
        path.write_bytes(data[:size])
        for format in ("text", "csv", "json"):
            try:
                assert not print_kernels(path, format, None)
            except UserError:
                assert size < 3000
                continue
            output = capsys.readouterr()
            assert "its gzip data is cut off" in output.err
            assert len(output.err.splitlines()) == 1
            if format == "text":
                assert output.out.startswith("PARTIAL: its gzip data is cut off")
            elif format == "csv":
                assert {row["is_partial"] for row in csv.DictReader(io.StringIO(output.out))} == {"True"}
            else:
                assert json.loads(output.out)["is_partial"]


def test_skipped_events_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [kernel(), kernel(0, -1), kernel(0, -1), kernel(name=3), kernel()])
    path.write_text(path.read_text().replace('[{"ph"', '[{"ph" 1}, {"ph"', 1))
    assert not print_kernels(path, "text", None)
    output = capsys.readouterr()
    reason = "4 events skipped (1 not decodable, 2 of negative duration, 1 without a name)"
    assert output.out.startswith(f"PARTIAL: {reason}. What could be read:")
    assert output.err == f"tunescope: {path}: {reason}\n"


def test_hostile_names_neither_break_the_table_nor_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["\x1b[2J", "a\nb\r\tc", "\ud800", "é" * 200, "n" * 10**6, "", "ab\u202ecd", "total", "(2 more)"]
    events = [kernel(name=name, stream=f"s\x1b{name[:9]}", args={"device": "\x1b"}) for name in names]
    path = write(tmp_path, [*events, op(0, 1, "\x1b]0;x\x07", 3)], deviceProperties=[{"id": "\x1b", "name": "\x1b"}, 7])
    text = printed(path, capsys)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert max(map(len, text.splitlines())) < 160
    assert len(json.loads(printed(path, capsys, "json"))["kernels"]) == len(names)
    assert len([row for row in csv.reader(io.StringIO(printed(path, capsys, "csv"))) if row[0] == "kernels"]) == len(
        names
    )


def test_a_stdout_of_few_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert print_kernels(write(tmp_path, [kernel(name="größe")]), "text", None)
    stdout.flush()
    assert rb"gr\xf6\xdfe" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_many_streams_are_cut_in_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(write(tmp_path, [kernel(stream=number) for number in range(150)]), capsys)
    assert "(51 more; csv and json have them)" in text


def test_two_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = [{"id": 0, "name": "NVIDIA H200"}, {"id": 10, "name": "NVIDIA H200"}, {"id": 2, "name": "NVIDIA A40"}]
    events = [kernel(0, 2 + device, args={"device": device}) for device in (10, 0, 2)]
    text = printed(write(tmp_path, events, deviceProperties=gpus), capsys)
    assert "NVIDIA H200, NVIDIA A40; 3 GPU events" in text
    assert list(trace_tables(tmp_path / "trace.json").streams["device"]) == ["0", "0", "2", "2", "10", "10"]
    assert "device" in text.splitlines()[2]


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format"):
        print_kernels(FIXTURES / "cuda.json.gz", "xml", None)
    with pytest.raises(UserError, match="--limit"):
        print_kernels(FIXTURES / "cuda.json.gz", "text", 0)
    with pytest.raises(UserError, match="there is no file"):
        print_kernels(tmp_path / "missing", "text", None)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::(anonymous namespace)::k<4, f(int)>(int, f(int))", "k<4, f(int)>"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("ampere_sgemm_128x64_nn", "ampere_sgemm_128x64_nn"),
        ("(x)", "(x)"),
        (")", ")"),
        ("", ""),
        ("a" * 61, "a" * 57 + "..."),
        ("ncclDevKernel_AllReduce(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_AllReduce"),
    ],
)
def test_short_name(name: str, short: str) -> None:
    assert short_name(name) == short
