"""What tunescope, HolisticTraceAnalysis and TraceLens say of backward and recompute in the same recorded steps.

    PYTHONPATH=src .venv/bin/python bench/compare_profilers.py TRACE_FOLDER... \
        --hta-python HTA_PYTHON --tracelens-python TRACELENS_PYTHON

A TRACE_FOLDER is a point of mixtral_lt.sh: events.arrow and its like, and trace.json.gz of the same steps. Each tool
runs in a process of its own, by its public functions. Rows are appended to bench/compare_profilers.csv, in ms over all
recorded steps; docs/profilers.md explains them. Last, a two-layer model on the CPU, recorded with with_stack=True,
shows what TraceLens' detect_recompute finds under each kind of checkpointing.

HTA 0.5.0 builds its call graph with pandas < 3 only. TraceLens is AMD's; the `tracelens` on PyPI is something else.
"""

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CSV = Path(__file__).with_suffix(".csv")
COLUMNS = ("date", "tool", "version", "trace", "quantity", "value_ms", "note")
PHASES = ("forward", "recompute", "backward", "clip", "optimizer", "rest", "unattributed")
MODULE_PHASES = ("forward", "recompute", "backward")
PARTS = {"decoder layers": "", "self_attn": ".self_attn", "block_sparse_moe": ".block_sparse_moe"}  # ends of paths

