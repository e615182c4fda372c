"""Times the phases of unprofiled steps, and decoder layers within them, by CUDA events that nothing waits for.

A mark is one event, read after the run: about 10 us of host time (docs/LOG.md). Mixtral-8x7B takes some 650 a step,
half a percent of it.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from tunescope import latency_files as files
from tunescope.measure.module_calls import in_backward

_Mark = tuple[Any, int]  # (CUDA event or None, host clock ns)


class PhaseClock:
    """Marks the boundaries of phases and of layers' forwards while it is installed on a model.

    The caller names each step by `begin_step` and tells of the two moments that only the Trainer knows.
    """

    def __init__(self, model: torch.nn.Module, module_ids: Mapping[torch.nn.Module, int], *, on_gpu: bool) -> None:
        self._model = model
        self._on_gpu = on_gpu
        self._handles: list[Any] = []
        self._step = -1
        self._marks: dict[int, list[tuple[str, _Mark]]] = defaultdict(list)
        # step -> (module, is a layer of its own, in backward, begin, end), in the order they ended
        self._spans: dict[int, list[tuple[int, bool, bool, _Mark, _Mark]]] = defaultdict(list)
        self._open: dict[int, list[_Mark]] = defaultdict(list)
        self._is_training = False  # the model's forward that runs or ran last was not an evaluation's
        self._timed = {}
        for layer in decoder_layers(model):
            self._timed[layer] = (module_ids[layer], True)
            self._timed |= {part: (module_ids[part], False) for part in layer.children() if part in module_ids}

    def install(self) -> None:
        self._handles += [
            self._model.register_forward_pre_hook(self._before_forward, prepend=True),
            self._model.register_forward_hook(self._after_forward),
        ]
        for module in self._timed:
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin_step(self, step: int) -> None:
        self._step = step

    def before_optimizer(self) -> None:
        self._mark("clip_end")

    def after_optimizer(self) -> None:
        self._mark("optimizer_end")

    # --- hooks ---

    def _mark(self, name: str) -> None:
        if self._step >= 0:
            self._marks[self._step].append((name, self._now()))

    def _now(self) -> _Mark:
        if not self._on_gpu:
            return None, time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, time.perf_counter_ns()

    def _before_forward(self, module: torch.nn.Module, *_: Any) -> None:
        if not in_backward():
            self._is_training = module.training or torch.is_grad_enabled()
            if self._is_training:
                self._mark("forward_begin")

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if in_backward() or not self._is_training:
            return
        self._mark("forward_end")
        if self._step >= 0:
            for tensor in _differentiable(output):
                tensor.register_hook(self._in_backward)

    def _in_backward(self, gradient: torch.Tensor) -> None:
        """Runs as backward starts: asks the engine to tell when it has ended."""
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._mark, "backward_end"))

    def _enter(self, module: torch.nn.Module, *_: Any) -> None:
        # Not by grad mode: reentrant checkpointing runs a layer's first forward without gradients.
        if self._step >= 0 and (self._is_training or in_backward()):
            self._open[self._timed[module][0]].append(self._now())

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        number, is_layer = self._timed[module]
        if self._open[number] and self._step >= 0:
            begin = self._open[number].pop()
            self._spans[self._step].append((number, is_layer, in_backward(), begin, self._now()))

    # --- results: call when the GPU has passed every mark ---

    def phase_rows(self, step_ns: Mapping[int, tuple[int, int]]) -> list[dict[str, Any]]:
        """One row a step and phase (latency_files.PHASES_SCHEMA); all but recompute add up to the step exactly.

        step_ns: step -> (its duration, the same on the host's clock).
        """
        rows = []
        for step, marks in sorted(self._marks.items()):
            if step not in step_ns:
                continue
            for phase, (duration_ns, host_ns) in self._phases(step, marks, step_ns[step]).items():
                rows.append({"step": step, "phase": phase, "duration_ns": duration_ns, "host_duration_ns": host_ns})
        return rows

    def _phases(
        self, step: int, marks: list[tuple[str, _Mark]], whole_ns: tuple[int, int]
    ) -> dict[str, tuple[int, int]]:
        """Between which marks each phase lies is the Trainer's order; micro-steps of one step are added up."""
        ends = {
            "forward_end": files.FORWARD,
            "backward_end": files.BACKWARD,
            "clip_end": files.CLIP,
            "optimizer_end": files.OPTIMIZER_STEP,
        }
        sums = {phase: [0, 0] for phase in files.PHASES}
        for (before, begin), (name, end) in itertools.pairwise(marks):
            if (before, name) == ("forward_end", "clip_end"):  # nothing in the output led to the loss: no end known
                _add(sums[files.BACKWARD], begin, end)
            elif name in ends:  # what ends with a forward_begin is the time between two micro-steps: rest
                _add(sums[ends[name]], begin, end)
        for _, is_layer, again, begin, end in self._spans[step]:
            if is_layer and again:
                _add(sums[files.RECOMPUTE], begin, end)
        for i in (0, 1):
            known = sum(sums[phase][i] for phase in files.PHASES if phase not in (files.RECOMPUTE, files.REST))
            sums[files.REST][i] = whole_ns[i] - known
        return {phase: (device_ns, host_ns) for phase, (device_ns, host_ns) in sums.items()}

    def span_rows(self, steps: Mapping[int, Any]) -> list[dict[str, Any]]:
        """One row a step, layer or part of one, and phase (latency_files.SPANS_SCHEMA).

        Backward of a layer is known under checkpointing only, and for the layer as a whole: from the end of its
        recompute to the begin of the next one's.
        """
        rows = []
        for step, spans in sorted(self._spans.items()):
            if step not in steps:
                continue
            sums: dict[tuple[int, str], int] = defaultdict(int)
            for number, _, again, begin, end in spans:
                sums[number, files.RECOMPUTE if again else files.FORWARD] += _between_ns(begin, end)
            again_layers = [(number, begin, end) for number, is_layer, again, begin, end in spans if is_layer and again]
            backward_ends = [mark for name, mark in self._marks[step] if name == "backward_end"]
            for i, (number, _, end) in enumerate(again_layers):
                following = again_layers[i + 1][1] if i + 1 < len(again_layers) else None
                stop = next((mark for mark in backward_ends if mark[1] >= end[1]), None)
                if following is not None and (stop is None or following[1] < stop[1]):
                    stop = following
                if stop is not None:
                    sums[number, files.BACKWARD] += _between_ns(end, stop)
            rows += [
                {"step": step, "module": number, "phase": phase, "duration_ns": duration_ns}
                for (number, phase), duration_ns in sums.items()
            ]
        return rows


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a model: members of its outermost lists of two or more modules of one class."""
    found: list[torch.nn.Module] = []
    within: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in within):
            continue
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1:
            found += list(module)
            within.append(path + ".")
    return found


def _differentiable(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a model's output that backward can start from; only the loss where it is named."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        yield loss
    elif isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _differentiable(value)


def _add(total: list[int], begin: _Mark, end: _Mark) -> None:
    total[0] += _between_ns(begin, end)
    total[1] += end[1] - begin[1]


def _between_ns(begin: _Mark, end: _Mark) -> int:
    if begin[0] is None:
        return end[1] - begin[1]
    return round(begin[0].elapsed_time(end[0]) * 1e6)  # torch gives ms
