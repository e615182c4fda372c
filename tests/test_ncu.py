"""Nsight Compute from outside: how it is found and run, what becomes of a run that fails, and how reports are read."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import results
from tunescope.analyze.kernels import function_of, plain_kernel, without_numbers
from tunescope.analyze.ncu_file import ncu_groups
from tunescope.errors import UserError
from tunescope.gpus import Gpu
from tunescope.measure import ncu
from tunescope.measure.plan import Options, PointSpec, make_plan
from tunescope.ncu import reports
from tunescope.ncu.counters import COUNTERS_FILE, COUNTERS_SCHEMA, METRICS, NCU_LOG_FILE, in_column_unit
from tunescope.ncu.names import MAX_DEMANGLED_CHARS, demangled
from tunescope.ncu.ranges import place_of, range_name
from tunescope.ncu.settings import Settings

MAGIC = b"NVR\0"
GPU = mock.create_autospec(Gpu, instance=True)  # that there is one is all that is asked of it

# Stands in for ncu: does what MODE says, and writes what it was asked to where --export says.
FAKE = """#!{python}
import subprocess, sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 1)")
    sys.exit()
mode = "{mode}"
if mode == "forbidden":
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    sys.exit(1)
if mode == "crash":
    print("something went wrong")
    sys.exit(9)
if mode == "hang":
    open(sys.argv[-1] + "/began", "w").close()
    time.sleep(600)
if mode != "nothing":
    with open(arguments[arguments.index("--export") + 1] + ".ncu-rep", "wb") as file:
        file.write(b"NVR\\0")
