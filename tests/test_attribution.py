"""Attribution of hand-made models: checkpointing, names, exceptions, on the CPU.

On a CPU operators are counted. A matrix product makes one in forward, one in each recompute, and in backward one for
each of its two operands that wants a gradient.
"""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from recording import (
    BACKWARD,
    BOTH_KINDS,
    CHECKPOINTING,
    FORWARD,
    MM,
    RECOMPUTE,
    WIDTH,
    Apply,
    Matmuls,
    cells,
    leaf,
    record,
    through,
    trains,
)

from tunescope import latency_files as files
from tunescope.analyze.places import LOSS, OUTSIDE

pytestmark = pytest.mark.usefixtures("one_thread")


# --- checkpointing, frozen and trained weights ---


@CHECKPOINTING
@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_under_checkpointing(kind: bool | None, trained: bool) -> None:
    def layers(self: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = through(kind, layer, x)
        return x

    blocks = [torch.nn.Sequential(Matmuls(2, trained=trained), Matmuls(3)) for _ in range(2)]
    model = Apply(layers, layers=torch.nn.ModuleList(blocks))
    found = record(model, trains(model)).cells()
    counts = [(2, 4 if trained else 2), (3, 6)]
    expected = {f"layers.{i}.{j}": counts[j] for i in (0, 1) for j in (0, 1)}
    assert found == cells(times_recomputed=kind is not None, **expected)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_nested_checkpointing(outer: bool, inner: bool) -> None:
    def block(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.after(through(inner, self.inside, x))

    layer = Apply(block, inside=Matmuls(2), after=Matmuls(1))
    model = Apply(lambda self, x: through(outer, self.layer, x), layer=layer)
    found = record(model, trains(model)).cells()
    assert found == cells(times_recomputed=1, **{"layer.after": (1, 2)}) | cells(
        times_recomputed=2, **{"layer.inside": (2, 4)}
    )


@CHECKPOINTING
def test_a_checkpointed_function_that_is_no_module(kind: bool | None) -> None:
    """Its operators belong to the module that calls it, in all three phases."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return through(kind, lambda y: torch.mm(torch.sin(torch.mm(y, self.weight)), self.weight), x)

    inner = Apply(forward, weight=torch.nn.Parameter(torch.eye(WIDTH)))
    model = Apply(lambda self, x: self.after(self.inner(x)), inner=inner, after=Matmuls(1))
    recorded = record(model, trains(model))
    again = int(kind is not None)
    assert recorded.cells() == cells(times_recomputed=again, inner=(2, 4)) | cells(after=(1, 2))
    assert recorded.cells("aten::sin") == cells(times_recomputed=again, inner=(1, 0))
    assert recorded.cells("aten::cos") == cells(inner=(0, 1))


@CHECKPOINTING
def test_a_checkpointed_function_that_calls_modules(kind: bool | None) -> None:
    """Also what it does before it first calls one, and what no gradient flows through, is the caller's."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        def function(y: torch.Tensor) -> torch.Tensor:
            y = torch.sin(y + torch.zeros(WIDTH, WIDTH))
            return self.second(torch.sin(self.first(y)).sin())

        return through(kind, function, x)

    model = Apply(
        lambda self, x: self.caller(x),
        caller=Apply(forward, first=Matmuls(2, trained=False), second=torch.nn.Sequential(Matmuls(1), Matmuls(1))),
    )
    recorded = record(model, trains(model))
    again = int(kind is not None)
    assert recorded.cells() == cells(
        times_recomputed=again,
        **{"caller.first": (2, 2), "caller.second.0": (1, 2), "caller.second.1": (1, 2)},
    )
    assert recorded.cells("aten::sin") == cells(times_recomputed=again, caller=(3, 0))
    assert recorded.cells("aten::cos") == cells(caller=(0, 3))
    assert recorded.cells("aten::zeros") == cells(times_recomputed=again, caller=(1, 0))
    if kind is not None:
        calls = recorded.recording.calls
        assert calls["is_recompute"].sum() == 4  # first, second and what is in it


@BOTH_KINDS
def test_a_whole_model_checkpointed_from_outside(kind: bool) -> None:
    model = torch.nn.Sequential(Matmuls(1), Matmuls(2))
    found = record(model, lambda: torch.sin(through(kind, model, leaf())).sum().backward())
    assert found.cells() == cells(times_recomputed=1, **{"0": (1, 2), "1": (2, 4)})
    assert found.cells("aten::cos") == {(BACKWARD, OUTSIDE): 1}
    assert (RECOMPUTE, LOSS) not in set(zip(found.work["phase"], found.work["module"], strict=True))


@pytest.mark.parametrize(
    ("kind", "needs_input_gradient"),
    # Reentrant checkpointing gives no gradients where the input wants none.
    [(None, True), (None, False), (True, True), (False, True), (False, False)],
)
def test_frozen_weights_with_adapters(kind: bool | None, needs_input_gradient: bool) -> None:
    def lora(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))

    layer = Apply(lora, base=Matmuls(1, trained=False), lora_A=Matmuls(1), lora_B=Matmuls(1))
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=layer)
    found = record(model, trains(model, leaf(requires_grad=needs_input_gradient))).cells()
    of_input = int(needs_input_gradient)
    assert found == cells(
        times_recomputed=kind is not None,
        **{"layer.base": (1, of_input), "layer.lora_A": (1, 1 + of_input), "layer.lora_B": (1, 2)},
    )


