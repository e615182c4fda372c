"""The clock of phases and layers, driven by a clock that only the model's own parts move: every nanosecond is known."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import through

from tunescope import latency_files as files
from tunescope.measure import phases as phases_module
from tunescope.measure.memory import memory_parts
from tunescope.measure.phases import PhaseClock, decoder_layers

FORWARD, RECOMPUTE, BACKWARD, CLIP, OPTIMIZER, REST = files.PHASES
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.usefixtures("one_thread"),
]
CHECKPOINTING = pytest.mark.parametrize("kind", [None, True, False], ids=["none", "reentrant", "non-reentrant"])


class Clock:
    now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def passes(self, duration_ns: int) -> None:
        self.now_ns += duration_ns


@pytest.fixture(scope="module")
def shared_clock() -> Iterator[Clock]:
    patch = pytest.MonkeyPatch()
    clock = Clock()
    patch.setattr(phases_module, "time", clock)
    yield clock
    patch.undo()


@pytest.fixture
def clock(shared_clock: Clock) -> Clock:
    return shared_clock


class Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, backward_ns: int) -> torch.Tensor:
        ctx.clock, ctx.backward_ns = clock, backward_ns
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        assert ctx.saved_tensors  # under non-reentrant checkpointing: recomputes
        ctx.clock.passes(ctx.backward_ns)
        return gradient, None, None


class Takes(torch.nn.Module):
    """Takes known times in forward and in backward."""

    def __init__(self, clock: Clock, forward_ns: int, backward_ns: int) -> None:
        super().__init__()
        self.clock, self.forward_ns, self.backward_ns = clock, forward_ns, backward_ns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.passes(self.forward_ns)
        return Passes.apply(x, self.clock, self.backward_ns)


class Layer(torch.nn.Module):
    def __init__(self, clock: Clock, scale: int = 1) -> None:
        super().__init__()
        self.first, self.second = Takes(clock, 100 * scale, 1_000 * scale), Takes(clock, 30 * scale, 200 * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Net(torch.nn.Module):
    """Layers of 130, 260, ... ns, between an embedding of 7 ns and a head of 50; backward takes ten times that."""

    def __init__(self, clock: Clock, kind: bool | None = None, num_layers: int = 2, pack: Any = None) -> None:
        super().__init__()
        self.kind, self.pack = kind, pack or (lambda x: x)
        self.embedding = Takes(clock, 7, 70)
        self.layers = torch.nn.ModuleList(Layer(clock, scale) for scale in range(1, num_layers + 1))
        self.head = Takes(clock, 50, 500)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embedding(x)
        for layer in self.layers:
            x = through(self.kind, layer, x)
        return self.pack(self.head(x).sum())


def leaf() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


@dataclass
class Watched:
    """Drives a clock of phases as the Trainer and StepRecorder would."""

    clock: Clock
    model: torch.nn.Module

    def __post_init__(self) -> None:
        self.module_ids = {module: number for number, (_, module) in enumerate(self.model.named_modules())}
        self.phases = PhaseClock(self.model, self.module_ids, on_gpu=False)
        self.phases.install()
        self.steps: dict[int, tuple[int, int]] = {}
        self._begin()

    def _begin(self) -> None:
        self.began_ns = self.clock.now_ns
        self.phases.begin_step(len(self.steps))

    def micro_step(self, loss_of: Callable[[Any], torch.Tensor] = lambda output: output) -> None:
        self.clock.passes(3)  # data
        loss = loss_of(self.model(leaf()))
        self.clock.passes(11)  # between forward and backward
        loss.backward()

    def finish(self) -> None:
        self.clock.passes(400)
        self.phases.before_optimizer()
        self.clock.passes(5_000)
        self.phases.after_optimizer()
        self.clock.passes(60)
        duration_ns = self.clock.now_ns - self.began_ns
        self.steps[len(self.steps)] = (duration_ns, duration_ns)
        self._begin()

    def table(self, step: int = 0) -> dict[str, int]:
        rows = [row for row in self.phases.phase_rows(self.steps) if row["step"] == step]
        assert [row["phase"] for row in rows] == list(files.PHASES)
        assert all(row["duration_ns"] == row["host_duration_ns"] for row in rows)
        table = {row["phase"]: row["duration_ns"] for row in rows}
        check(table, self.steps[step][0])
        return table

    def spans(self, step: int = 0) -> dict[tuple[str, str], int]:
        paths = {number: path for number, (path, _) in enumerate(self.model.named_modules())}
        rows = [row for row in self.phases.span_rows(self.steps) if row["step"] == step]
        found = {(paths[row["module"]], row["phase"]): row["duration_ns"] for row in rows}
        assert len(found) == len(rows)
        return found


def check(table: Mapping[str, int], duration_ns: int) -> None:
    """Phases tile the step, and recompute lies inside backward."""
    assert sum(table.values()) - table[RECOMPUTE] == duration_ns
    assert all(value >= 0 for value in table.values())
    assert table[RECOMPUTE] <= table[BACKWARD]


def phases_of(kind: bool | None, num_layers: int = 2, micro_steps: int = 1) -> dict[str, int]:
    of_layers = sum(range(1, num_layers + 1))
    again = 130 * of_layers if kind is not None else 0
    return {
        FORWARD: (7 + 130 * of_layers + 50) * micro_steps,
        RECOMPUTE: again * micro_steps,
        BACKWARD: (11 + 500 + 1_200 * of_layers + again + 70) * micro_steps,
        CLIP: 400,
        OPTIMIZER: 5_000,
        REST: 3 * micro_steps + 60,
    }


# --- phases ---


@CHECKPOINTING
@pytest.mark.parametrize("num_layers", [0, 1, 2, 5])
def test_phases_of_a_step(clock: Clock, kind: bool | None, num_layers: int) -> None:
    watched = Watched(clock, Net(clock, kind, num_layers))
    for _ in range(3):
        watched.micro_step()
        watched.finish()
    for step in range(3):
        expected = phases_of(kind, num_layers)
        if num_layers < 2:  # one layer is no stack of them: what it recomputes is not told from its backward
            expected[RECOMPUTE] = 0
        assert watched.table(step) == expected


@CHECKPOINTING
def test_micro_steps_are_added_up(clock: Clock, kind: bool | None) -> None:
    watched = Watched(clock, Net(clock, kind))
    for micro_steps in (3, 1):
        for _ in range(micro_steps):
            watched.micro_step()
        watched.finish()
    assert watched.table(0) == phases_of(kind, micro_steps=3)
    assert watched.table(1) == phases_of(kind)
    assert watched.spans(0) == {cell: 3 * duration for cell, duration in watched.spans(1).items()}


PACKED: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "an object with a loss": (lambda x: SimpleNamespace(loss=x), lambda output: output.loss),
    "a tuple": (lambda x: (x, x.detach()), lambda output: output[0]),
    "a tuple, loss last": (lambda x: (torch.ones(1), None, x), lambda output: output[2]),
    "a dict": (lambda x: {"loss": x}, lambda output: output["loss"]),
    "a dict without a loss": (lambda x: {"n": 1, "logits": x}, lambda output: output["logits"]),
    "a list in a dict": (lambda x: {"deep": [(None, x)]}, lambda output: output["deep"][0][1]),
    "a tensor that the loss is made of": (lambda x: x, lambda output: output.exp() / 3),
    "two tensors of which the second leads to the loss": (lambda x: (x * 2, x * 3), lambda output: output[1]),
    "two tensors that both do": (lambda x: (x * 2, x * 3), lambda output: output[0] + output[1]),
    "a loss that does not lead to the loss": (lambda x: (x, {"loss": x * 2}), lambda output: output[0]),
}


@CHECKPOINTING
@pytest.mark.parametrize("name", PACKED)
def test_the_end_of_backward_is_found_whatever_a_model_returns(clock: Clock, kind: bool | None, name: str) -> None:
    pack, loss_of = PACKED[name]
    watched = Watched(clock, Net(clock, kind, pack=pack))
    for _ in range(2):
        watched.micro_step(loss_of)
    watched.finish()
    assert watched.table() == phases_of(kind, micro_steps=2)


def test_an_output_in_which_no_tensor_is_found(clock: Clock) -> None:
    """Then backward has no known end, and lasts until clipping is over."""
    watched = Watched(clock, Net(clock, pack=lambda x: SimpleNamespace(hidden=x)))
    watched.micro_step(lambda output: output.hidden)
    watched.finish()
    expected = phases_of(None)
    assert watched.table() == expected | {BACKWARD: expected[BACKWARD] + 400, CLIP: 0}


@CHECKPOINTING
def test_evaluation_in_between_is_rest(clock: Clock, kind: bool | None) -> None:
    watched = Watched(clock, Net(clock, kind))
    watched.micro_step()
    watched.finish()
    watched.model.eval()
    with torch.no_grad():
        for _ in range(2):
            watched.model(leaf())
    watched.model.train()
    watched.micro_step()
    watched.finish()
    expected = phases_of(kind)
    assert watched.table(0) == expected
    assert watched.table(1) == expected | {REST: expected[REST] + 2 * (7 + 3 * 130 + 50)}
    assert watched.spans(0) == watched.spans(1)


def test_a_whole_model_under_checkpointing(clock: Clock) -> None:
    """Its second forward is no new one."""
    watched = Watched(clock, Net(clock))
    for kind in (True, False):
        clock.passes(3)
        loss = through(kind, watched.model, leaf())
        clock.passes(11)
        loss.backward()
        watched.finish()
    expected = phases_of(None)
    of_model = expected[FORWARD]
    for step in (0, 1):
        table = watched.table(step)
        assert table[FORWARD] == of_model
        assert table[BACKWARD] + table[CLIP] == expected[BACKWARD] + of_model + 400


def test_two_backwards_of_one_forward(clock: Clock) -> None:
    watched = Watched(clock, Net(clock))
    watched.micro_step(lambda loss: (loss.backward(retain_graph=True), loss)[1])
    watched.finish()
    expected = phases_of(None)
    assert watched.table() == expected | {BACKWARD: 2 * expected[BACKWARD] - 11}


def test_a_forward_that_fails_costs_only_its_own_step(clock: Clock) -> None:
    model = Net(clock)
    watched = Watched(clock, model)
    failing = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watched.micro_step()
    failing.remove()
    watched.micro_step()
    watched.finish()
    watched.micro_step()
    watched.finish()
    expected = phases_of(None)
    assert watched.table(0) == expected | {REST: expected[REST] + 3 + 7 + 130}
    assert watched.table(1) == expected
    assert watched.spans(1) == {
        ("layers.0", FORWARD): 130, ("layers.0.first", FORWARD): 100, ("layers.0.second", FORWARD): 30,
        ("layers.1", FORWARD): 260, ("layers.1.first", FORWARD): 200, ("layers.1.second", FORWARD): 60,
    }  # fmt: skip


def test_what_other_hooks_do_before_a_forward_is_part_of_it(clock: Clock) -> None:
    model = Net(clock)
    for module in (model, model.layers[1]):
        module.register_forward_pre_hook(lambda *_: clock.passes(9))
    watched = Watched(clock, model)
    watched.micro_step()
    watched.finish()
    assert watched.table()[FORWARD] == phases_of(None)[FORWARD] + 2 * 9
    assert watched.spans()["layers.1", FORWARD] == 260 + 9


def test_steps_that_are_not_asked_for_have_no_rows(clock: Clock) -> None:
    watched = Watched(clock, Net(clock))
    for _ in range(3):
        watched.micro_step()
        watched.finish()
    assert {row["step"] for row in watched.phases.phase_rows({1: (1, 1), 7: (1, 1)})} == {1}
    assert {row["step"] for row in watched.phases.span_rows({1: (1, 1)})} == {1}
    watched.phases.begin_step(-1)
    watched.micro_step()
    assert {row["step"] for row in watched.phases.phase_rows(watched.steps | {-1: (1, 1)})} == {0, 1, 2}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([None, True, False]),
    num_layers=st.integers(0, 3),
    steps=st.lists(st.lists(st.sampled_from(["train", "evaluate", "alone"]), max_size=4), min_size=1, max_size=4),
)
def test_phases_tile_steps_of_any_kind(
    shared_clock: Clock, kind: bool | None, num_layers: int, steps: list[list[str]]
) -> None:
    """Also steps that skip training, evaluate, or run a layer by itself."""
    watched = Watched(shared_clock, Net(shared_clock, kind, num_layers))
    for todo in steps:
        for what in todo:
            if what == "train":
                watched.micro_step()
            elif what == "alone":
                Net(shared_clock, kind, 1)(leaf()).backward()
            else:
                with torch.no_grad():
                    watched.model.eval()(leaf())
                watched.model.train()
        watched.finish()
    for step, todo in enumerate(steps):
        table = watched.table(step)
        count = todo.count("train")
        expected = phases_of(kind, num_layers, count)
        assert table[FORWARD] == expected[FORWARD]
        assert table[RECOMPUTE] == (expected[RECOMPUTE] if num_layers > 1 else 0)
        assert table[OPTIMIZER] == 5_000
        if count:
            assert table[BACKWARD] == expected[BACKWARD]


# --- spans ---


@CHECKPOINTING
def test_spans_of_layers_and_their_parts(clock: Clock, kind: bool | None) -> None:
    watched = Watched(clock, Net(clock, kind, 3))
    watched.micro_step()
    watched.finish()
    expected = {}
    for i, scale in enumerate((1, 2, 3)):
        for phase in (FORWARD, RECOMPUTE) if kind is not None else (FORWARD,):
            expected[f"layers.{i}", phase] = 130 * scale
            expected[f"layers.{i}.first", phase] = 100 * scale
            expected[f"layers.{i}.second", phase] = 30 * scale
        if kind is not None:  # the last to run backward goes on to the end, with the embedding's
            expected[f"layers.{i}", BACKWARD] = 1_200 * scale + (70 if i == 0 else 0)
    assert watched.spans() == expected


def test_a_layer_that_runs_by_itself_after_the_model(clock: Clock) -> None:
    model = Net(clock)
    watched = Watched(clock, model)
    watched.phases.begin_step(-1)
    model(leaf())
    watched._begin()
    watched.micro_step()
    watched.finish()
    assert watched.spans()["layers.0", FORWARD] == 130


def test_a_model_without_layers(clock: Clock) -> None:
    watched = Watched(clock, Net(clock, num_layers=0))
    watched.micro_step()
    watched.finish()
    assert watched.spans() == {}
    assert watched.table()[RECOMPUTE] == 0


def test_decoder_layers_are_the_outermost_lists_of_one_class() -> None:
    linear = partial_linear = torch.nn.Linear
    inner = torch.nn.ModuleList([linear(1, 1), linear(1, 1)])
    block = torch.nn.ModuleDict({"experts": inner})
    other = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([partial_linear(1, 1), linear(1, 1)])})
    model = torch.nn.ModuleDict(
        {
            "mixed": torch.nn.ModuleList([linear(1, 1), torch.nn.ReLU()]),
            "single": torch.nn.ModuleList([linear(1, 1)]),
            "layers": torch.nn.ModuleList([block, other]),
            "layers_too": torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.ReLU()]),
        }
    )
    assert decoder_layers(model) == [block, other, *model["layers_too"]]


# --- nothing is left behind ---


@CHECKPOINTING
def test_hooks_are_gone_afterwards(clock: Clock, kind: bool | None) -> None:
    model = Net(clock, kind)
    before = [dict(vars(module)) for module in model.modules()]
    watched = Watched(clock, model)
    watched.micro_step()
    watched.finish()
    watched.phases.remove()
    for module, kept in zip(model.modules(), before, strict=True):
        assert vars(module) == kept
        assert not any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
    rows = watched.phases.phase_rows(watched.steps)
    watched.micro_step()
    assert watched.phases.phase_rows(watched.steps) == rows


def test_memory_parts_of_models_of_all_kinds() -> None:
    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    model.register_buffer("kept", torch.ones(5))
    model.weight.grad = torch.ones(3, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    optimizer.step()
    parts = {row["part"]: row["allocated_bytes"] for row in memory_parts(model, optimizer, "now")}
    assert parts == {
        "frozen_weights": 12, "trained_weights": 24, "gradients": 24, "buffers": 20, "optimizer": 24
    }  # fmt: skip
    assert sum(row["allocated_bytes"] for row in memory_parts(torch.nn.ReLU(), None, "now")) == 0