# Each prints JSON. reported: what the tool's functions say, as quantity, us, note. kernels: what its tree tells of each
# kernel, copy and memset: correlation, us, module or null, and then ours: phase; the others': is it launched in an
# autograd node, is it launched in a module's range. backward_us: by module, with the modules within it.
OURS = """
import json, sys
from pathlib import Path
import tunescope
from tunescope import latency_files as files, results
from tunescope.analyze.attribution import Recording, attribute
schemas = {
    files.EVENTS_FILE: files.EVENTS_SCHEMA, files.CALLS_FILE: files.CALLS_SCHEMA,
    files.MODULES_FILE: files.MODULES_SCHEMA,
}
recording = Recording.from_tables(*(results.read_arrow(Path(sys.argv[1]) / name, schemas[name]) for name in schemas))
work = attribute(recording).work
gpu = recording.events[recording.events["kind"].isin(files.GPU_KINDS)]
work = work.merge(gpu[["start_ns", "name", "correlation"]], on=["start_ns", "name"], validate="one_to_one")
work["us"] = work["duration_ns"] / 1e3
reentrant = recording.events["name"].eq(files.NODE_PREFIX + "CheckpointFunctionBackward").any()
modules = work["module"].where(~work["module"].str.startswith("(")).astype(object)
modules = modules.where(modules.notna(), None)
print(json.dumps({
    "version": tunescope.__version__, "trace": "reentrant" if reentrant else "non-reentrant",
    "kernels": list(zip(work["correlation"].tolist(), work["us"], modules, work["phase"])),
}))
"""
HTA = """
import json, logging, re, sys, warnings
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
from importlib.metadata import version
import pandas
from hta.common.trace_call_graph import CallGraph
from hta.trace_analysis import TraceAnalysis
clean = lambda name: re.sub(" #[0-9]+$", "", name).removeprefix("nn.Module: ")
said = {"version": f"{version('HolisticTraceAnalysis')} (pandas {pandas.__version__})", "reported": []}
reported = said["reported"]
analysis = TraceAnalysis(trace_files={0: sys.argv[1]}, include_last_profiler_step=sys.argv[2] == "all")
times = analysis.get_temporal_breakdown(visualize=False).iloc[0]
reported.append(["compute", times["compute_time(us)"], "get_temporal_breakdown"])
reported.append(["copies, memsets", times["non_compute_time(us)"], "get_temporal_breakdown"])
if sys.argv[2] == "all":
    kinds, kernels = analysis.get_gpu_kernel_breakdown(False, 1, 10**6, include_memory_kernels=True)
    reported.append(["all", kernels["sum (us)"].sum(), "get_gpu_kernel_breakdown, by kernel"])
    reported.append(["all, by kernel type", kinds["sum"].sum(), "get_gpu_kernel_breakdown, by type"])
    table = analysis.get_gpu_kernels_with_user_annotations(0)
    steps = table["s_user_annotation"].str.startswith("Optimizer.step")
    reported.append(["optimizer", table.loc[steps, "dur"].sum(), "get_gpu_kernels_with_user_annotations"])
    graph = CallGraph(analysis.t)
    table, symbols = analysis.t.get_trace(0), analysis.t.symbol_table
    for thread in graph.mapping.itertuples():
        on_thread = table.loc[table["pid"].eq(thread.pid) & table["tid"].eq(thread.tid)]
        launched = table["parent"].isin(on_thread.index) & table["stream"].ge(0)
        reported.append([f"thread {thread.label}", table.loc[launched, "dur"].sum(), "CallGraph"])
    linked = "has" if "fwdbwd_index" in table.columns else "lacks"
    reported.append(["forward-backward links", None, f"the parsed trace {linked} fwdbwd_index"])
    parents = table["parent"].to_dict()
    names = {row: symbols.get_sym_table()[name] for row, name in table["name"].items()}
    wanted = [symbols.get_sym_id_map().get(kind) for kind in ("kernel", "gpu_memcpy", "gpu_memset")]
    said["kernels"] = []
    for kernel in table[table["cat"].isin(wanted)].itertuples():
        above, row = [], parents[kernel.Index]
        while row >= 0:
            above.append(names[row])
            row = parents[row]
        module = next((clean(name) for name in above if name.startswith("nn.Module: ")), None)
        in_node = any("evaluate_function: " in name for name in above)
        said["kernels"].append([int(kernel.correlation), float(kernel.dur), module, in_node, module is not None])
print(json.dumps(said, default=float))
"""
TRACELENS = """
import contextlib, json, re, sys
from collections import Counter
from importlib.metadata import version
from TraceLens import TreePerfAnalyzer
clean = lambda name: re.sub(" #[0-9]+$", "", name).removeprefix("nn.Module: ")
with contextlib.redirect_stdout(sys.stderr):
    analyzer = TreePerfAnalyzer.from_file(sys.argv[1], detect_recompute=True)
    launchers = analyzer.get_df_kernel_launchers(include_kernel_details=True, include_call_stack=True)
tree, times = analyzer.tree, analyzer.get_df_gpu_timeline().set_index("type")["time ms"] * 1e3
operators = [event for event in tree.events if event.get("cat") == "cpu_op"]
direct = launchers["total_direct_kernel_time"]
said = {"version": version("TraceLens"), "kernels": [], "reported": [
    ["all", times["busy_time"], "get_df_gpu_timeline: busy"],
    ["compute", times["computation_time"], "get_df_gpu_timeline; with memsets"],
    ["copies", times["total_memcpy_time"], "get_df_gpu_timeline"],
    ["with a parent_module", direct[launchers["parent_module"] != "NA"].sum(), "get_df_kernel_launchers"],
    ["is_recompute", direct[launchers["is_recompute"]].sum(), "get_df_kernel_launchers(detect_recompute)"],
]}
for event in tree.events:
    if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
        above = tree.traverse_parents_and_get_callstack(event, ("nn.Module", "evaluate_function"), follow_fwd_link=True)
        module = next((clean(name) for name in above if name.startswith("nn.Module: ")), None)
        in_node = any("evaluate_function: " in name for name in above)
        in_range = len(tree.traverse_parents_and_get_callstack(event, ("nn.Module",))) > 1
        said["kernels"].append([event["args"]["correlation"], event["dur"], module, in_node, in_range])
threads = {event["tid"] for event in operators if "evaluate_function: " in event["name"]}
backward_us = Counter()
for event in operators:
    if event["name"].startswith("nn.Module: ") and event["tid"] not in threads:
        nodes = [tree.get_UID2event(uid) for uid in tree.get_subtree_bwd_events(event["UID"])]
        backward_us[clean(event["name"])] += analyzer.loop_and_aggregate_kernels(nodes)[0]
said["backward_us"] = backward_us
print(json.dumps(said, default=float))
"""
MARKED = """
import contextlib, json, sys
from importlib.metadata import version
from TraceLens import TreePerfAnalyzer
with contextlib.redirect_stdout(sys.stderr):
    analyzer = TreePerfAnalyzer.from_file(sys.argv[1], detect_recompute=True)
operators = [event for event in analyzer.tree.events if event.get("cat") == "cpu_op"]
marked = sum(bool(event.get("is_recompute")) for event in operators)
print(json.dumps({"version": version("TraceLens"), "note": f"{marked} of {len(operators)} operators marked"}))
"""
TOY = """
import sys, torch
from torch.utils.checkpoint import checkpoint
for kind in ("non-reentrant", "reentrant"):
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)) for _ in range(2)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True) as profiler:
        x = torch.ones(4, 8, requires_grad=True)
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=kind == "reentrant")
        x.sum().backward()
    profiler.export_chrome_trace(f"{sys.argv[1]}/{kind}.json")
"""


def run(python: str, code: str, *arguments: object, **variables: str) -> Any:
    """What the code prints as JSON, or None if it prints nothing."""
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout) if done.stdout else None


