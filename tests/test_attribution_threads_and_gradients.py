"""Attribution of hand-made models: threads, and gradients of every origin."""

import threading
from typing import Any

import pytest
import torch
from recording import (
    BACKWARD,
    BOTH_KINDS,
    CHECKPOINTING,
    FORWARD,
    RECOMPUTE,
    REST,
    WIDTH,
    Apply,
    Matmuls,
    cells,
    leaf,
    record,
    through,
    trains,
)

from tunescope.analyze.places import CHECK, ENGINE, LOSS, OTHER_THREAD, OUTSIDE

pytestmark = pytest.mark.usefixtures("one_thread")


# --- threads ---


def test_threads_that_train_at_once_with_the_same_sequence_numbers() -> None:
    """Each thread counts from 0: only thread and number together tell whose node it is."""
    first, second = Apply(lambda self, x: self.part(x), part=Matmuls(1)), Matmuls(3, trained=False)
    model = torch.nn.ModuleDict({"first": first, "second": second})
    barrier = threading.Barrier(2)
    begins = []

    def train(part: torch.nn.Module) -> None:
        for _ in range(2):
            barrier.wait()
            begins.append(torch._C._autograd._get_sequence_nr())
            out = torch.sin(part(leaf())).sum()
            barrier.wait()
            out.backward()

    def run() -> None:
        threads = [threading.Thread(target=train, args=(part,)) for part in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    recorded = record(model, run, all_threads=True)
    assert sorted(begins)[:2] == [0, 0]
    assert recorded.cells() == cells(**{"first.part": (2, 4), "second": (6, 6)})
    # What a thread that trains does outside its modules is told from its own forwards and backwards.
    assert recorded.cells("aten::sin") == {(FORWARD, LOSS): 4}
    assert recorded.cells("aten::cos") == {(BACKWARD, OUTSIDE): 4}


@CHECKPOINTING
def test_forward_on_another_thread_than_backward(kind: bool | None) -> None:
    model = Apply(lambda self, x: through(kind, self.part, x), part=Matmuls(2))

    def run() -> None:
        trains(model)()
        out: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: out.append(model(leaf()).sum()))
        thread.start()
        thread.join()
        out[0].backward()
        torch.flip(leaf(), [0])

    recorded = record(model, run, all_threads=True)
    expected = cells(part=(4, 8)) | ({(RECOMPUTE, "part"): 4} if kind is not None else {})
    assert recorded.cells() == expected
    assert recorded.cells("aten::flip") == {(REST, CHECK): 1}  # backward is over


def test_another_thread_trains_between_a_forward_and_its_backward() -> None:
    model = torch.nn.ModuleDict({"main": Matmuls(1), "other": Matmuls(2)})

    def run() -> None:
        out = model["main"](leaf())
        thread = threading.Thread(target=trains(model["other"]))
        thread.start()
        thread.join()
        torch.tan(out).sum().backward()

    recorded = record(model, run, all_threads=True)
    assert recorded.cells() == cells(main=(1, 2), other=(2, 4))
    assert recorded.cells("aten::tan") == {(FORWARD, LOSS): 1}


def test_backward_on_another_thread_than_forward() -> None:
    model = Matmuls(2)

    def run() -> None:
        out = model(leaf()).sum()
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
        torch.flip(leaf(), [0])

    recorded = record(model, run, all_threads=True)
    assert recorded.cells() == cells(Matmuls=(2, 4))
    assert recorded.cells("aten::flip") == {(REST, CHECK): 1}
    assert recorded.cells("aten::ones_like") == {(BACKWARD, ENGINE): 1}


def test_threads_that_neither_train_nor_differentiate() -> None:
    model = Matmuls(1)

    def run() -> None:
        thread = threading.Thread(target=lambda: torch.mm(leaf(), leaf()))
        thread.start()
        trains(model)()
        thread.join()

    assert record(model, run, all_threads=True).cells() == cells(Matmuls=(1, 2)) | {(REST, OTHER_THREAD): 1}


def test_the_profiler_does_not_follow_a_thread_that_python_starts() -> None:
    model = Matmuls(1)

    def run() -> None:
        thread = threading.Thread(target=trains(model))
        thread.start()
        thread.join()

    assert record(model, run).cells() == {}


# --- gradients ---


@CHECKPOINTING
def test_micro_steps_add_to_a_parameters_gradient_in_its_module(kind: bool | None) -> None:
    model = Apply(lambda self, x: through(kind, self.part, x), part=Matmuls(1))

    def run() -> None:
        for _ in range(3):
            trains(model)()

    recorded = record(model, run)
    assert recorded.cells() == cells(part=(3, 6)) | ({(RECOMPUTE, "part"): 3} if kind is not None else {})
    assert recorded.at(BACKWARD, "part")["aten::add_"] == 2  # the first gradient is taken as it is
    accumulating = recorded.work[recorded.work["name"] == "aten::add_"]
    assert set(accumulating["node"]) == {"torch::autograd::AccumulateGrad"}
    assert set(accumulating["outer_op"]) == {"aten::add_"}


