"""The trace reader: the same events as json.load gives, at any layout and block size, and no file that breaks it."""

import gzip
import json
import random
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.analyze import trace_json
from tunescope.analyze.trace_json import TraceReader
from tunescope.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures" / "traces"
TRACES = ("cuda.json.gz", "rocm.json.gz", "pytorch18.json", "cpu.json.gz")
WANTED = ("kernel", "cpu_op", "gpu_memcpy")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"indent": 0},
    {"indent": 1},
    {"indent": 4},
    {"separators": (",", ":")},
    {"separators": (" ,\n", "\t: ")},
)
KERNEL = {
    "ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 12.345, "dur": 6.5,
    "args": {"External id": 3, "grid": [1, 2, 3]},
}  # fmt: skip


def plain(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def write(folder: Path, content: str | bytes, name: str = "trace.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def read(path: Path, **options: Any) -> tuple[list[Any], TraceReader]:
    reader = TraceReader(path, **options)
    return list(reader), reader


def expected(text: str) -> list[Any]:
    content = json.loads(text, parse_float=str)
    return content["traceEvents"] if isinstance(content, dict) else content


def is_wanted(event: Any) -> bool:
    return isinstance(event, dict) and event.get("ph") == "X" and event.get("cat") in WANTED


# --- the events of whole files ---


@pytest.mark.parametrize("name", TRACES)
def test_all_events_of_a_trace(name: str) -> None:
    events, reader = read(FIXTURES / name)
    assert events == expected(plain(FIXTURES / name))
    assert reader.num_events == len(events)
    assert (reader.problem, reader.num_undecodable) == (None, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_bare", [False, True])
def test_any_layout(layout: dict[str, Any], is_bare: bool, tmp_path: Path) -> None:
    every = expected(plain(FIXTURES / "rocm.json.gz"))
    text = json.dumps(every if is_bare else {"a": [{"b": 1}, {"c": "}"}], "traceEvents": every, "z": None}, **layout)
    events, reader = read(write(tmp_path, text))
    assert events == every
    assert (reader.num_events, reader.problem) == (len(every), None)


@pytest.mark.parametrize("block_bytes", [2, 7, 64, 1000])
def test_any_block_size(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_json, "BLOCK_BYTES", block_bytes)
    for name in ("rocm.json.gz", "pytorch18.json"):
        events, reader = read(FIXTURES / name)
        assert events == expected(plain(FIXTURES / name))
        assert reader.problem is None


def test_numbers_are_exact(tmp_path: Path) -> None:
    text = '[{"ts": 1712195495505543.223, "dur": 5, "big": 123456789012345678901234567890, "x": 1.50, "n": NaN}]'
    ((event,), _) = read(write(tmp_path, text))
    assert event["ts"] == "1712195495505543.223"
    assert (event["dur"], event["big"], event["x"]) == (5, 123456789012345678901234567890, "1.50")
    assert event["n"] != event["n"]


def test_gzip_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    assert read(write(tmp_path, gzip.compress(b"[1, 2]"), "trace.json"))[0] == [1, 2]
    assert read(write(tmp_path, b"[1, 2]", "trace.json.gz"))[0] == [1, 2]


@pytest.mark.parametrize("block_bytes", [2, 10, 128 * 1024])
def test_gzip_members_and_padding(block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_json, "BLOCK_BYTES", block_bytes)
    data = gzip.compress(b"[1, ") + b"\0" * 5 + gzip.compress(b"2]") + b"\0" * 300
    events, reader = read(write(tmp_path, data))
    assert events == [1, 2]
    assert reader.problem is None


def test_members_of_the_outer_object(tmp_path: Path) -> None:
    gpus = [{"id": 0, "name": "NVIDIA H200"}]
    for before, after in (({"deviceProperties": gpus}, {}), ({}, {"deviceProperties": gpus})):
        text = json.dumps({"x": {"deviceProperties": 1}, **before, "traceEvents": [KERNEL], **after}, indent=1)
        assert read(write(tmp_path, text))[1].members == {"deviceProperties": gpus}


def test_a_member_of_any_size_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_json, "MAX_EVENT_CHARS", 2000)
    monkeypatch.setattr(trace_json, "BLOCK_BYTES", 100)
    values = ['x\\"{' * 2000, [[[{"a": ["]}"] * 1000}]]], "1" * 5000, 7, None, {}, [], "", "\\" * 99]
    for value in values:
        text = json.dumps({"a": value, "deviceProperties": value, "traceEvents": [KERNEL]})
        events, reader = read(write(tmp_path, text))
        assert len(events) == 1, str(value)[:50]
        assert reader.problem is None
    assert reader.members == {"deviceProperties": "\\" * 99}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    event = json.dumps(KERNEL | {"name": "x" * 500})
    path = tmp_path / "trace.json"
    with path.open("w") as file:
        file.write("[")
        for _ in range(200):
            file.write((event + ",\n") * 200)
        file.write(event + "]")
    tracemalloc.start()
    try:
        num_events = sum(len(batch) for batch in TraceReader(path).batches())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_events == 40_001
    assert path.stat().st_size > 25e6
    assert peak_bytes < 4e6


# --- text made to mislead ---

TRICKY = st.sampled_from(
    ['}, {"ph": "X"', "},{", '{"', '"', "\\", '\\"', "}", "{", "]", "[", '"args": {', "é\u2028\U0001f600", ",", "a"]
)
STRINGS = st.lists(TRICKY, max_size=4).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)
EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "ph": st.sampled_from("XXXfsM"),
        "cat": st.sampled_from([*WANTED, "Kernel", "python_function", "ac2g"]),
        "name": STRINGS,
        "ts": st.integers(0, 10**6),
        "args": st.dictionaries(STRINGS, VALUES, max_size=3) | VALUES,
        "more": VALUES,
    },
)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(EVENTS | VALUES, min_size=1, max_size=8),
    layout=st.sampled_from(LAYOUTS),
    ascii_only=st.booleans(),
    block_bytes=st.sampled_from([2, 13, 200, 10**5]),
)
def test_misleading_text(
    events: list[Any], layout: dict[str, Any], ascii_only: bool, block_bytes: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("t") / "trace.json"
    document = {"m": events, "traceEvents": events, "deviceProperties": events}
    path.write_text(json.dumps(document, ensure_ascii=ascii_only, **layout), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_json, "BLOCK_BYTES", block_bytes)
        found, reader = read(path)
    assert found == events
    assert (reader.num_events, reader.num_undecodable, reader.problem) == (len(events), 0, None)


# --- damage ---


def read_damaged(path: Path, **options: Any) -> tuple[list[Any], TraceReader | None]:
    """What could be read of a file that may be anything: no error but UserError may come."""
    try:
        return read(path, **options)
    except UserError:
        return [], None


@pytest.mark.parametrize("compress", [False, True])
def test_cut_at_every_byte(compress: bool, tmp_path: Path) -> None:
    events = [KERNEL | {"ts": number, "name": "é}, {" * number} for number in range(6)]
    text = json.dumps({"traceEvents": events, "deviceProperties": [{"id": 0}]}, ensure_ascii=False).encode()
    data = gzip.compress(text) if compress else text
    numbers = []
    for size in range(len(data)):
        found, reader = read_damaged(write(tmp_path, data[:size]))
        assert [event["ts"] for event in found] == list(range(len(found)))
        assert reader is None or reader.problem is not None
        numbers.append(len(found))
    assert numbers == sorted(numbers)
    assert numbers[-1] == 6


def test_any_byte_changed(tmp_path: Path) -> None:
    text = json.dumps({"deviceProperties": [{"id": 0}], "traceEvents": [KERNEL] * 3, "end": "x"}).encode()
    for at in range(len(text)):
        for byte in b'"{}[],:\\\0\xff9a':
            path = write(tmp_path, text[:at] + bytes([byte]) + text[at + 1 :])
            found, reader = read_damaged(path)
            if reader is not None and reader.problem is None and reader.num_undecodable == 0:
                assert reader.num_events in (3, 4)  # a comma that became a number is a number
            assert len(list(filter(is_wanted, found))) <= 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_of_a_real_trace_changed(data: st.DataObject, tmp_path_factory: Any) -> None:
    content = bytearray((FIXTURES / data.draw(st.sampled_from(TRACES))).read_bytes())
    if data.draw(st.booleans()) and content[:2] == b"\x1f\x8b":
        content = bytearray(gzip.decompress(content))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "drop", "double", "insert"]))
        if kind == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at + 1 :]
        elif kind == "drop":
            del content[at : at + data.draw(st.integers(0, 3000))]
            content = content or bytearray(b" ")
        elif kind == "double":
            content[at:at] = content[at : at + data.draw(st.integers(0, 3000))]
        else:
            content[at:at] = data.draw(st.binary(max_size=20) | st.sampled_from([b"[" * 2000, b'{"a":' * 2000, b'"']))
    read_damaged(write(tmp_path_factory.mktemp("t"), bytes(content)))


