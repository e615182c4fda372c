"""Breaks training steps down: phases of unprofiled steps, then profiled steps, then one whose memory is followed.

The stages come one after the other in one run, so all of them see the same model, data and machine:

    warm-up | unprofiled steps: phases and layers by events | one step to get the profiler going, recorded steps |
    the same once more with memory | whatever is left of training, untouched
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunescope import latency_files as files
from tunescope import results
from tunescope.measure.memory import memory_parts
from tunescope.measure.module_calls import ModuleCalls, mark
from tunescope.measure.phases import PhaseClock
from tunescope.measure.steps import StepRecorder
from tunescope.measure.trace import Trace

_NUM_MEMORY_STEPS = 1


class Breakdown(TrainerCallback):
    """Add it after `steps`, whose unprofiled steps it breaks down; profiling begins when those are finished.

    `write(folder)` leaves the files of latency_files; call it after training, or as soon as `is_done`. ends_training:
    stop when all is recorded.
    """

    def __init__(
        self,
        steps: StepRecorder,
        trace_file: Path | None,
        *,
        ends_training: bool = True,
    ) -> None:
        self.steps = steps
        self.is_done = False
        self._trace_file = trace_file
        self._ends_training = ends_training
        self._installed: list[PhaseClock | ModuleCalls] = []
        self._traces: list[Trace] = []
        self._memory_rows: list[dict[str, Any]] = []

    # --- Trainer events ---

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._on_gpu = args.device.type == "cuda"
        self._model = model
        self._calls = ModuleCalls(model)
        self._clock = PhaseClock(model, self._calls.module_ids, on_gpu=self._on_gpu)
        self._installed = [self._clock, self._calls]
        self._clock.install()
        self._begin_timed_step()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark(files.STEP_BEGIN)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark(files.STEP_BEGIN)  # the next micro-step's data come now

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._clock.before_optimizer()
        self._mark(files.PRE_OPTIMIZER)
        if len(self._traces) == 2 and not self.is_done:
            self._memory_rows = memory_parts(self._model, optimizer, "before the optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.after_optimizer()
        self._mark(files.OPTIMIZER)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_done:
            return
        if not self.steps.is_finished:
            self._begin_timed_step()
            return
        if not self._traces:
            self._clock.begin_step(-1)
            self._clock.remove()
            self._calls.install()
            self._begin_trace(self.steps.protocol.num_profiled_steps, self._trace_file, with_memory=False)
            return
        self._mark(files.STEP_END)
        trace = self._traces[-1]
        trace.step(self._calls.parameter_modules)
        if not trace.is_done:
            self._mark(files.RESUME)
        if trace.is_done and len(self._traces) == 1:
            self._begin_trace(_NUM_MEMORY_STEPS, None, with_memory=True)
        elif trace.is_done:
            self._calls.remove()
            self.is_done = True
            control.should_training_stop = control.should_training_stop or self._ends_training

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.abandon()
        if self._on_gpu:
            torch.cuda.synchronize()

    def abandon(self) -> None:
        """Takes every hook off the model and ends a recording under way; what is recorded in full stays."""
        for installed in self._installed:
            installed.remove()
        for trace in self._traces:
            trace.stop()

    # --- inside ---

    def _begin_timed_step(self) -> None:
        self._clock.begin_step(self.steps.num_steps_done)

    def _begin_trace(self, num_steps: int, json_file: Path | None, *, with_memory: bool) -> None:
        self._traces.append(
            Trace(on_gpu=self._on_gpu, num_steps=num_steps, with_memory=with_memory, json_file=json_file)
        )
        self._traces[-1].start()

    def _mark(self, name: str) -> None:
        if self._traces and not self.is_done:
            mark(files.MARK_PREFIX + name)

    # --- results ---

    def write(self, folder: Path) -> None:
        """Writes all but the trace for viewers, which is in its place already. Call when `is_done`."""
        assert self.is_done
        step_ns = {
            row["step"]: (row["duration_ns"], row["host_duration_ns"])
            for row in self.steps.rows()
            if not row["is_warmup"]
        }
        timed, with_memory = self._traces
        assert timed.table is not None
        assert with_memory.table is not None
        results.write_arrow(folder / files.PHASES_FILE, self._clock.phase_rows(step_ns), files.PHASES_SCHEMA)
        results.write_arrow(folder / files.SPANS_FILE, self._clock.span_rows(step_ns), files.SPANS_SCHEMA)
        results.write_arrow(folder / files.MODULES_FILE, self._calls.module_rows(), files.MODULES_SCHEMA)
        results.write_arrow(folder / files.CALLS_FILE, self._calls.rows(), files.CALLS_SCHEMA)
        results.write_arrow(folder / files.MEMORY_PARTS_FILE, self._memory_rows, files.MEMORY_PARTS_SCHEMA)
        results.write_arrow_table(folder / files.EVENTS_FILE, timed.table)
        results.write_arrow_table(folder / files.MEMORY_EVENTS_FILE, with_memory.table)
