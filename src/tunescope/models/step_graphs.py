"""Forward and backward of a training step as two CUDA graphs for each shape of batch: the host launches two things.

A step of grouped experts is some thousands of small launches, and the host takes longer to make them than the GPU to
run them. Of each shape the first step runs as ever, the second is captured, and it and all later ones are replayed.
What is between forward and backward, and after them, is the Trainer's as before: gradients are in .grad, and the loss
is the model's. All graphs share their memory, for one step at a time is under way.
"""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tunescope.models.fast_moe_stacks import ExpertStacks

MAX_SHAPES = 64
_NUM_EAGER = 1  # of a shape: compiles its kernels, and lets libraries set themselves up

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Any]], Replay]


class StepGraphs:
    """Replays a model's training steps. It changes model.forward and model.zero_grad, until remove().

    stacks: of all its grouped MoE blocks; gradients of their adapters are written where they belong, without autograd
    handing them out one by one. max_shapes: of batches that get graphs; batches of others run as ever. capture: how a
    function becomes something to replay; for tests.

    While steps are replayed, hooks on modules inside the model see nothing, the model's output is the loss alone, and
    parameters that no step uses get gradients of zeros. What cannot be replayed is run as ever: forward without
    gradients or in eval mode, adapters that are switched off, arguments that are not by name. Where a graph cannot be
    captured, none is from then on, and `why_not` says why.

    Nothing of an earlier step may be alive when one is captured: a loop of one's own that keeps `loss` until it is
    overwritten must `del loss` after backward, as the Trainer does. Else the capture fails.

    Dropout would be replayed with fresh random numbers in forward and others in a recompute, so there must be none.
    """

    def __init__(
        self, model: nn.Module, stacks: Sequence[ExpertStacks], *, max_shapes: int = MAX_SHAPES,
        capture: Capture | None = None,
    ) -> None:  # fmt: skip
        self.why_not: str | None = _why_not(model)
        self.num_replays = 0
        self._model, self._stacks, self._max_shapes = model, stacks, max_shapes
        self._capture = capture or _CudaCapture()
        self._met: Counter[Any] = Counter()
        self._pairs: dict[Any, _Pair] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._others: list[tuple[nn.Parameter, Tensor]] = []
        self._own_forward = vars(model).get("forward")
        self._forward = model.forward

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._step(*args, **kwargs)

        model.forward = forward
        self._own_zero_grad = vars(model).get("zero_grad")
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad = self._zero_grad

    @property
    def num_shapes(self) -> int:
        return len(self._pairs)

    def remove(self) -> None:
        """The forward of before. Gradients stay; graphs and their memory go. Safe to call twice."""
        for name, own in (("forward", self._own_forward), ("zero_grad", self._own_zero_grad)):
            if own is None:
                vars(self._model).pop(name, None)
            else:
                setattr(self._model, name, own)
        for stack in self._stacks:
            stack.gradients_to = None
        self._pairs.clear()
        self.why_not = self.why_not or "removed"

    def clip_gradients(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ of the model's parameters; returns the norm. Nothing waits for the GPU.

        After a replay gradients of a block's adapters are one tensor, and there are tens to look at, not thousands.
        """
        if self._gradients and all(parameter.grad is room for parameter, room in self._gradients):
            tensors = [stack.gradient_room for stack in self._stacks if stack.gradient_room is not None]
            tensors += [room for _, room in self._others]
        else:
            tensors = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        if not tensors:
            return torch.zeros(())
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
        torch._foreach_mul_(tensors, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Of what is trained alone: walking through a large model's modules takes longer than everything else here."""
        if not set_to_none:
            type(self._model).zero_grad(self._model, set_to_none=False)
            return
        for parameter in self._trained:
            parameter.grad = None

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if args or self.why_not or not (self._model.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        if any(stack.without_adapters() for stack in self._stacks):
            return self._forward(**kwargs)
        key = _key(kwargs)
        pair = self._pairs.get(key)
        if pair is None:
            self._met[key] += 1
            if self._met[key] <= _NUM_EAGER or len(self._pairs) == self._max_shapes:
                return self._forward(**kwargs)
            pair = self._captured(kwargs)
            if pair is None:
                return self._forward(**kwargs)
            self._pairs[key] = pair
        self.num_replays += 1
        for name, static in pair.inputs.items():
            if isinstance(static, Tensor):
                static.copy_(kwargs[name], non_blocking=True)
        return pair.output(loss=_Replay.apply(self._anchor, pair, self))

    def _captured(self, kwargs: dict[str, Any]) -> "_Pair | None":
        self._make_room()
        pair = _Pair({name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()})
        before = [(parameter, parameter.grad) for parameter, _ in self._gradients]
        try:
            with _without_host_questions():
                pair.forward = self._capture(lambda: pair.run_forward(self._forward))
                assert pair.loss is not None
                pair.grad_of_loss = torch.ones_like(pair.loss)
                pair.backward = self._capture(lambda: self._run_backward(pair))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.why_not = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            warnings.warn(
                f"steps are not replayed as CUDA graphs: {self.why_not} (is the loss of an earlier step still alive?)",
                stacklevel=3,
            )
            return None
        finally:
            pair.node = None
            for parameter, gradient in before:
                parameter.grad = gradient
            for stack in self._stacks:
                stack.gradients_to = None
        return pair

    def _make_room(self) -> None:
        """Where gradients lie at every step, of the adapters of a block in one piece as they do themselves."""
        if self._gradients:
            return
        self._anchor = torch.zeros((), device=next(self._model.parameters()).device, requires_grad=True)
        for stack in self._stacks:
            self._gradients += stack.room_for_gradients()
        of_stacks = {id(parameter) for parameter, _ in self._gradients}
        self._others = [
            (parameter, torch.zeros_like(parameter))
            for parameter in self._model.parameters()
            if parameter.requires_grad and id(parameter) not in of_stacks
        ]
        self._gradients += self._others

    def _run_backward(self, pair: "_Pair") -> None:
        for stack in self._stacks:
            stack.gradients_to = stack.gradient_room
        for parameter, room in self._others:
            parameter.grad = room
        if self._others:
            torch._foreach_zero_([room for _, room in self._others])
        assert pair.node is not None
        pair.node.backward(pair.grad_of_loss)
        for stack in self._stacks:
            stack.gradients_to = None

    def replay_backward(self, pair: "_Pair", gradient: Tensor) -> None:
        """All gradients of the step, added to those of earlier micro-batches where there are any."""
        # Copied, because they lie where the new ones will.
        earlier = [(room, parameter.grad.clone()) for parameter, room in self._gradients if parameter.grad is not None]
        pair.grad_of_loss.copy_(gradient)
        pair.backward()
        for parameter, room in self._gradients:
            parameter.grad = room
        if earlier:
            rooms, kept = zip(*earlier, strict=True)
            torch._foreach_add_(rooms, kept)


class _Pair:
    """The graphs of one shape of batch. inputs: what they read, tensors of which are overwritten at each step."""

    forward: Replay
    backward: Replay
    grad_of_loss: Tensor

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.loss: Tensor | None = None
        self.node: Tensor | None = None  # the loss with what backward needs, while it is captured
        self.output: type[Any] = dict

    def run_forward(self, forward: Callable[..., Any]) -> None:
        output = forward(**self.inputs)
        self.output = type(output)
        self.node = output["loss"]
        assert self.node is not None
        self.loss = self.node.detach()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pair: _Pair, steps: StepGraphs) -> Tensor:
        pair.forward()
        ctx.pair, ctx.steps = pair, steps
        assert pair.loss is not None
        return pair.loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.steps.replay_backward(ctx.pair, gradient)
        return None, None, None


class _CudaCapture:
    """A function's launches as a CUDA graph, on a stream of its own and in memory that all its graphs share."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, function: Callable[[], Any]) -> Replay:
        if self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # or what steps that are not replayed have left would be in memory beside it
        with torch.cuda.stream(self._stream):
            # Other threads, as a data loader's that pins memory, may call what a capture must not.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says again what has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


@contextlib.contextmanager
def _without_host_questions() -> Iterator[None]:
    """Nothing waits for the GPU to decide what to do: the mask is always one, and no random state is kept.

    transformers asks whether any token is masked, to do without a mask where none is. What it computes is the same.
    torch's checkpoint keeps the state of random numbers for a recompute; there is no dropout.
    """
    from torch.utils import checkpoint
    from transformers import masking_utils

    with (
        mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", return_value=False),
        mock.patch.object(checkpoint, "get_device_states", return_value=([], [])),
        mock.patch.object(checkpoint, "set_device_states", return_value=None),
    ):
        yield


def _key(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for a graph to be replayed: shapes and dtypes of tensors, anything else as it is."""
    return tuple(
        (name, tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in sorted(kwargs.items())
    )


def _why_not(model: nn.Module) -> str | None:
    drops = sorted(name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0)
    if drops:
        return f"there is dropout, as in {drops[0]}"
    if getattr(getattr(model, "config", None), "attention_dropout", 0):
        return "there is dropout in attention"
    devices = {parameter.device for parameter in model.parameters()}
    return None if len(devices) == 1 else f"the model is on {len(devices)} devices"
