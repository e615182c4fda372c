"""Attribution of what lies outside the model: the Trainer's order, optimizers, memory, odd recordings."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recording import (
    BACKWARD,
    CHECKPOINTING,
    CLIP,
    FORWARD,
    ONCE_A_STEP,
    OPTIMIZER,
    RECOMPUTE,
    REST,
    SIGNS,
    WIDTH,
    Apply,
    Matmuls,
    cells,
    hooks_of,
    leaf,
    put_mark,
    record,
    through,
    trainer_step,
    trains,
)

from tunescope import latency_files as files
from tunescope.analyze.attribution import Recording, attribute, memory_timeline
from tunescope.analyze.places import AFTER, CHECK, CLIPPING, DATA, LOSS, OUTSIDE, STEPPING, ZEROING

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the Trainer's order ---


def parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(model.parameters())


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW one by one": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "SGD foreach, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_work_outside_the_model_has_named_cells(name: str, micro_steps: int) -> None:
    model = torch.nn.Sequential(Matmuls(1), Matmuls(1, trained=False), Matmuls(2))
    optimizer = OPTIMIZERS[name](parameters(model)[::2])
    recorded = record(model, lambda: [trainer_step(model, optimizer, micro_steps) for _ in range(2)])
    for operator, place in SIGNS.items():
        assert recorded.cells(operator) == {place: 2 if operator in ONCE_A_STEP else 2 * micro_steps}, operator
    work = recorded.work
    assert set(work.loc[work["module"] == CLIPPING, "phase"]) == {CLIP}
    assert set(work.loc[work["module"] == ZEROING, "phase"]) == {REST}
    assert Counter(work.loc[work["module"] == CLIPPING, "outer_op"])["aten::_foreach_norm"] >= 2
    assert set(work.loc[work["name"] == "aten::_foreach_norm", "module"]) == {CLIPPING}
    assert Counter(work.loc[work["outer_op"] == "aten::_foreach_norm", "module"]).keys() == {CLIPPING}
    zeroing = work[work["module"] == ZEROING]
    assert {"aten::_foreach_zero_", "aten::zero_"} & set(zeroing["name"])
    # Everything between the marks around optimizer.step, and nothing else.
    events = recorded.recording.events
    is_step = (events["kind"] == files.ANNOTATION) & events["name"].astype(str).str.startswith("Optimizer.step")
    steps = events[is_step]
    assert len(steps) == 2
    inside = np.zeros(len(work), dtype=bool)
    for start, duration in zip(steps["start_ns"], steps["duration_ns"], strict=True):
        inside |= ((work["start_ns"] >= start) & (work["start_ns"] < start + duration)).to_numpy()
    assert inside.sum() > 0
    assert ((work["module"] == STEPPING).to_numpy() == inside).all()
    assert set(work.loc[inside, "phase"]) == {OPTIMIZER}
    assert Counter(work["step"]).keys() == {0, 1}
    assert recorded.attribution.num_steps == 2
    assert recorded.attribution.window_ns > 0
    assert Counter(work.loc[work["name"] == "aten::isnan", "step"]) == {0: micro_steps, 1: micro_steps}


def test_an_optimizer_that_runs_the_model_itself() -> None:
    model = Matmuls(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    def closure() -> torch.Tensor:
        loss = torch.tan(model(leaf())).sum()
        loss.backward()
        return loss

    def run() -> None:
        put_mark(files.PRE_OPTIMIZER)
        optimizer.step(closure)
        torch.flip(leaf(), [0])
        put_mark(files.OPTIMIZER)

    recorded = record(model, run)
    assert recorded.cells() == cells(Matmuls=(1, 2))
    assert recorded.cells("aten::tan") == recorded.cells("aten::flip") == {(OPTIMIZER, STEPPING): 1}


def test_norms_elsewhere_are_not_clipping() -> None:
    model = Matmuls(1)

    def run() -> None:
        put_mark(files.STEP_BEGIN)
        torch.linalg.vector_norm(leaf())
        torch.linalg.vector_norm(model(leaf())).backward()
        put_mark(files.PRE_OPTIMIZER)
        torch.linalg.vector_norm(leaf())
        put_mark(files.OPTIMIZER)
        torch.linalg.vector_norm(leaf())

    assert record(model, run).cells("aten::linalg_vector_norm") == {
        (REST, DATA): 1, (FORWARD, LOSS): 1, (OPTIMIZER, STEPPING): 1, (REST, AFTER): 1
    }  # fmt: skip


def test_an_optimizer_that_steps_inside_backward_is_the_optimizers() -> None:
    model = Matmuls(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    found = record(model, trains(model))
    assert found.cells() == cells(Matmuls=(1, 2))
    assert found.at(OPTIMIZER, STEPPING)["aten::add_"] == 1


def test_a_recording_without_marks_and_without_forwards() -> None:
    model = Matmuls(1)
    assert record(model, lambda: torch.mm(leaf(), leaf())).cells() == {(REST, OUTSIDE): 1}
    assert record(model, lambda: None).cells() == {}


def test_backward_of_a_function_that_is_no_module() -> None:
    model = Matmuls(1)

    def run() -> None:
        put_mark(files.RESUME)
        put_mark(files.STEP_BEGIN)
        torch.mm(leaf(), leaf()).sum().backward()
        torch.flip(leaf(), [0])

    found = record(model, run)
    assert found.cells() == {(REST, DATA): 1, (BACKWARD, OUTSIDE): 2}
    assert found.cells("aten::flip") == {(REST, CHECK): 1}


def test_events_of_an_empty_recording() -> None:
    empty = Recording.from_tables(
        files.EVENTS_SCHEMA.empty_table(), files.CALLS_SCHEMA.empty_table(), files.MODULES_SCHEMA.empty_table()
    )
    found = attribute(empty)
    assert (len(found.work), found.window_ns, found.num_steps, found.on_gpu) == (0, 0, 1, False)
    assert len(memory_timeline(empty)) == 0


def test_hooks_leave_no_trace_behind() -> None:
    model = torch.nn.Sequential(Matmuls(1), torch.nn.Sequential(Matmuls(1)))
    record(model, trains(model))
    assert not hooks_of(model)


@CHECKPOINTING
def test_memory_is_placed_like_work(kind: bool | None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.part(x.repeat(100, 1))

    model = Apply(lambda self, x: through(kind, self.layer, x), layer=Apply(forward, part=Matmuls(2)))
    timeline = memory_timeline(record(model, trains(model), with_memory=True).recording)
    size = 100 * WIDTH * WIDTH * 4
    large = timeline[timeline["allocated_bytes"] == size]
    allocated = Counter(zip(large["phase"], large["module"], strict=True))
    again = {} if kind is None else {(RECOMPUTE, "layer"): 1, (RECOMPUTE, "layer.part"): 2}
    if kind is False:  # stops as the last product asks for its inputs
        again[RECOMPUTE, "layer.part"] = 1
    of_backward = allocated.pop((BACKWARD, "layer.part"))
    assert of_backward >= 2  # the gradients of the products' inputs, and copies that the library wants
    outside = {(FORWARD, "(between steps)"), (BACKWARD, "layer"), (BACKWARD, OUTSIDE), (FORWARD, LOSS)}
    found = {cell: count for cell, count in allocated.items() if cell not in outside}
    assert found == {(FORWARD, "layer"): 1, (FORWARD, "layer.part"): 2} | again
    assert set(timeline["device"]) == {-1}
