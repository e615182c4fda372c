"""Make <repository>/.venv. Standard library only; parses and runs on Python 3.8, see _bootstrap.py.

Two runs at once: a file lock; the second waits and takes what the first made. A run killed in the
middle: the marker file says so, and the next one starts anew. A .venv without the marker is the
user's and is never changed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from typing import IO, Iterator, List

from tunescope._environment import (
    NEEDS,
    NEWEST_PYTHON,
    OLDEST_PYTHON,
    REPO,
    Need,
    answer_of,
    ask,
    dotted,
    package_name,
    refuse,
    requirement_lines,
    runs,
    say,
    shortened,
)

FOLDER = REPO / ".venv"
PYTHON = FOLDER / "bin" / "python"
MARKER = FOLDER / ".made-by-tunescope"  # its text is UNFINISHED or COMPLETE
ABSENT, OF_THE_USER, UNFINISHED, COMPLETE = "absent", "of the user", "unfinished", "complete"

STILL_INSTALLING_EVERY_S = 30
# Settings for the machine's own Python that would send the packages elsewhere or forbid our pins.
FOREIGN_PIP_SETTINGS = ("PIP_TARGET", "PIP_PREFIX", "PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV")


def state() -> str:
    if not os.path.lexists(str(FOLDER)):
        return ABSENT
    if MARKER.is_file() and not FOLDER.is_symlink():
        return COMPLETE if MARKER.read_text() == COMPLETE else UNFINISHED
    # An empty folder is what a set-up killed in its first millisecond leaves.
    return ABSENT if FOLDER.is_dir() and not any(FOLDER.iterdir()) else OF_THE_USER


def make(need_name: str, no_install: bool) -> str:
    """The interpreter of a .venv that satisfies the need: made, completed, or waited for."""
    import fcntl  # not at the top: parsers also run where there is none

    need = NEEDS[need_name]
    price = f"up to {need.minutes} min and {need.disk_gb} GB"
    lacking = shortened(answer_of(ask(sys.executable, need_name))["unmet"])
    what = f"no Python environment here has what this command needs; python3 lacks {lacking}"
    if no_install:
        refuse(
            f"{what}.",
            cause="--no-install forbids to install it.",
            cure=f"run again without --no-install ({price}, into {FOLDER}); or activate an "
            "environment that has requirements.txt; or set TUNESCOPE_PYTHON=/path/to/python.",
        )
    with open(str(REPO / ".venv.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is setting up {FOLDER}; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        found = state()
        unmet = [] if found == ABSENT else answer_of(ask(str(PYTHON), need_name))["unmet"]
        if found == OF_THE_USER and unmet:
            refuse(
                f"{FOLDER} lacks {shortened(unmet)}.",
                cause="tunescope did not make this folder, so it leaves it as it is.",
                cure=f"{PYTHON} -m pip install -r {REPO / 'requirements.txt'}; or move the folder away and run again.",
            )
        if found != OF_THE_USER and (found != COMPLETE or unmet):
            say(f"{what}. Installing into {FOLDER}: {price}, once.")
            fill(found, need_name, lock)
    return str(PYTHON)


def fill(found: str, need_name: str, lock: IO[str]) -> None:
    """Make or complete our .venv. The marker says UNFINISHED all the while."""
    if found != COMPLETE or not runs(str(PYTHON)):
        base_python = find_base_python()
        if found != ABSENT:
            say("what .venv holds is unfinished or broken; starting it anew.")
        FOLDER.mkdir(exist_ok=True)
        MARKER.write_text(UNFINISHED)
        empty_but_for_marker()
        command = [base_python, "-I", "-m", "venv", str(FOLDER)]
        if subprocess.call(command, stdout=sys.stderr) != 0:
            refuse(f"{' '.join(command)} failed; its message is above.")
    MARKER.write_text(UNFINISHED)
    pip_install(need_name, lock)
    unmet = answer_of(ask(str(PYTHON), need_name))["unmet"]
    assert not unmet, f"requirements.lock does not satisfy the requirements: {unmet}"
    MARKER.write_text(COMPLETE)


def empty_but_for_marker() -> None:
    """The marker stays: killed while 6 GB go, this must not leave what looks like the user's."""
    for entry in FOLDER.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(str(entry))
        elif entry != MARKER:
            entry.unlink()


