"""Grouped linears over 4-bit weights as the GPU runs them: decoded by PTX, multiplied in bf16."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_nf4 import dequantized, distance, ends, quantized
from torch import Tensor

from tunescope.kernels import nf4_triton
from tunescope.kernels.nf4 import Nf4Stack, dequantize, grouped_linear_nf4, grouped_linear_nf4_dx, scales
from tunescope.kernels.nf4_triton import DX_CONFIGS, FORWARD_CONFIGS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Products of weights rounded to bf16 (2^-9 at most, of scales too where those are multiplied first), and the result's.
BF16 = 4e-3
SIZES = {"Mixtral w1": (8, 14336, 4096), "Mixtral w2": (8, 4096, 14336), "Qwen3": (128, 768, 2048)}
ROUTINGS = {
    "even": lambda experts: [32] * experts,
    "one token": lambda experts: [0] * (experts - 1) + [1],
    "two experts": lambda experts: [100, 0] + [0] * (experts - 3) + [156],
    "uneven": lambda experts: [(7 * expert) % 61 for expert in range(experts)],
}


def random_stack(num_experts: int, num_out: int, num_in: int) -> Nf4Stack:
    """Any bytes are weights; scales as of weights around 0.02."""
    small, _ = quantized(1, 64, 256, device=DEVICE)
    blocks = num_out * num_in // 64
    generator = torch.Generator(DEVICE).manual_seed(0)

    def any_byte(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE, generator=generator)

    nested = math.ceil(blocks / 256)
    absmax2_EB = 0.01 + 0.01 * torch.rand(num_experts, nested, device=DEVICE, generator=generator)
    offset_E = 0.05 + 0.01 * torch.rand(num_experts, device=DEVICE, generator=generator)
    assert small.code2 is not None
    return Nf4Stack(
        any_byte(num_experts, num_out, num_in // 2), any_byte(num_experts, blocks), absmax2_EB, offset_E, small.code2,
        small.code_16,
    )  # fmt: skip


def case(stack: Nf4Stack, sizes: list[int], rank: int = 16) -> dict[str, Any]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    num_experts, num_out, num_in = stack.shape_ENK
    rows = sum(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).bfloat16()

    return {
        "x": normal(rows, num_in),
        "dy": normal(rows, num_out),
        "ends": ends(sizes, DEVICE),
        "lora": {"lora_u_RQ": normal(rows, rank), "lora_b_ENQ": normal(num_experts, num_out, rank)},
        "dlora": {"lora_du_RQ": normal(rows, rank), "lora_a_EQK": normal(num_experts, rank, num_in)},
    }


def both(stack: Nf4Stack, of: dict[str, Any], implementation: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    lora, dlora = ({name: x.to(dtype) for name, x in of[kind].items()} for kind in ("lora", "dlora"))
    how = {"implementation": implementation}
    return [
        grouped_linear_nf4(of["x"].to(dtype), stack, of["ends"], **lora, **how),
        grouped_linear_nf4_dx(of["dy"].to(dtype), stack, of["ends"], **dlora, **how),
    ]


@pytest.fixture(scope="module", params=SIZES)
def stack(request: pytest.FixtureRequest) -> Nf4Stack:
    return random_stack(*SIZES[request.param])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "not nested"])
def test_weights_are_bitsandbytes_to_the_bit(kind: str, is_nested: bool) -> None:
    stack, experts = quantized(3, 1000, 1088, is_nested=is_nested, kind=kind, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize(stack, dtype, implementation="triton"), dequantized(experts, dtype)), dtype
    assert torch.equal(scales(stack, implementation="triton"), scales(stack, implementation="reference"))


def test_all_bytes_of_large_experts_are_dequantised(stack: Nf4Stack) -> None:
    found = dequantize(stack, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for expert in torch.randint(0, len(found), (3,), generator=generator).tolist():
        one = Nf4Stack(
            *(x[expert : expert + 1] for x in (stack.packed_ENP, stack.absmax_ES, stack.absmax2_EB, stack.offset_E)),
            stack.code2, stack.code_16,
        )  # fmt: skip
        assert torch.equal(found[expert : expert + 1], dequantize(one, torch.bfloat16, implementation="reference"))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_kernels_equal_the_reference(stack: Nf4Stack, routing: str) -> None:
    of = case(stack, ROUTINGS[routing](stack.shape_ENK[0]))
    expected = both(stack, of, "reference", torch.float32)
    for found, wanted in zip(both(stack, of, "triton"), expected, strict=True):
        assert distance(found, wanted) <= BF16
    for found, wanted in zip(both(stack, of, "dequantize"), expected, strict=True):
        assert distance(found, wanted) <= 2 * BF16  # two results in bf16 are added


CONFIGS = [("forward_config", config) for _, config in FORWARD_CONFIGS] + [
    ("dx_config", config) for _, config in DX_CONFIGS
]


@pytest.mark.parametrize(("which", "config"), CONFIGS, ids=str)
@pytest.mark.parametrize("sizes", [[37, 0, 200], [1, 0, 0]], ids=str)
def test_every_configuration_equals_the_reference(which: str, config: Any, sizes: list[int]) -> None:
    stack, _ = quantized(3, 1000, 1088, device=DEVICE)
    of = case(stack, sizes, rank=5)
    with mock.patch.object(nf4_triton, which, return_value=config):
        found = both(stack, of, "triton")
    for one, wanted in zip(found, both(stack, of, "reference", torch.float32), strict=True):
        assert distance(one, wanted) <= BF16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_run_too(dtype: torch.dtype) -> None:
    stack, _ = quantized(3, 256, 256, device=DEVICE)
    of = case(stack, [37, 0, 20])
    found, expected = both(stack, of, "triton", dtype), both(stack, of, "reference", torch.float64)
    for one, wanted in zip(found, expected, strict=True):
        assert distance(one, wanted) <= (2e-3 if dtype == torch.float16 else 1e-5)


def test_the_same_input_gives_the_same_bits_and_a_graph_too(stack: Nf4Stack) -> None:
    """Nothing waits for the device: else it could not be captured."""
    of = case(stack, ROUTINGS["uneven"](stack.shape_ENK[0]))
    eager = both(stack, of, "triton")
    for found, expected in zip(both(stack, of, "triton"), eager, strict=True):
        assert torch.equal(found, expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        both(stack, of, "triton")
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = both(stack, of, "triton")
    # Other rows of other experts, in the same memory: the routing is read on the device.
    other = case(stack, ROUTINGS["uneven"](stack.shape_ENK[0])[::-1])
    of["ends"].copy_(other["ends"])
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, both(stack, of, "triton"), strict=True):
        assert torch.equal(found, expected)


def test_nothing_is_compiled_for_another_number_of_rows() -> None:
    stack, _ = quantized(3, 256, 256, device=DEVICE)
    both(stack, case(stack, [30, 0, 30]), "triton")
    before = num_compiled()
    assert min(before) > 0
    for sizes in ([29, 0, 30], [17, 17, 17], [60, 1, 2]):
        both(stack, case(stack, sizes), "triton")
    assert num_compiled() == before


def num_compiled() -> list[int]:
    kernels = (nf4_triton.forward_kernel, nf4_triton.dx_kernel)
    return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]


def test_no_byte_of_the_output_is_left_unwritten(stack: Nf4Stack) -> None:
    of = case(stack, ROUTINGS["uneven"](stack.shape_ENK[0]))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    try:
        assert all(found.isfinite().all() for found in both(stack, of, "triton"))
        assert dequantize(stack, torch.bfloat16).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