def test_nested_functions_that_are_no_modules() -> None:
    """The inner recompute needs what the outer one makes, so one node runs both, and what they call."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = through(False, lambda y: self.part(torch.sin(y)), x)
        return through(False, lambda y: torch.sin(torch.mm(y, self.weight)), x)

    layer = Apply(forward, part=Matmuls(1), weight=torch.nn.Parameter(torch.eye(WIDTH)))
    model = Apply(lambda self, x: through(False, lambda y: self.layer(torch.sin(y)), x), layer=layer)
    recorded = record(model, trains(model))
    # The outer recompute stops as the last inner function asks for its input.
    assert recorded.cells() == cells(times_recomputed=2, **{"layer.part": (1, 2)}) | cells(
        times_recomputed=1, layer=(1, 2)
    )
    assert recorded.cells("aten::sin") == cells(layer=(2, 0), Apply=(1, 0)) | {
        (RECOMPUTE, "layer"): 3,
        (RECOMPUTE, "Apply"): 1,
    }


@BOTH_KINDS
def test_what_a_function_does_without_gradients_before_it_calls_a_module(kind: bool) -> None:
    inner = Apply(lambda self, x, y: torch.mm(x + y, self.weight), weight=torch.nn.Parameter(torch.eye(WIDTH)))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return through(kind, lambda y: self.inner(y, torch.zeros(WIDTH, WIDTH)), x)

    model = Apply(lambda self, x: self.caller(x), caller=Apply(forward, inner=inner))
    assert record(model, trains(model)).cells("aten::zeros") == cells(times_recomputed=1, caller=(1, 0))


def test_work_without_gradients_is_forward() -> None:
    model = Matmuls(3, trained=False)

    def run() -> None:
        with torch.no_grad():
            model(leaf())

    assert record(model, run).cells() == {(FORWARD, "Matmuls"): 3}


# --- how modules are called and named ---


def test_a_module_under_two_names_has_the_first() -> None:
    shared = Matmuls(2)
    model = torch.nn.Sequential(shared, Matmuls(1), shared)
    found = record(model, trains(model))
    assert found.cells() == cells(**{"0": (4, 8), "1": (1, 2)})
    assert found.at(BACKWARD, "0")["torch::autograd::AccumulateGrad"] == 1
    assert list(found.recording.modules["path"]) == ["", "0", "1"]


def test_a_tied_parameter_gathers_its_gradient_in_its_first_module() -> None:
    embedding, head = torch.nn.Embedding(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH, bias=False)
    head.weight = embedding.weight
    model = Apply(lambda self, ids: self.head(self.embedding(ids)), embedding=embedding, head=head)
    found = record(model, trains(model, torch.arange(WIDTH)))
    assert found.cells() == cells(head=(1, 2))
    assert found.cells("aten::embedding_dense_backward") == cells(embedding=(0, 1))
    assert found.cells("torch::autograd::AccumulateGrad") == cells(embedding=(0, 1))
    bytes_of = found.recording.modules.set_index("path")["trained_bytes"]
    assert (bytes_of["embedding"], bytes_of["head"]) == (WIDTH * WIDTH * 4, 0)


@CHECKPOINTING
def test_a_module_called_twice(kind: bool | None) -> None:
    model = Apply(lambda self, x: through(kind, self.part, self.part(x)), part=Matmuls(2))
    recorded = record(model, trains(model))
    assert recorded.cells() == {
        (FORWARD, "part"): 4,
        **({(RECOMPUTE, "part"): 2} if kind is not None else {}),
        (BACKWARD, "part"): 8,
    }
    forwards = recorded.work[(recorded.work["name"] == MM) & (recorded.work["phase"] == FORWARD)]
    assert Counter(forwards["call"]) == {1: 2, 2: 2}


@CHECKPOINTING
def test_a_module_that_calls_itself(kind: bool | None) -> None:
    def recurse(self: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
        x = torch.mm(x, self.weight)
        return x if depth == 0 else torch.mm(through(kind, self, x, depth - 1), self.weight)

    model = Apply(recurse, weight=torch.nn.Parameter(torch.eye(WIDTH)))
    recorded = record(model, trains(model, leaf(), 1))
    assert recorded.cells() == cells(Apply=(3, 6)) | ({(RECOMPUTE, "Apply"): 1} if kind is not None else {})


def test_modules_of_one_class_are_told_apart_by_their_path() -> None:
    blocks = torch.nn.ModuleList(Apply(lambda self, x: self.part(x), part=Matmuls(n)) for n in (1, 2, 3))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tail(x)

    model = Apply(forward, blocks=blocks, tail=torch.nn.Sequential(torch.nn.Sequential(Matmuls(1)), Matmuls(2)))
    assert record(model, trains(model)).cells() == cells(
        **{f"blocks.{n - 1}.part": (n, 2 * n) for n in (1, 2, 3)}, **{"tail.0.0": (1, 2), "tail.1": (2, 4)}
    )


@CHECKPOINTING
def test_modules_that_return_tuples_and_dicts(kind: bool | None) -> None:
    pair = Apply(lambda self, x: (self.part(x), 7), part=Matmuls(1))
    table = Apply(lambda self, x: {"x": self.part(x), "none": None}, part=Matmuls(2))

    def forward(self: Any, x: torch.Tensor) -> Any:
        x, _ = through(kind, self.pair, x)
        # Reentrant checkpointing gives no gradients through a dict.
        return {"out": [through(None if kind else kind, self.table, x)["x"]]}

    model = Apply(forward, pair=pair, table=table)
    assert record(model, lambda: model(leaf())["out"][0].sum().backward()).cells() == cells(
        times_recomputed=kind is not None, **{"pair.part": (1, 2)}
    ) | cells(times_recomputed=kind is False, **{"table.part": (2, 4)})


def test_a_name_with_a_number_sign_and_a_range_that_looks_like_ours() -> None:
    model = torch.nn.Sequential()
    model.add_module("layer #7", Matmuls(1))

    def run() -> None:
        for name in ("Linear", "Linear #0 of somebody else"):
            with torch.profiler.record_function(files.CALL_PREFIX + name):
                trains(model)()

    assert record(model, run).cells() == cells(**{"layer #7": (2, 4)})


# --- exceptions ---


class Fails(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.weight = torch.nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.mm(x, self.weight)
        if self.inner is not None:
            return self.inner(x)
        raise ValueError("as planned")


@CHECKPOINTING
def test_an_exception_that_the_model_catches(kind: bool | None) -> None:
    """Work after it is placed right, in that step and in the next."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(ValueError):
            return through(kind, self.bad, x)
        return through(kind, self.good, torch.mm(x, self.weight))

    weight = torch.nn.Parameter(torch.eye(WIDTH))
    model = Apply(forward, bad=Fails(Fails()), good=Matmuls(2), weight=weight)

    def run() -> None:
        trains(model)()
        trains(model)()

    expected = cells(times_recomputed=kind is not None, good=(4, 8)) | cells(Apply=(2, 4))
    if kind is not None:
        expected[RECOMPUTE, "good"] = 4
    assert record(model, run).cells() == expected | {(FORWARD, "bad"): 2, (FORWARD, "bad.inner"): 2}


