"""The launchers' way into an environment, as processes: real venvs, real pip, tiny packages.

Each test has a small repository of its own: the real launchers and bootstrap, a two-line tunescope,
and requirements that pip finds as wheels in a folder beside it. No network.
"""

import ast
import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from small_clone import (
    PARSERS,
    REPO,
    STDLIB_ONLY,
    Clone,
    bare_python,
    edit,
    environment,
    files_in,
    installed,
    shim,
    wheel,
)

FORKING_CLI = """
import multiprocessing
def work():
    print("the child ran in", work.__module__, flush=True)
def main():
    child = multiprocessing.get_context("forkserver").Process(target=work)
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


# --- old systems ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PARSERS, "src/tunescope/__init__.py", *(f"src/tunescope/{n}" for n in STDLIB_ONLY)])
def test_parses_on_python_3_8(path: str) -> None:
    ast.parse((REPO / path).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("old", ["python3.8", "python3.9", "python3.10"])
def test_an_old_python3_finds_a_newer_one(clone: Clone, old: str) -> None:
    path = shutil.which(old)
    if not path or subprocess.run([path, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no {old} here")
    shim(clone.bin / "python3", f'exec "{path}" "$@"')
    shim(clone.bin / "python3.12", "echo 'no such version' >&2; exit 127")  # as pyenv's shims do
    shim(clone.bin / "python3.11", f'exec "{bare_python()}" "$@"')
    code, out, err = clone.run("throughput.py", "DIR")
    assert (code, out.split(" by ")[0]) == (0, "ran ['table', 'throughput', 'DIR']"), err


def test_no_new_enough_python(clone: Clone) -> None:
    """Every Python here is too old if 3.90 is asked for."""
    here = clone.root / "src/tunescope/_environment.py"
    edit(here, "OLDEST_PYTHON = (3, 11)", "OLDEST_PYTHON = (3, 90)")
    edit(here, "NEWEST_PYTHON = (3, 13)", "NEWEST_PYTHON = (3, 91)")
    code, out, err = clone.run("mixtral_tp.sh")
    assert (code, out) == (2, "")
    assert "no Python 3.90 to 3.91 to make .venv with" in err
    assert "Cure:  install one" in err
    assert not clone.venv.exists()


def test_no_python3_at_all(clone: Clone) -> None:
    for name in ("bash", "readlink", "dirname"):
        (clone.bin / name).symlink_to(str(shutil.which(name)))
    (clone.bin / "python3").unlink()
    code, _, err = clone.run("mixtral_tp.sh", PATH=str(clone.bin))
    assert code == 2
    assert "there is no python3 on the PATH" in err


# --- an environment that is there -----------------------------------------------------------------


def test_an_environment_that_satisfies_is_used_in_process(clone: Clone, tmp_path: Path) -> None:
    active = environment(tmp_path / "active", clone, "readingside", "trainingstack")
    shim(clone.bin / "python3", f'exec "{active}" "$@"')
    code, out, err = clone.run("mixtral_tp.sh", "--preset", "tiny")
    command = ["run", "throughput", "--model", "mixtral", "--preset", "tiny"]
    assert (code, err) == (0, "")
    assert out == f"ran {command} by {active} as tunescope.__main__\nclean\n"
    assert not clone.venv.exists()


@pytest.mark.parametrize("is_in_process", [True, False])
def test_a_fork_server_can_import_the_main_module_again(clone: Clone, tmp_path: Path, is_in_process: bool) -> None:
    """Every measured point runs in such a child."""
    (clone.root / "src/tunescope/cli.py").write_text(FORKING_CLI)
    active = environment(tmp_path / "active", clone, "readingside", "trainingstack")
    env = {"VIRTUAL_ENV": str(tmp_path / "active")}
    if is_in_process:
        shim(clone.bin / "python3", f'exec "{active}" "$@"')
    code, out, err = clone.run("mixtral_tp.sh", **env)
    assert (code, out, err) == (0, "the child ran in tunescope.cli\n", "")


def test_the_virtual_env_is_used_from_another_python(clone: Clone, tmp_path: Path) -> None:
    active = environment(tmp_path / "active", clone, "readingside")
    code, out, err = clone.run("throughput.py", "DIR", VIRTUAL_ENV=str(tmp_path / "active"))
    assert (code, err) == (0, "")
    assert out == f"ran ['table', 'throughput', 'DIR'] by {active} as tunescope.__main__\nclean\n"


def test_what_speaks_of_a_run_is_asked_of_the_environment_that_would_run(clone: Clone, tmp_path: Path) -> None:
    """A base environment knows no versions of the training stack: it would call every finished point `to run`."""
    reading = {"VIRTUAL_ENV": str(tmp_path / "reading")}
    environment(tmp_path / "reading", clone, "readingside")
    code, out, err = clone.run("mixtral_tp.sh", "--dry-run", **reading)
    assert (code, err) == (0, "")  # there is no other environment: this one answers, and nothing is installed
    assert f"by {tmp_path / 'reading'}" in out
    assert clone.run("mixtral_tp.sh", **reading)[0] == 0  # makes .venv
    assert f"by {clone.venv}" in clone.run("mixtral_tp.sh", "--dry-run", **reading)[1]
    assert f"by {tmp_path / 'reading'}" in clone.run("throughput.py", "DIR", **reading)[1]


def test_tunescope_python_is_used_unchecked(clone: Clone) -> None:
    code, out, err = clone.run("mixtral_tp.sh", "--no-install", TUNESCOPE_PYTHON=bare_python())
    assert (code, err) == (0, "")
    assert f"by {bare_python()} " in out
    assert "--no-install" not in out


def test_tunescope_python_that_is_none(clone: Clone) -> None:
    code, _, err = clone.run("mixtral_tp.sh", TUNESCOPE_PYTHON="/no/such/python")
    assert code == 2
    assert "TUNESCOPE_PYTHON=/no/such/python" in err


def test_no_install_refuses(clone: Clone) -> None:
    code, out, err = clone.run("mixtral_tp.sh", "--no-install", "--preset", "tiny")
    assert (code, out) == (2, "")
    assert "Cause: --no-install" in err
    assert "Cure:" in err
    assert not clone.venv.exists()


# --- the driver -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "arguments", "visible", "is_refused"),
    [
        ("535.104.05", [], "0", True),
        ("535.104.05", ["--preset", "full"], "0", True),
        ("535.104.05", ["--preset", "tiny"], "0", False),
        ("535.104.05", ["--preset=tiny"], "0", False),
        ("535.104.05", ["--dry-run"], "0", False),
        ("535.104.05", ["--help"], "0", False),
        ("535.104.05", [], "", False),
        ("580.65.06", [], "0", False),
    ],
)
def test_an_old_driver_is_told_before_any_installation(
    clone: Clone, driver: str, arguments: list[str], visible: str, is_refused: bool
) -> None:
    shim(clone.bin / "nvidia-smi", f"echo {driver}")
    env = {"CUDA_VISIBLE_DEVICES": visible}
    code, _, err = clone.run("mixtral_tp.sh", *arguments, "--no-install", **env)
    assert code == 2  # refused: for the driver, or else by --no-install
    assert (f"driver is {driver}" in err) is is_refused
    assert not clone.venv.exists()


def test_an_own_build_of_torch_may_have_an_older_driver(clone: Clone, tmp_path: Path) -> None:
    clone.require("train", wheel(clone.wheels, "torch", "2.11.0"))
    shim(clone.bin / "nvidia-smi", "echo 535.104.05")
    own = wheel(clone.wheels, "torch", "2.11.0+cu126")
    active = environment(tmp_path / "active", clone, "readingside", str(own))
    shim(clone.bin / "python3", f'exec "{active}" "$@"')
    assert clone.run("mixtral_tp.sh")[0] == 0


# --- making .venv ---------------------------------------------------------------------------------


def test_a_parser_gets_the_reading_side_and_a_launcher_adds_the_rest(clone: Clone) -> None:
    code, out, err = clone.run("LLaMA-Factory/throughput.py", "DIR")
    assert code == 0, err
    assert "Installing into" in err
    assert out.startswith(f"ran ['table', 'throughput', 'DIR'] by {clone.venv}/bin/python ")
    assert installed(clone) >= {"readingside"}
    assert "trainingstack" not in installed(clone)

    assert clone.run("throughput.py", "DIR")[2] == ""  # nothing to say the second time
    assert clone.run("mixtral_tp.sh", "--dry-run")[2] == ""
    assert clone.run("mixtral_tp.sh", "--no-install")[0] == 2

    before = (clone.venv / "pyvenv.cfg").stat().st_mtime_ns
    code, out, err = clone.run("LLaMA-Factory/mixtral_tp.sh")
    assert code == 0, err
    assert installed(clone) >= {"readingside", "trainingstack"}
    assert (clone.venv / "pyvenv.cfg").stat().st_mtime_ns == before
    assert not (clone.root.parent / "home").exists()  # no cache of pip's, nothing outside


def test_two_at_once_make_it_once(clone: Clone) -> None:
    both = [clone.start("mixtral_tp.sh"), clone.start("throughput.py", "DIR")]
    errs = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errs
    assert sum("Installing into" in err for err in errs) in (1, 2)  # 2: base first, then the rest
    assert sum("waiting for it" in err for err in errs) == 1
    assert sum("unfinished" in err for err in errs) == 0


def test_two_of_the_same_make_it_once(clone: Clone) -> None:
    both = [clone.start("mixtral_tp.sh"), clone.start("mixtral_tp.sh")]
    errs = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errs
    assert sum("Installing into" in err for err in errs) == 1
    assert sum("waiting for it" in err for err in errs) == 1


def test_a_killed_set_up_is_made_anew(clone: Clone) -> None:
    killed = clone.start("mixtral_tp.sh")
    clone.wait_for_marker("unfinished")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=120)
    (clone.venv / "half a package").write_text("")
    code, _, err = clone.run("mixtral_tp.sh")
    assert code == 0, err
    assert "unfinished or broken; starting it anew" in err
    assert not (clone.venv / "half a package").exists()
    assert clone.marker.read_text() == "complete"


def test_pip_that_outlives_its_launcher_keeps_the_lock(clone: Clone) -> None:
    """Or it would write into the .venv that the next run empties and makes anew."""
    gate = clone.root.parent / "gate"
    os.mkfifo(gate)
    edit(
        clone.root / "src/tunescope/_venv.py",
        '"-m", "pip", "install",',
        f'"-c", "open({str(gate)!r}).read()", "install",',
    )
    launcher = clone.start("mixtral_tp.sh")
    with gate.open("w"):  # opens when the stand-in for pip reads: it runs
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(timeout=60)
        with (clone.root / ".venv.lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_venv_whose_python_is_gone_is_made_anew(clone: Clone) -> None:
    assert clone.run("throughput.py", "DIR")[0] == 0
    for python in (clone.venv / "bin").glob("python*"):
        python.unlink()
    code, out, err = clone.run("throughput.py", "DIR")
    assert (code, "starting it anew" in err) == (0, True), err
    assert f"by {clone.venv}/bin/python " in out


@pytest.mark.parametrize("is_link", [False, True])
def test_the_users_own_venv_is_left_as_it_is(clone: Clone, tmp_path: Path, is_link: bool) -> None:
    own = tmp_path / "elsewhere" if is_link else clone.venv
    environment(own, clone)
    if is_link:
        clone.venv.symlink_to(own)
    before = files_in(own)
    code, _, err = clone.run("mixtral_tp.sh")
    assert code == 2
    assert f"{clone.venv} lacks readingside==1.2 (not there), trainingstack==3.0" in err
    assert "-m pip install -r" in err
    assert files_in(own) == before

    environment(own, clone, "readingside", "trainingstack")
    code, out, err = clone.run("mixtral_tp.sh")
    assert (code, err) == (0, "")
    assert f"by {clone.venv}/bin/python " in out


def test_a_package_that_is_not_what_the_lock_says_is_refused(clone: Clone) -> None:
    tampered = {"readingside.py": b"import os"}
    wheel(clone.wheels, "readingside", "1.2", tampered)
    code, out, err = clone.run("throughput.py", "DIR")
    assert (code, out) == (2, "")
    assert "DO NOT MATCH THE HASHES" in err
    assert "pip could not install the packages" in err
    assert clone.marker.read_text() == "unfinished"
