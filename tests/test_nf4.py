"""Grouped linears over 4-bit weights: against bitsandbytes' own weights, and the kernels against the reference.

Without a GPU the kernels are interpreted, in fp32 and with the portable decoding: tests/test_nf4_decode.py and
tests/test_nf4_compile.py have the other one.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_nf4 import dequantized, distance, ends, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunescope.errors import UserError
from tunescope.kernels import nf4, nf4_triton
from tunescope.kernels.nf4 import (
    IMPLEMENTATIONS,
    Nf4Stack,
    dequantize,
    grouped_linear_nf4,
    grouped_linear_nf4_dx,
    scales,
)
from tunescope.kernels.nf4_triton import DxConfig, ForwardConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 2e-6  # dots of both are of fp32 products
# Tiles of which small sizes take several, in every kind of launch.
FORWARD = {
    "sums": ForwardConfig(16, 32, 1, True, True, 4, 2),
    "sums, rows first": ForwardConfig(16, 32, 1, True, False, 4, 2),
    "weights": ForwardConfig(16, 32, 2, False, True, 4, 2),
    "weights, rows first": ForwardConfig(32, 16, 1, False, False, 4, 2, max_split=1),
}
DX = {
    "weights first": DxConfig(16, 32, 2, True, 4, 2),
    "rows first": DxConfig(32, 16, 1, False, 4, 2, max_split=1),
    "rows first, split": DxConfig(16, 16, 4, False, 4, 2),
}


def launched(forward: ForwardConfig | None = None, dx: DxConfig | None = None) -> Any:
    return mock.patch.multiple(
        nf4_triton,
        forward_config=lambda rows: forward or FORWARD["sums"],
        dx_config=lambda rows: dx or DX["weights first"],
    )


def case(stack: Nf4Stack, sizes: list[int], rank: int, *, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    num_experts, num_out, num_in = stack.shape_ENK
    num_rows = sum(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return {
        "x": normal(num_rows, num_in),
        "dy": normal(num_rows, num_out),
        "ends": ends(sizes, DEVICE),
        "lora": {"lora_u_RQ": normal(num_rows, rank), "lora_b_ENQ": normal(num_experts, num_out, rank)} if rank else {},
        "dlora": {"lora_du_RQ": normal(num_rows, rank), "lora_a_EQK": normal(num_experts, rank, num_in)}
        if rank
        else {},
    }


def both(stack: Nf4Stack, of: dict[str, Any], implementation: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """y and dx."""
    lora, dlora = ({name: x.to(dtype) for name, x in of[kind].items()} for kind in ("lora", "dlora"))
    how = {"implementation": implementation}
    return [
        grouped_linear_nf4(of["x"].to(dtype), stack, of["ends"], **lora, **how),
        grouped_linear_nf4_dx(of["dy"].to(dtype), stack, of["ends"], **dlora, **how),
    ]


def assert_equal_reference(stack: Nf4Stack, of: dict[str, Any], implementation: str) -> None:
    expected = both(stack, of, "reference", torch.float64)
    for found, wanted in zip(both(stack, of, implementation), expected, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == torch.float32
        assert distance(found, wanted) <= FP32


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "not nested"])
@pytest.mark.parametrize("block", [64, 128])
def test_weights_are_bitsandbytes_to_the_bit(kind: str, is_nested: bool, block: int) -> None:
    """96 * 192 values: the last 256 absmax of an expert are not whole, and of block 128 some lie in two rows."""
    stack, experts = quantized(3, 96, 192, block=block, is_nested=is_nested, kind=kind, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(stack, dtype, implementation="reference"), dequantized(experts, dtype)), dtype
    for dtype in (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(stack, dtype, implementation="triton"), dequantized(experts, dtype)), dtype
    assert torch.equal(scales(stack, implementation="triton"), scales(stack, implementation="reference"))


def test_blocks_that_the_kernels_do_not_take_are_dequantised_all_the_same() -> None:
    stack, experts = quantized(2, 8, 96, block=32, device=DEVICE)
    assert torch.equal(dequantize(stack, torch.bfloat16), dequantized(experts, torch.bfloat16))
    assert_equal_reference(stack, case(stack, [3, 4], 0), "auto")
    with pytest.raises(UserError, match="whole blocks of 64"):
        both(stack, case(stack, [3, 4], 0), "triton")


def test_weights_go_where_they_are_wanted() -> None:
    stack, experts = quantized(2, 16, 64, device=DEVICE)
    out = torch.full((2, 16, 64), float("nan"), device=DEVICE)
    assert dequantize(stack, torch.float32, out) is out
    assert torch.equal(out, dequantized(experts, torch.float32))
    wide = torch.full((2, 20, 72), 7.0, device=DEVICE)
    dequantize(stack, torch.float32, wide[:, 3:19, :64])
    assert torch.equal(wide[:, 3:19, :64], out)
    assert bool((wide[:, :3] == 7).all() and (wide[:, 19:] == 7).all() and (wide[:, :, 64:] == 7).all())
    for wrong in (out.bfloat16(), out[:1], out.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(ValueError, match="out is"):
            dequantize(stack, torch.float32, wrong)


@pytest.mark.parametrize("rank", [0, 16, 5])
@pytest.mark.parametrize("implementation", ["triton", "dequantize", "auto"])
def test_every_implementation_equals_the_reference(implementation: str, rank: int) -> None:
    stack, _ = quantized(3, 96, 192, device=DEVICE)
    with launched():
        assert_equal_reference(stack, case(stack, [20, 0, 37], rank), implementation)


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "not nested"])
def test_larger_blocks_may_lie_in_two_rows(block: int, is_nested: bool) -> None:
    stack, _ = quantized(3, 96, 192, block=block, is_nested=is_nested, device=DEVICE)
    with launched():
        assert_equal_reference(stack, case(stack, [20, 0, 37], 16), "triton")


def test_the_reference_is_a_linear_of_each_expert() -> None:
    stack, experts = quantized(2, 16, 64, device=DEVICE)
    of = case(stack, [3, 5], 4)
    y_RN, dx_RK = both(stack, of, "reference")
    for rows, expert in ((slice(0, 3), 0), (slice(3, 8), 1)):
        weight_NK = dequantized(experts, torch.float32)[expert]
        b_NQ, a_QK = of["lora"]["lora_b_ENQ"][expert], of["dlora"]["lora_a_EQK"][expert]
        expected = of["x"][rows] @ weight_NK.T + of["lora"]["lora_u_RQ"][rows] @ b_NQ.T
        assert distance(y_RN[rows], expected) <= FP32
        expected = of["dy"][rows] @ weight_NK + of["dlora"]["lora_du_RQ"][rows] @ a_QK
        assert distance(dx_RK[rows], expected) <= FP32


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("sizes", [[1, 0, 0], [0, 16, 17], [0, 0, 0]], ids=str)
def test_every_forward_launch_equals_the_reference(forward: str, sizes: list[int]) -> None:
    """N of 80 is two and a half tiles, K of 192 three blocks, which two at a time do not divide."""
    stack, _ = quantized(3, 80, 192, device=DEVICE)
    with launched(forward=FORWARD[forward]):
        assert_equal_reference(stack, case(stack, sizes, 16), "triton")


@pytest.mark.parametrize("dx", DX)
@pytest.mark.parametrize("sizes", [[1, 0, 0], [0, 16, 17], [0, 0, 0]], ids=str)
def test_every_dx_launch_equals_the_reference(dx: str, sizes: list[int]) -> None:
    stack, _ = quantized(3, 80, 192, device=DEVICE)
    with launched(dx=DX[dx]):
        assert_equal_reference(stack, case(stack, sizes, 16), "triton")


def test_sums_are_split_where_programs_are_few() -> None:
    """Into parts that are added up: each of the same number of steps."""
    stack, _ = quantized(1, 32, 512, device=DEVICE)
    with launched(), mock.patch.object(nf4_triton, "_sum", wraps=nf4_triton._sum) as added:
        assert_equal_reference(stack, case(stack, [5], 16), "triton")
    assert [len(call.args[0]) for call in added.call_args_list] == [4, 1]  # K of 8 steps, and N of 1
    assert nf4_triton._split(100, 8, 12) == 4
    assert nf4_triton._split(400, 8, 12) == 1
    assert nf4_triton._split(1, 8, 3) == 1


@pytest.mark.parametrize("num_experts", [1, 8, 128])
def test_numbers_of_experts(num_experts: int) -> None:
    stack, _ = quantized(num_experts, 32, 64, device=DEVICE)
    sizes = [(3 * expert) % 4 for expert in range(num_experts)]
    sizes[0] = 33
    with launched():
        assert_equal_reference(stack, case(stack, sizes, 16), "triton")


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    num_out=st.integers(1, 70),
    blocks=st.integers(1, 4),
    is_nested=st.booleans(),
    rank=st.sampled_from([0, 1, 16]),
    forward=st.sampled_from(list(FORWARD)),
    dx=st.sampled_from(list(DX)),
    seed=st.integers(0, 9),
)
def test_any_routing_and_size_equals_the_reference(
    sizes: list[int], num_out: int, blocks: int, is_nested: bool, rank: int, forward: str, dx: str, seed: int
) -> None:
    stack, _ = quantized(len(sizes), num_out, 64 * blocks, is_nested=is_nested, seed=seed, device=DEVICE)
    with launched(FORWARD[forward], DX[dx]):
        assert_equal_reference(stack, case(stack, sizes, rank, seed=seed), "triton")


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), block_r=st.sampled_from([16, 32]))
def test_programs_are_enough_for_all_tiles(sizes: list[int], block_r: int) -> None:
    tiles = sum(-(-size // block_r) for size in sizes)
    assert tiles <= nf4_triton._slots(sum(sizes), len(sizes), block_r) <= sum(sizes)


def test_rows_do_not_touch_each_other() -> None:
    """NaN in one expert's rows stays there, though tiles read beyond their rows."""
    stack, _ = quantized(3, 80, 192, device=DEVICE)
    of = case(stack, [5, 7, 20], 16)
    with launched():
        clean = both(stack, of, "triton")
        for kind in ("x", "dy"):
            of[kind][5:12] = float("nan")
        for found, expected in zip(both(stack, of, "triton"), clean, strict=True):
            assert torch.equal(found[:5], expected[:5])
            assert found[5:12].isnan().all()
            assert torch.equal(found[12:], expected[12:])


