"""Times training steps without touching them: one CUDA event at each step's end, read after the run.

A step's window runs from the end of the step before to its own end, so windows tile the run: fetching the batch,
forward, backward, clipping and optimizer are all inside, and nothing inside waits for the GPU.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from tunescope.config import Protocol
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.stopping import interval_width_frac

# The stopping rule is looked at only every few steps: it costs about 50 us of host time.
CHECK_EVERY_STEPS = 5
# The rule below uses the large-sample formula; the bootstrap reported in the end may come out slightly wider.
STOP_MARGIN = 0.9

Progress = Callable[[int, int], None]


class StepRecorder(TrainerCallback):
    """Records one row per optimizer step (results.STEPS_SCHEMA) until the protocol is met, and then ends training.

    on_progress(steps done, steps expected) is called after every step, inside the next one's window: keep it short.
    Where the protocol wants steps after the timed ones, training goes on: the last steps are left to whoever records
    them, and `is_finished` says when nothing is recorded here any more. Rows are complete only after training; read
    `rows()` then.
    """

    def __init__(self, protocol: Protocol, on_progress: Progress, energy: EnergyMeter) -> None:
        self.protocol = protocol
        self.on_progress = on_progress
        self.energy = energy
        self.is_finished = False
        self.energy_j: float | None = None
        self.peak_memory: dict[str, int | None] = {}
        self.num_warmup_steps = 0
        self.train_runtime_ns = 0
        # Wall-clock edges of the timed steps, to pick out the GPU samples that belong to them.
        self.timed_start_unix_ns = 0
        self.timed_end_unix_ns = 0
        self.interval_reached = False
        self._expected_timed_steps = protocol.min_timed_steps
        self._boundaries: list[tuple[Any, int]] = []  # (CUDA event or None, host clock ns): one more than steps
        self._reopened: dict[int, tuple[Any, int]] = {}  # step -> its window's start, where that is not the boundary
        self._micro_batches: list[list[tuple[int, int, Any]]] = [[]]  # per step: (queries, slots a query, tokens)
        self._durations_ns: list[int] = []
        self._rank, self._world_size = 0, 1

    @property
    def num_steps_done(self) -> int:
        return len(self._boundaries) - 1

    # --- Trainer events ---

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._on_gpu = args.device.type == "cuda"
        self._rank, self._world_size = args.process_index, args.world_size
        num_steps = state.max_steps - self.protocol.num_steps_after
        self.num_warmup_steps = min(self.protocol.num_warmup_steps, max(num_steps - 1, 0))
        self._hook = model.register_forward_pre_hook(self._count_batch, with_kwargs=True)
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._train_start_ns = time.perf_counter_ns()
        self._boundaries.append(self._mark())
        if self.num_warmup_steps == 0:
            self._start_timed_steps(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_finished:
            return
        self._boundaries.append(self._mark())
        self._micro_batches.append([])
        done = len(self._boundaries) - 1
        if done == self.num_warmup_steps:
            self._start_timed_steps(done)
        is_last = bool(self.protocol.num_steps_after) and done >= state.max_steps - self.protocol.num_steps_after
        if is_last or (self.protocol.num_queries is None and self._is_enough(done)):
            control.should_training_stop = not self.protocol.num_steps_after
            self._expected_timed_steps = done - self.num_warmup_steps
            if self.protocol.num_steps_after:
                self._finish()
        self.on_progress(done, self._expected_steps(state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.is_finished:
            self._finish()

    def abandon(self) -> None:
        """Takes the hook off the model where training ended in a way that no event tells."""
        if hasattr(self, "_hook"):
            self._hook.remove()

    # --- inside ---

    def _finish(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self.train_runtime_ns = time.perf_counter_ns() - self._train_start_ns
        self.timed_end_unix_ns = time.time_ns()
        self.energy_j = self.energy.stop_j()
        self.peak_memory = peak_memory(self._on_gpu)
        self._hook.remove()
        self.is_finished = True

    def _mark(self) -> tuple[Any, int]:
        if not self._on_gpu:
            return None, time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, time.perf_counter_ns()

    def _start_timed_steps(self, done: int) -> None:
        """Opens the energy window between two steps, with the GPU idle, and keeps that pause out of the next step."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self.energy.start()
        self.timed_start_unix_ns = time.time_ns()
        self._reopened[done] = self._mark()

    def _count_batch(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not (module.training or torch.is_grad_enabled()):
            return  # an evaluation between two steps
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim())
        ids = kwargs.get("input_ids")
        ids = next(tensors, None) if ids is None else ids
        if ids is None:
            return
        mask = kwargs.get("attention_mask")
        # A sum on the GPU is queued like any kernel; its value is read after the run.
        tokens = ids.numel() if mask is None or mask.dim() != 2 else mask.sum()
        self._micro_batches[-1].append((ids.shape[0], ids.shape[1] if ids.dim() > 1 else 1, tokens))

    def _is_enough(self, done: int) -> bool:
        timed = done - self.num_warmup_steps
        if timed < self.protocol.min_timed_steps:
            return False
        timed_host_ns = self._boundaries[-1][1] - self._start_of(self.num_warmup_steps)[1]
        if timed >= self.protocol.max_timed_steps or timed_host_ns >= self.protocol.max_timed_s * 1e9:
            return True
        if timed % CHECK_EVERY_STEPS:
            return False
        self._read_finished_steps()
        durations_ns = self._durations_ns[self.num_warmup_steps :]
        queries = [self._num_queries(step) for step in range(self.num_warmup_steps, len(self._durations_ns))]
        if len(durations_ns) < self.protocol.min_timed_steps:
            return False
        width_frac, wanted_frac = interval_width_frac(queries, durations_ns), STOP_MARGIN * self.protocol.interval_frac
        self.interval_reached = width_frac < wanted_frac
        # For the progress bar: an interval narrows as one over the root of the steps, and time may run out before.
        for_interval = timed * (width_frac / wanted_frac) ** 2
        for_time = timed * self.protocol.max_timed_s * 1e9 / timed_host_ns
        self._expected_timed_steps = math.ceil(min(for_interval, for_time, self.protocol.max_timed_steps))
        return self.interval_reached

    def _read_finished_steps(self) -> None:
        """Appends durations of steps whose events the GPU has passed; asks, never waits."""
        while (step := len(self._durations_ns)) < len(self._boundaries) - 1:
            end = self._boundaries[step + 1]
            if end[0] is not None and not end[0].query():
                break
            self._durations_ns.append(_between_ns(self._start_of(step), end))

    def _start_of(self, step: int) -> tuple[Any, int]:
        return self._reopened.get(step, self._boundaries[step])

    def _num_queries(self, step: int) -> int:
        return sum(queries for queries, _, _ in self._micro_batches[step])

    def _expected_steps(self, max_steps: int) -> int:
        if self.protocol.num_queries is not None:
            return max_steps
        return min(max_steps, self.num_warmup_steps + self._expected_timed_steps + self.protocol.num_steps_after)

    # --- results ---

    def rows(self) -> list[dict[str, Any]]:
        """One row per step in the columns of results.STEPS_SCHEMA. Call after training: waits for the GPU."""
        if self._boundaries and self._boundaries[-1][0] is not None:
            torch.cuda.synchronize()
        self._read_finished_steps()
        made = []
        for step, duration_ns in enumerate(self._durations_ns):
            micro = self._micro_batches[step]
            made.append(
                {
                    "step": step,
                    "is_warmup": step < self.num_warmup_steps,
                    "duration_ns": duration_ns,
                    "host_duration_ns": self._boundaries[step + 1][1] - self._start_of(step)[1],
                    "num_queries": self._num_queries(step),
                    "tokens": sum(int(tokens) for _, _, tokens in micro),
                    "padded_tokens": sum(queries * slots for queries, slots, _ in micro),
                    "seq_len_tokens": max((slots for _, slots, _ in micro), default=0),
                    "micro_steps": len(micro),
                    "rank": self._rank,
                    "world_size": self._world_size,
                }
            )
        return made


def peak_memory(on_gpu: bool) -> dict[str, int | None]:
    """Highest memory of torch's allocator so far, as outcome.json has it (bytes); None without a GPU."""
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
    }


def _between_ns(start: tuple[Any, int], end: tuple[Any, int]) -> int:
    if end[0] is None:
        return end[1] - start[1]
    return round(start[0].elapsed_time(end[0]) * 1e6)  # torch gives ms