@pytest.mark.parametrize(
    ("bad", "num_undecodable"),
    [
        ('{"ph": "X" "cat": "kernel"}', 1),
        ('{"ph": "X", "cat": "kernel", "args": {"a": 1e}}', 1),
        ("[" * 5000 + "]" * 5000, 1),
        ('{"a":' * 5000 + "1" + "}" * 5000, 1),
        ('{"ts": ' + "9" * 5000 + "}", 1),
        ('{"name": "bad \\q escape"}', 1),
        ('{"name": "tab\tand\nline"}', 0),
        ("{}", 0),
        ("nonsense", 1),
        ('{"name": "\\ud800"}', 0),
        ("-", 1),
        ("1,,,2", 0),
    ],
)
@pytest.mark.parametrize("block_bytes", [50, 128 * 1024])
def test_a_bad_event_costs_no_other(
    bad: str, num_undecodable: int, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_json, "BLOCK_BYTES", block_bytes)
    good = json.dumps(KERNEL)
    found, reader = read(write(tmp_path, f'{{"traceEvents": [{good}, {bad}, {good}, {good}]}}'))
    assert len(list(filter(is_wanted, found))) == 3
    assert (reader.num_undecodable, reader.problem) == (num_undecodable, None)


def test_a_bad_last_event_is_said(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": [KERNEL, KERNEL]}).removesuffix("}]}") + ' x}], "traceName": "a name"}'
    found, reader = read(write(tmp_path, text))
    assert len(found) == 1
    assert "breaks off near character" in str(reader.problem)


