"""Marks every module's forward in a trace, so that each operator and kernel can be placed in the model.

Backward has no modules, only autograd nodes. A node carries the thread and the sequence number of the forward operator
that made it, and the hooks here record which numbers each forward used up: that joins the two. A range of numbers
rather than the operators' own is kept because most operators make no node and share the number of the next that does
(in a small Mixtral 555 of 903 nodes match several operators).
"""

import itertools
import threading
from typing import Any

import torch

from tunescope.latency_files import CALL_PREFIX, PARAMETER_PREFIX

# 1 us a range where the public record_function takes 7 (docs/LOG.md); a step of Mixtral-8x7B has some 10,000.
TraceRange: Any = getattr(torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function)


def in_backward() -> bool:
    """Whether autograd's engine is running on this thread: a module's forward there is a recompute, under reentrant
    and non-reentrant checkpointing alike."""
    return torch._C._current_graph_task_id() != -1


def mark(name: str) -> None:
    """A moment in the trace, as a range of next to no length."""
    with TraceRange(name):
        pass


class ModuleCalls:
    """While installed on a model, gives every forward of every module a range in the trace and a row in `rows()`."""

    def __init__(self, model: torch.nn.Module) -> None:
        # A module or parameter that is tied has one name here, its first.
        self.module_ids = {module: number for number, (_, module) in enumerate(model.named_modules())}
        self._paths = [path for path, _ in model.named_modules()]
        self._classes = [type(module).__name__ for module in self.module_ids]
        self.parameter_modules: dict[str, int] = {}  # full name -> module it belongs to
        self._bytes = {number: [0, 0] for number in self.module_ids.values()}  # frozen, trained
        seen: set[torch.nn.Parameter] = set()
        for module, number in self.module_ids.items():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter in seen:
                    continue
                seen.add(parameter)
                path = f"{self._paths[number]}.{name}".removeprefix(".")
                self.parameter_modules[path] = number
                self._bytes[number][parameter.requires_grad] += held_bytes(parameter)
        self._model = model
        self._handles: list[Any] = []
        self._rows: dict[int, dict[str, Any]] = {}
        self._next_call = itertools.count()
        self._threads = threading.local()

    def install(self) -> None:
        assert not self._handles
        for module in self.module_ids:
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                # Non-reentrant checkpointing ends a recompute early, by an exception.
                module.register_forward_hook(self._leave, always_call=True),
            ]
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter.is_leaf and name in self.parameter_modules:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_MarkGradient(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: torch.nn.Module, *_: Any) -> None:
        number = self.module_ids[module]
        call = next(self._next_call)
        name = f"{CALL_PREFIX}{self._paths[number] or self._classes[number]} #{call}"
        trace_range = TraceRange(name)
        trace_range.__enter__()
        self._stack().append((call, module, trace_range))
        self._rows[call] = {
            "call": call,
            "module": number,
            "is_recompute": in_backward(),
            "sequence_begin": torch._C._autograd._get_sequence_nr(),
            "sequence_end": -1,
        }

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        stack = self._stack()
        while stack:
            # More than one where what ended an inner forward was no Exception: torch calls no hook then.
            call, open_module, trace_range = stack.pop()
            trace_range.__exit__(None, None, None)
            self._rows[call]["sequence_end"] = torch._C._autograd._get_sequence_nr()
            if open_module is module:
                return

    def _stack(self) -> list[tuple[int, torch.nn.Module, Any]]:
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        return self._threads.stack

    def rows(self) -> list[dict[str, Any]]:
        """One row a finished forward (latency_files.CALLS_SCHEMA)."""
        return [row for _, row in sorted(self._rows.items()) if row["sequence_end"] >= 0]

    def module_rows(self) -> list[dict[str, Any]]:
        """One row a module (latency_files.MODULES_SCHEMA); bytes are of its own parameters, not its children's."""
        return [
            {
                "module": number,
                "path": self._paths[number],
                "class_name": self._classes[number],
                "frozen_bytes": self._bytes[number][False],
                "trained_bytes": self._bytes[number][True],
            }
            for number in self.module_ids.values()
        ]


class _MarkGradient:
    """Says in the trace whose gradient an AccumulateGrad node has just added to: such nodes have no number."""

    def __init__(self, parameter_name: str) -> None:
        self._name = PARAMETER_PREFIX + parameter_name

    def __call__(self, parameter: torch.Tensor) -> None:
        mark(self._name)


def held_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter, with the scales of a quantised one (bitsandbytes keeps them beside it)."""
    total = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        tensors = (state.absmax, state.code, state.offset)
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        state = state.state2
    return total
