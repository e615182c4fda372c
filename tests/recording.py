"""Records hand-made models, and says where their work was put. The models launch work whose place is known."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tunescope import latency_files as files
from tunescope.analyze.attribution import Attribution, Recording, attribute
from tunescope.analyze.places import AFTER, BETWEEN_STEPS, CHECK, DATA, LOSS
from tunescope.measure import trace as trace_module
from tunescope.measure.module_calls import ModuleCalls, mark
from tunescope.measure.trace import Trace

FORWARD, RECOMPUTE, BACKWARD, CLIP, OPTIMIZER, REST = files.PHASES
CHECKPOINTING = pytest.mark.parametrize("kind", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
BOTH_KINDS = pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non-reentrant"])
WIDTH = 4
MM = "aten::mm"
Cells = dict[tuple[str, str], int]  # (phase, module) -> operators


class Matmuls(torch.nn.Module):
    """Launches `count` matrix products of its own and nothing else."""

    def __init__(self, count: int, *, trained: bool = True) -> None:
        super().__init__()
        self.count = count
        self.weight = torch.nn.Parameter(0.5 * torch.eye(WIDTH), requires_grad=trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.count):
            x = torch.mm(x, self.weight)
        return x


class Apply(torch.nn.Module):
    """Calls its parts, which are attributes, as `function` says."""

    def __init__(self, function: Callable[..., Any], **parts: torch.nn.Module | torch.nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def through(kind: bool | None, function: Callable[..., Any], *inputs: Any) -> Any:
    """kind: use_reentrant; None: no checkpointing."""
    return function(*inputs) if kind is None else checkpoint(function, *inputs, use_reentrant=kind)


def leaf(*, requires_grad: bool = True, device: str = "cpu") -> torch.Tensor:
    return torch.ones(WIDTH, WIDTH, requires_grad=requires_grad, device=device)


@dataclass(frozen=True)
class Recorded:
    recording: Recording
    attribution: Attribution
    calls: ModuleCalls

    @property
    def work(self) -> pd.DataFrame:
        return self.attribution.work

    def cells(self, name: str = MM, column: str = "name") -> Cells:
        """How many pieces of work of that name, on a CPU operators, lie in each cell."""
        found = self.work[self.work[column] == name]
        return dict(Counter(zip(found["phase"], found["module"], strict=True)))

    def at(self, phase: str, module: str) -> Counter[str]:
        """Operators in one cell."""
        return Counter(self.work.loc[(self.work["phase"] == phase) & (self.work["module"] == module), "name"])


def record(
    model: torch.nn.Module,
    run: Callable[[], Any],
    *,
    all_threads: bool = False,
    on_gpu: bool = False,
    with_memory: bool = False,
) -> Recorded:
    """Where the work of `run` was put.

    all_threads: the profiler follows threads that `run` starts, which it does not by itself.
    """
    calls = ModuleCalls(model)
    with follow_all_threads() if all_threads else contextlib.nullcontext():
        trace = Trace(on_gpu=on_gpu, num_steps=1, with_memory=with_memory, json_file=None)
    trace.start()
    trace.step({})
    calls.install()
    try:
        run()
    finally:
        trace.step(calls.parameter_modules)
        calls.remove()
    assert trace.table is not None
    return read(trace.table, calls)


@contextlib.contextmanager
def follow_all_threads() -> Iterator[None]:
    plain = trace_module.torch.profiler.profile
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    trace_module.torch.profiler.profile = partial(plain, experimental_config=everywhere)
    try:
        yield
    finally:
        trace_module.torch.profiler.profile = plain


def read(events: pa.Table, calls: ModuleCalls) -> Recorded:
    recording = Recording.from_tables(
        events,
        pa.Table.from_pylist(calls.rows(), schema=files.CALLS_SCHEMA),
        pa.Table.from_pylist(calls.module_rows(), schema=files.MODULES_SCHEMA),
    )
    recorded = Recorded(recording, attribute(recording), calls)
    check_conservation(recorded)
    assert calls._stack() == []
    return recorded


def check_conservation(recorded: Recorded) -> None:
    """Every piece of work is in exactly one cell, and no nanosecond is lost or counted twice."""
    events, work = recorded.recording.events, recorded.work
    if recorded.attribution.on_gpu:
        there = events[events["kind"].isin(files.GPU_KINDS)]
        assert len(work) == len(there)
        assert work["duration_ns"].sum() == there["duration_ns"].sum()
        return
    assert len(work) == (events["kind"] == files.OP).sum()
    assert (work["duration_ns"] >= 0).all()
    assert work["duration_ns"].sum() == operator_ns(events)
    assert not work[["phase", "module"]].isna().any(axis=None)
    assert set(work["phase"]) <= set(files.PHASES)


def operator_ns(events: pd.DataFrame) -> int:
    """Time in which an operator is the innermost open range of its thread, by walking along each thread's edges."""
    total_ns = 0
    ranges = events[~events["kind"].isin((*files.GPU_KINDS, files.MEMORY, files.LAUNCH)) & (events["duration_ns"] > 0)]
    for _, there in ranges.groupby("thread"):
        edges = []
        ends = there["start_ns"] + there["duration_ns"]
        for order, (start, end, kind) in enumerate(zip(there["start_ns"], ends, there["kind"], strict=True)):
            # Ends come before begins; of two that begin together the longer one is outside.
            edges += [(start, 1, -end, order, kind), (end, 0, 0, order, kind)]
        open_ranges: list[tuple[int, str]] = []
        last = 0
        for time, opens, _, order, kind in sorted(edges):
            if open_ranges and open_ranges[-1][1] == files.OP:
                total_ns += time - last
            last = time
            if opens:
                open_ranges.append((order, kind))
            else:
                open_ranges.remove((order, kind))
    return total_ns


