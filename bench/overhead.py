"""What measuring costs: queries/s of a point as tunescope runs it over a bare run_exp, alternated.

    python3 bench/overhead.py                       # tiny on a CPU, full on a GPU; appends a row to bench/overhead.csv

Both train the same point for the same number of steps in a process of its own; the bare one has no callback, sampler
or energy meter of ours, only the model class that stands in for a checkpoint. The time is the Trainer's own
`train_runtime` for the bare run, and ours for ours (it ends later: after one more synchronise and the energy reading).
Beside the ratio, whose noise is the machine's, stands a figure without it: the host time spent in our callbacks.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from csv_rows import append  # noqa: E402

from tunescope import results  # noqa: E402
from tunescope.gpus import show_only  # noqa: E402
from tunescope.measure import worker  # noqa: E402
from tunescope.measure.environment import git_revision, package_versions  # noqa: E402
from tunescope.measure.gpu_sampler import GpuSampler  # noqa: E402
from tunescope.measure.plan import Options, Plan, PointSpec, make_plan  # noqa: E402
from tunescope.measure.sweep import PRELOAD  # noqa: E402
from tunescope.train.forkserver import ForkServer  # noqa: E402

CSV = Path(__file__).with_name("overhead.csv")
COLUMNS = (
    "point", "preset", "weights", "data", "steps", "rounds", "bare_queries_per_s", "ours_queries_per_s",
    "ratio_ours_over_bare", "ratio_low_of_rounds", "ratio_high_of_rounds", "callback_us_per_step",
    "callback_frac_of_step", "device", "torch", "transformers", "llamafactory", "bitsandbytes", "commit", "date",
)  # fmt: skip


def run_bare(connection: Connection, spec: PointSpec, work_dir: Path) -> None:
    """A run_exp that nothing of ours watches. Sends the Trainer's own runtime (s)."""
    from llamafactory.train.tuner import run_exp

    from tunescope.train.engine import prepare

    worker.limit_threads(spec)
    arguments, _ = prepare(spec.workload, work_dir / worker.SCRATCH)
    run_exp(arguments)
    metrics = json.loads((Path(arguments["output_dir"]) / "train_results.json").read_text())
    connection.send(("runtime_s", metrics["train_runtime"]))


def run_ours(connection: Connection, spec: PointSpec, work_dir: Path) -> None:
    """A point as the launcher runs it, with the time inside the recorder's own functions added up."""
    from tunescope.measure.steps import StepRecorder

    spent = _time_methods(StepRecorder, ("on_step_end", "_count_batch"))
    worker.measure_point(connection, spec, work_dir)
    outcome = results.read_json(work_dir / results.OUTCOME_FILE)
    if outcome["status"] != "ok":
        raise RuntimeError(f"the point ended {outcome['status']}: {outcome['cause']}")
    steps = results.read_arrow(work_dir / results.STEPS_FILE, results.STEPS_SCHEMA).num_rows
    connection.send(("runtime_s", outcome["train_runtime_ns"] / 1e9))
    connection.send(("callback_us", sum(spent) / steps * 1e6))


def _time_methods(owner: type, names: tuple[str, ...]) -> list[float]:
    """Wraps methods of a class so that their durations (s) are collected in the list returned."""
    spent: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start_s)

        return wrapper

    for name in names:
        setattr(owner, name, timed(getattr(owner, name)))
    return spent


def run_one(server: ForkServer, plan: Plan, spec: PointSpec, function: Callable[..., None]) -> dict[str, float]:
    """One process of one variant. Returns what it sent, by name."""
    with tempfile.TemporaryDirectory(prefix="tunescope-bench-") as folder:
        work_dir = Path(folder) / spec.point_id
        work_dir.mkdir()
        sent: dict[str, float] = {}
        errors: list[str] = []

        def on_message(message: Any) -> None:
            if message[0] in ("runtime_s", "callback_us"):
                sent[message[0]] = message[1]
            elif message[0] == "user_error":
                errors.append(str(message[1]))

        log_file = Path(folder) / "log.txt"
        sampler = GpuSampler(plan.gpu if function is run_ours else None)
        end = server.run(
            function, (spec, work_dir), log_file=log_file, on_message=on_message, while_running=sampler.watching()
        )
        if end.exit_code or "runtime_s" not in sent:
            raise SystemExit(f"{function.__name__} failed: {errors or end.cause}\n{log_file.read_text()[-3000:]}")
        return sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="cs:sparse:bs=1", help="one point")
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--steps", type=int, default=30, help="training steps a run")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs; every other pair in reverse order")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()

    plan = make_plan(Options(points=options.points, preset=options.preset))
    first = plan.specs[0]
    num_queries = options.steps * first.workload.point.per_device_batch_size
    spec = replace(
        first,
        protocol=replace(first.protocol, num_queries=num_queries),
        workload=replace(first.workload, num_samples=num_queries, max_steps=None),
    )
    show_only(plan.gpu)
    server = ForkServer(PRELOAD)
    few = 2 * spec.workload.point.per_device_batch_size
    run_one(server, plan, replace(spec, workload=replace(spec.workload, num_samples=few)), run_bare)  # warms the disk
    runs: dict[str, list[dict[str, float]]] = {"run_bare": [], "run_ours": []}
    for number in range(options.rounds):
        order = (run_bare, run_ours) if number % 2 == 0 else (run_ours, run_bare)
        for function in order:
            runs[function.__name__].append(run_one(server, plan, spec, function))
    rates = {name: [num_queries / sent["runtime_s"] for sent in each] for name, each in runs.items()}
    ratios = [ours / bare for ours, bare in zip(rates["run_ours"], rates["run_bare"], strict=True)]
    callback_us = statistics.median(sent["callback_us"] for sent in runs["run_ours"])
    step_us = statistics.median(sent["runtime_s"] for sent in runs["run_ours"]) / options.steps * 1e6
    versions = package_versions()
    row = {
        "point": spec.workload.point.label,
        "preset": plan.size.preset,
        "weights": spec.weights["kind"],
        "data": spec.data["kind"],
        "steps": options.steps,
        "rounds": options.rounds,
        "bare_queries_per_s": f"{statistics.median(rates['run_bare']):.5g}",
        "ours_queries_per_s": f"{statistics.median(rates['run_ours']):.5g}",
        "ratio_ours_over_bare": f"{statistics.median(ratios):.4f}",
        "ratio_low_of_rounds": f"{min(ratios):.4f}",
        "ratio_high_of_rounds": f"{max(ratios):.4f}",
        "callback_us_per_step": f"{callback_us:.1f}",
        "callback_frac_of_step": f"{callback_us / step_us:.6f}",
        "device": plan.device,
        **{name: versions[name] for name in ("torch", "transformers", "llamafactory", "bitsandbytes")},
        "commit": git_revision(),
        "date": datetime.date.today().isoformat(),
    }
    append(options.out, COLUMNS, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