def test_an_exception_that_leaves_the_model() -> None:
    model = torch.nn.Sequential(Matmuls(1), Fails())

    def run() -> None:
        with pytest.raises(ValueError, match="as planned"):
            model(leaf())
        torch.mm(leaf(), leaf())
        trains(model[0])()

    assert record(model, run).cells() == {
        (FORWARD, "0"): 2,
        (FORWARD, "1"): 1,
        (FORWARD, LOSS): 1,
        (BACKWARD, "0"): 2,
    }


def test_an_exception_that_runs_no_hooks() -> None:
    """Torch runs a module's hooks after an Exception only; the range stays open until the module around it ends."""

    class Stop(BaseException):
        pass

    def stop(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise Stop

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(Stop):
            return self.bad(x)
        return x

    model = Apply(lambda self, x: self.after(self.layer(x)), layer=Apply(forward, bad=Apply(stop)), after=Matmuls(2))
    assert record(model, trains(model)).cells() == cells(after=(2, 4))


@pytest.mark.parametrize("registered_first", [True, False])
def test_an_exception_in_someone_elses_hook(registered_first: bool) -> None:
    model = torch.nn.Sequential(Matmuls(1), Matmuls(2))

    def refuse(*_: Any) -> None:
        raise ValueError("as planned")

    handles = [model[0].register_forward_hook(refuse)] if registered_first else []

    def run() -> None:
        if not registered_first:
            handles.append(model[0].register_forward_hook(refuse))
        with pytest.raises(ValueError, match="as planned"):
            model(leaf())
        handles[0].remove()
        trains(model)()

    found = record(model, run).cells()
    assert found == cells(**{"0": (2, 2), "1": (2, 4)})


@BOTH_KINDS
def test_an_exception_in_a_recompute_leaves_ranges_balanced(kind: bool) -> None:
    failing = [False]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.part(x)
        if failing[0]:
            raise ValueError("as planned")
        return self.part(x)

    model = Apply(lambda self, x: through(kind, self.block, x), block=Apply(forward, part=Matmuls(1)))

    def run() -> None:
        out = model(leaf()).sum()
        failing[0] = True
        with pytest.raises(ValueError, match="as planned"):
            out.backward()
        failing[0] = False
        trains(model)()

    found = record(model, run).cells()
    assert found == {(FORWARD, "block.part"): 4, (RECOMPUTE, "block.part"): 3, (BACKWARD, "block.part"): 4}
