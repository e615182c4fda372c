"""Runs one point under Nsight Compute: finds ncu, starts it over the training process, makes a table of its report.

ncu is asked for nothing that needs rights beyond the counters themselves: clocks are left as they are unless a flag
says otherwise. Where the counters are not to be had, the reason is a fact of the point, and its tables are modelled.
"""

import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunescope import results
from tunescope.errors import UserError
from tunescope.gpus import Gpu
from tunescope.measure.plan import PointSpec
from tunescope.ncu.counters import (
    COUNTERS_FILE,
    ESSENTIAL,
    METRICS,
    NCU_LOG_FILE,
    REPORT_FILE,
    SAMPLING_FILE,
    SM_PERCENT,
)
from tunescope.ncu.ranges import SAMPLE, place_of
from tunescope.ncu.reports import read_report
from tunescope.ncu.settings import Settings
from tunescope.train.forkserver import die_with_parent

MAX_SECONDS = 1800.0
_FOLDERS = ("bin", "nsight-compute", "nsight-compute/bin")
NOT_PERMITTED = (
    "the driver lets only administrators read the GPU's counters (ERR_NVGPUCTRPERM). To allow everyone: on the host, "
    "the driver's module option NVreg_RestrictProfilingToAdminUsers=0, and a reboot; in a container only its host can. "
    "It lets every user of the machine read counters, from which what others compute may be guessed"
)
NOT_FOUND = "ncu is not on the PATH, not in CUDA_HOME, and not named by --ncu"


@dataclass(frozen=True)
class Ncu:
    path: str
    version: str


