"""What a command needs, and whether a Python environment has it.

Run as a file by an interpreter it answers for that interpreter: `python _environment.py train`.
Standard library only; parses and runs on Python 3.8, see _bootstrap.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Tuple

SRC = Path(__file__).resolve().parent.parent
REPO = SRC.parent
OLDEST_PYTHON = (3, 11)  # llamafactory 0.9.5 asks for it
NEWEST_PYTHON = (3, 13)  # requirements.lock is compiled for 3.11 to here

Answer = Dict[str, Any]  # {"unmet": [reason, ...], "torch": version or ""}


class Need(NamedTuple):
    """What a command imports: whole requirements files, and single packages out of train.txt."""

    files: Tuple[str, ...]
    packages: Tuple[str, ...]
    minutes: int  # about what an installation takes on a fast line,
    disk_gb: int  # and the room it fills: said beforehand


NEEDS = {
    "base": Need(("requirements/base.txt",), (), minutes=1, disk_gb=1),
    "download": Need(("requirements/base.txt",), ("huggingface-hub",), minutes=1, disk_gb=1),
    "train": Need(("requirements.txt",), (), minutes=3, disk_gb=6),
    "dev": Need(("requirements.txt", "requirements/dev.txt"), (), minutes=3, disk_gb=6),
}


def requirement_lines(name: str) -> Iterator[Tuple[str, str]]:
    """(file, requirement) for each line of a requirements file, `-r` lines followed."""
    for raw in (REPO / name).read_text(encoding="utf-8").splitlines():
        line = raw.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from requirement_lines(line[3:].strip())
        elif line:
            yield name, line


def requirements_of(need: Need) -> List[str]:
    lines = [line for name in need.files for _, line in requirement_lines(name)]
    pins = [line for _, line in requirement_lines("requirements/train.txt")]
    return lines + [line for line in pins if package_name(line) in need.packages]


def package_name(text: str) -> str:
    """The normalised name that a requirement, or a line of requirements.lock, starts with."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text)
    assert match, f"no package name in {text!r}"
    return re.sub(r"[._-]+", "-", match.group()).lower()


def check(need: Need) -> Answer:
    """The answer for the interpreter this runs in. 30 ms: it imports nothing it looks for."""
    if sys.version_info < OLDEST_PYTHON:
        reason = f"Python {dotted(OLDEST_PYTHON)} (this is {sys.version.split()[0]})"
        return {"unmet": [reason], "torch": ""}
    from importlib import metadata

    try:
        from packaging.requirements import Requirement
    except ImportError:
        return {"unmet": ["packaging (not there)"], "torch": ""}

    def version_of(name: str) -> str:
        try:
            return metadata.version(name) or ""
        except metadata.PackageNotFoundError:
            return ""

    unmet = []
    for requirement in map(Requirement, requirements_of(need)):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        version = version_of(requirement.name)
        # A local build such as 2.11.0+cu130 satisfies ==2.11.0 (PEP 440).
        if not version or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement} ({'has ' + version if version else 'not there'})")
    return {"unmet": unmet, "torch": version_of("torch")}


def ask(python: str, need_name: str) -> "Optional[subprocess.Popen[str]]":
    """Start `check` in another interpreter; `answer_of` waits for it."""
    try:
        return subprocess.Popen(
            [python, __file__, need_name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
        )
    except OSError:
        return None


def answer_of(process: "Optional[subprocess.Popen[str]]") -> Answer:
    """What `ask` got back. An interpreter that does not run satisfies nothing."""
    try:
        answer: Answer = json.loads(process.communicate()[0] if process else "")
    except ValueError:
        return {"unmet": ["a Python that runs"], "torch": ""}
    return answer


def runs(python: str, modules: str = "sys") -> Tuple[int, ...]:
    """(major, minor) of an interpreter that runs and imports the modules; otherwise ()."""
    code = f"import sys, {modules}; print(*sys.version_info[:2])"
    command = [python, "-I", "-c", code]
    try:
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(map(int, out.split()))


def say(text: str) -> None:
    print(f"tunescope: {text}", file=sys.stderr, flush=True)


def refuse(what: str, *, cause: str = "", cure: str = "") -> NoReturn:
    """End with the words of tunescope.errors.UserError, which Python 3.8 cannot import."""
    parts = [what, f"  Cause: {cause}" if cause else "", f"  Cure:  {cure}" if cure else ""]
    say("\n".join(part for part in parts if part))
    sys.exit(2)


def dotted(version: Tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def shortened(reasons: List[str], num_shown: int = 3) -> str:
    num_more = len(reasons) - num_shown
    return ", ".join(reasons[:num_shown]) + (f" and {num_more} more" if num_more > 0 else "")


if __name__ == "__main__":
    # Nothing of src/tunescope may pass for a top-level module (`data`, `train`) in this process.
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    print(json.dumps(check(NEEDS[sys.argv[1]])))
