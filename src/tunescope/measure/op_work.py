"""FLOP and bytes of an operator, counted from its tensors: what a model of the GPU's counters is made of.

Bytes are the least that can be moved: every input read once, every output written once, whatever the caches do. A
multiply-add is 2 FLOP; an operator that is no matrix product or attention is taken for one FLOP an element it reads
or writes, whichever are more. Attention is counted whole, masked or not, for the heads of the query.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
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
# Attention of which torch registers no counter, and one that does the same.
_ATEN = torch.ops.aten
_SAME_FLOP = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
    _ATEN._scaled_dot_product_fused_attention_overrideable: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_fused_attention_overrideable_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}
_LOG = logging.getLogger(__name__)
# Give their result no bytes of their own.
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Work(NamedTuple):
    """op: the operator, or what a fused one does in its stead."""

    op: str
    flop: int
    read_bytes: int
    written_bytes: int


def work_of(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> list[Work]:
    """What one call of an operator has to do; nothing for a view or an allocation. name: as `aten::mm`.

    Never raises: what cannot be counted is left out, or counted by its elements, and said once in the log.
    """
    try:
        return _work_of(name, func, args, kwargs, output)
    except Exception as error:  # any: what cannot be counted must not end a training
        _say_once(name, f"{type(error).__name__}: {error}"[:300])
        return [Work(name, 0, 0, 0)]


def _work_of(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> list[Work]:
    if name == _GEMM_4BIT:
        return list(_gemm_4bit(func, args, kwargs, output))
    if name in _ALLOCATIONS or _is_view(func):
        return []
    inputs, outputs = tensors_of((args, kwargs)), tensors_of(output)
    read, written = sum(map(touched_bytes, inputs)), sum(map(touched_bytes, outputs))
    flop = _flop_of(name, func, args, kwargs, output)
    if flop is None:
        flop = max((tensor.numel() for tensor in (*inputs, *outputs)), default=0)
    return [Work(name, int(flop), read, written)]


def _flop_of(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> int | None:
    """None for an operator that is counted by its elements, also where torch's own counter does not take its shapes."""
    try:
        if name == "aten::_grouped_mm":
            return _grouped_mm_flop(args, output)
        counter = flop_registry.get(_SAME_FLOP.get(func.overloadpacket, func.overloadpacket))
        if counter is None:
            return None
        return int(counter(*_with_heads_of_the_query(name, func, args), **kwargs, out_val=output))
    except Exception as error:  # any: what cannot be counted must not end a training
        _say_once(name, f"{type(error).__name__}: {error}"[:300])
        return None


@lru_cache(maxsize=256)
def _say_once(name: str, why_not: str) -> None:
    _LOG.warning("FLOP of %s are taken for one an element: %s", name, why_not)


def _with_heads_of_the_query(name: str, func: Any, args: Sequence[Any]) -> list[Any]:
    """Arguments of attention as torch's counters take them: (batch, heads, length, width), and as many heads of keys
    and values as of queries, which is what is computed. They refuse fewer (grouped-query attention), and take a length
    for heads where an operator has its heads after it. Of other operators the arguments as they are."""
    if "attention" not in name:
        return list(args)
    places = {argument.name: number for number, argument in enumerate(func._schema.arguments)}
    has_heads_last = "scaled_dot_product" not in name
    ends = [args[places[key]] for key in ("cum_seq_q", "cu_seqlens_q") if key in places and has_heads_last]
    axis = -2 if has_heads_last else 1
    heads = args[places["query"]].size(axis)
    given = list(args)
    for key in ("query", "key", "value", "grad_out", "grad_out_"):
        if key not in places:
            continue
        sizes = list(args[places[key]].shape)
        if key in ("key", "value"):
            sizes[axis] = heads
        if ends and ends[0] is None:  # no sequences of several lengths, one after another
            sizes[1], sizes[2] = sizes[2], sizes[1]
        given[places[key]] = torch.empty(sizes, device="meta")  # only its sizes are looked at
    return given


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