def put_mark(name: str) -> None:
    mark(files.MARK_PREFIX + name)


# Operators that trainer_step runs outside the model, each at one place only -> that place.
SIGNS = {
    "aten::flip": (files.REST, BETWEEN_STEPS),
    "aten::tril": (files.REST, DATA),
    "aten::tan": (files.FORWARD, LOSS),
    "aten::isnan": (files.REST, CHECK),
    "aten::round": (files.REST, AFTER),
}
ONCE_A_STEP = ("aten::tril", "aten::round")


def trainer_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, micro_steps: int = 1, device: str = "cpu"
) -> None:
    """One step in the Trainer's order, with marks, and SIGNS outside the model."""
    put_mark(files.RESUME)
    batches = [torch.flip(leaf(device=device), [0]).detach().requires_grad_() for _ in range(micro_steps)]
    put_mark(files.STEP_BEGIN)
    for i, batch in enumerate(batches):
        moved = torch.tril(batch.detach()).requires_grad_() if i == 0 else batch
        loss = torch.tan(model(moved)).sum() / micro_steps
        loss.backward()
        torch.isnan(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    put_mark(files.PRE_OPTIMIZER)
    optimizer.step()
    put_mark(files.OPTIMIZER)
    torch.round(loss.detach())
    optimizer.zero_grad(set_to_none=False)
    put_mark(files.STEP_END)


def cells(*, times_recomputed: int = 0, **modules: tuple[int, int]) -> Cells:
    """Expected matrix products: module -> (in one forward, in backward)."""
    found = {}
    for name, (forward, backward) in modules.items():
        found[FORWARD, name] = forward
        found[RECOMPUTE, name] = forward * times_recomputed
        found[BACKWARD, name] = backward
    return {cell: count for cell, count in found.items() if count}


def trains(model: torch.nn.Module, *inputs: Any) -> Callable[[], None]:
    return lambda: model(*(inputs or (leaf(),))).sum().backward()


def modules_table(root_class: str, paths: list[str]) -> pa.Table:
    nothing = {"class_name": root_class, "frozen_bytes": 0, "trained_bytes": 0}
    rows = [{"module": i, "path": path} | nothing for i, path in enumerate(paths)]
    return pa.Table.from_pylist(rows, schema=files.MODULES_SCHEMA)


def hooks_of(model: torch.nn.Module) -> Counter[str]:
    return Counter(
        name
        for owner in (*model.modules(), *model.parameters())
        for name, hooks in (vars(owner) | {"_post": getattr(owner, "_post_accumulate_grad_hooks", None)}).items()
        if name.startswith(("_forward", "_backward", "_post")) and isinstance(hooks, dict)
        for _ in hooks
    )
