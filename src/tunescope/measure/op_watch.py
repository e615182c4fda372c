"""Sees every operator of a training step as it is called, with the module and phase it belongs to.

A trace tells afterwards what was launched where; this tells it before the launch, so that a counter can be opened
around just the launches that are wanted, and it has the operator's tensors, of which FLOP and bytes are counted.

Operators are seen below autograd, as torch's dispatcher passes them on: aten::mm, not aten::linear. What an operator
calls by itself belongs to it: bitsandbytes' gemm_4bit decodes and multiplies. torch's modes follow into backward, as
autograd's engine takes the state of the thread that called it into its own.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tunescope import latency_files as files
from tunescope.measure.module_calls import in_backward

OUTSIDE = -1  # of any module


class Place(NamedTuple):
    """Where an operator runs. module: number as in latency_files.MODULES_SCHEMA, or OUTSIDE. phase: forward, recompute
    or backward. op: as `aten::mm`. node: of autograd, in backward; else empty."""

    module: int
    phase: str
    op: str
    node: str


Operator = Callable[[], Any]  # the call itself, which may be made once
Watcher = Callable[[Place, Any, tuple[Any, ...], dict[str, Any], Operator], Any]


class OpWatch(TorchDispatchMode):
    """While entered, every operator that training calls goes through `watcher(place, func, args, kwargs, call)`, which
    returns what `call()` gives. `install` and `remove` put hooks on the model's modules; both must be around it.

    paths: a module's number -> its path.
    """

    def __init__(self, model: torch.nn.Module, watcher: Watcher) -> None:
        super().__init__()
        named = list(model.named_modules())
        self._module_ids = {module: number for number, (_, module) in enumerate(named)}
        self.paths = {number: path for number, (path, _) in enumerate(named)}
        self.watcher = watcher
        self._handles: list[Any] = []
        self._threads = threading.local()
        # Autograd numbers the nodes of each thread by itself. Those of forward are one thread's; those that a reentrant
        # checkpoint's recompute makes are another's, and only backward's inner graphs run them.
        self._made_in_forward: dict[int, int] = {}
        self._made_in_recompute: dict[int, int] = {}
        self._outermost_graph = -1
        self._names: dict[Any, str] = {}

    def install(self) -> None:
        self._made_in_forward.clear()
        self._made_in_recompute.clear()
        for module in self._module_ids:
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = self._place(func)
        if place.op in _IN_PLACE_WITHOUT_A_MODE and place.node in _IN_PLACE_WITHOUT_A_MODE[place.op]:
            func, args, kwargs = _in_place(func, args, kwargs)
            place = place._replace(op=self._name(func))
        return self.watcher(place, func, args, kwargs, lambda: func(*args, **kwargs))

    # --- inside ---

    def _place(self, func: Any) -> Place:
        stack = self._stack()
        if not in_backward():
            self._outermost_graph = -1
            module = stack[-1] if stack else OUTSIDE
            self._made_in_forward.setdefault(_newest_node(), module)
            return Place(module, files.FORWARD, self._name(func), "")
        graph = torch._C._current_graph_task_id()
        if self._outermost_graph < 0:
            self._outermost_graph = graph
        if stack:
            self._made_in_recompute.setdefault(_newest_node(), stack[-1])
            return Place(stack[-1], files.RECOMPUTE, self._name(func), "")
        node = torch._C._current_autograd_node()
        made = self._made_in_forward if graph == self._outermost_graph else self._made_in_recompute
        if node is None:
            return Place(OUTSIDE, files.BACKWARD, self._name(func), "")
        return Place(made.get(node._sequence_nr(), OUTSIDE), files.BACKWARD, self._name(func), node.name())

    def _name(self, func: Any) -> str:
        if func not in self._names:
            self._names[func] = func.name().partition(".")[0]
        return self._names[func]

    def _stack(self) -> list[int]:
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        return self._threads.stack

    def _enter(self, module: torch.nn.Module, *_: Any) -> None:
        self._stack().append(self._module_ids[module])

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        stack, number = self._stack(), self._module_ids[module]
        while stack and stack.pop() != number:  # what an exception of torch's own left open, as a recompute's end
            pass


# torch's formulas of these nodes write into the zeros that they have just made, unless a mode is on: then they call
# what makes a new tensor instead, which copies, and of index_put checks every index by up to twelve more launches (seen
# under ncu on an H200, torch 2.11). Not so here: a step that is watched is to launch what one that is not does.
_IN_PLACE_WITHOUT_A_MODE = {
    "aten::index_put": ("IndexBackward0",),
    "aten::scatter": ("TopkBackward0", "SortBackward0", "SortBackward1"),
}


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if func.overloadpacket is torch.ops.aten.scatter:
        return getattr(torch.ops.aten.scatter_, func._overloadname), args, kwargs
    given = dict(zip(("self", "indices", "values", "accumulate"), args, strict=False)) | kwargs
    return torch.ops.aten._index_put_impl_.default, (given.pop("self"),), given | {"unsafe": True}


def _newest_node() -> int:
    """Sequence number of the node that autograd has made last on this thread: before it passes an operator on, it has
    made that operator's, if it makes one."""
    return torch._C._autograd._get_sequence_nr() - 1
