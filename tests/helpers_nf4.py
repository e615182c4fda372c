"""Stacks of experts quantised by bitsandbytes itself, for the tests of the 4-bit kernels."""

from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from tunescope.kernels.nf4 import Nf4Stack


def quantized(
    num_experts: int,
    num_out: int,
    num_in: int,
    *,
    block: int = 64,
    is_nested: bool = True,
    kind: str = "nf4",
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Nf4Stack, list[tuple[Tensor, Any]]]:
    """A stack, and each expert's (packed, QuantState) as bitsandbytes made them. Experts are of different sizes."""
    generator = torch.Generator(device).manual_seed(seed)
    experts = []
    for expert in range(num_experts):
        weight_NK = torch.randn(num_out, num_in, generator=generator, device=device) * 0.02 * (expert + 1)
        experts.append(
            functional.quantize_4bit(weight_NK, blocksize=block, quant_type=kind, compress_statistics=is_nested)
        )
    states = [state for _, state in experts]
    stack = Nf4Stack(
        packed_ENP=torch.stack([packed.view(num_out, num_in // 2) for packed, _ in experts]),
        absmax_ES=torch.stack([state.absmax for state in states]),
        absmax2_EB=torch.stack([state.state2.absmax for state in states]) if is_nested else None,
        offset_E=torch.stack([state.offset for state in states]).float() if is_nested else None,
        code2=states[0].state2.code if is_nested else None,
        code_16=states[0].code,
        block=block,
    )
    return stack, experts


def dequantized(experts: list[tuple[Tensor, Any]], dtype: torch.dtype) -> Tensor:
    """(E, N, K) by bitsandbytes.functional.dequantize_4bit.

    As one long row each: on a CPU 0.50 begins a new block with each row, though a block may lie in two.
    """
    weights = []
    for packed, state in experts:
        shape = state.shape
        state.dtype, state.shape = dtype, torch.Size([1, shape.numel()])
        weights.append(functional.dequantize_4bit(packed, state).view(shape))
        state.shape = shape
    return torch.stack(weights)


def ends(sizes: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm; of two zeros 0."""
    difference = (found.double() - expected.double()).norm()
    return float(difference if difference == 0 else difference / expected.double().norm())
