"""Attribution of models and of event tables made by chance, against plain code."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    RECOMPUTE,
    REST,
    WIDTH,
    Cells,
    modules_table,
    operator_ns,
    record,
    through,
    trains,
)

from tunescope import latency_files as files
from tunescope.analyze.attribution import Recording, attribute
from tunescope.analyze.places import NO_OPERATOR, OUTSIDE, STEPPING, UNATTRIBUTED, ZEROING
from tunescope.analyze.timelines import span_and_busy

pytestmark = pytest.mark.usefixtures("one_thread")


# --- models made by chance ---


class Block(torch.nn.Module):
    """Own products before and after its parts, each part called some times, under some kind of checkpointing.

    `ran` counts products as they are launched, by the block that launches them.
    """

    def __init__(self, rng: random.Random, depth: int, ran: Counter[int], known: list["Block"]) -> None:
        super().__init__()
        self.before, self.after = rng.randint(0, 2), rng.randint(0, 2)
        self.weight = torch.nn.Parameter(0.5 * torch.eye(WIDTH), requires_grad=rng.random() < 0.6)
        self.ran = ran
        self.plans = []
        self.parts = torch.nn.ModuleList()
        for _ in range(rng.randint(0, 3) if depth else 0):
            tied = [part for part in known if part.depth < depth]
            part = rng.choice(tied) if tied and rng.random() < 0.25 else Block(rng, depth - 1, ran, known)
            self.parts.append(part)
            in_function = rng.choice([0, 0, 1, 2])  # own products in a checkpointed function around the part
            self.plans.append((rng.choice([None, None, True, False]), rng.choice([1, 1, 2]), in_function))
        self.depth = depth
        known.append(self)

    def own(self, x: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            self.ran[id(self)] += 1
            x = torch.mm(x, self.weight)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.own(x, self.before)
        for part, (kind, times, in_function) in zip(self.parts, self.plans, strict=True):
            for _ in range(times):
                x = through(kind, partial(self.around, part, in_function) if in_function else part, x)
        return self.own(x, self.after)

    def around(self, part: torch.nn.Module, count: int, x: torch.Tensor) -> torch.Tensor:
        return self.own(part(self.own(x, count - count // 2)), count // 2)

    def expect(self, forward: Counter[int]) -> None:
        """Adds the products of one forward."""
        forward[id(self)] += self.before + self.after
        for part, (_, times, in_function) in zip(self.parts, self.plans, strict=True):
            for _ in range(times):
                forward[id(self)] += in_function
                part.expect(forward)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), micro_steps=st.sampled_from([1, 1, 2]))
def test_random_models(seed: int, micro_steps: int) -> None:
    rng = random.Random(seed)
    ran: Counter[int] = Counter()
    model = Block(rng, rng.randint(0, 3), ran, [])

    def run() -> None:
        for _ in range(micro_steps):
            trains(model)()

    recorded = record(model, run)
    forward: Counter[int] = Counter()
    for _ in range(micro_steps):
        model.expect(forward)
    expected: Cells = {}
    for path, module in model.named_modules():
        if isinstance(module, Block) and forward[id(module)]:
            name, count = path or "Block", forward[id(module)]
            expected[FORWARD, name] = count
            expected[RECOMPUTE, name] = ran[id(module)] - count
            expected[BACKWARD, name] = count * (1 + module.weight.requires_grad)
    assert recorded.cells() == {cell: count for cell, count in expected.items() if count}


# --- tables made by chance ---

Place = tuple[str, str, str, str, str]  # phase, module, node, op, outer op


@dataclass
class Table:
    """Events of some threads and a GPU, built range by range, with the place that each piece of work must get."""

    rng: random.Random
    events: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[str, Place | None] = field(default_factory=dict)  # GPU work -> place; None: outside all frames
    owners: dict[tuple[int, int], str] = field(default_factory=dict)  # (thread, sequence number) -> module
    numbers: dict[int, int] = field(default_factory=dict)  # thread -> next sequence number
    now: int = 0
    num_modules: int = 5
    correlation: int = 0

    def add(self, kind: str, name: str, thread: int, **columns: Any) -> dict[str, Any]:
        nothing = {"duration_ns": 0, "device": -1, "correlation": 0, "sequence": -1, "forward_thread": 0, "ref": -1}
        event = {"kind": kind, "name": name, "thread": thread, "start_ns": self.now, "allocated_bytes": 0}
        self.events.append(event | nothing | columns)
        return self.events[-1]

    def tick(self, least: int = 0) -> None:
        self.now += self.rng.randint(least, 3)

    def within(self, event: dict[str, Any], fill: Callable[[], None]) -> None:
        self.tick()
        fill()
        self.tick()
        event["duration_ns"] = self.now - event["start_ns"]

    def module(self, number: int) -> str:
        return "Root" if number == 0 else f"part{number}"

    def fill(self, thread: int, depth: int, place: Place | None, again: bool = False) -> None:
        """Some ranges and launches, one after the other, in a range that gives them `place`."""
        for _ in range(self.rng.randint(0, 3)):
            kinds = ["launch", "op", "op", "call", "node", "accumulate", "optimizer"]
            getattr(self, self.rng.choice(kinds if depth else ["launch"]))(thread, depth - 1, place)
            self.tick()

    def op(self, thread: int, depth: int, place: Place | None) -> None:
        name = f"aten::op{len(self.events)}"
        phase, module, node, _, outer = place or ("", "", "", NO_OPERATOR, NO_OPERATOR)
        inner = (phase, module, node, name, name if outer == NO_OPERATOR else outer)
        self.within(self.add(files.OP, name, thread), lambda: self.fill(thread, depth, inner if place else None))

    def call(self, thread: int, depth: int, place: Place | None) -> None:
        number, module, again = len(self.calls), self.rng.randrange(self.num_modules), self.rng.random() < 0.3
        row = {"call": number, "module": module, "is_recompute": again, "sequence_begin": self.number(thread)}
        self.calls.append(row)
        inner = (RECOMPUTE if again else FORWARD, self.module(module), "", NO_OPERATOR, NO_OPERATOR)

        def fill() -> None:
            self.make_nodes(thread, self.module(module))
            self.fill(thread, depth, inner)
            self.make_nodes(thread, self.module(module))

        # A recompute that is not directly in a node, so that what lies beside it is no recompute.
        self.within(self.add(files.CALL, files.CALL_PREFIX, thread, ref=number), fill)
        row["sequence_end"] = self.number(thread)

    def number(self, thread: int) -> int:
        return self.numbers.setdefault(thread, self.rng.choice([0, 0, 17]))

    def make_nodes(self, thread: int, module: str) -> None:
        for _ in range(self.rng.randint(0, 2)):
            self.owners[thread, self.number(thread)] = module
            self.numbers[thread] += 1

    def node(self, thread: int, depth: int, place: Place | None) -> None:
        made = [*self.owners, (thread, 10**6)]
        maker_thread, number = self.rng.choice(made)
        module = self.owners.get((maker_thread, number), place[1] if place else OUTSIDE)
        name = self.rng.choice(["MulBackward0", "AddmmBackward0", "CheckpointFunctionBackward"])
        inner = (RECOMPUTE if name.startswith("Checkpoint") else BACKWARD, module, name, NO_OPERATOR, NO_OPERATOR)
        self.node_range(thread, depth, inner, sequence=number, forward_thread=maker_thread)

    def accumulate(self, thread: int, depth: int, place: Place | None) -> None:
        name, number = "torch::autograd::AccumulateGrad", self.rng.randint(-1, self.num_modules - 1)
        module = self.module(number) if number >= 0 else place[1] if place else OUTSIDE
        self.node_range(thread, depth, (BACKWARD, module, name, NO_OPERATOR, NO_OPERATOR), parameter=number)

    def node_range(self, thread: int, depth: int, inner: Place, *, parameter: int = -1, **numbers: int) -> None:
        def fill() -> None:
            self.launch(thread, 0, inner)  # a hook's
            self.within(self.add(files.OP, inner[2], thread, **numbers), lambda: self.fill_node(thread, depth, inner))
            if parameter >= 0:
                self.add(files.PARAMETER, files.PARAMETER_PREFIX + "p", thread, ref=parameter, duration_ns=1)
                self.tick(1)

        numbers_of_range = numbers if self.rng.random() < 0.5 else {}  # the profiler leaves them out where hooks ran
        self.within(self.add(files.NODE, files.NODE_PREFIX + inner[2], thread, **numbers_of_range), fill)

    def fill_node(self, thread: int, depth: int, inner: Place) -> None:
        """As `fill`, without the recomputes that would make what comes before them recompute too."""
        for _ in range(self.rng.randint(0, 3)):
            getattr(self, self.rng.choice(["launch", "op_in_node"]))(thread, depth - 1, inner)
        self.tick(1)

    def op_in_node(self, thread: int, depth: int, place: Place) -> None:
        name = f"aten::op{len(self.events)}"
        inner = (*place[:3], name, name if place[4] == NO_OPERATOR else place[4])
        fill = (lambda: self.fill_node(thread, depth, inner)) if depth > 0 else (lambda: self.launch(thread, 0, inner))
        self.within(self.add(files.OP, name, thread), fill)

    def optimizer(self, thread: int, depth: int, place: Place | None) -> None:
        steps = self.rng.random() < 0.5
        name = "Optimizer.step#AdamW.step" if steps else "Optimizer.zero_grad#AdamW.zero_grad"
        inner = (*((OPTIMIZER, STEPPING) if steps else (REST, ZEROING)), "", NO_OPERATOR, NO_OPERATOR)
        self.within(self.add(files.ANNOTATION, name, thread), lambda: self.fill(thread, depth, inner))

    def launch(self, thread: int, depth: int, place: Place | None) -> None:
        """A launch and what it started: a graph's has several kernels, and a recording may lack the launch itself."""
        self.correlation += 1
        is_recorded, lasts_ns = self.rng.random() < 0.9, self.rng.choice([0, 1, 6])
        self.tick(lasts_ns > 0)
        launched = self.now
        if is_recorded:
            name = self.rng.choice(["cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaGraphLaunch"])
            # By its own clock it may go on for longer than what is around it.
            self.add(files.LAUNCH, name, thread, correlation=self.correlation, duration_ns=lasts_ns)
        for _ in range(self.rng.choice([0, 1, 1, 4])):
            name = f"kernel{len(self.expected)}"
            unknown = (UNATTRIBUTED, UNATTRIBUTED, "", NO_OPERATOR, NO_OPERATOR)
            self.expected[name] = place if is_recorded else unknown
            self.add(
                self.rng.choice(files.GPU_KINDS), name, self.rng.randint(7, 9), device=self.rng.randint(0, 1),
                correlation=self.correlation, duration_ns=self.rng.choice([0, 1, 5, 40]),
                start_ns=launched + self.rng.randint(-2, 50),
            )  # fmt: skip
        self.tick(1)

    def recording(self) -> Recording:
        modules = modules_table("Root", ["", *(self.module(i) for i in range(1, self.num_modules))])
        in_order = sorted(self.events, key=lambda event: event["start_ns"])
        return Recording.from_tables(
            pa.Table.from_pylist(in_order, schema=files.EVENTS_SCHEMA),
            pa.Table.from_pylist(self.calls, schema=files.CALLS_SCHEMA),
            modules,
        )


