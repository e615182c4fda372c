"""Operators as they are called: the module and phase of each, under both kinds of checkpointing."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunescope.measure.op_watch import OUTSIDE, OpWatch, Place

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Two linears of different widths and a softmax of its own, so that every product tells where it is from."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.softmax(self.up(x), -1))


class Stack(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3, bias=False)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x).sum()


def places_of(model: nn.Module, step: Any) -> Counter[tuple[str, str, str]]:
    """(module, phase, operator) -> calls."""
    seen: Counter[tuple[str, str, str]] = Counter()

    def watch(place: Place, func: Any, args: Any, kwargs: Any, call: Any) -> Any:
        seen[watcher.paths.get(place.module, "outside"), place.phase, place.op] += 1
        return call()

    watcher = OpWatch(model, watch)
    watcher.install()
    with watcher:
        step()
    watcher.remove()
    return seen


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_product_is_placed(reentrant: bool | None) -> None:
    model, x = Stack(reentrant), torch.randn(4, 6, requires_grad=True)
    seen = places_of(model, lambda: model(x).backward())
    products = {key[:2]: count for key, count in seen.items() if key[2] == "aten::mm"}
    expected = {("head", "forward"): 1, ("head", "backward"): 2}
    for block in (0, 1):
        for name in ("up", "down"):
            expected[f"blocks.{block}.{name}", "forward"] = 1
            expected[f"blocks.{block}.{name}", "backward"] = 2
            if reentrant is not None:
                expected[f"blocks.{block}.{name}", "recompute"] = 1
    if reentrant is False:  # a block's recompute ends with the last tensor that backward needs, before its last product
        del expected["blocks.0.down", "recompute"], expected["blocks.1.down", "recompute"]
    assert products == expected
    for block in (0, 1):  # a function's operators belong to the module that calls it
        assert seen[f"blocks.{block}", "forward", "aten::_softmax"] == 1
        assert seen[f"blocks.{block}", "backward", "aten::_softmax_backward_data"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_second_step_starts_anew(reentrant: bool) -> None:
    model, x = Stack(reentrant), torch.randn(4, 6, requires_grad=True)

    def two_steps() -> None:
        model(x).backward()
        model(x).backward()

    seen = places_of(model, two_steps)
    assert seen["head", "backward", "aten::mm"] == 4
    assert seen["blocks.0.up", "forward", "aten::mm"] == 2


def test_what_it_returns_is_what_the_operator_gives() -> None:
    model, x = Stack(False), torch.randn(4, 6)
    expected = model(x)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    places_of(model, lambda: model(x).backward())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_outside_of_every_module() -> None:
    model = nn.Linear(2, 2)
    seen = places_of(model, lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2)))
    assert seen["outside", "forward", "aten::mm"] == 1
    assert OUTSIDE < 0


class Twice(torch.autograd.Function):
    """An autograd function of Python's: its operators run with gradients off, under its own node."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.flip(gradient, (0,))


class UsesTwice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Twice.apply(x)


def test_functions_in_python() -> None:
    model = nn.Sequential(nn.Linear(3, 3), UsesTwice(), nn.Linear(3, 3))
    seen = places_of(model, lambda: model(torch.randn(2, 3)).sum().backward())
    assert seen["1", "forward", "aten::cumsum"] == 1
    assert seen["1", "backward", "aten::flip"] == 1


def test_hooks_are_gone_afterwards() -> None:
    model = Stack(None)
    places_of(model, lambda: model(torch.randn(4, 6)))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Picks(nn.Module):
    """Indexing and top-k, whose backwards write into zeros that torch makes for them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight[rows].sum() + 3 * self.weight.topk(2, -1).values.sum()


def test_backward_calls_what_it_calls_unwatched() -> None:
    """Under a mode torch's formulas take another operator, that checks indices or copies: not under this one."""
    model, rows = Picks(), torch.tensor([0, 2, 2, 5])
    with torch.profiler.profile(acc_events=True) as trace:
        model(rows).backward()
    unwatched = {event.name for event in trace.events()}
    expected = model.weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    seen = places_of(model, lambda: model(rows).backward())
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, expected)
    backward = {op for _, phase, op in seen if phase == "backward"}
    assert backward <= unwatched
    assert {"aten::_index_put_impl_", "aten::scatter_"} <= backward