def test_rows_need_not_be_contiguous() -> None:
    stack, _ = quantized(2, 32, 64, device=DEVICE)
    of = case(stack, [5, 7], 16)
    loose = of | {kind: of[kind].T.contiguous().T for kind in ("x", "dy")}
    with launched():
        for found, expected in zip(both(stack, loose, "triton"), both(stack, of, "triton"), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["dequantize", "reference"])
def test_autocast_changes_nothing(implementation: str) -> None:
    stack, _ = quantized(2, 32, 64, device=DEVICE)
    of = case(stack, [5, 7], 16)
    expected = both(stack, of, implementation)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for found, wanted in zip(both(stack, of, implementation), expected, strict=True):
            assert torch.equal(found, wanted)


def test_configurations_are_chosen_by_rows_per_expert() -> None:
    for configs, choose in (
        (nf4_triton.FORWARD_CONFIGS, nf4_triton.forward_config),
        (nf4_triton.DX_CONFIGS, nf4_triton.dx_config),
    ):
        limits = [most for most, _ in configs[:-1]]
        assert limits == sorted(set(limits))
        assert [choose(most) for most in limits] == [config for _, config in configs[:-1]]
        assert choose(limits[-1] + 0.1) == configs[-1][1]


def test_auto_dequantises_without_a_gpu_and_where_rows_are_many() -> None:
    stack, _ = quantized(2, 32, 64)
    assert nf4._choose("auto", 8, torch.float32, stack, 400) == "dequantize"
    assert nf4.dequantizes(stack, 1, torch.float32)
    on_gpu = mock.Mock(shape_ENK=stack.shape_ENK)
    on_gpu.packed_ENP.device = torch.device("cuda")
    with mock.patch.object(nf4, "_why_not_triton", return_value=""):
        for rows, expected in ((800, "triton"), (801, "dequantize")):
            assert nf4._choose("auto", rows, torch.bfloat16, on_gpu, 400) == expected
        assert nf4._choose("auto", 1, torch.float32, on_gpu, 400) == "dequantize"
        with mock.patch.multiple(nf4, MAX_ROWS_PER_EXPERT_TRITON=2, MAX_ROWS_PER_EXPERT_TRITON_DX=3):
            found = [nf4.dequantizes(on_gpu, rows, torch.bfloat16) for rows in (4, 5, 6, 7)]
        assert found == [False, False, False, True]  # only where neither direction would decode as it multiplies