def random_table(seed: int) -> Table:
    table = Table(random.Random(seed))
    for thread in range(1, table.rng.randint(1, 3) + 1):
        table.now = table.rng.randint(0, 10)
        for _ in range(table.rng.randint(1, 4)):
            table.fill(thread, 4, None)
            if table.rng.random() < 0.5:
                table.add(files.MARK, files.MARK_PREFIX + table.rng.choice([files.RESUME, files.STEP_BEGIN]), thread)
    return table


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_tables(seed: int) -> None:
    """Every GPU activity is in exactly one row, at the place that its launch has on its thread's stack."""
    table = random_table(seed)
    recording = table.recording()
    found = attribute(recording)
    gpu = recording.events[recording.events["kind"].isin(files.GPU_KINDS)]
    assert found.on_gpu == bool(len(gpu))
    if found.on_gpu:
        work = found.work
        assert sorted(work["name"]) == sorted(gpu["name"])
        assert work["duration_ns"].sum() == gpu["duration_ns"].sum()
        places = work[["phase", "module", "node", "op", "outer_op"]].itertuples(index=False, name=None)
        for name, place in zip(work["name"], places, strict=True):
            expected = table.expected[name]
            if expected is None:
                assert place[1].startswith("(")
            else:
                assert place == expected, name
        assert set(work["step"]) <= set(range(-1, 10))
        columns = ["kind", "name", "device", "start_ns", "duration_ns"]
        assert Counter(work[columns].itertuples(index=False)) == Counter(gpu[columns].itertuples(index=False))
        assert (work["stream"] >= 7).all()
    operators = replace(recording, events=recording.events.drop(gpu.index))
    on_cpu = attribute(operators)
    assert len(on_cpu.work) == (operators.events["kind"] == files.OP).sum()
    assert on_cpu.work["duration_ns"].sum() == operator_ns(operators.events)
    assert (on_cpu.work["duration_ns"] >= 0).all()
    assert not on_cpu.on_gpu