def own_rows(ours: Any, first: Any) -> Iterator[tuple[str, float, str]]:
    kernels = ours["kernels"]
    yield "all", sum(us for _, us, _, _ in kernels), f"{len(kernels)} launches"
    for phase in PHASES:
        inside = [(module, us) for _, us, module, where in kernels if where == phase]
        yield phase, sum(us for _, us in inside), ""
        if phase in MODULE_PHASES:
            yield f"{phase} with a module", sum(us for module, us in inside if module), ""
            for part, end in PARTS.items():
                path = re.compile(rf"\.layers\.\d+{re.escape(end)}(\.|$)")
                yield f"{phase} of {part}", sum(us for module, us in inside if module and path.search(module)), ""
    if first is not ours:
        times_us: defaultdict[str | None, float] = defaultdict(float)
        launches: defaultdict[str | None, int] = defaultdict(int)
        for said, sign in ((ours, 1), (first, -1)):
            for _, us, module, where in said["kernels"]:
                if where == "backward":
                    times_us[module] += sign * us
                    launches[module] += sign
        note = f"{sum(map(abs, launches.values()))} launches"
        yield "backward by module, unlike the first trace's", sum(map(abs, times_us.values())), note


def compared_rows(kernels: list[Any], ours: Any) -> Iterator[tuple[str, float, str]]:
    """What a tool's tree tells of recompute, and how much of each phase it gives to the module that tunescope names."""
    places = {number: (module, where) for number, _, module, where in ours["kernels"]}
    assert len(places) == len(kernels) == len(ours["kernels"]), "the trace is not that of events.arrow"
    yield "in autograd nodes", sum(us for _, us, _, in_node, _ in kernels if in_node), "by its tree"
    recompute_us = sum(us for _, us, _, in_node, in_range in kernels if in_node and in_range)
    yield "in a module's range in an autograd node", recompute_us, "by its tree: a rule for recompute"
    for phase in MODULE_PHASES:
        inside = [(module, us, places[number][0]) for number, us, module, *_ in kernels if places[number][1] == phase]
        same_us = sum(us for module, us, ours_is in inside if module and module == ours_is)
        yield f"{phase} with tunescope's module", same_us, "by its tree"
        yield f"{phase} with another module", sum(us for module, us, _ in inside if module) - same_us, "by its tree"


def rows_of_trace(folder: Path, options: argparse.Namespace, first: list[Any]) -> Iterator[tuple[Any, ...]]:
    """tool, version, trace, quantity, us or None, note. first: what tunescope said of the traces so far."""
    trace = folder.resolve() / "trace.json.gz"
    ours = run(sys.executable, OURS, folder)
    first.append(ours)
    label = f"{folder.name} {ours['trace']}"
    for row in own_rows(ours, first[0]):
        yield "tunescope", ours["version"], label, *row

    said = run(options.hta_python, HTA, trace, "default")
    for quantity, us, note in said["reported"]:
        yield "HTA", said["version"], label, f"{quantity}, by default", us, note
    said = run(options.hta_python, HTA, trace, "all", HTA_DISABLE_NS_ROUNDING="1")
    for row in (*said["reported"], *compared_rows(said["kernels"], ours)):
        yield "HTA", said["version"], label, *row

    said = run(options.tracelens_python, TRACELENS, trace)
    for row in (*said["reported"], *compared_rows(said["kernels"], ours)):
        yield "TraceLens", said["version"], label, *row
    for part, end in PARTS.items():
        path = re.compile(rf"\.layers\.\d+{re.escape(end)}$")
        us = sum(us for module, us in said["backward_us"].items() if path.search(module))
        yield "TraceLens", said["version"], label, f"backward of {part}", us, "get_subtree_bwd_events"


def rows_of_toy(options: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    with tempfile.TemporaryDirectory(prefix="tunescope-bench-") as folder:
        run(sys.executable, TOY, folder)
        for kind in ("non-reentrant", "reentrant"):
            said = run(options.tracelens_python, MARKED, f"{folder}/{kind}.json")
            trace = f"two layers, CPU, with_stack, {kind}"
            yield "TraceLens", said["version"], trace, "is_recompute", None, said["note"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="TRACE_FOLDER")
    parser.add_argument("--hta-python", required=True, help="a Python with HolisticTraceAnalysis")
    parser.add_argument("--tracelens-python", required=True, help="a Python with AMD's TraceLens")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()

    date, is_new = datetime.date.today().isoformat(), not options.out.exists()
    first: list[Any] = []
    rows = [row for folder in options.folders for row in rows_of_trace(folder, options, first)]
    rows += rows_of_toy(options)
    with options.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for tool, version, trace, quantity, us, note in rows:
            value_ms = "" if us is None else f"{us / 1e3:.6f}"
            writer.writerow((date, tool, version, trace, quantity, value_ms, note))
            print(f"{tool:10} {trace:52} {quantity:46} {value_ms:>12} {note}")


if __name__ == "__main__":
    main()
