"""What one point records, by kind of measurement: the callbacks that watch its training, and the files they leave."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunescope import expert_tokens, latency_files, results
from tunescope.config import LATENCY, NCU
from tunescope.errors import UserError
from tunescope.measure.breakdown import Breakdown
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.experts import ExpertProbe
from tunescope.measure.memory import OutOfMemorySnapshot
from tunescope.measure.op_work import OpWorkStep
from tunescope.measure.plan import PointSpec
from tunescope.measure.steps import Progress, StepRecorder
from tunescope.ncu.counters import OP_WORK_FILE, OP_WORK_SCHEMA


class ThroughputRecording:
    """Step times and nothing else."""

    def __init__(self, spec: PointSpec, on_progress: Progress, energy: EnergyMeter) -> None:
        self.steps = StepRecorder(spec.protocol, on_progress, energy)

    def callbacks(self, others: Iterable[TrainerCallback]) -> list[TrainerCallback]:
        """All callbacks of the run in their order; others: what comes before the recording's own."""
        return [*others, self.steps]

    def write(self, work_dir: Path) -> None:
        """Writes what was recorded. Raises UserError where training ended before there was enough."""
        rows = self.steps.rows()
        if all(row["is_warmup"] for row in rows):
            raise UserError(
                "training ended before a step could be timed",
                cause="the data set holds fewer queries than two batches",
                cure="use more queries or a smaller batch",
            )
        results.write_arrow(work_dir / results.STEPS_FILE, rows, results.STEPS_SCHEMA)

    def facts(self, work_dir: Path) -> dict[str, Any]:
        """What outcome.json says beyond what it says of every point, whatever became of this one."""
        return {}


class LatencyRecording(ThroughputRecording):
    """Step times, then where they go; tokens per expert before and after; a snapshot where memory runs out."""

    def __init__(
        self,
        spec: PointSpec,
        on_progress: Progress,
        energy: EnergyMeter,
        work_dir: Path,
        queries: Callable[[], dict[str, list[list[int]]]],
    ) -> None:
        super().__init__(spec, on_progress, energy)
        self._breakdown = Breakdown(self.steps, work_dir / latency_files.TRACE_FILE)
        self._probe = ExpertProbe(queries)
        self._snapshot = OutOfMemorySnapshot(work_dir / latency_files.OOM_SNAPSHOT_FILE, spec.protocol.num_warmup_steps)

    def callbacks(self, others: Iterable[TrainerCallback]) -> list[TrainerCallback]:
        return self._probe.around([self._snapshot, *others, self.steps, self._breakdown])

    def write(self, work_dir: Path) -> None:
        super().write(work_dir)
        if not self._breakdown.is_done:
            raise UserError(
                "training ended before its steps could be profiled",
                cause="too few queries: a breakdown needs steps to warm up, to time and to profile",
                cure="use more queries, or a smaller batch",
            )
        self._breakdown.write(work_dir)
        results.write_arrow(
            work_dir / expert_tokens.EXPERT_TOKENS_FILE, self._probe.rows(), expert_tokens.EXPERT_TOKENS_SCHEMA
        )
        # Memory may have run out in something that was tried and given up, and the run went on.
        (work_dir / latency_files.OOM_SNAPSHOT_FILE).unlink(missing_ok=True)

    def facts(self, work_dir: Path) -> dict[str, Any]:
        snapshot = work_dir / latency_files.OOM_SNAPSHOT_FILE
        return {
            "expert_probe_why_not": self._probe.why_not,
            "oom_snapshot": snapshot.name if snapshot.is_file() else None,
        }


class KernelRecording(ThroughputRecording):
    """Where the time of a few steps goes, launch by launch, and what each operator had to do in one of them."""

    def __init__(self, spec: PointSpec, on_progress: Progress, energy: EnergyMeter) -> None:
        super().__init__(spec, on_progress, energy)
        self._breakdown = Breakdown(self.steps, None)
        self._work = OpWorkStep()

    def callbacks(self, others: Iterable[TrainerCallback]) -> list[TrainerCallback]:
        return [*others, self._work, self.steps, self._breakdown]

    def write(self, work_dir: Path) -> None:
        super().write(work_dir)
        assert self._breakdown.is_done
        self._breakdown.write(work_dir)
        results.write_arrow(work_dir / OP_WORK_FILE, self._work.rows(), OP_WORK_SCHEMA)


def make_recording(
    spec: PointSpec, on_progress: Progress, energy: EnergyMeter, work_dir: Path, model_dir: Path
) -> ThroughputRecording:
    """The recording of the point's kind. model_dir: where the engine will put the point's tokenizer."""
    if spec.kind == LATENCY:
        from tunescope.train.probe import probe_queries

        return LatencyRecording(
            spec, on_progress, energy, work_dir, lambda: probe_queries(spec.workload, model_dir, spec.probe_files)
        )
    if spec.kind == NCU:
        return KernelRecording(spec, on_progress, energy)
    return ThroughputRecording(spec, on_progress, energy)