def test_an_event_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_json, "BLOCK_BYTES", 100)
    monkeypatch.setattr(trace_json, "MAX_EVENT_CHARS", 2000)
    for name, is_read in (("x" * 1500, True), ("x" * 10_000, False), ("\\" * 10_000, False)):
        found, reader = read(write(tmp_path, json.dumps([KERNEL, KERNEL | {"name": name}, KERNEL])))
        assert len(found) == 2 + is_read
        assert (reader.num_undecodable, reader.problem) == (1 - is_read, None)


def test_a_name_of_a_million_characters(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, json.dumps([KERNEL | {"name": "n" * 10**6}, KERNEL])))
    assert [len(event["name"]) for event in found] == [10**6, 4]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    found, reader = read(write(tmp_path, b'\xef\xbb\xbf[{"ph": "X", "cat": "kernel", "name": "\xff\xc3"}, {"a": 1}]'))
    assert [found[0]["name"], found[1]] == ["\ufffd\ufffd", {"a": 1}]
    assert reader.problem is None


@pytest.mark.parametrize("text", ["[1, 2]x", '{"traceEvents": [1, 2]} {}', "[1, 2], [3]"])
def test_something_after_the_end(text: str, tmp_path: Path) -> None:
    found, reader = read(write(tmp_path, text))
    assert found == [1, 2]
    assert reader.problem == "something follows the end of its JSON"


