"""What grouped experts do between their matmuls: Triton against plain torch, and plain torch against autograd.

Runs itself in another process to compile the kernels for GPUs: here the interpreter may have replaced the compiler.
"""

import json
from typing import Any

import pytest
import torch
from helpers_compile import accesses, compile_kernel, output_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.kernels import frozen_norm, rotary
from tunescope.models import fast_moe_ops as ops

sizes = st.tuples(st.integers(1, 9), st.sampled_from([1, 8, 64, 1025, 1536]), st.integers(0, 2**31))


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(sizes)
@settings(max_examples=15, deadline=None)
def test_the_gated_activation_and_its_gradient(case: tuple[int, int, int]) -> None:
    rows, width, seed = case
    gate, up, grad = (numbers(rows, width, seed=seed + i) for i in range(3))
    weight = numbers(rows, seed=seed + 3)
    both = torch.cat((gate, up), 1)  # also as halves of one matrix, written into a wider one
    for left, right in ((gate, up), (both[:, :width], both[:, width:])):
        wide = torch.full((rows, width + 8), 7.0)
        torch.testing.assert_close(ops.launch_gated_silu(left, right, wide[:, :width]), ops.gated_silu_ref(gate, up))
        assert bool((wide[:, width:] == 7).all())
    wide = torch.full((rows, 2 * width + 8), 7.0)
    found = ops.launch_gated_silu_backward(
        both[:, :width], both[:, width:], grad, weight, wide[:, :width], wide[:, width : 2 * width]
    )
    assert bool((wide[:, 2 * width :] == 7).all())
    wanted = ops.gated_silu_backward_ref(gate, up, grad, weight)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_plain_gradient_is_autograds() -> None:
    """In float64: of the sum of grad * weight * silu(gate) * up."""
    gate, up, grad = (numbers(5, 24, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    weight = numbers(5, seed=3, dtype=torch.float64).requires_grad_()
    act = torch.nn.functional.silu(gate) * up
    wanted = torch.autograd.grad((grad * weight[:, None] * act).sum(), (gate, up, weight))
    d_gate, d_up, same, d_weight = ops.gated_silu_backward_ref(*(x.detach() for x in (gate, up, grad, weight)))
    torch.testing.assert_close(same, act.detach())
    for one, other in zip((d_gate, d_up, d_weight), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("has_weight", [True, False])
@given(case=sizes, top_k=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_rows_of_a_token_are_added_up(case: tuple[int, int, int], top_k: int, has_weight: bool) -> None:
    tokens, width, seed = case
    y = numbers(tokens * top_k, width, seed=seed)
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(seed)).view(tokens, top_k)
    weight = numbers(tokens, top_k, seed=seed + 1) if has_weight else None
    by_hand = torch.stack(
        [sum((y[row] * (weight[t, k] if has_weight else 1) for k, row in enumerate(order[t])), torch.zeros(width))
         for t in range(tokens)]
    )  # fmt: skip
    for function in (ops.launch_gather_sum, ops.gather_sum_ref):
        torch.testing.assert_close(function(y, order, weight), by_hand, rtol=1e-5, atol=1e-5)


# Widths of Mixtral-8x7B and Qwen3-30B-A3B: the latter's 768 are no whole block.
VARIANTS = {
    "rotary": (rotary, "rotate_kernel", {"H": 32, "HALF": 64, "BLOCK_H": 32, "BLOCK_HALF": 64, "IS_BACKWARD": False}),
    "rotary back": (rotary, "rotate_kernel", {"H": 8, "HALF": 64, "BLOCK_H": 8, "BLOCK_HALF": 64, "IS_BACKWARD": True}),
    "norm": (frozen_norm, "forward_kernel", {"D": 4096, "BLOCK_D": 4096}),
    "norm back": (frozen_norm, "backward_kernel", {"D": 2048, "BLOCK_D": 2048}),
    "act": (ops, "gated_silu_kernel", {"F": 14336, "ROW": 28672, "ROW_OUT": 14352, "BLOCK_F": 1024}),
    "act backward": (ops, "gated_silu_backward_kernel", {"F": 14336, "ROW": 28672, "ROW_OUT": 28704, "BLOCK_F": 1024}),
    "act backward, narrow": (
        ops,
        "gated_silu_backward_kernel",
        {"F": 768, "ROW": 768, "ROW_OUT": 768, "BLOCK_F": 1024},
    ),
    "combine": (ops, "gather_sum_kernel", {"D": 4096, "K": 2, "HAS_WEIGHT": True, "BLOCK_D": 512}),
    "add up": (ops, "gather_sum_kernel", {"D": 2048, "K": 8, "HAS_WEIGHT": False, "BLOCK_D": 512}),
}


def compile_all() -> dict[str, dict[str, Any]]:
    found = {}
    for name, (module, kernel_name, constants) in VARIANTS.items():
        kernel = getattr(module, kernel_name)
        types = {"row_ptr": "*i64", "rstd_ptr": "*fp32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
        signature = {
            argument: types.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
            for argument in kernel.arg_names
        }
        for capability in (80, 90):
            ptx, resources = compile_kernel(kernel, signature, constants, capability=capability, num_warps=4)
            found[f"{name}, sm_{capability}"] = {"accesses": accesses(ptx), **resources}
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return output_of(__file__, tmp_path_factory)


def test_the_compiler_takes_them_without_spills_and_with_wide_accesses(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == 2 * len(VARIANTS)
    for name, one in compiled.items():
        assert one["STACK"] == one["LOCAL"] == 0, name
        assert one["REG"] <= 128, (name, one["REG"])
        # Rows of numbers 16 or 8 bytes at a time; single ones are indices, weights and their gradients.
        wide = [access for access in one["accesses"] if ".v" in access]
        assert len(wide) >= {"act": 3, "act backward": 6}.get(name.partition(",")[0], 2), (name, one["accesses"])


if __name__ == "__main__":
    print(json.dumps(compile_all()))