@settings(max_examples=150, deadline=None)
@given(
    intervals=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12),
    offset=st.sampled_from([0, 1_795_511_358_909_160_636]),
)
def test_busy_time_is_the_union(intervals: list[tuple[int, int]], offset: int) -> None:
    start = np.array([begin for begin, _ in intervals], dtype=np.int64) + offset
    duration = np.array([length for _, length in intervals], dtype=np.int64)
    busy = span_and_busy(start, start + duration)[1]
    assert busy == len({ns for begin, length in intervals for ns in range(begin, begin + length)})
    if intervals:
        assert busy <= min(int((start + duration).max() - start.min()), int(duration.sum()))


def test_an_activity_whose_launch_is_missing_is_unattributed() -> None:
    table = Table(random.Random(0))
    table.add(files.CALL, files.CALL_PREFIX, 1, ref=0, duration_ns=100)
    table.calls.append({"call": 0, "module": 1, "is_recompute": False, "sequence_begin": 0, "sequence_end": 0})
    table.now = 10
    for name in ("cudaGraphLaunch", "cuGraphLaunch"):  # the runtime's call, and the driver's that it makes
        table.add(files.LAUNCH, name, 1, correlation=5, duration_ns=1)
    for correlation, name in ((5, "a"), (5, "b"), (6, "c")):
        table.add(files.KERNEL, name, 7, device=0, correlation=correlation, duration_ns=10)
    work = attribute(table.recording()).work.set_index("name")
    assert list(work["phase"]) == [FORWARD, FORWARD, UNATTRIBUTED]
    assert list(work["module"]) == ["part1", "part1", UNATTRIBUTED]
    assert work.loc["c", ["call", "step", "node", "op", "outer_op"]].tolist() == [-1, -1, "", NO_OPERATOR, NO_OPERATOR]
