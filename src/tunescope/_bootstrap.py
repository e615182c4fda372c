"""Start tunescope in a Python environment that holds what the command needs; make one if none does.

    python3 src/tunescope/_bootstrap.py run throughput --model mixtral

Every launcher and parser comes through here. The first of these that will do is used:
$TUNESCOPE_PYTHON (as it is, unchecked), the active environment, <repository>/.venv, a new .venv.
Nothing outside the repository is written, and nothing about an environment is remembered between
runs: the check takes 30 ms, and a remembered answer would outlive the next `pip install`.

This file, _environment.py and _venv.py use the standard library only, and parse and run on
Python 3.8: older systems must be able to read what they are told. What they start needs 3.11.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Optional, Tuple

if __name__ == "__main__":
    # Run as a file. Its own folder goes: it would offer `data`, `train`... as top-level names.
    _package = Path(__file__).resolve().parent
    sys.path[:] = [str(_package.parent)] + [p for p in sys.path if p != str(_package)]

from tunescope import _venv
from tunescope._environment import (
    NEEDS,
    REPO,
    SRC,
    Answer,
    answer_of,
    ask,
    check,
    refuse,
    say,
)

# On an older one the CUDA 13 build of torch sees no GPU, and says nothing.
OLDEST_CUDA13_DRIVER = 580


def main(argv: List[str]) -> None:
    """Run `tunescope argv...` in the right environment.

    `--no-install` anywhere forbids to make or change .venv; tunescope does not see it.
    `--python-for NEED` prints the interpreter instead of starting it (test.sh).
    """
    no_install = "--no-install" in argv
    argv = [arg for arg in argv if arg != "--no-install"]
    only_print = argv[:1] == ["--python-for"]
    try:
        python = choose_python(argv[1] if only_print else need_of(argv), argv, no_install)
    except KeyboardInterrupt:
        say("set-up interrupted; the next run starts it again.")
        sys.exit(130)
    except OSError as error:
        refuse(
            f"could not set up {REPO / '.venv'}: {error}.",
            cure="give this folder write permission and room; or name an environment that has the "
            "packages, TUNESCOPE_PYTHON=/path/to/python.",
        )
    if only_print:
        print(python)
    else:
        start(python, argv)


def need_of(argv: List[str]) -> str:
    """Which of NEEDS a command line has; a table, a help text, a list of points: never torch."""
    command = argv[0] if argv else ""
    if {"--help", "-h"}.intersection(argv):
        return "base"
    if command in ("run", "train"):
        return "base" if "--dry-run" in argv else "train"
    if command == "download":
        return "train" if "--dry-run" not in argv and converts(argv) else "download"
    return "base"


def converts(argv: List[str]) -> bool:
    """Whether a download takes in BlackMamba, whose file torch reads to convert it; all models do if none is named."""
    named = [value.partition("=")[2] for value in argv if value.startswith("--model=")]
    named += [value for flag, value in zip(argv, argv[1:]) if flag == "--model"]
    return not named or "blackmamba" in named


def answers_for_training(argv: List[str]) -> bool:
    """Commands that need no torch, but speak of the environment that a training run would have."""
    return argv[:1] == ["doctor"] or "--dry-run" in argv


def choose_python(need_name: str, argv: List[str], no_install: bool) -> str:
    """The interpreter to use; as a last resort, .venv with the packages just installed."""
    given = os.environ.get("TUNESCOPE_PYTHON")
    if given:
        python = shutil.which(given)
        if python is None:
            refuse(
                f"TUNESCOPE_PYTHON={given} is not a program that can be run.",
                cure="give the full path of a Python interpreter, or unset the variable.",
            )
        return python
    found = None
    if need_name == "base" and answers_for_training(argv):
        found = find_satisfied("train")  # of the environment that would train, where there is one
    found = found or find_satisfied(need_name)
    if trains_on_gpu(argv):
        refuse_old_driver(torch_version=found[1]["torch"] if found else "")
    if found:
        return found[0]
    return _venv.make(need_name, no_install)


def find_satisfied(need_name: str) -> Optional[Tuple[str, Answer]]:
    """The first environment at hand that satisfies the need: (interpreter, its answer)."""
    here = check(NEEDS[need_name])
    if not here["unmet"]:
        return sys.executable, here
    active = os.environ.get("VIRTUAL_ENV")
    others = [os.path.join(active, "bin", "python") if active else None, shutil.which("python3")]
    if _venv.state() in (_venv.COMPLETE, _venv.OF_THE_USER):
        others.append(str(_venv.PYTHON))
    # All asked at once: one answer takes 0.1 s, twice that behind a version manager's shim.
    asked = [(p, ask(p, need_name)) for p in dict.fromkeys(others) if p and p != sys.executable]
    answers = [(python, answer_of(process)) for python, process in asked]
    return next(((python, answer) for python, answer in answers if not answer["unmet"]), None)


def start(python: str, argv: List[str]) -> None:
    """Become tunescope, by PYTHONPATH and not by an install: this folder's files are what runs."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(SRC)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SRC), *others])
    if python != sys.executable:
        # -P: `-m` alone would put the current folder first on sys.path, whatever it holds.
        os.execv(python, [python, "-P", "-m", "tunescope", *argv])
    sys.path[:] = [str(SRC)] + [p for p in sys.path if p not in (str(SRC), str(REPO))]
    sys.argv[1:] = argv
    # alter_sys: it is sys.modules["__main__"], which a fork server's children import again by name.
    runpy.run_module("tunescope", run_name="__main__", alter_sys=True)


def trains_on_gpu(argv: List[str]) -> bool:
    if argv[:1] not in (["run"], ["train"]) or {"--help", "-h", "--dry-run"}.intersection(argv):
        return False
    is_tiny = "--preset=tiny" in argv or ("--preset", "tiny") in zip(argv, argv[1:])
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not is_tiny and not is_hidden


def refuse_old_driver(torch_version: str) -> None:
    """Refuse if the GPU's driver is too old for this torch; "": the pinned one, yet to come."""
    build = torch_version.partition("+")[2]
    if build and not build.startswith("cu13"):
        return  # the user's own build of torch, for CUDA 12 or another maker's GPU
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(
            query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=True
        ).stdout.decode()
    except (OSError, subprocess.SubprocessError):
        return  # no GPU, or none that answers; the command itself looks again
    version = re.match(r"\s*(\d+)[.\d]*", out)
    if version and int(version.group(1)) < OLDEST_CUDA13_DRIVER:
        refuse(
            f"the GPU's driver is {version.group().strip()}; the pinned torch needs {OLDEST_CUDA13_DRIVER} or newer.",
            cause="torch 2.11 from PyPI is built for CUDA 13.",
            cure=f"update the driver to {OLDEST_CUDA13_DRIVER}; or name a Python with your own "
            "build of torch, TUNESCOPE_PYTHON=/path/to/python; or leave the GPU out, "
            'CUDA_VISIBLE_DEVICES="" with --preset tiny.',
        )


if __name__ == "__main__":
    main(sys.argv[1:])
