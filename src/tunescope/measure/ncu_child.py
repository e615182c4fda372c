"""The process that Nsight Compute watches: `python -m tunescope.measure.ncu_child WORK_DIR`.

Trains one point for a few steps with the launches of one of them marked, and leaves what it saw of that step.
"""

import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tunescope import latency_files as files
from tunescope import results
from tunescope.families import find_family
from tunescope.measure.plan import PointSpec
from tunescope.measure.worker import limit_threads
from tunescope.ncu.counters import SAMPLING_FILE
from tunescope.ncu.op_costs import op_costs
from tunescope.train.forkserver import die_with_parent

TASK_FILE = "ncu_task.pickle"  # written by this project's launcher for this run alone
SCRATCH = "ncu_scratch"  # of its own: that of the run without ncu is still there
MOE = "moe"  # the part of a layer that the figures are of


def part_filter(model: str, part: str, layers: tuple[int, ...] = ()) -> Callable[[str], bool]:
    """Whether a module's path lies in one part of the decoder layers: of all of them, or of some."""
    pattern = find_family(model).layout.parts[part]

    def is_wanted(path: str) -> bool:
        match = re.match(r"(?:.*?\.)?layers\.(\d+)(\..*)$", path)
        return bool(match and re.search(pattern, match[2]) and (not layers or int(match[1]) in layers))

    return is_wanted


def main(work_dir: Path) -> None:
    die_with_parent()
    spec: PointSpec = pickle.loads((work_dir / TASK_FILE).read_bytes())
    settings = spec.ncu
    assert settings is not None
    from tunescope.measure.kernel_sampling import SampledStep
    from tunescope.measure.start import MemoryBudget
    from tunescope.train.engine import run_workload

    limit_threads(spec)
    trace = work_dir / files.EVENTS_FILE  # of the run without ncu, which was there first
    costs = op_costs(results.read_arrow(trace, files.EVENTS_SCHEMA)) if trace.is_file() else {}
    sampled = SampledStep(
        part_filter(spec.workload.point.model, MOE, settings.layers), settings.phases, settings.max_launches, costs
    )
    scratch_dir = work_dir / SCRATCH
    try:
        run_workload(spec.workload, scratch_dir, [MemoryBudget(spec.memory_budget_bytes), sampled])
    finally:
        shutil.rmtree(scratch_dir, ignore_errors=True)
    results.write_json(work_dir / SAMPLING_FILE, sampled.to_json())
    if not sampled.is_done:
        sys.exit("training ended before the step that was to be sampled: too few queries, or too large a batch")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