"""


def fake_ncu(folder: Path, mode: str) -> Path:
    script = folder / "ncu"
    script.write_text(FAKE.format(python=sys.executable, mode=mode))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def spec(path: Path | None) -> PointSpec:
    ncu_settings = Settings(path=None if path is None else str(path))
    return make_plan(Options(kind="ncu", preset="tiny", points="random:sparse:bs=1:seq=8", ncu=ncu_settings)).specs[0]


def counted(tmp_path: Path, mode: str) -> tuple[dict[str, Any], Path]:
    work_dir = tmp_path / "point"
    work_dir.mkdir()
    outcome = ncu.with_counters(spec(fake_ncu(tmp_path, mode)), GPU, work_dir, {"status": "ok", "cause": None})
    assert results.read_json(work_dir / results.OUTCOME_FILE) == outcome
    return outcome, work_dir


def test_found_on_the_path_in_cuda_home_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert ncu.find_ncu() is None
    (tmp_path / "bin").mkdir()
    script = fake_ncu(tmp_path / "bin", "nothing")
    assert ncu.find_ncu(str(script)) == ncu.Ncu(str(script), "2025.3.1.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert ncu.find_ncu() == ncu.Ncu(f"{tmp_path}/bin/ncu", "2025.3.1.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ncu.find_ncu() == ncu.Ncu(str(script), "2025.3.1.0")
    assert ncu.find_ncu("/nonexistent/ncu") is None


def test_forbidden_counters_are_no_failure_and_have_a_cure(tmp_path: Path) -> None:
    outcome, work_dir = counted(tmp_path, "forbidden")
    assert outcome["status"] == "ok"
    assert "NVreg_RestrictProfilingToAdminUsers=0" in outcome["ncu_why_not"]
    assert "every user" in outcome["ncu_why_not"]
    assert not (work_dir / COUNTERS_FILE).exists()


@pytest.mark.parametrize(
    ("mode", "words"), [("crash", "something went wrong"), ("nothing", "exit code 0"), ("empty", "holds no kernel")]
)
def test_what_goes_wrong_under_ncu_fails_the_point_with_its_log(tmp_path: Path, mode: str, words: str) -> None:
    if mode == "empty":
        pytest.importorskip("ncu_report")
    outcome, work_dir = counted(tmp_path, mode)
    assert outcome["status"] == "failed"
    assert words in outcome["cause"]
    assert (work_dir / NCU_LOG_FILE).is_file()
    assert not (work_dir / COUNTERS_FILE).exists()
    assert not list(work_dir.glob("*.pickle"))


@pytest.mark.parametrize(("gpu", "words"), [(None, "there is no GPU"), (GPU, "not on the PATH")])
def test_without_a_gpu_or_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, words: str) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    outcome = ncu.with_counters(spec(None), gpu, tmp_path, {"status": "ok", "cause": None})
    assert outcome["status"] == "ok"
    assert words in outcome["ncu_why_not"]


def test_it_ends_with_the_launcher(tmp_path: Path) -> None:
    """A launcher that is killed takes ncu, and what ncu runs, with it."""
    script = fake_ncu(tmp_path, "hang")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunescope.measure import ncu\n"
        f"ncu._run([{str(script)!r}, '--export', 'x', '--', {str(tmp_path)!r}], Path({str(tmp_path / 'log')!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(ncu.__file__).parents[2])}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=environment)
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "began").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True, check=False).stdout.split()
    assert children
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


# --- reports ---


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04zip", b"NVR", os.urandom(1000).replace(b"NVR\0", b"")])
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.ncu-rep"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is empty|is no Nsight Compute report"):
        reports.read_report(file)
    with pytest.raises(UserError, match="cannot be read"):
        reports.read_report(tmp_path / "missing.ncu-rep")


@given(content=st.binary(max_size=400))
@settings(max_examples=8, deadline=None)
def test_damaged_reports_are_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    pytest.importorskip("ncu_report")
    file = tmp_path_factory.mktemp("damaged") / "x.ncu-rep"
    file.write_bytes(MAGIC + content)
    with pytest.raises(UserError):
        reports.read_report(file)


def test_a_reader_that_hangs_or_ends_badly_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.ncu-rep"
    file.write_bytes(MAGIC)
    monkeypatch.setattr(reports, "MAX_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"0\.5 s"):
        reports._run([sys.executable, "-c", "import time; time.sleep(60)"], file)
    with pytest.raises(UserError, match="signal 11"):
        reports._run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], file)
    monkeypatch.setattr(reports, "MAX_MEMORY_BYTES", 2**29)
    monkeypatch.setattr(reports, "MAX_SECONDS", 30)
    with pytest.raises(UserError, match="MemoryError"):
        reports._run([sys.executable, "-c", "x = bytearray(2**30)"], file)


def test_without_any_reader_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.ncu-rep"
    file.write_bytes(MAGIC)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        reports.read_report(file)
    assert "tunescope[ncu]" in error.value.cure


@pytest.mark.parametrize(
    ("column", "value", "unit", "expected"),
    [
        ("duration_ns", 3.0, "us", 3000.0), ("duration_ns", 3.0, "nsecond", 3.0), ("duration_ns", 2.0, "msecond", 2e6),
        ("dram_read_bytes", 2.5, "Mbyte", 2.5e6), ("dram_read_bytes", 7.0, "byte", 7.0),
        ("sm_clock_hz", 1.98, "Ghz", 1.98e9), ("sm_clock_hz", 1.98, "cycle/nsecond", 1.98e9),
        ("sm_clock_hz", 3.0, "cycle/second", 3.0), ("sm_clock_hz", 3.0, "cycle/inst", None),
        ("duration_ns", 7.0, "", 7.0),
        ("dram_read_bytes", 7.0, "", 7.0), ("sm_clock_hz", 5.0, "hz", 5.0), ("sm_percent", 40.0, "%", 40.0),
        ("duration_ns", 3.0, "inst", None), ("dram_read_bytes", 3.0, "%", None),
    ],
)  # fmt: skip
def test_units(column: str, value: float, unit: str, expected: float | None) -> None:
    assert in_column_unit(column, value, unit) == (None if expected is None else pytest.approx(expected))


CSV = """==PROF== Disconnected
"ID","Kernel Name","gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes_read.sum"
"","","nsecond","%","byte"
"0","void f<int>(int)","1,234","45.5","2,000"
"1","g","100","n/a","10"
"""


# In the form of `ncu --import --csv --page raw` with NVTX: a range's payload, colour and message follow its name.
_COLUMN = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
_FIELDS = ":none" * 6
RANGES_CSV = f""""ID","Kernel Name","{_COLUMN}","Grid Size"
"","","",""
"0","k","13416  ""<default domain>:tunescope{_FIELDS}""  ""<default domain>:a:b{_FIELDS}"" ","(8, 2, 1)"
"1","k","","(1, 1, 1)"
"2","k","tunescope
a|b","(1, 1, 1)"
"""


def test_ranges_in_csv() -> None:
    rows = reports.rows_of_csv(RANGES_CSV.encode())
    assert [row["ranges"] for row in rows] == [["tunescope", "a:b"], [], ["tunescope", "a|b"]]
    assert rows[0]["grid_blocks"] == 16
    assert rows[0]["sm_percent"] is None


def test_csv_of_a_release_that_prints_otherwise() -> None:
    without_units = CSV.replace('"","","nsecond","%","byte"\n', "").replace("\n", "\r\n")
    rows = reports.rows_of_csv(without_units.encode() + b"==WARNING== something\n")
    assert [row["duration_ns"] for row in rows] == [1234.0, 100.0]
    instances = reports.rows_of_csv(CSV.replace('"45.5"', '"45.5 (40; 51)"').replace('"100"', '"1e2"').encode())
    assert (instances[0]["sm_percent"], instances[1]["duration_ns"]) == (45.5, 100.0)
    assert reports.rows_of_csv(CSV.replace("void f<int>(int)", MANGLED).encode())[0]["kernel"] == IN_A_TRACE


def test_csv_without_any_known_metric_is_shown(tmp_path: Path) -> None:
    text = '"ID","Kernel Name","odd__metric"\n"","","%"\n"0","k","1"\n'
    script = tmp_path / "ncu"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    script.chmod(0o755)
    with pytest.raises(UserError) as error:
        reports._by_ncu(tmp_path / "x.ncu-rep", str(script))
    assert "odd__metric" in error.value.cause


def test_csv_of_ncu() -> None:
    first, second = reports.rows_of_csv(CSV.encode())
    assert first["kernel"] == "void f<int>(int)"
    assert (first["duration_ns"], first["sm_percent"], first["dram_read_bytes"]) == (1234.0, 45.5, 2000.0)
    assert second["sm_percent"] is None
    assert second["memory_percent"] is None  # was not collected
    assert reports.rows_of_csv(b"") == reports.rows_of_csv(b"==ERROR== x") == []
    with pytest.raises(UserError, match="cut off"):
        reports.rows_of_csv(CSV.encode()[:-15])


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_csv_is_rows_or_an_error(content: bytes) -> None:
    for text in (content, b'"ID","Kernel Name"\n"",""\n' + content):
        with contextlib.suppress(UserError):
            assert isinstance(reports.rows_of_csv(text), list)


# --- what is made of them ---


def table_of(*rows: dict[str, Any]) -> pa.Table:
    empty = dict.fromkeys(METRICS)
    full = [{"kernel": "k", "mangled": "k", "ranges": [], **empty, **row} for row in rows]
    return pa.Table.from_pylist(full, COUNTERS_SCHEMA)


def test_launches_of_any_report_by_range_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        {"kernel": "a", "ranges": ["step", "x"], "duration_ns": 100.0, "sm_percent": 10.0, "dram_read_bytes": 5.0},
        {"kernel": "a", "ranges": ["step", "x"], "duration_ns": 300.0, "sm_percent": 50.0, "dram_read_bytes": 5.0},
        {"kernel": "b", "ranges": [], "duration_ns": 50.0, "sm_percent": None, "dram_read_bytes": None},
    )
    monkeypatch.setattr("tunescope.analyze.ncu_file.read_report", lambda path: table_of(*rows))
    found = ncu_groups(Path("x"))
    assert found.by == "range"
    assert list(found.groups["name"]) == ["step / x", "(no range)"]
    first = found.groups.iloc[0]
    assert (first["num_launches"], first["duration_ns"], first["dram_read_bytes"]) == (2, 400.0, 10.0)
    assert first["sm_percent"] == pytest.approx((10 * 100 + 50 * 300) / 400)
    assert list(ncu_groups(Path("x"), "kernel").groups["name"]) == ["a", "b"]
    monkeypatch.setattr("tunescope.analyze.ncu_file.read_report", lambda path: table_of(rows[2]))
    assert ncu_groups(Path("x")).by == "kernel"
    with pytest.raises(UserError, match="no NVTX range"):
        ncu_groups(Path("x"), "range")


def test_the_place_of_a_sampled_launch() -> None:
    place = ("backward", "model.layers.3.moe.experts.1", "aten::mm", "MmBackward0")
    name = range_name(*place)
    assert place_of(["tunescope", name]) == place
    assert place_of([name, "inner range of a library"]) == place
    assert place_of([f'4711  "<default domain>:{name}:none:none:none"']) == place  # as printed, had it not been parsed
    assert place_of([f"<0,{name}>"]) == place
    assert place_of(["a", "b|c"]) is None
    assert place_of([]) is None
    assert without_numbers(".block_sparse_moe.experts.7.w1") == ".block_sparse_moe.experts.*.w1"
    assert plain_kernel("void (anonymous namespace)::f<int, 2>(int*)") == plain_kernel("f<int,2>(int *)")
    assert function_of(plain_kernel("void at::native::fill<4, at::F<float> >(int, at::F<float>)")) == "fill"
    assert function_of("nvjet_sm90_tst_8x64") == "nvjet_sm90_tst_8x64"


@given(
    st.sampled_from(("forward", "recompute", "backward")),
    st.from_regex(r"[a-z_]\w*(\.\w+)*", fullmatch=True),
    st.from_regex(r"[a-z_]+::[a-z_0-9]+", fullmatch=True),
    st.from_regex(r"([A-Za-z]+::)*[A-Za-z0-9]+", fullmatch=True),
)
def test_a_place_survives_its_name_and_what_a_printer_puts_around_it(phase: str, path: str, op: str, node: str) -> None:
    name = range_name(phase, path, op, node)
    assert not set(name) & set(':/[]+*@,"<> ')
    for text in (name, f"<default domain>:{name}:none:none", f'"{name}"'):
        assert place_of(["tunescope", text]) == (phase, path, op, node)


# As the compiler named a kernel of torch's, and as torch's profiler prints it (a trace of torch 2.11 on an H200).
MANGLED = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EEEEviT0_T1_"
IN_A_TRACE = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >"
    "(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)"
)


def test_kernels_are_called_as_in_a_trace() -> None:
    assert demangled(MANGLED) == IN_A_TRACE
    for other in ("nvjet_sm90_tst_8x64", "", "_Znonsense!", MANGLED + "x" * MAX_DEMANGLED_CHARS):
        assert demangled(other) is None


def test_settings_are_checked_and_their_path_is_no_part_of_them() -> None:
    for wrong in (
        {"clock_control": "x"}, {"cache_control": "x"}, {"max_launches": -1}, {"phases": ("x",)}, {"phases": ()},
        {"layers": (-1,)},
    ):  # fmt: skip
        with pytest.raises(UserError):
            Settings(**wrong)  # type: ignore[arg-type]
    assert "path" not in json.dumps(Settings(path="/somewhere").to_json())
