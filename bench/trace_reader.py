"""Kernel totals of a large trace: time and peak memory of tunescope beside HolisticTraceAnalysis, alternated.

    .venv/bin/python bench/trace_reader.py --hta-python /tmp/hta/bin/python      # 1 GB made from the fixture
    .venv/bin/python bench/trace_reader.py --source trace.json.gz --gb 2 --hta-python /tmp/hta/bin/python

The trace repeats a recorded one: each copy starts where the one before ended, with ids of its own, in the source's own
text. Each reader is a process of its own that prints the total of every kernel; they must agree to a nanosecond a
launch. HTA is what TraceAnalysis(trace_dir=...) gives, but for two things without which the totals could not agree:
its rounding of all times to whole microseconds is switched off, and ProfilerStep# annotations have another name, since
it leaves out the last step's kernels. `--hta-backend ijson_batch_and_compress` is its backend for little memory (needs
ijson with yajl in that environment).
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from csv_rows import append

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "fixtures" / "traces" / "cuda.json.gz"
CSV = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "source", "trace_gb", "compressed", "events", "gpu_events", "rounds", "ours_s", "hta_s", "ratio_hta_over_ours_s",
    "ours_cpu_s", "hta_cpu_s", "ours_peak_mib", "hta_peak_mib", "ratio_hta_over_ours_memory", "ours_mb_per_s",
    "hta_backend", "hta_version", "hta_pandas", "python", "pandas", "cpu", "cores", "memory_gib", "commit", "date",
)  # fmt: skip
CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
# What the copies must not share: a time, in whole µs, and ids that link events to each other.
_TIME = re.compile(r'("ts"\s*:\s*)(-?\d+)')
_IDS = re.compile(r'("(?:External id|correlation|id|Ev Idx|Python id|Python parent id)"\s*:\s*)([1-9]\d*)\b(?!")')

# Peak memory from /proc: ru_maxrss of a process also holds that of the one that started it.
OURS = """
import json, re, sys
from pathlib import Path
from tunescope.analyze.trace_kernels import trace_tables
tables = trace_tables(Path(sys.argv[1]))
totals = tables.kernels.groupby("name")[["launches", "total_ns"]].sum()
print(json.dumps({
    "peak_kib": int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]), "whole": tables.is_whole,
    "events": tables.num_events, "totals": {name: [int(n), int(t)] for name, n, t in totals.itertuples()},
}))
"""
HTA = """
import json, re, sys
import logging
logging.disable(logging.WARNING)
from hta.common.trace_parser import set_default_trace_parsing_backend
from hta.configs.parser_config import ParserBackend
from hta.trace_analysis import TraceAnalysis
set_default_trace_parsing_backend(ParserBackend(sys.argv[2]))
trace = TraceAnalysis(trace_dir=sys.argv[1]).t
(rank,) = trace.get_all_traces()
table, names = trace.get_trace(rank), trace.symbol_table.get_sym_table()
wanted = {trace.symbol_table.get_sym_id_map().get(category) for category in sys.argv[3:]}
table = table[table["cat"].isin(wanted)]
totals = table.groupby("name")["dur"].agg(["count", "sum"])
import pandas
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({
    "peak_kib": peak, "pandas": pandas.__version__,
    "totals": {names[int(name)]: [int(n), float(t) * 1e3] for name, n, t in totals.itertuples()},
}))
"""


def make_trace(source: Path, target: Path, num_bytes: int) -> None:
    """Writes `num_bytes` or a little more: the source's head, its events over and over, its tail."""
    data = source.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    start = text.index("[", text.index('"traceEvents"')) + 1
    end = json.JSONDecoder().raw_decode(text, start - 1)[1] - 1
    # Without names of steps HTA also does not take time by steps times events, of which a repeated trace has too many.
    body = text[start:end].strip().replace('"ProfilerStep#', '"Step ')
    head, tail = text[:start], text[end:]
    times = [int(found[2]) for found in _TIME.finditer(body)]
    step_us = max(times) - min(times) + 20_000
    step_ids = max(int(found[2]) for found in _IDS.finditer(body)) + 1
    pieces = re.split("(" + _TIME.pattern + "|" + _IDS.pattern + ")", body)
    # A split of two alternatives gives, after each literal: the whole match, time's two groups, the ids' two.
    literals, places = pieces[0::6], [pieces[at : at + 6] for at in range(1, len(pieces), 6)]
    numbers = [
        (place[1], int(place[2]), True) if place[1] is not None else (place[3], int(place[4]), False)
        for place in places
    ]
    with target.open("w", encoding="utf-8") as file:
        file.write(head + "\n")
        copy = 0
        while file.tell() < num_bytes:
            shift_us, shift_ids = copy * step_us, copy * step_ids
            parts = [",\n" * (copy > 0), literals[0]]
            for (key, number, is_time), literal in zip(numbers, literals[1:], strict=True):
                parts += [key, str(number + (shift_us if is_time else shift_ids)), literal]
            file.write("".join(parts))
            copy += 1
        file.write("\n" + tail)


