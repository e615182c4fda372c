"""A launcher's main loop: point after point, each in its own process, published whole. No torch in this process."""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunescope import results
from tunescope.errors import UserError
from tunescope.gpus import Gpu, show_only
from tunescope.locking import locked
from tunescope.measure import max_batch, ncu, worker
from tunescope.measure.environment import cpu_name, package_versions
from tunescope.measure.faults import fault
from tunescope.measure.gpu_sampler import GpuSampler
from tunescope.measure.plan import Plan, PointSpec
from tunescope.measure.progress import SweepProgress
from tunescope.train.forkserver import ForkServer, ProcessEnd

PRELOAD = ("tunescope.measure.preload",)
# Measured once, these stand until the point's settings change; a failed point is tried again.
_FINAL_STATUSES = ("ok", "oom")
# (point whose batch size is to be found, GPU) -> where to begin, or None. On a CPU nobody is asked: what is known of
# memory is a GPU's.
Guess = Callable[[PointSpec, Gpu], int | None]


def is_done(spec: PointSpec, out_dir: Path) -> bool:
    """Whether the folder of this point is whole, readable, and of exactly these settings."""
    folder = out_dir / spec.point_id
    if not (folder / results.POINT_FILE).is_file():
        return False
    try:
        found = results.read_point(folder)
    except results.PointFormatError:
        return False
    if found.status not in _FINAL_STATUSES:
        return False
    if spec.search is not None:
        return found.point.get("search_hash") == spec.search_hash()
    return found.point.get("recipe_hash") == spec.point_json()["recipe_hash"]


def run_sweep(plan: Plan, out_dir: Path, *, fresh: bool, guess: Guess | None = None) -> dict[str, int]:
    """Measures every point that is not done yet (all, if fresh). Returns how many ended in each status.

    guess: of the largest batch, where a search for it begins; without one, or where it has none, that is 1.
    Raises UserError if the folder is taken or cannot be written, or a point's input is at fault. Whatever ends it,
    finished points stay and an unfinished one leaves nothing behind but a folder that the next run removes.
    """
    with locked(out_dir):
        # Not those of folders below: they may be another launcher's --out, under a lock of its own.
        for leftover in out_dir.glob("*" + results.UNFINISHED_SUFFIX):
            shutil.rmtree(leftover, ignore_errors=True)
        todo = [spec for spec in plan.specs if fresh or not is_done(spec, out_dir)]
        counts: dict[str, int] = {}
        with SweepProgress(len(todo)) as progress:
            if skipped := len(plan.specs) - len(todo):
                progress.note(f"{skipped} of {len(plan.specs)} points are measured already and are skipped")
            if not todo:
                return counts
            show_only(plan.gpu)
            server = ForkServer(PRELOAD)
            for spec in todo:
                progress.start_point(spec.workload.point.label)
                if spec.search is None:
                    status, text = _run_point(spec, plan.gpu, out_dir, server, progress)
                else:
                    status, text = _search(spec, plan.gpu, out_dir, server, progress, guess, fresh=fresh)
                counts[status] = counts.get(status, 0) + 1
                progress.end_point(text)
        fault("table")
        return counts


def _run_point(
    spec: PointSpec, gpu: Gpu | None, out_dir: Path, server: ForkServer, progress: SweepProgress
) -> tuple[str, str]:
    """Runs and publishes one point. Returns its status and a line for people."""
    work_dir = out_dir / (spec.point_id + results.UNFINISHED_SUFFIX)
    try:
        outcome = _run_unpublished(spec, gpu, out_dir, server, progress)
        _publish(spec, work_dir, out_dir)
    except BaseException:  # Ctrl-C as well: nothing half-made stays
        shutil.rmtree(work_dir, ignore_errors=True)
        raise
    return outcome["status"], _line(outcome, out_dir / spec.point_id)


def _search(
    spec: PointSpec,
    gpu: Gpu | None,
    out_dir: Path,
    server: ForkServer,
    progress: SweepProgress,
    guess: Guess | None,
    *,
    fresh: bool,
) -> tuple[str, str]:
    """Finds the largest batch of a point and publishes its measurement. Returns its status and a line for people."""
    assert spec.search is not None
    work_dir = out_dir / (spec.point_id + results.UNFINISHED_SUFFIX)

    def run(batch_size: int, is_trial: bool) -> dict[str, Any]:
        return _run_unpublished(spec.at_batch_size(batch_size, is_trial=is_trial), gpu, out_dir, server, progress)

    def note(text: str) -> None:
        progress.note(f"  {spec.workload.point.label}: {text}")

    try:
        with _writing_to(out_dir):
            log = max_batch.TrialLog(out_dir, spec.point_id, str(spec.search_hash()), fresh=fresh)
            if log.trials:
                note(f"{len(log.trials)} sizes were tried before: the search goes on")
            guessed = None if guess is None or gpu is None else guess(spec, gpu)
            found = max_batch.find_max_batch(spec.search, log, guessed, run, note)
            # Of a trial that ended the search, too, the folder is that of the point that was asked for.
            results.write_json(work_dir / results.POINT_FILE, spec.at_batch_size(found.batch_size).point_json())
            results.write_json(work_dir / results.OUTCOME_FILE, found.outcome)
        _publish(spec, work_dir, out_dir)
        if found.outcome["status"] != "failed":
            log.remove()
    except BaseException:
        shutil.rmtree(work_dir, ignore_errors=True)
        raise
    line = _line(found.outcome, out_dir / spec.point_id)
    return found.outcome["status"], f"batch {found.batch_size} {line}" if line == "ok" else line


