"""FLOP and bytes of operators, counted from their tensors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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


ATEN = torch.ops.aten
# Every operator of attention that torch has a counter of, and the CPU's: the axis of its heads, arguments before the
# query and after the value, and products that it makes of queries and keys of one head (2 FLOP each).
SDPA = {
    "_scaled_dot_product_flash_attention": (1, 0, (), 2),
    "_scaled_dot_product_efficient_attention": (1, 0, (None, False), 2),
    "_scaled_dot_product_cudnn_attention": (1, 0, (None, False), 2),
    "_scaled_dot_product_flash_attention_for_cpu": (1, 0, (), 2),
    "_scaled_dot_product_flash_attention_backward": (1, 1, (), 5),
    "_scaled_dot_product_efficient_attention_backward": (1, 1, (), 5),
    "_scaled_dot_product_cudnn_attention_backward": (1, 1, (), 5),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 1, (), 5),
    "_flash_attention_forward": (2, 0, (None, None, 6, 7), 2),
    "_efficient_attention_forward": (2, 0, (None, None, None, 6, 7), 2),
    "_flash_attention_backward": (2, 1, (None, None, None, None, 6, 7), 5),
    "_efficient_attention_backward": (2, 1, (None, None, None, None, 6, 7), 5),
}


def test_every_registered_attention_is_tried() -> None:
    registered = {str(op).partition(".")[2] for op in flop_registry if "attention" in str(op)}
    assert registered <= set(SDPA)


@pytest.mark.parametrize("name", SDPA)
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_attention_is_counted_for_the_heads_of_the_query(
    name: str, kv_heads: int, caplog: pytest.LogCaptureFixture
) -> None:
    axis, num_before, after, num_products = SDPA[name]
    batch, heads, queries, keys, width = 3, 8, 6, 7, 16

    def tensor(num_heads: int, length: int) -> torch.Tensor:
        sizes = (batch, num_heads, length, width) if axis == 1 else (batch, length, num_heads, width)
        return torch.empty(sizes, device="meta")

    query, key = tensor(heads, queries), tensor(kv_heads, keys)
    args = (*[query] * num_before, query, key, key, *after)
    (found,) = work_of(f"aten::{name}", getattr(ATEN, name).default, args, {}, query)
    assert found.flop == num_products * 2 * batch * heads * queries * keys * width
    assert found.read_bytes >= 4 * (query.numel() + key.numel())  # of the key heads that there are
    assert not caplog.records


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_over_sequences_one_after_another(kv_heads: int) -> None:
    """Of several lengths, whose ends it is given: each one's own products."""
    query, key = torch.empty(9, 4, 8, device="meta"), torch.empty(9, kv_heads, 8, device="meta")
    ends = torch.tensor([0, 2, 9])
    op = ATEN._flash_attention_forward.default
    (found,) = work_of("aten::_flash_attention_forward", op, (query, key, key, ends, ends, 7, 7), {}, query)
    assert found.flop == 2 * 2 * 4 * 8 * (2 * 2 + 7 * 7)


def test_grouped_query_attention_through_torch(caplog: pytest.LogCaptureFixture) -> None:
    query = torch.randn(2, 8, 16, 32, requires_grad=True)
    key, value = (torch.randn(2, 2, 16, 32, requires_grad=True) for _ in range(2))
    found = work(
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()
    )
    product = 2 * 2 * 8 * 16 * 16 * 32
    flop = {part.op.removeprefix("aten::"): part.flop for part in found if part.flop >= product}
    assert sum(flop.values()) >= 7 * product  # two forward, five backward; or as many products where it is not fused
    if fused := {name for name in flop if "scaled_dot_product" in name}:
        assert {flop[name] for name in fused} == {2 * product, 5 * product}
    assert not caplog.records


def test_what_cannot_be_counted_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: Any, **__: Any) -> int:
        raise AssertionError("shapes are incompatible")

    for op in list(flop_registry):
        monkeypatch.setitem(flop_registry, op, refuses)
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    for _ in range(2):
        assert work(lambda: a @ b) == [Work("aten::mm", 35, 4 * (35 + 21), 4 * 15)]  # by its elements
    assert len(caplog.records) == 1
    assert "aten::mm" in caplog.text
    assert "shapes are incompatible" in caplog.text

    sparse = torch.eye(3).to_sparse()  # has no strides
    assert [part.op for part in work(lambda: sparse * 2)]
    broken = work_of("bitsandbytes::gemm_4bit", ATEN.mm.default, (a, b), {}, a)  # of another release
    assert broken == [Work("bitsandbytes::gemm_4bit", 0, 0, 0)]


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
