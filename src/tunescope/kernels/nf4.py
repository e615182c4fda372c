"""Linears of experts whose weights are 4-bit, for rows sorted by expert: forward, the input's gradient, dequantisation.

A weight of bitsandbytes' NF4 or FP4 is code_16[nibble] * absmax, one absmax for each `block` values in row-major order,
and the absmax is itself 8-bit: code2[absmax] * absmax2 + offset, one absmax2 for each 256 of them, one offset for each
expert (QLoRA, arXiv 2305.14314, section 3; bitsandbytes.functional.dequantize_4bit). What comes out here equals
bitsandbytes' bit for bit where it is dequantised, and is as near as its rounding where it is multiplied at once.

Nothing here waits for the GPU, but `reference` and what torch's grouped matmul does not take (kernels.moe).
"""

# E experts, N out, K in, R rows, Q adapter rank, P = K / 2 bytes of a row, S = N * K / block, B = S / 256 rounded up

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tunescope.errors import UserError
from tunescope.kernels.common import check_known
from tunescope.kernels.moe import grouped_linear, grouped_linear_reference

IMPLEMENTATIONS = ("auto", "triton", "dequantize", "reference")
DEQUANTIZE_IMPLEMENTATIONS = ("auto", "triton", "reference")
NESTED_BLOCK = 256  # absmax under one absmax2, in bitsandbytes' kernels and these

# Rows per expert up to which decoding inside the product is taken for faster than dequantising all of a projection and
# then multiplying. Of forward, and of the input's gradient. One H200, Mixtral's shapes: at 128 rows 381 and 374 us
# against 572 and 556, or 506 and 564 where rows are spread unevenly; at 192 rows 718 and 717 against 625 and 606.
MAX_ROWS_PER_EXPERT_TRITON = 144
MAX_ROWS_PER_EXPERT_TRITON_DX = 144


