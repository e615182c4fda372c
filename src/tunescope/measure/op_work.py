"""FLOP and bytes of an operator, counted from its tensors: what a model of the GPU's counters is made of.

Bytes are the least that can be moved: every input read once, every output written once, whatever the caches do. A
multiply-add is 2 FLOP; an operator that is no matrix product or attention is taken for one FLOP an element it reads
or writes, whichever are more.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree
from torch.utils.flop_counter import flop_registry
from transformers import TrainerCallback

from tunescope.families.family import NF4_BLOCK_WEIGHTS, NF4_NESTED_BLOCK
from tunescope.measure.op_watch import Operator, OpWatch, Place

DECODE_SCALES, DECODE, MATMUL = (
    "bitsandbytes::dequantize_blockwise", "bitsandbytes::dequantize_4bit", "aten::mm",
)  # fmt: skip
_GEMM_4BIT = "bitsandbytes::gemm_4bit"
# Give their result no bytes of their own.
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Work(NamedTuple):
    """op: the operator, or what a fused one does in its stead."""

    op: str
    flop: int
    read_bytes: int
    written_bytes: int


def work_of(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> list[Work]:
    """What one call of an operator has to do; nothing for a view or an allocation. name: as `aten::mm`."""
    if name == _GEMM_4BIT:
        return list(_gemm_4bit(func, args, kwargs, output))
    if name in _ALLOCATIONS or _is_view(func):
        return []
    inputs, outputs = tensors_of((args, kwargs)), tensors_of(output)
    read, written = sum(map(touched_bytes, inputs)), sum(map(touched_bytes, outputs))
    if name == "aten::_grouped_mm":
        flop = _grouped_mm_flop(args, output)
    elif (counter := flop_registry.get(func.overloadpacket)) is not None:
        flop = counter(*args, **kwargs, out_val=output)
    else:
        flop = max((tensor.numel() for tensor in (*inputs, *outputs)), default=0)
    return [Work(name, int(flop), read, written)]


def tensors_of(values: Any) -> list[torch.Tensor]:
    """Every tensor in nested arguments, each once."""
    found = (leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return list({id(tensor): tensor for tensor in found}.values())


def touched_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor's elements; one that repeats its elements by strides of 0 has fewer in memory."""
    sizes = (size for size, stride in zip(tensor.size(), tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.element_size()


def _is_view(func: Any) -> bool:
    """Whether the output is the input seen otherwise: no kernel runs."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _gemm_4bit(func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: torch.Tensor) -> Iterator[Work]:
    """bitsandbytes' product with an NF4 weight, as its three stages: scales decoded, weight decoded, product. For few
    tokens it does all at once, and the decoded weight is never in memory."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    rows_in, packed, (num_out, num_in) = given["A"], given["B"], given["shapeB"]
    num_weights = num_out * num_in
    num_scales = -(-num_weights // int(given.get("blocksize", NF4_BLOCK_WEIGHTS)))
    if given.get("absmax_8bit") is not None:
        yield Work(DECODE_SCALES, 2 * num_scales, num_scales + 4 * -(-num_scales // NF4_NESTED_BLOCK), 4 * num_scales)
    weight_bytes = num_weights * rows_in.element_size()
    yield Work(DECODE, 2 * num_weights, touched_bytes(packed) + 4 * num_scales, weight_bytes)
    rows = rows_in.numel() // num_in
    yield Work(MATMUL, 2 * rows * num_weights, touched_bytes(rows_in) + weight_bytes, touched_bytes(output))


def _grouped_mm_flop(args: Sequence[Any], output: torch.Tensor) -> int:
    """Rows of all groups times a weight each (2-D by 3-D), or the weights' gradients (2-D by 2-D, 3-D out)."""
    left = args[0]
    return 2 * left.numel() * output.size(-1)


class OpWorkStep(TrainerCallback):
    """Counts what every operator of every module had to do in one step, the second: while others warm up.

    `rows()` has them by ncu.counters.OP_WORK_SCHEMA, a call for each stage of a fused one.
    """

    STEP = 1  # from 0

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str, str], list[int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._watch = OpWatch(model, self._count)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.STEP:
            self._watch.install()
            self._watch.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.STEP + 1:
            self._watch.__exit__(None, None, None)
            self._watch.remove()

    def _count(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Operator) -> Any:
        output = call()
        for work in work_of(place.op, func, args, kwargs, output):
            key = (self._watch.paths.get(place.module, ""), place.phase, place.node, work.op)
            sums = self._sums.setdefault(key, [0, 0, 0, 0])
            for at, more in enumerate((1, work.flop, work.read_bytes, work.written_bytes)):
                sums[at] += more
        return output

    def rows(self) -> list[dict[str, Any]]:
        names = ("path", "phase", "node", "op", "num_calls", "flop", "read_bytes", "written_bytes")
        return [dict(zip(names, (*key, *sums), strict=True)) for key, sums in sorted(self._sums.items())]