def test_what_does_not_fit_is_refused() -> None:
    stack, _ = quantized(2, 32, 64)
    for change, name in (
        ({"packed_ENP": stack.packed_ENP[:, :, :16].contiguous()}, "absmax_ES"),
        ({"absmax_ES": stack.absmax_ES.int()}, "absmax_ES"),
        ({"absmax2_EB": None}, "absmax2_EB"),
        ({"offset_E": stack.offset_E.double()}, "offset_E"),
        ({"code_16": stack.code_16[:8]}, "code_16"),
        ({"packed_ENP": stack.packed_ENP.transpose(1, 2).contiguous().transpose(1, 2)}, "not contiguous"),
    ):
        with pytest.raises(ValueError, match=name):
            replace(stack, **change)
    x, good = torch.zeros(5, 64), ends([2, 3])
    u, b = torch.zeros(5, 4), torch.zeros(2, 32, 4)
    for args, lora, name in (
        ((x[:, :32], good), {}, "x_RK"),
        ((x, good.long()), {}, "ends_E"),
        ((x, good[:1]), {}, "ends_E"),
        ((x, good), {"lora_u_RQ": u}, "come together"),
        ((x, good), {"lora_u_RQ": u[:4], "lora_b_ENQ": b}, "5 rows"),
        ((x, good), {"lora_u_RQ": u, "lora_b_ENQ": b[:, :16]}, "lora_b_ENQ"),
    ):
        with pytest.raises(ValueError, match=name):
            grouped_linear_nf4(args[0], stack, args[1], **lora)
    with pytest.raises(ValueError, match="dy_RN"):
        grouped_linear_nf4_dx(x, stack, good)
    with pytest.raises(UserError, match="no implementation"):
        grouped_linear_nf4(x, stack, good, implementation="cutlass")
    assert "auto" in IMPLEMENTATIONS


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to run on")
def test_without_a_gpu_and_without_the_interpreter_the_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # Triton asks each time; its knobs, once patched, forget the variable
    stack, _ = quantized(2, 32, 64)
    with pytest.raises(UserError, match="on a GPU"):
        grouped_linear_nf4(torch.zeros(5, 64), stack, ends([2, 3]), implementation="triton")