def run(python: str, code: str, *arguments: str) -> dict[str, Any]:
    """One reader in a process of its own. Returns what it printed last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HTA_DISABLE_NS_ROUNDING": "1"}
    start_s, start_cpu_s = time.perf_counter(), children_cpu_s()
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{python} ended {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {
        "wall_s": time.perf_counter() - start_s,
        "cpu_s": children_cpu_s() - start_cpu_s,
    }


def children_cpu_s() -> float:
    """CPU time of the processes waited for so far: less than the wall clock's does it hang on what else runs here."""
    times = os.times()
    return times.children_user + times.children_system


def check_totals(ours: dict[str, list[int]], theirs: dict[str, list[float]]) -> None:
    """Raises SystemExit unless both found the same kernels, launches and, to a nanosecond a launch, times."""
    if ours.keys() != theirs.keys():
        raise SystemExit(f"kernels differ: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    for name, (launches, total_ns) in ours.items():
        if theirs[name][0] != launches or abs(theirs[name][1] - total_ns) > launches:
            raise SystemExit(f"{name}: {launches} launches, {total_ns} ns; HTA: {theirs[name]}")


def machine() -> dict[str, Any]:
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) or [platform.processor()]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": names[0], "cores": os.cpu_count(), "memory_gib": f"{memory_bytes / 2**30:.0f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="trace to repeat, JSON or gzip")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the trace that is made, uncompressed")
    parser.add_argument("--gzip", action="store_true", help="read it as .json.gz")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs; every other pair in reverse order")
    parser.add_argument("--hta-python", required=True, help="a Python with HolisticTraceAnalysis")
    parser.add_argument("--hta-backend", default="json", help="json (HTA's default) or ijson_batch_and_compress")
    parser.add_argument("--tmp", type=Path, default=None, help="where to make the trace; deleted afterwards")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="tunescope-trace-", dir=options.tmp) as folder:
        trace = Path(folder) / "trace.json"
        make_trace(options.source, trace, int(options.gb * 1e9))
        trace_bytes = trace.stat().st_size
        if options.gzip:
            with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb", compresslevel=6) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
            trace.unlink()
            trace = Path(f"{trace}.gz")
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "hta": []}
        for number in range(options.rounds):
            for reader in ("ours", "hta") if number % 2 == 0 else ("hta", "ours"):
                if reader == "ours":
                    runs[reader].append(run(sys.executable, OURS, str(trace)))
                else:
                    runs[reader].append(run(options.hta_python, HTA, folder, options.hta_backend, *CATEGORIES))
                print(
                    reader,
                    f"{runs[reader][-1]['wall_s']:.2f} s,",
                    runs[reader][-1]["peak_kib"] // 1024,
                    "MiB",
                    flush=True,
                )
    for ours, theirs in zip(runs["ours"], runs["hta"], strict=True):
        if not ours["whole"]:
            raise SystemExit("ours is partial")
        check_totals(ours["totals"], theirs["totals"])
    seconds = {name: statistics.median(one["wall_s"] for one in each) for name, each in runs.items()}
    peak_mib = {name: max(one["peak_kib"] for one in each) / 1024 for name, each in runs.items()}
    row = {
        "source": options.source.name,
        "trace_gb": f"{trace_bytes / 1e9:.2f}",
        "compressed": options.gzip,
        "events": runs["ours"][0]["events"],
        "gpu_events": sum(launches for launches, _ in runs["ours"][0]["totals"].values()),
        "rounds": options.rounds,
        "ours_s": f"{seconds['ours']:.2f}",
        "hta_s": f"{seconds['hta']:.2f}",
        "ratio_hta_over_ours_s": f"{seconds['hta'] / seconds['ours']:.2f}",
        **{f"{name}_cpu_s": f"{statistics.median(one['cpu_s'] for one in each):.2f}" for name, each in runs.items()},
        "ours_peak_mib": f"{peak_mib['ours']:.0f}",
        "hta_peak_mib": f"{peak_mib['hta']:.0f}",
        "ratio_hta_over_ours_memory": f"{peak_mib['hta'] / peak_mib['ours']:.2f}",
        "ours_mb_per_s": f"{trace_bytes / 1e6 / seconds['ours']:.0f}",
        "hta_backend": options.hta_backend,
        "hta_version": version(options.hta_python, "HolisticTraceAnalysis"),
        "hta_pandas": runs["hta"][0]["pandas"],
        "python": platform.python_version(),
        "pandas": version(sys.executable, "pandas"),
        **machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    append(options.out, COLUMNS, row)
    print(json.dumps(row, indent=1))


def version(python: str, package: str) -> str:
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return subprocess.run([python, "-c", code, package], capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