def _run_unpublished(
    spec: PointSpec, gpu: Gpu | None, out_dir: Path, server: ForkServer, progress: SweepProgress
) -> dict[str, Any]:
    """Runs one process into a new unfinished folder, which is then whole. Returns the outcome."""
    with _writing_to(out_dir):
        work_dir = results.start_unfinished(out_dir, spec.point_id)
        results.write_json(work_dir / results.POINT_FILE, spec.point_json())
    outcome = _run_process(spec, gpu, work_dir, server, progress.step)
    with _writing_to(out_dir):
        if spec.ncu is not None and outcome["status"] == "ok":
            progress.stage("under Nsight Compute")
            outcome = ncu.with_counters(spec, gpu, work_dir, outcome)
            if why_not := outcome.get("ncu_why_not"):
                progress.note_once(f"No counters, so what they would say is modelled: {why_not}")
        shutil.rmtree(work_dir / worker.SCRATCH, ignore_errors=True)
    return outcome


def _publish(spec: PointSpec, work_dir: Path, out_dir: Path) -> None:
    with _writing_to(out_dir):
        fault("publish", spec.point_id)
        results.publish(work_dir, out_dir / spec.point_id)


def _run_process(
    spec: PointSpec,
    gpu: Gpu | None,
    work_dir: Path,
    server: ForkServer,
    on_step: Callable[[int, int], None],
) -> dict[str, Any]:
    """Runs the point's process and completes its files where it could not. Returns the outcome."""
    user_errors: list[UserError] = []

    def on_message(message: Sequence[Any]) -> None:
        if message[0] == "step":
            on_step(message[1], message[2])
        else:
            user_errors.append(message[1])

    sampler = GpuSampler(gpu)
    end = server.run(
        worker.measure_point,
        (spec, work_dir),
        log_file=work_dir / results.LOG_FILE,
        on_message=on_message,
        while_running=sampler.watching(),
    )
    if user_errors:
        raise user_errors[0]
    with _writing_to(work_dir.parent):
        if sampler.rows:
            results.write_arrow(work_dir / results.GPU_SAMPLES_FILE, sampler.rows, results.GPU_SAMPLES_SCHEMA)
        if not _is_whole(work_dir / results.ENVIRONMENT_FILE):
            results.write_json(work_dir / results.ENVIRONMENT_FILE, _outer_environment(spec))
        if end.exit_code or not _is_whole(work_dir / results.OUTCOME_FILE):
            outcome = {"status": "failed", "cause": _cause(end, work_dir)}
            results.write_json(work_dir / results.OUTCOME_FILE, outcome)
    return results.read_json(work_dir / results.OUTCOME_FILE)


def _is_whole(file: Path) -> bool:
    try:
        results.read_json(file)
    except results.PointFormatError:
        return False
    return True


def _outer_environment(spec: PointSpec) -> dict[str, Any]:
    """What can be said of the machine from outside, for a point whose process did not get to say it."""
    return {
        "git_revision": spec.revision,
        "device": spec.device,
        "cpu": cpu_name(),
        "packages": package_versions(),
    }


def _cause(end: ProcessEnd, work_dir: Path) -> str:
    if end.exit_code == 1:  # an exception: its last line is in the log
        log_file = work_dir / results.LOG_FILE
        lines = log_file.read_text(errors="replace").strip().splitlines() if log_file.is_file() else []
        if lines:
            return lines[-1][:500]
    return end.cause


def _line(outcome: dict[str, Any], folder: Path) -> str:
    if outcome["status"] == "ok":
        return "ok"
    log_file = folder / results.LOG_FILE
    log = f"; log: {log_file}" if outcome["status"] == "failed" and log_file.is_file() else ""
    return f"{outcome['status']}: {outcome['cause']}{log}"


@contextlib.contextmanager
def _writing_to(out_dir: Path) -> Iterator[None]:
    """Turns the system's refusal to write into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise results.disk_full(out_dir) from None
        raise UserError(f"cannot write to {out_dir}: {error.strerror}", cure="name another folder with --out") from None