def test_damaged_gzip(tmp_path: Path) -> None:
    data = bytearray((FIXTURES / "cuda.json.gz").read_bytes())
    data[len(data) // 2] ^= 255
    found, reader = read_damaged(write(tmp_path, bytes(data)))
    assert found
    assert "gzip" in str(reader and reader.problem)
    data = bytearray(gzip.compress(json.dumps([KERNEL] * 5000).encode()))
    data[-8] ^= 1  # of the checksum, which is seen with the last block
    found, reader = read_damaged(write(tmp_path, bytes(data)))
    assert 3000 < len(found) < 5000
    assert "incorrect data check" in str(reader and reader.problem)
    found, reader = read_damaged(write(tmp_path, gzip.compress(b"[1]") + b"not gzip"))
    assert "gzip" in str(reader and reader.problem)


def bomb(head: bytes, num_bytes: int) -> bytes:
    deflater = zlib.compressobj(wbits=31)
    return b"".join([deflater.compress(head), deflater.compress(b" " * num_bytes), deflater.flush()])


def test_decompression_bomb(tmp_path: Path) -> None:
    path = write(tmp_path, bomb(json.dumps([KERNEL, KERNEL])[:-1].encode(), 80_000_000))
    found, reader = read(path)
    assert len(found) == 2
    assert "no trace shrinks so well" in str(reader.problem)
    assert reader.path.stat().st_size < 100_000
    with pytest.raises(UserError, match="no trace shrinks so well"):
        read(write(tmp_path, bomb(b"", 80_000_000)))


def test_the_limit_of_decompression_can_be_set(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps([KERNEL] * 5000).encode())
    found, reader = read(write(tmp_path, data), max_decompressed_bytes=200_000)
    assert 0 < len(found) < 5000
    assert "grew past the limit" in str(reader.problem)
    found, reader = read(write(tmp_path, data), max_decompressed_bytes=10**9)
    assert (len(found), reader.problem) == (5000, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n",
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        b"\0" * 1000,
        b"{}",
        b"[]",
        b"[",
        b'"text"',
        b"12",
        b"12.",
        b"null",
        b'{"traceEvents": []}',
        b'{"traceEvents": {}}',
        b'{"traceEvents": "x"}',
        b'{"traceEvents"',
        b'{"traceEvents" []}',
        b'{"a": [1, 2]}',
        b'{"a": "' + b"x" * 300_000,
        b"{1: 2}",
        b'{"a": 1]',
        b"{[]}",
        b'{"a": tru',
        b"\xff\xfe[\0]\0",
        b"\x1f\x8b",
        b"\x1f\x8b\x08\0garbage",
        gzip.compress(b"", mtime=0),
        gzip.compress(b"hello", mtime=0),
        gzip.compress(b"[1, 2]", mtime=0)[:11],
    ],
)
def test_what_is_no_trace(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trace\.json is (empty|no trace)"):
        read(write(tmp_path, content))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read(tmp_path / "missing.json")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="cannot be opened"):
        read(tmp_path / "a\0b")
    with pytest.raises(UserError, match="cannot be opened"):
        read(write(tmp_path, "[]") / "below")


def test_a_disk_that_fails_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file, self.num_reads = file, 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def read(self, size: int) -> bytes:
            self.num_reads += 1
            if self.num_reads == 3:
                raise OSError(5, "Input/output error")
            return self.file.read(size)

    path = write(tmp_path, json.dumps([KERNEL] * 5000))
    monkeypatch.setattr(Path, "open", lambda self, mode="r": Failing(real(self, mode)))
    found, reader = read(path)
    assert 0 < len(found) < 5000
    assert reader.problem == "the file cannot be read on: Input/output error"


def test_hostile_shapes_take_no_long_time(tmp_path: Path) -> None:
    random.seed(0)
    shapes = [
        "[" * 2_000_000,
        '{"a":' + "[]," * 1_000_000,
        "[" + '{"a" 1},' * 50_000,
        "[{}" + "} " * 1_000_000,
        '[{"a": "' + '\\"' * 1_000_000,
        '{"a": "' + '\\"' * 1_000_000,
        "[" + '"args"' * 500_000,
        '[{"ph": "f", ' + '"args": ' * 300_000 + '}, {"a": 1}, {"a": 2}]',
        "[1" + " " * 2_000_000,
        "[" + "1," * 500_000,
    ]
    for shape in shapes:
        read_damaged(write(tmp_path, shape))