def find_base_python() -> str:
    """The newest Python on the PATH that can make the environment.

    Each one is run, not only found: a version manager puts names on the PATH that do not work.
    """
    seen = [f"python3 is {sys.version.split()[0]}"]
    for path in dict.fromkeys(pythons_on_path()):
        version = runs(path)
        if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
            if runs(path, "venv, ensurepip"):
                return path
            seen.append(f"{path} has no venv module (apt install python{dotted(version)}-venv)")
    refuse(
        f"no Python {dotted(OLDEST_PYTHON)} to {dotted(NEWEST_PYTHON)} to make .venv with: {'; '.join(seen)}.",
        cure="install one and run again: apt install python3.12-venv; or, without root, "
        "`uv python install 3.12` or `conda create -n tunescope python=3.12`.",
    )


def pythons_on_path() -> Iterator[str]:
    minors = range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1)
    for name in [f"python3.{minor}" for minor in minors] + ["python3"]:
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                yield path
    yield sys.executable


def pip_install(need_name: str, lock: IO[str]) -> None:
    """Install what the need pulls in, in exact and hash-checked versions."""
    need = NEEDS[need_name]
    free_gb = shutil.disk_usage(str(FOLDER)).free / 1e9
    wanted_gb = 1.5 * need.disk_gb  # pip keeps the downloads beside what it unpacks
    if free_gb < wanted_gb:
        refuse(
            f"installing into {FOLDER} takes {wanted_gb:.0f} GB; {free_gb:.1f} GB are free.",
            cure="make room; or make an environment on another disk and set TUNESCOPE_PYTHON=/path/to/python.",
        )
    pins, scratch = FOLDER / f"requirements-{need_name}.lock", FOLDER / "tmp"
    pins.write_text(locked_subset(need), encoding="utf-8")
    scratch.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN_PIP_SETTINGS}
    env.update(PIP_USER="0", TMPDIR=str(scratch))  # many a /tmp is too small for torch
    command = [str(PYTHON), "-I", "-m", "pip", "install", "--require-hashes", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "-r", str(pins)]
    shows_progress = sys.stderr.isatty()
    begin_s = time.monotonic()
    # pip inherits the lock: if it outlives us, the next run waits for it and then starts anew.
    pip = subprocess.Popen(
        command + ([] if shows_progress else ["--quiet"]),
        stdout=sys.stderr,  # a table is often being redirected from stdout
        env=env,
        pass_fds=(lock.fileno(),),
    )
    while True:
        try:
            code = pip.wait(timeout=None if shows_progress else STILL_INSTALLING_EVERY_S)
            break
        except subprocess.TimeoutExpired:
            say(f"still installing, {time.monotonic() - begin_s:.0f} s so far.")
    shutil.rmtree(str(scratch), ignore_errors=True)
    if code != 0:
        refuse(
            f"pip could not install the packages into {FOLDER} (exit status {code}).",
            cause="pip's own message is above; mostly the network, a proxy or a partial mirror.",
            cure="mend that and run again (another index: PIP_INDEX_URL); or name an environment "
            "that has the packages, TUNESCOPE_PYTHON=/path/to/python.",
        )
    say(f"installed in {time.monotonic() - begin_s:.0f} s.")


def locked_subset(need: Need) -> str:
    """The part of requirements.lock that the need pulls in, so that reading a table costs no torch.

    A part, because pip takes hashes from a requirements file only, not from a constraint on a
    looser one. The lock's `# via` comments name all that ask for a package: they lead to the part.
    """
    text = (REPO / "requirements.lock").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    kept: List[str] = [block for block in blocks if package_name(block) in need.packages]
    wanted = {f"-r {file}" for name in need.files for file, _ in requirement_lines(name)}
    wanted.update(need.packages)
    num_kept = -1
    while num_kept != len(kept):  # until nothing more is pulled in
        num_kept = len(kept)
        kept = [b for b in blocks if b in kept or wanted.intersection(asked_for_by(b))]
        wanted.update(map(package_name, kept))
    return "".join(kept)


def asked_for_by(block: str) -> List[str]:
    """Names after `# via`: on its line if there is one, on lines of their own if there are more."""
    return re.findall(r"^    #(?: via |   )(\S.*)$", block, re.MULTILINE)
