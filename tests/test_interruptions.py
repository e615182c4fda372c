"""Whatever ends a run, and whenever: finished points stay, no process does, and the next run does the rest once."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from launching import (
    CS_DENSE,
    CS_SPARSE,
    REPO,
    TINY,
    Finished,
    Launcher,
    assert_all_whole,
    assert_one_clear_paragraph,
    measure,
    run,
    statuses,
    table,
)

from tunescope import results

MATH_SPARSE = "math-k2-b1-tiny-cpu"
TWO_POINTS = "cs:sparse:bs=1 math:sparse:bs=1"
THREE_POINTS = "cs:sparse:bs=1 cs:dense:bs=1 math:sparse:bs=1"
STOPPED = "stopped; finished points are kept, run the same command again to go on"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def one_done(recorded: Path) -> Path:
    """A results folder with CS_SPARSE, so that of TWO_POINTS one is still to do."""
    shutil.rmtree(recorded / CS_DENSE)
    return recorded


# --- kill -9 ---


def test_any_process_killed_at_any_stage_costs_one_point_and_the_next_run_makes_all_whole_once(tmp_path: Path) -> None:
    """One folder through it all: every launcher goes on where the one before was killed."""
    out = tmp_path / "throughput"
    for stage in ("start", "step", "writing"):
        with Launcher(out, THREE_POINTS, fault=f"{stage}:hang") as launcher:
            launcher.wait_until_hanging(stage, CS_SPARSE)
            launcher.point_process().kill()
            launcher.wait_until_hanging(stage, CS_DENSE)
            launcher.fork_server().kill()
            launcher.wait_until_hanging(stage, MATH_SPARSE)
            launcher.kill()
            launcher.assert_no_process_left()
        causes = {row["point_id"]: row["cause"] for row in table(out)}
        assert causes.keys() == {CS_SPARSE, CS_DENSE}  # the third is not there: its launcher was killed
        assert "SIGKILL" in causes[CS_SPARSE]
        assert "killed" in causes[CS_DENSE]

    with Launcher(out, THREE_POINTS, fault=f"publish:hang:{MATH_SPARSE}") as launcher:
        launcher.wait_until_hanging("publish")
        launcher.fork_server().kill()
        launcher.kill()
        launcher.assert_no_process_left()
    assert statuses(out) == {CS_SPARSE: "ok", CS_DENSE: "ok"}  # the third was whole, but not under its final name

    with Launcher(out, THREE_POINTS, fault="table:hang") as launcher:
        launcher.wait_until_hanging("table")
        launcher.fork_server().kill()
        launcher.kill()
        launcher.assert_no_process_left()

    again = measure(out, THREE_POINTS)
    assert again.code == 0
    assert "3 of 3 points are measured already" in again.err
    assert_all_whole(out, CS_SPARSE, CS_DENSE, MATH_SPARSE)


def test_a_fork_server_killed_while_it_imports_costs_one_point_and_sigterm_keeps_its_row(tmp_path: Path) -> None:
    out = tmp_path / "throughput"
    with Launcher(out, TWO_POINTS) as launcher:
        first = launcher.fork_server()
        first.kill()
        first.wait()
        launcher.fork_server()  # the second, for the second point
        assert_stopped(launcher.interrupt(signal.SIGTERM, group=False))
        launcher.assert_no_process_left()
    assert statuses(out) == {CS_SPARSE: "failed"}
    assert not results.find_unfinished(out)


# --- stopped, and taken ---


def assert_stopped(done: Finished) -> None:
    assert done.code == 130
    assert STOPPED in done.err
    assert "Traceback" not in done.err


def test_ctrl_c_keeps_what_is_finished_and_nobody_else_gets_in_before(one_done: Path) -> None:
    before = contents(one_done)
    with Launcher(one_done, TWO_POINTS, fault="step:hang") as launcher:
        launcher.wait_until_hanging("step", MATH_SPARSE)
        second = measure(one_done, TWO_POINTS)
        assert_one_clear_paragraph(second, "another launcher", f"(process {launcher.pid})", "--out")
        assert_stopped(launcher.interrupt(signal.SIGINT, group=True))
        launcher.assert_no_process_left()
    assert contents(one_done) | {".lock": b""} == before | {".lock": b""}  # nothing half-made, nothing touched


# --- one point ends badly ---


def test_error_and_out_of_memory_are_rows_and_only_the_error_is_tried_again(one_done: Path) -> None:
    failing = measure(one_done, TWO_POINTS, fault="start:error")
    assert failing.code == 1
    assert "failed: RuntimeError: injected error; log: " in failing.err
    (row,) = [row for row in table(one_done) if row["status"] == "failed"]
    assert (row["point_id"], row["cause"]) == (MATH_SPARSE, "RuntimeError: injected error")
    assert "RuntimeError: injected error" in (one_done / MATH_SPARSE / results.LOG_FILE).read_text()

    small = measure(one_done, f"{TWO_POINTS} cs:dense:bs=1", fault="step:oom:math")
    assert small.code == 0
    assert statuses(one_done) == {CS_SPARSE: "ok", MATH_SPARSE: "oom", CS_DENSE: "ok"}
    assert not results.find_unfinished(one_done)

    again = measure(one_done, f"{TWO_POINTS} cs:dense:bs=1")
    assert again.code == 0
    assert "3 of 3 points are measured already" in again.err


# --- no space ---


def test_a_disk_that_fills_up_in_the_last_moment(one_done: Path) -> None:
    before = contents(one_done)
    done = measure(one_done, TWO_POINTS, fault="publish:disk-full")
    assert_one_clear_paragraph(done, "no space is left on the disk", "finished points are kept")
    assert contents(one_done) | {".lock": b""} == before | {".lock": b""}


@pytest.mark.parametrize("free_kb", [0, 20])
def test_a_disk_that_is_really_full(one_done: Path, tmp_path: Path, free_kb: int) -> None:
    """A file system that the finished point fits on, and of another one nothing or a part."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    small, copied = tmp_path / "small disk", tmp_path / "copied"
    small.mkdir()
    if subprocess.run([*mount, 'mount -t tmpfs tmpfs "$0"', small], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system")
    script = (
        'mount -t tmpfs -o size=100k tmpfs "$0" && cp -r "$1" "$0/out" && cd "$0" && '
        "{ head -c $(($(df -k --output=avail . | tail -n 1) * 1024 - $2 * 1024)) /dev/zero > filler; } && shift 2 && "
        '"$@"; code=$?; cp -r out "$COPIED"; exit $code'
    )
    launcher = [REPO / "mixtral_tp.sh", *TINY, "--out", small / "out", "--points", TWO_POINTS]
    done = run(*mount, script, small, one_done, str(free_kb), *launcher, COPIED=str(copied))
    assert_one_clear_paragraph(done, "no space is left on the disk", "finished points are kept")
    assert contents(copied) | {".lock": b""} == contents(one_done) | {".lock": b""}


# --- measured again ---


def test_fresh_and_changed_settings_measure_again_and_keep_the_old_result_aside(one_done: Path) -> None:
    def planned(*arguments: str) -> str:
        return measure(one_done, "cs:sparse:bs=1", "--dry-run", *arguments).out.rpartition(")")[2].strip()

    assert planned() == "done, skipped"
    assert planned("--reentrant") == planned("--queries", "7") == planned("--fresh") == "to run"

    old = contents(one_done / CS_SPARSE)
    assert measure(one_done, "cs:sparse:bs=1", "--fresh").code == 0
    assert contents(one_done / results.SUPERSEDED_FOLDER / f"{CS_SPARSE}~1") == old
    assert contents(one_done / CS_SPARSE) != old
    assert_all_whole(one_done, CS_SPARSE)  # what was superseded is in no table


def test_only_this_folders_own_leftovers_are_removed(one_done: Path) -> None:
    """A folder below may be another launcher's --out, with a point in the making."""
    own, foreign = one_done / "a.unfinished", one_done / "below" / "b.unfinished"
    for folder in (own, foreign):
        folder.mkdir(parents=True)
    assert measure(one_done, "cs:sparse:bs=1").code == 0
    assert (own.exists(), foreign.exists()) == (False, True)