def test_a_parameter_used_twice_adds_once() -> None:
    weight = torch.nn.Parameter(torch.eye(WIDTH))
    first, second = Matmuls(1), Matmuls(1)
    first.weight = second.weight = weight
    model = torch.nn.Sequential(first, second)
    found = record(model, trains(model))
    assert found.cells() == cells(**{"0": (1, 2), "1": (1, 2)})
    assert found.cells("torch::autograd::AccumulateGrad") == {(BACKWARD, "0"): 1, (BACKWARD, OUTSIDE): 1}  # and x's


@BOTH_KINDS
def test_a_gradient_of_no_parameter(kind: bool) -> None:
    """Reentrant checkpointing detaches a layer's input and gathers its gradient: that is checkpointing's own work."""
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=Matmuls(1))
    found = record(model, trains(model)).cells("torch::autograd::AccumulateGrad")
    assert found == {(BACKWARD, "layer"): 1, (BACKWARD, OUTSIDE): 1} | ({(BACKWARD, "Apply"): 1} if kind else {})


class TwiceTheMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(torch.mm(x, weight), weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        _, weight = ctx.saved_tensors
        return torch.mm(torch.mm(torch.mm(gradient, weight), weight), weight), None


@CHECKPOINTING
def test_an_autograd_function_written_in_python(kind: bool | None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return TwiceTheMatmul.apply(self.before(x), self.weight)

    layer = Apply(forward, before=Matmuls(1), weight=torch.nn.Parameter(torch.eye(WIDTH)))
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=layer)
    recorded = record(model, trains(model))
    assert recorded.cells() == cells(times_recomputed=kind is not None, **{"layer": (2, 3), "layer.before": (1, 2)})
    inside = recorded.work.query("name == 'aten::mm' and module == 'layer' and phase == 'backward'")
    assert set(inside["node"]) == {"TwiceTheMatmulBackward"}


@CHECKPOINTING
def test_hooks_on_tensors_run_where_the_tensor_was_made(kind: bool | None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.part(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: torch.flip(gradient, [0]))
        return torch.sin(x)

    model = Apply(lambda self, x: through(kind, self.layer, x), layer=Apply(forward, part=Matmuls(1)))
    recorded = record(model, trains(model))
    assert recorded.cells("aten::flip") == cells(**{"layer.part": (0, 1)})
    assert recorded.cells() == cells(times_recomputed=kind is not None, **{"layer.part": (1, 2)})


def test_hooks_before_a_recompute_are_backward() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.mm(x, self.weight)
        x.register_hook(lambda gradient: torch.flip(gradient, [0]))
        return x

    layer = Apply(forward, weight=torch.nn.Parameter(torch.eye(WIDTH)))
    model = Apply(lambda self, x: through(False, self.layer, x), layer=layer)
    recorded = record(model, trains(model))
    assert recorded.cells("aten::flip") == cells(layer=(0, 1))
    assert recorded.cells() == cells(times_recomputed=1, layer=(1, 2))


def look_at_gradient(weight: torch.Tensor) -> None:
    assert weight.grad is not None
    torch.tril(weight.grad)


@CHECKPOINTING
def test_hooks_on_parameters_run_in_the_parameters_module(kind: bool | None) -> None:
    part = Matmuls(1)
    model = Apply(lambda self, x: through(kind, self.part, x), part=part)
    part.weight.register_hook(lambda gradient: torch.flip(gradient, [0]))
    part.weight.register_post_accumulate_grad_hook(look_at_gradient)
    recorded = record(model, trains(model))
    assert recorded.cells("aten::flip") == recorded.cells("aten::tril") == cells(part=(0, 1))


def test_hooks_on_the_module_itself() -> None:
    model = Apply(lambda self, x: self.part(x), part=Matmuls(1))
    model.part.register_forward_pre_hook(lambda module, args: (torch.sin(args[0]),))
    model.part.register_forward_hook(lambda module, args, output: torch.sin(output))
    model.part.register_full_backward_hook(lambda module, into, out: (torch.flip(into[0], [0]),))
    recorded = record(model, trains(model))
    assert recorded.cells("aten::sin") == cells(part=(2, 0))
    assert recorded.cells("aten::flip") == cells(part=(0, 1))
    assert recorded.cells() == cells(part=(1, 2))


def test_a_gradient_taken_inside_forward() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.part(inner).sum(), inner)
        return self.part(x) + gradient

    model = Apply(forward, part=Matmuls(1))
    assert record(model, trains(model)).cells() == cells(part=(2, 3))


def test_a_double_backward_reads_as_recompute() -> None:
    """A documented limit: the operators of a backward that can itself be differentiated look like a forward's."""
    model = Matmuls(2)

    def run() -> None:
        x = leaf()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.sum().backward()

    found = record(model, run).cells()
    assert found[RECOMPUTE, "Matmuls"] == 2
    assert found[FORWARD, "Matmuls"] == 2
    assert sum(found.values()) > 4
