"""FLOP and bytes of operators, counted from their tensors."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tunescope.families.family import NF4_BYTES_PER_WEIGHT
from tunescope.measure.op_work import DECODE, DECODE_SCALES, MATMUL, Work, touched_bytes, work_of


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.work += work_of(func.name().partition(".")[0], func, args, kwargs or {}, output)
        return output


def work(call: Any) -> list[Work]:
    with Recorder() as recorder:
        call()
    return recorder.work


def test_matmul() -> None:
    a, b = torch.randn(5, 7, dtype=torch.bfloat16), torch.randn(7, 3, dtype=torch.bfloat16)
    assert work(lambda: a @ b) == [Work("aten::mm", 2 * 5 * 7 * 3, 2 * (5 * 7 + 7 * 3), 2 * 5 * 3)]


def test_elementwise_counts_one_flop_an_element() -> None:
    x = torch.randn(4, 6)
    assert work(lambda: torch.sigmoid(x)) == [Work("aten::sigmoid", 24, 96, 96)]
    assert work(lambda: x + x) == [Work("aten::add", 24, 96, 96)]  # one tensor, read once
    assert work(lambda: x.sum(0)) == [Work("aten::sum", 24, 96, 24)]


def test_views_and_allocations_do_nothing() -> None:
    x = torch.randn(4, 6)
    assert work(lambda: (x.t(), x.view(24), x[1:], torch.empty_like(x), x.expand(2, 4, 6), x.detach())) == []
    assert [part.op for part in work(lambda: x.clone())] == ["aten::clone"]


def test_repeated_elements_are_in_memory_once() -> None:
    assert touched_bytes(torch.zeros(1, 6).expand(5, 6)) == 24
    assert touched_bytes(torch.zeros(5, 0)) == 0
    assert touched_bytes(torch.zeros(3, 4).t()) == 48


def test_grouped_matmul_counts_each_row_once() -> None:
    rows = torch.randn(10, 16, dtype=torch.bfloat16)
    weights = torch.randn(4, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 9, 10], dtype=torch.int32)
    (forward,) = work(lambda: torch._grouped_mm(rows, weights, offs=ends))
    assert forward.flop == 2 * 10 * 16 * 8
    gradient = torch.randn(10, 8, dtype=torch.bfloat16)
    (weight_gradient,) = work(lambda: torch._grouped_mm(rows.t(), gradient, offs=ends))
    assert weight_gradient.flop == 2 * 10 * 16 * 8
    assert weight_gradient.written_bytes == 2 * 4 * 16 * 8


@pytest.mark.parametrize("is_nested", [False, True])
def test_nf4_product_is_its_three_stages(is_nested: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(128, 256)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=is_nested)
    x = torch.randn(5, 256)
    found = work(lambda: bitsandbytes.matmul_4bit(x, packed.t(), state))
    stages = {part.op: part for part in found if part.op in (DECODE_SCALES, DECODE, MATMUL)}
    assert set(stages) == ({DECODE_SCALES} if is_nested else set()) | {DECODE, MATMUL}
    assert stages[MATMUL] == Work(MATMUL, 2 * 5 * 128 * 256, 4 * (5 * 256 + 128 * 256), 4 * 5 * 128)
    assert stages[DECODE].written_bytes == 4 * 128 * 256
    num_scales = 128 * 256 // 64
    assert stages[DECODE].read_bytes == 128 * 256 // 2 + 4 * num_scales
    if is_nested:  # what is stored of a weight is what decoding reads, its scales in their stored form
        stored = stages[DECODE].read_bytes - 4 * num_scales + stages[DECODE_SCALES].read_bytes
        assert stored == pytest.approx(NF4_BYTES_PER_WEIGHT * 128 * 256)
