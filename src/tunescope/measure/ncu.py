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
from pathlib import Path
from typing import Any

from tunescope import results
from tunescope.errors import UserError
from tunescope.gpus import Gpu
from tunescope.measure.plan import PointSpec
from tunescope.ncu.counters import COUNTERS_FILE, METRICS, NCU_LOG_FILE, REPORT_FILE
from tunescope.ncu.reports import read_report
from tunescope.ncu.settings import Settings
from tunescope.train.forkserver import die_with_parent

SAMPLE = "tunescope"  # the NVTX range that ncu looks into
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

    task, report, log_file = (work_dir / name for name in (ncu_child.TASK_FILE, REPORT_FILE, NCU_LOG_FILE))
    task.write_bytes(pickle.dumps(spec))
    command = [
        tool.path, "--nvtx", "--nvtx-include", f"{SAMPLE}/", "--clock-control", settings.clock_control,
        "--cache-control", settings.cache_control, "--metrics", ",".join(METRICS.values()),
        "--force-overwrite", "--export", str(report.with_suffix("")), "--",
        sys.executable, "-m", "tunescope.measure.ncu_child", str(work_dir),
    ]  # fmt: skip
    exit_code = _run(command, log_file)
    task.unlink()
    log = log_file.read_text(errors="replace")
    if "ERR_NVGPUCTRPERM" in log:
        report.unlink(missing_ok=True)
        return {"ncu_why_not": NOT_PERMITTED}
    if exit_code or not report.is_file():
        cause = f"ncu ended with exit code {exit_code}: {_last_line(log)}"
        return {"status": "failed", "cause": f"{cause} (its output is in {NCU_LOG_FILE})"}
    try:
        table = read_report(report, tool.path)
    except UserError as error:
        return {"status": "failed", "cause": f"what ncu wrote cannot be used: {error.what} ({error.cause})"}
    results.write_arrow_table(work_dir / COUNTERS_FILE, table)
    return {}


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


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
