"""Breaks down the steps of anybody's Hugging Face Trainer."""

import logging
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunescope import latency_files as files
from tunescope import results
from tunescope.config import LATENCY, Protocol
from tunescope.errors import UserError
from tunescope.measure.breakdown import Breakdown
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.environment import environment, git_revision
from tunescope.measure.memory import OutOfMemorySnapshot
from tunescope.measure.phases import decoder_layers
from tunescope.measure.start import is_out_of_memory
from tunescope.measure.steps import StepRecorder

logger = logging.getLogger("tunescope")
# What of the Trainer's arguments decides where a step's time goes.
_ARGUMENTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "bf16", "fp16", "max_grad_norm", "logging_nan_inf_filter", "torch_compile",
)  # fmt: skip


# Whoever measures, or did when training ended in an exception, which nobody tells a callback.
_measuring: "weakref.WeakSet[StepProfiler]" = weakref.WeakSet()


class StepProfiler(TrainerCallback):
    """A callback for any `transformers.Trainer` (TRL's and LLaMA-Factory's too): where do its steps go?

        trainer.add_callback(StepProfiler("profile"))
        trainer.train()                                  # then: python -m tunescope table latency profile

    After `num_warmup_steps`, `num_timed_steps` run unprofiled, with their phases marked by events; then the profiler
    records `num_profiled_steps`, and memory is followed for one more. The results lie in `folder/name` as soon as they
    are there, and training goes on untouched (stop_after=True ends it). It takes num_warmup_steps + num_timed_steps +
    num_profiled_steps + 3 steps in all; a shorter training leaves nothing and says so in the log.

    name: of this run, in tables; an earlier run of that name moves to superseded/. trace: keep trace.json.gz for
    viewers. On several GPUs the first process measures its own. What goes wrong in here is logged, and never ends
    training.
    """

    def __init__(
        self,
        folder: str | Path = "profile",
        *,
        name: str = "run",
        num_warmup_steps: int = 3,
        num_timed_steps: int = 20,
        num_profiled_steps: int = 2,
        trace: bool = True,
        stop_after: bool = False,
    ) -> None:
        for what, value in (
            ("num_warmup_steps", num_warmup_steps),
            ("num_timed_steps", num_timed_steps),
            ("num_profiled_steps", num_profiled_steps),
        ):
            if type(value) is not int or value < 1:
                raise UserError(f"{what} is {value!r}; it must be a whole number from 1")
        if (
            not name
            or {"/", "\0"} & set(name)
            or name.startswith(".")
            or name.endswith(results.UNFINISHED_SUFFIX)
            or name == results.SUPERSEDED_FOLDER
        ):
            raise UserError(f"name {name!r} cannot be that of a run", cure="use a plain folder name")
        self.folder = Path(folder)
        self.name = name
        self.why_not: str | None = None
        self._protocol = Protocol(
            num_warmup_steps=num_warmup_steps,
            min_timed_steps=num_timed_steps,
            max_timed_steps=num_timed_steps,
            num_profiled_steps=num_profiled_steps,
        )
        self._with_trace = trace
        self._stop_after = stop_after
        self._parts: list[Any] = []
        self._is_written = False
        self._work_dir = self.folder / (name + results.UNFINISHED_SUFFIX)
        self._has_begun = False

    def detach(self) -> None:
        """Takes everything off the model and ends what was being recorded. Training's end does it, or the next
        StepProfiler; after an exception it is for you to do."""
        parts, self._parts = self._parts, []
        for part in parts:
            part.abandon()

    @property
    def is_done(self) -> bool:
        """Whether the results are in `folder/name`."""
        return self._is_written

    # --- Trainer events: each goes to the parts, in their order ---

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.process_index != 0:
            return
        for last in list(_measuring):
            if last._parts:
                last._give_up("another StepProfiler began, or its own training ended in an exception")
        _measuring.clear()
        _measuring.add(self)
        self.why_not = None
        needed = self._protocol.num_warmup_steps + self._protocol.max_timed_steps + self._protocol.num_steps_after
        if state.max_steps < needed:
            self._give_up(f"training has {state.max_steps} steps, and {needed} are needed")
            return
        try:
            self._work_dir = results.start_unfinished(self.folder, self.name)
            self._has_begun = True
            use_gpu = args.device.type == "cuda"
            results.write_json(self._work_dir / results.POINT_FILE, self._point_json(args, model))
            facts = environment(use_gpu=use_gpu, revision=git_revision())
            results.write_json(self._work_dir / results.ENVIRONMENT_FILE, facts)
        except OSError as error:
            self._give_up(f"cannot write to {self.folder}: {error.strerror}")
            return
        trace_file = self._work_dir / files.TRACE_FILE if self._with_trace else None
        self._energy = EnergyMeter(use_gpu=use_gpu)
        self._steps = StepRecorder(self._protocol, lambda done, expected: None, self._energy)
        self._breakdown = Breakdown(self._steps, trace_file, ends_training=self._stop_after)
        snapshot = OutOfMemorySnapshot(self._work_dir / files.OOM_SNAPSHOT_FILE, self._protocol.num_warmup_steps)
        self._parts = [snapshot, self._steps, self._breakdown]
        self._pass_on("on_train_begin", args, state, control, model=model, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_step_begin", args, state, control, **kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_substep_end", args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_optimizer_step", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_step_end", args, state, control, **kwargs)
        if self._parts and self._breakdown.is_done:
            self._finish(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._parts:
            self._give_up("training ended before all steps were recorded")

    # --- inside ---

    def _pass_on(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            for part in self._parts:
                getattr(part, event)(args, state, control, **kwargs)
        except Exception as error:  # a measurement must not cost the run that it watches
            if is_out_of_memory(error):
                raise
            self._give_up(f"{type(error).__name__}: {error}")

    def _finish(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_train_end", args, state, control, **kwargs)
        self._parts = []
        try:
            rows = self._steps.rows()
            results.write_arrow(self._work_dir / results.STEPS_FILE, rows, results.STEPS_SCHEMA)
            self._breakdown.write(self._work_dir)
            results.write_json(self._work_dir / results.OUTCOME_FILE, self._outcome(args))
            results.publish(self._work_dir, self.folder / self.name)
        except OSError as error:
            self._give_up(f"cannot write to {self.folder}: {error.strerror}")
            return
        self._is_written = True
        logger.info("Breakdown of steps: python -m tunescope table latency %s", self.folder)

    def _outcome(self, args: Any) -> dict[str, Any]:
        steps = self._steps
        return {
            "status": "ok",
            "cause": None,
            "clock": "cuda_event" if args.device.type == "cuda" else "host",
            "num_warmup_steps": steps.num_warmup_steps,
            "interval_reached": steps.interval_reached,
            "train_runtime_ns": steps.train_runtime_ns,
            "timed_start_unix_ns": steps.timed_start_unix_ns,
            "timed_end_unix_ns": steps.timed_end_unix_ns,
            "gpu_energy_j": steps.energy_j,
            "gpu_energy_why_not": self._energy.why_not,
            "compute_dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            **steps.peak_memory,
        }

    def _point_json(self, args: Any, model: Any) -> dict[str, Any]:
        attached = {
            "name": self.name,
            "model_class": type(model).__name__,
            "num_layers": len(decoder_layers(model)),
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            **{name: _plain(getattr(args, name, None)) for name in _ARGUMENTS},
        }
        content = {"schema_version": results.SCHEMA_VERSION, "kind": LATENCY, "attached": attached}
        content["protocol"] = self._protocol.to_json()
        return {"point_id": self.name, "recipe_hash": results.digest(content), **content}

    def _give_up(self, reason: str) -> None:
        """Lets training go on without being measured, and says why there are no results."""
        self.why_not = self.why_not or reason
        self.detach()
        if self._has_begun:
            shutil.rmtree(self._work_dir, ignore_errors=True)
        logger.warning("tunescope measured nothing: %s", reason)


def _plain(value: Any) -> Any:
    """As JSON has it; of what it has not, infinity among it, the text."""
    is_plain = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    return value if is_plain else str(value)