def find_ncu(path: str | None = None) -> Ncu | None:
    """--ncu, the PATH, CUDA_HOME, in that order; None if there is none that answers."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [path] if path else [shutil.which("ncu"), *(f"{home}/{folder}/ncu" for folder in _FOLDERS if home)]
    for place in filter(None, places):
        try:
            done = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if match := re.search(r"Version (\S+)", done.stdout):
            return Ncu(place, match[1])
    return None


def with_counters(spec: PointSpec, gpu: Gpu | None, work_dir: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """Runs a measured point once more, under ncu, and leaves COUNTERS_FILE and the report in its folder.

    Returns the outcome, also as outcome.json: with ncu_why_not where there are no counters to be had, and of status
    failed where ncu was there and failed.
    """
    assert spec.ncu is not None
    tool = None if gpu is None else find_ncu(spec.ncu.path)
    facts: dict[str, Any] = {"ncu_version": tool.version if tool else None, "ncu_s": None, "ncu_why_not": None}
    if gpu is None:
        facts["ncu_why_not"] = "there is no GPU"
    elif tool is None:
        facts["ncu_why_not"] = NOT_FOUND
    else:
        start_s = time.monotonic()
        facts |= _profile(tool, spec, spec.ncu, work_dir)
        facts["ncu_s"] = round(time.monotonic() - start_s, 3)
    outcome = outcome | facts
    results.write_json(work_dir / results.OUTCOME_FILE, outcome)
    return outcome


def _profile(tool: Ncu, spec: PointSpec, settings: Settings, work_dir: Path) -> dict[str, Any]:
    from tunescope.measure import ncu_child

    task, report, log_file, sampling = (
        work_dir / name for name in (ncu_child.TASK_FILE, REPORT_FILE, NCU_LOG_FILE, SAMPLING_FILE)
    )
    metrics = known_metrics(tool)
    command = [
        tool.path, "--target-processes", "all", "--nvtx", "--nvtx-include", f"{SAMPLE}/",
        # Ranges are opened by the thread that launches, also in backward; but only this has been seen to work there.
        "--nvtx-push-pop-scope", "process", "--import-sass", "no",
        "--clock-control", settings.clock_control, "--cache-control", settings.cache_control,
        "--metrics", ",".join(metrics), "--force-overwrite", "--export", str(report.with_suffix("")), "--",
        sys.executable, "-m", "tunescope.measure.ncu_child", str(work_dir),
    ]  # fmt: skip
    facts: dict[str, Any] = {}
    try:
        while True:
            task.write_bytes(pickle.dumps(spec))
            exit_code = _run(command, log_file)
            log = log_file.read_text(errors="replace")
            if report.is_file() or (simpler := without_what_is_unknown(command, log)) is None:
                break
            command = simpler
    finally:
        task.unlink(missing_ok=True)
        shutil.rmtree(work_dir / ncu_child.SCRATCH, ignore_errors=True)
    if "ERR_NVGPUCTRPERM" in log:
        report.unlink(missing_ok=True)
        return {"ncu_why_not": NOT_PERMITTED}
    if not report.is_file() or (exit_code and not _is_sampled(sampling)):
        cause = f"ncu ended with exit code {exit_code}: {_last_words(log)}"
        return {"status": "failed", "cause": f"{cause} (its output is in {NCU_LOG_FILE})"}
    if exit_code:  # once all was counted
        facts["ncu_exit_code"] = exit_code
    if missing := sorted(set(METRICS.values()) - set(command[command.index("--metrics") + 1].split(","))):
        facts["ncu_unknown_metrics"] = missing
    try:
        table = read_report(report, tool.path)
    except UserError as error:
        return {"status": "failed", "cause": f"what ncu wrote cannot be used: {error.what} ({error.cause})"}
    ranges = table.column("ranges").to_pylist()
    if not any(place_of(found) for found in ranges):
        cause = f"none of the {len(ranges)} launches that ncu looked into says where it belongs"
        return {"status": "failed", "cause": f"{cause}; of the first it says {ranges[0]!r}"}
    results.write_arrow_table(work_dir / COUNTERS_FILE, table)
    return facts


@lru_cache
def known_metrics(tool: Ncu) -> tuple[str, ...]:
    """Those of METRICS that this GPU has by ncu's own list: of one that it does not know, ncu counts nothing at all.

    What makes the figures is always asked for, and all is where the list cannot be had.
    """
    names = tuple(METRICS.values())
    bases = {name: name.partition(".")[0] for name in names}
    try:
        done = subprocess.run(
            [tool.path, "--query-metrics"], capture_output=True, text=True, timeout=60, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return names
    listed = set(re.findall(r"\b[a-z0-9]+__\w+", done.stdout))
    if bases[METRICS[SM_PERCENT]] not in listed:
        return names
    return tuple(name for column, name in METRICS.items() if column in ESSENTIAL or bases[name] in listed)


def without_what_is_unknown(command: Sequence[str], log: str) -> list[str] | None:
    """The command without an option or a metric that this release of ncu said not to know; None if it said no such
    thing."""
    if option := re.search(r"unrecogni[sz]ed option '(--[\w-]+)'", log):
        at = command.index(option[1]) if option[1] in command[: command.index("--")] else -1
        return [*command[:at], *command[at + 2 :]] if at >= 0 else None
    at = command.index("--metrics") + 1
    asked = command[at].split(",")
    unknown = [line.replace("\\", "") for line in log.splitlines() if re.search(r"ERROR.*[mM]etric", line)]
    left = [name for name in asked if not any(name in line or f"^{name.partition('.')[0]}" in line for line in unknown)]
    return [*command[:at], ",".join(left), *command[at + 1 :]] if left and left != asked else None


def _is_sampled(file: Path) -> bool:
    try:
        return bool(results.read_json(file)["is_done"])
    except (results.PointFormatError, KeyError):
        return False


def _run(command: Sequence[str], log_file: Path) -> int:
    """Runs ncu and what it starts to their end; an exception here, Ctrl-C too, ends them all."""
    package_folder = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": search_path}, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            return process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_words(log: str) -> str:
    """The exception of the program under ncu, if there is one, and ncu's own last word."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return " / ".join(dict.fromkeys([*errors[-1:], *lines[-1:]]))[:500] or "it said nothing"
