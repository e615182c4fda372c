"""The process of one point: trains, records, writes the point's files into its work folder."""

import errno
import resource
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tunescope import results
from tunescope.errors import UserError
from tunescope.families.family import TRITON
from tunescope.measure.faults import fault, fault_callback
from tunescope.measure.max_batch import host_budget_callback, longest_batch_callback
from tunescope.measure.plan import PointSpec

SCRATCH = "scratch"
PROGRESS_INTERVAL_S = 0.2


def measure_point(connection: Connection, spec: PointSpec, work_dir: Path) -> None:
    """Runs one point to its end, good or bad, and leaves outcome.json, with what was recorded if it is ok.

    Sends ("step", done, expected) now and then, and ("user_error", UserError) where the user's input is at fault and no
    other point would fare better.
    """
    try:
        outcome = _measured(connection, spec, work_dir)
    except UserError as error:
        connection.send(("user_error", error))
        return
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        connection.send(("user_error", results.disk_full(work_dir.parent)))
        return
    results.write_json(work_dir / results.OUTCOME_FILE, outcome)


def _measured(connection: Connection, spec: PointSpec, work_dir: Path) -> dict[str, Any]:
    from tunescope.measure.energy import EnergyMeter
    from tunescope.measure.environment import environment
    from tunescope.measure.recordings import make_recording
    from tunescope.measure.start import MeetLongestBatch, MemoryBudget, RunFacts, limit_memory
    from tunescope.measure.steps import peak_memory
    from tunescope.train.engine import MODEL_FOLDER, run_workload

    use_gpu = not spec.workload.use_cpu
    limit_threads(spec)
    results.write_json(work_dir / results.ENVIRONMENT_FILE, environment(use_gpu=use_gpu, revision=spec.revision))
    if use_gpu and spec.memory_budget_bytes is not None and spec.weights["kind"] == "random":
        # A checkpoint's loading may take more for a moment than its training: there the limit waits for its end.
        limit_memory(spec.memory_budget_bytes)
    energy = EnergyMeter(use_gpu=use_gpu)
    scratch_dir = work_dir / SCRATCH
    recording = make_recording(spec, _Ticker(connection), energy, work_dir, scratch_dir / MODEL_FOLDER)
    recorder = recording.steps
    compiles = spec.workload.model_config.get("scan") == TRITON
    run_facts, longest = RunFacts(), MeetLongestBatch(by_length=compiles)
    facts: dict[str, Any] = {}
    status, cause = "ok", None
    try:
        batch_size = spec.workload.point.per_device_batch_size
        fault("start", spec.point_id, batch_size)
        first: list[Any] = [longest] if spec.protocol.longest_batch_first else []
        if spec.memory_budget_bytes is not None and not use_gpu:
            first.insert(0, host_budget_callback(spec.memory_budget_bytes))
        if spec.is_trial and spec.search is not None:
            first.append(longest_batch_callback(spec.search.longest_tokens))
        callbacks = [
            MemoryBudget(spec.memory_budget_bytes),
            run_facts,
            *recording.callbacks(first),
            fault_callback(spec.point_id, batch_size),
        ]
        facts = run_workload(spec.workload, scratch_dir, callbacks)
        fault("writing", spec.point_id, batch_size)
        recording.write(work_dir)
    except (UserError, OSError):
        raise
    except Exception as error:
        if _is_out_of_memory(error, has_host_budget=not use_gpu and spec.memory_budget_bytes is not None):
            status, cause = "oom", _first_line(error)
        else:
            traceback.print_exc()  # to the point's log
            status, cause = "failed", f"{type(error).__name__}: {_first_line(error)}"
    return {
        "status": status,
        "cause": cause,
        "clock": "cuda_event" if use_gpu else "host",
        "num_warmup_steps": recorder.num_warmup_steps,
        "interval_reached": recorder.interval_reached,
        "train_runtime_ns": recorder.train_runtime_ns,
        "timed_start_unix_ns": recorder.timed_start_unix_ns,
        "timed_end_unix_ns": recorder.timed_end_unix_ns,
        "gpu_energy_j": recorder.energy_j,
        "gpu_energy_why_not": energy.why_not,
        **(recorder.peak_memory or peak_memory(use_gpu)),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "longest_batch_why_not": longest.why_not,
        **facts,
        **run_facts.facts,
        **recording.facts(work_dir),
    }


# How torch and oneDNN say on a CPU that memory ran out.
_HOST_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
)


def _is_out_of_memory(error: Exception, *, has_host_budget: bool) -> bool:
    """Also the host's, where the budget of a search ends it: else these words may mean something else."""
    from tunescope.measure.start import is_out_of_memory

    return is_out_of_memory(error) or (has_host_budget and any(word in str(error) for word in _HOST_WORDS))


def limit_threads(spec: PointSpec) -> None:
    """One thread for preset tiny.

    Two OpenMP threads wait for each other at every small operation: where another process has one of two cores, a step
    took 10 times as long (docs/LOG.md, 2026-11-24); with one thread it does not matter.
    """
    import torch

    if spec.workload.point.preset == "tiny":
        torch.set_num_threads(1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


class _Ticker:
    """Tells the launcher how far the run is, a few times a second at most."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._next_s = 0.0

    def __call__(self, done: int, expected: int) -> None:
        if (now_s := time.monotonic()) >= self._next_s or done >= expected:
            self._next_s = now_s + PROGRESS_INTERVAL_S
            self._connection.send(("step", done, expected))
