"""Real launchers and parsers as processes: started, watched from outside, counted to the last one they leave.

Every one runs without a GPU and without a hub, so that a test means the same on every machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tunescope import results

REPO = Path(__file__).resolve().parent.parent
TINY = ("--preset", "tiny", "--queries", "6")  # the shortest run there is: 3 steps of warm-up, 3 timed
NUM_STEPS = 6  # of TINY at batch 1
CS_SPARSE, CS_DENSE = "cs-k2-b1-tiny-cpu", "cs-k8-b1-tiny-cpu"  # two of its points
MARK = "TUNESCOPE_TEST_MARK"  # in the environment of a launcher and all that it starts
# One measures what a busy machine of 2 cores never reaches; a test that waits so long has failed anyway.
PATIENCE_S = 90


class Finished(NamedTuple):
    """code: exit status. out, err: all that was printed."""

    code: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """The tests' own environment with nothing in it that changes a run, then `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TUNESCOPE_", "HF_", "CUDA_"))}
    return kept | {
        "TUNESCOPE_PYTHON": sys.executable,
        "PYTHONPATH": str(REPO / "src"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": "/nonexistent/hf-home",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens on the discard port
        **changes,
    }


def run(*command: str | Path, cwd: Path = REPO, **changes: str) -> Finished:
    """Runs a command to its end."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def tunescope(*arguments: str | Path, **changes: str) -> Finished:
    return run(sys.executable, "-m", "tunescope", *arguments, **changes)


def measure(out: Path, points: str, *arguments: str, fault: str = "", cwd: Path = REPO) -> Finished:
    """`./mixtral_tp.sh` into `out`, as TINY."""
    launcher = [REPO / "mixtral_tp.sh", *TINY, "--out", out, "--points", points, *arguments]
    return run(*launcher, cwd=cwd, TUNESCOPE_FAULT=fault)


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of `throughput.py`."""
    done = run(sys.executable, REPO / "throughput.py", out, "--format", "json")
    assert done.code in (0, 2), done.err
    return json.loads(done.out)


def statuses(out: Path) -> dict[str, str]:
    """point id -> status. A point that were there twice would fail here."""
    rows = table(out)
    found = {row["point_id"]: row["status"] for row in rows}
    assert len(found) == len(rows)
    return found


def assert_all_whole(out: Path, *point_ids: str) -> None:
    """Exactly these points, each whole, ok and measured once; nothing half-made beside them."""
    beside = {results.SUPERSEDED_FOLDER, ".lock"}
    assert {entry.name for entry in out.iterdir()} - beside == set(point_ids)
    assert statuses(out) == dict.fromkeys(point_ids, "ok")
    for point_id in point_ids:
        steps = results.read_point(out / point_id).steps
        assert steps is not None
        assert steps["step"].to_pylist() == list(range(NUM_STEPS))
        assert not (out / point_id / "scratch").exists()


def assert_one_clear_paragraph(done: Finished, *texts: str) -> None:
    """Exit code 2 and an error that says what, why or what to do, and nothing of our source."""
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert any(text in done.err for text in ("  Cause: ", "  Cure:  ", "it must be "))
    assert done.err.count("tunescope: ") == 1
    for text in texts:
        assert text in done.err


def wait_until(is_so: Callable[[], Any], what: str) -> Any:
    """The first true answer of `is_so`."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (answer := is_so()):
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S} s in vain: {what}"
        time.sleep(0.02)
    return answer


class Launcher:
    """`./mixtral_tp.sh` in a session of its own, as a terminal would start it; killed at the end of its block."""

    script, shortest = REPO / "mixtral_tp.sh", TINY

    def __init__(self, out: Path, points: str, *arguments: str, fault: str = "") -> None:
        self.out = out
        self._mark = uuid.uuid4().hex
        self._err = out.with_name(f"{out.name}-{self._mark}.err")
        with self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [self.script, *self.shortest, "--out", out, "--points", points, *arguments],
                env=environment(**{MARK: self._mark, "TUNESCOPE_FAULT": fault}),
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
                # A script's background job ignores Ctrl-C, and so does all that it starts; a terminal's does not.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def err(self) -> str:
        return self._err.read_text()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """All that run with this launcher's mark: itself, the fork server, the point's process and any other."""
        return [process for process in psutil.process_iter() if _has_mark(process, self._mark)]

    def fork_server(self) -> psutil.Process:
        """The one that runs now; waits for it."""

        def find() -> psutil.Process | None:
            return next((p for p in self.processes() if "multiprocessing.forkserver" in _command(p)), None)

        return wait_until(find, "a fork server")

    def point_process(self) -> psutil.Process:
        return next(process for process in self.processes() if process.ppid() == self.fork_server().pid)

    def wait_until_hanging(self, stage: str, point_id: str = "") -> None:
        """Until the fault `stage:hang` is reached, by that point if one is named."""
        text = f"fault: hanging at {stage}"
        log = self.out / (point_id + results.UNFINISHED_SUFFIX) / results.LOG_FILE
        watched = log if point_id else self._err

        def is_hanging() -> bool:
            assert self.is_running(), self.err
            return watched.is_file() and text in watched.read_text(errors="replace")

        wait_until(is_hanging, f"{point_id or 'the launcher'} at stage {stage}")

    def kill(self) -> None:
        """kill -9 of the launcher alone."""
        self._process.kill()
        self._process.wait()

    def interrupt(self, number: signal.Signals, *, group: bool) -> Finished:
        """Signals the launcher, or its whole group as a terminal's Ctrl-C does, and waits for its end."""
        if group:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
        return Finished(self._process.wait(PATIENCE_S), "", self.err)

    def assert_no_process_left(self) -> None:
        wait_until(lambda: not self.processes(), f"the end of {[_command(p) for p in self.processes()]}")


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # ended meanwhile, or another user's
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