@dataclass(frozen=True)
class Nf4Stack:
    """The weights of one projection of all experts, each (N, K), in bitsandbytes' packing.

    packed_ENP: uint8, contiguous; byte i of a row has element 2i in its high nibble and 2i + 1 in its low one.
    absmax_ES: uint8, to be undone by the next three; or float32, and those are None.
    absmax2_EB, offset_E, code2: float32 (E, B), (E,) and (256,).
    code_16: float32, the values of the 16 nibbles.

    Raises ValueError for shapes and dtypes that do not fit together.
    """

    packed_ENP: Tensor
    absmax_ES: Tensor
    absmax2_EB: Tensor | None
    offset_E: Tensor | None
    code2: Tensor | None
    code_16: Tensor
    block: int = 64

    def __post_init__(self) -> None:
        num_experts, num_out, num_in = self.shape_ENK
        num_scales = -(-num_out * num_in // self.block)
        shapes = {
            "packed_ENP": (self.packed_ENP, torch.uint8, (num_experts, num_out, num_in // 2)),
            "absmax_ES": (self.absmax_ES, torch.uint8 if self.is_nested else torch.float32, (num_experts, num_scales)),
            "code_16": (self.code_16, torch.float32, (16,)),
        }
        if self.is_nested:
            nested = {
                "absmax2_EB": (self.absmax2_EB, (num_experts, -(-num_scales // NESTED_BLOCK))),
                "offset_E": (self.offset_E, (num_experts,)),
                "code2": (self.code2, (256,)),
            }
            for name, (tensor, shape) in nested.items():
                if tensor is None:
                    raise ValueError(f"absmax_ES is {self.absmax_ES.dtype}, which needs {name}")
                shapes[name] = tensor, torch.float32, shape
        for name, (tensor, dtype, shape) in shapes.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and would have to be {dtype} {shape}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous")

    @property
    def shape_ENK(self) -> tuple[int, int, int]:
        num_experts, num_out, num_bytes = self.packed_ENP.shape
        return num_experts, num_out, 2 * num_bytes

    @property
    def is_nested(self) -> bool:
        """Whether the absmax are themselves quantised."""
        return self.absmax_ES.dtype != torch.float32


def scales(stack: Nf4Stack, *, implementation: str = "auto") -> Tensor:
    """(E, S) float32: absmax with their own quantisation undone, to the bit as bitsandbytes undoes it.

    implementation: `triton`, one launch; `reference`, plain torch; `auto`, `triton` on a GPU.
    """
    if _dequantizes_in_triton(implementation, stack, torch.float32) and stack.is_nested:
        from tunescope.kernels.nf4_triton import scales_triton

        return scales_triton(stack)
    return _scales_reference(stack)


def dequantize(
    stack: Nf4Stack, dtype: torch.dtype, out: Tensor | None = None, *, implementation: str = "auto"
) -> Tensor:
    """(E, N, K) in dtype, to the bit as bitsandbytes.functional.dequantize_4bit gives each expert.

    out: where to write; rows may be apart, values of a row follow each other. implementation: `triton`, one launch for
    all experts; `reference`, plain torch, expert by expert; `auto`, `triton` on a GPU where it takes these weights.

    Raises ValueError where out is of another shape or dtype, UserError for an implementation that cannot run here.
    """
    shape = stack.shape_ENK
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=stack.packed_ENP.device)
    elif tuple(out.shape) != shape or out.dtype != dtype or out.stride(-1) != 1 or any(s % 2 for s in out.stride()[:2]):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, and would have to be {dtype} {shape}, in whole rows")
    if _dequantizes_in_triton(implementation, stack, dtype):
        from tunescope.kernels.nf4_triton import dequantize_triton

        return dequantize_triton(stack, out)
    for expert, weight_NK in enumerate(_weights_reference(stack, dtype)):
        out[expert] = weight_NK
    return out


def grouped_linear_nf4(
    x_RK: Tensor,
    stack: Nf4Stack,
    ends_E: Tensor,
    *,
    lora_u_RQ: Tensor | None = None,
    lora_b_ENQ: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """(R, N) in x's dtype: each expert's rows times its weights, x W^T, and u B^T on top where there are adapters.

    ends_E (int32): row behind the last one of each expert; the last is R. lora_u_RQ: x A^T, already scaled.
    Without autograd: neither x nor u gets a gradient here.

    implementation: `triton` decodes the weights inside the product, for bf16 (other dtypes more slowly), and never
    writes them out. `dequantize` writes them all out in x's dtype and calls torch's grouped matmul. `reference` goes
    expert by expert in plain torch, in any dtype. `auto`: `triton` on a GPU for bf16 and few rows per expert, else
    `dequantize`.

    Raises ValueError for shapes that do not fit, UserError for an implementation that cannot run here.
    """
    num_experts, num_out, num_in = stack.shape_ENK
    _check("x_RK", x_RK, "lora_u_RQ", lora_u_RQ, "lora_b_ENQ", lora_b_ENQ, num_in, ends_E, num_experts)
    rank = 0 if lora_u_RQ is None else lora_u_RQ.shape[1]
    if lora_b_ENQ is not None and tuple(lora_b_ENQ.shape) != (num_experts, num_out, rank):
        raise ValueError(f"lora_b_ENQ is {tuple(lora_b_ENQ.shape)}, not {(num_experts, num_out, rank)}")
    chosen = _choose(implementation, len(x_RK), x_RK.dtype, stack, MAX_ROWS_PER_EXPERT_TRITON)
    if chosen == "triton":
        from tunescope.kernels.nf4_triton import forward_triton

        return forward_triton(x_RK, stack, ends_E, lora_u_RQ, lora_b_ENQ)
    weight_ENK = dequantize(stack, x_RK.dtype)
    y_RN = _linear(x_RK, weight_ENK, ends_E, chosen)
    if lora_u_RQ is not None and lora_b_ENQ is not None:
        y_RN += _linear(*_aligned(lora_u_RQ.to(x_RK.dtype), lora_b_ENQ.to(x_RK.dtype)), ends_E, chosen)
    return y_RN


def grouped_linear_nf4_dx(
    dy_RN: Tensor,
    stack: Nf4Stack,
    ends_E: Tensor,
    *,
    lora_du_RQ: Tensor | None = None,
    lora_a_EQK: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """(R, K) in dy's dtype: the gradient of grouped_linear_nf4's x, dy W, and du A on top where there are adapters.

    lora_du_RQ: the gradient of x A^T, with the scaling in it. Everything else as there.
    """
    num_experts, num_out, num_in = stack.shape_ENK
    _check("dy_RN", dy_RN, "lora_du_RQ", lora_du_RQ, "lora_a_EQK", lora_a_EQK, num_out, ends_E, num_experts)
    rank = 0 if lora_du_RQ is None else lora_du_RQ.shape[1]
    if lora_a_EQK is not None and tuple(lora_a_EQK.shape) != (num_experts, rank, num_in):
        raise ValueError(f"lora_a_EQK is {tuple(lora_a_EQK.shape)}, not {(num_experts, rank, num_in)}")
    chosen = _choose(implementation, len(dy_RN), dy_RN.dtype, stack, MAX_ROWS_PER_EXPERT_TRITON_DX)
    if chosen == "triton":
        from tunescope.kernels.nf4_triton import dx_triton

        return dx_triton(dy_RN, stack, ends_E, lora_du_RQ, lora_a_EQK)
    weight_ENK = dequantize(stack, dy_RN.dtype)
    dx_RK = _linear(dy_RN, weight_ENK.transpose(1, 2), ends_E, chosen)
    if lora_du_RQ is not None and lora_a_EQK is not None:
        a_EKQ = lora_a_EQK.to(dy_RN.dtype).transpose(1, 2)
        dx_RK += _linear(*_aligned(lora_du_RQ.to(dy_RN.dtype), a_EKQ), ends_E, chosen)
    return dx_RK


def dequantizes(stack: Nf4Stack, num_rows: int, dtype: torch.dtype) -> bool:
    """Whether both products, of `auto`, would write the weights out for so many rows, so that they may share them."""
    both = (MAX_ROWS_PER_EXPERT_TRITON, MAX_ROWS_PER_EXPERT_TRITON_DX)
    return all(_choose("auto", num_rows, dtype, stack, most) == "dequantize" for most in both)


def _linear(x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor, implementation: str) -> Tensor:
    """Under autocast too in x's dtype, as whoever dequantised has chosen it."""
    function = grouped_linear_reference if implementation == "reference" else grouped_linear
    with torch.autocast(x_RK.device.type, enabled=False):
        return function(x_RK, weight_ENK, ends_E)


def _aligned(u_RQ: Tensor, b_ENQ: Tensor) -> tuple[Tensor, Tensor]:
    """With zeros to the rank that torch's grouped matmul takes: rows of whole 16 bytes."""
    missing = -u_RQ.shape[1] % (16 // u_RQ.itemsize)
    if not missing:
        return u_RQ, b_ENQ
    return functional.pad(u_RQ, (0, missing)), functional.pad(b_ENQ, (0, missing))


def _scales_reference(stack: Nf4Stack) -> Tensor:
    code2, absmax2_EB, offset_E = stack.code2, stack.absmax2_EB, stack.offset_E
    if code2 is None or absmax2_EB is None or offset_E is None:
        return stack.absmax_ES
    absmax2_ES = absmax2_EB.repeat_interleave(NESTED_BLOCK, dim=1)[:, : stack.absmax_ES.shape[1]]
    return code2[stack.absmax_ES.int()] * absmax2_ES + offset_E[:, None]


def _weights_reference(stack: Nf4Stack, dtype: torch.dtype) -> Any:
    """(N, K) of one expert after another: products in fp32, rounded once."""
    _, num_out, num_in = stack.shape_ENK
    for packed_NP, scale_S in zip(stack.packed_ENP, _scales_reference(stack), strict=True):
        nibble_NP2 = torch.stack((packed_NP >> 4, packed_NP & 15), dim=-1)
        value = stack.code_16[nibble_NP2.flatten().int()]
        scale = scale_S.repeat_interleave(stack.block)[: len(value)]
        yield (value * scale).view(num_out, num_in).to(dtype)


def _check(
    x_name: str, x: Tensor, u_name: str, u: Tensor | None, b_name: str, b: Tensor | None, width: int, ends_E: Tensor,
    num_experts: int,
) -> None:  # fmt: skip
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{x_name} is {tuple(x.shape)}, and would have to be (rows, {width})")
    if ends_E.dtype != torch.int32 or tuple(ends_E.shape) != (num_experts,):
        raise ValueError(f"ends_E is {ends_E.dtype} {tuple(ends_E.shape)}, not torch.int32 {(num_experts,)}")
    if (u is None) != (b is None):
        raise ValueError(f"{u_name} and {b_name} come together")
    if u is not None and (u.dim() != 2 or u.shape[0] != x.shape[0]):
        raise ValueError(f"{u_name} is {tuple(u.shape)}, and has to have the {x.shape[0]} rows of {x_name}")


def _choose(
    implementation: str, num_rows: int, dtype: torch.dtype, stack: Nf4Stack, max_rows_per_expert: int
) -> str:  # fmt: skip
    check_known(implementation, IMPLEMENTATIONS, "grouped 4-bit linear")
    device = stack.packed_ENP.device
    if implementation == "auto":
        is_few = num_rows <= max_rows_per_expert * stack.shape_ENK[0]
        suits = device.type == "cuda" and dtype == torch.bfloat16 and not _why_not_triton(stack, dtype, device)
        return "triton" if suits and is_few else "dequantize"
    if implementation == "triton":
        _refuse_unless_triton(stack, dtype, device)
    return implementation


def _dequantizes_in_triton(implementation: str, stack: Nf4Stack, dtype: torch.dtype) -> bool:
    check_known(implementation, DEQUANTIZE_IMPLEMENTATIONS, "dequantisation")
    device = stack.packed_ENP.device
    if implementation == "auto":
        return device.type == "cuda" and not _why_not_triton(stack, dtype, device)
    if implementation == "triton":
        _refuse_unless_triton(stack, dtype, device)
    return implementation == "triton"


def _refuse_unless_triton(stack: Nf4Stack, dtype: torch.dtype, device: torch.device) -> None:
    reason = _why_not_triton(stack, dtype, device)
    if reason:
        raise UserError(
            "the Triton kernels cannot take these 4-bit weights here",
            cause=reason,
            cure="take the implementation auto or reference",
        )


def _why_not_triton(stack: Nf4Stack, dtype: torch.dtype, device: torch.device) -> str:
    """Empty where the kernels take these weights for rows of dtype."""
    _, num_out, num_in = stack.shape_ENK
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they take bf16, fp16 and fp32, not {dtype}"
    if num_in % 64 or stack.block % 64:
        return f"they take whole blocks of 64 columns, not {num_in} columns in blocks of {stack.block}"
    if num_out * num_in >= 2**31:
        return f"an expert of {num_out} x {num_in} has more values than they count to, 2^31"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"they run on a GPU, and the weights are on {device.type}"
    return ""
