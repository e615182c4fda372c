"""Where memory is: what holds it at the moments of a step, and a snapshot where it ran out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunescope import latency_files as files
from tunescope.measure.module_calls import held_bytes

# Of the allocator's history; with Python stacks some 30 MB at most.
_SNAPSHOT_ENTRIES = 50_000


def memory_parts(model: torch.nn.Module, optimizer: Any, moment: str) -> list[dict[str, Any]]:
    """What holds memory now, one row a part (latency_files.MEMORY_PARTS_SCHEMA).

    `everything` is what the allocator says, so what the parts leave of it is activations and what libraries keep; it is
    missing without a GPU.
    """
    sizes = dict.fromkeys(files.PARTS, 0)
    for parameter in model.parameters():  # a tied one is met once
        sizes["trained_weights" if parameter.requires_grad else "frozen_weights"] += held_bytes(parameter)
    sizes["gradients"] = _total_bytes(p.grad for p in model.parameters() if p.grad is not None)
    sizes["buffers"] = _total_bytes(model.buffers())
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    states = getattr(inner, "state", {})
    sizes["optimizer"] = _total_bytes(value for state in states.values() for value in state.values())
    rows = [{"moment": moment, "part": part, "allocated_bytes": size} for part, size in sizes.items()]
    if any(parameter.is_cuda for parameter in model.parameters()):
        rows.append({"moment": moment, "part": files.EVERYTHING, "allocated_bytes": torch.cuda.memory_allocated()})
    return rows


def _total_bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class OutOfMemorySnapshot(TrainerCallback):
    """Keeps the allocator's state in `file` when the GPU's memory runs out; https://pytorch.org/memory_viz draws it.

    Who allocated what is recorded until `num_steps` steps are done, which is when memory usually runs out; a later
    snapshot shows the blocks without their stacks, for recording costs time in every step.
    """

    def __init__(self, file: Path, num_steps: int) -> None:
        self.file = file
        self.num_steps = num_steps
        self._is_recording = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type != "cuda":
            return
        torch._C._cuda_attach_out_of_memory_observer(self._keep)
        torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES, stacks="python")
        self._is_recording = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.num_steps:
            self.abandon()

    def abandon(self) -> None:
        if self._is_recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._is_recording = False

    def _keep(self, *_: Any) -> None:
        try:
            torch.cuda.memory._dump_snapshot(str(self.file))
        except OSError:  # a full disk must not hide what happened
            self.file.unlink(missing_ok=True)
