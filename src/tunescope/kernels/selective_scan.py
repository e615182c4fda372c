"""The selective scan of Mamba-1 with its gate: the choice of an implementation, and the plain reference for all.

    Δ[e, b, t] = softplus(delta + delta_bias)
    s_t        = exp(Δ_t A) s_{t-1} + Δ_t B_t c_t                       N states per channel, from zeros
    y_t        = (sum over n of C_t s_t + D c_t) SiLU(z_t)

Source: arXiv:2312.00752, algorithm 2, discretised as its authors' code does it.
"""

# E channels, B batch, L time steps, N states per channel

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tunescope.errors import UserError
from tunescope.families.family import SCANS
from tunescope.kernels.common import check_known, not_importable

IMPLEMENTATIONS = ("auto", *SCANS)


def selective_scan(
    c_EBL: Tensor,
    delta_EBL: Tensor,
    A_EN: Tensor,
    B_NBL: Tensor,
    C_NBL: Tensor,
    D_E: Tensor | None,
    z_EBL: Tensor | None,
    delta_bias_E: Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """y (E, B, L) in the dtype of c. All inputs get gradients, in their dtypes.

    A is negative, in fp32 or float64. D and z may be None: then there is no such term, no gate. Channels, states and
    batch may have any stride; a tensor is copied where time has another stride than 1. Softplus, states and gate are
    fp32, and the output is rounded once; where c is float64, all is float64.

    implementation: `triton` takes fp32, fp16 and bf16; the same input gives the same bits again. `mamba-ssm` is the
    CUDA kernel of that package. `reference` is plain torch, step by step. `auto` is `triton` for what it takes on a
    GPU, else `reference`.

    Raises ValueError for shapes that do not fit, UserError for an implementation that cannot run here.
    """
    num_channels, num_states = A_EN.shape
    if not (
        c_EBL.dim() == 3
        and c_EBL.shape[0] == num_channels
        and all(x is None or x.shape == c_EBL.shape for x in (delta_EBL, z_EBL))
        and B_NBL.shape == C_NBL.shape == (num_states, *c_EBL.shape[1:])
        and all(x is None or x.shape == (num_channels,) for x in (D_E, delta_bias_E))
    ):
        tensors = (c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, delta_bias_E)
        shapes = ", ".join("none" if x is None else str(tuple(x.shape)) for x in tensors)
        raise ValueError(
            "c, delta, A, B, C, D, z and delta_bias must be (E, B, L), (E, B, L), (E, N), (N, B, L), (N, B, L), (E,), "
            f"(E, B, L) and (E,); they are {shapes}"
        )
    scan = _choose(implementation, c_EBL, delta_EBL, B_NBL, C_NBL, z_EBL)
    return scan(c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, delta_bias_E)


def selective_scan_ref(
    c_EBL: Tensor,
    delta_EBL: Tensor,
    A_EN: Tensor,
    B_NBL: Tensor,
    C_NBL: Tensor,
    D_E: Tensor | None,
    z_EBL: Tensor | None,
    delta_bias_E: Tensor,
) -> Tensor:
    """What the kernels must equal: fp32 inside, float64 for float64 c."""
    dtype = torch.promote_types(c_EBL.dtype, torch.float32)
    Delta_EBL = functional.softplus(delta_EBL.to(dtype) + delta_bias_E.to(dtype)[:, None, None])
    wide_c_EBL = c_EBL.to(dtype)
    A_E1N = A_EN.to(dtype)[:, None]
    s_EBN = wide_c_EBL.new_zeros(*c_EBL.shape[:2], A_EN.shape[1])
    # Taken apart at once: a slice in each step would cost a gradient as long as the sequence in each step.
    Delta, Delta_c = Delta_EBL.unbind(2), (Delta_EBL * wide_c_EBL).unbind(2)
    B, C = (x.to(dtype).permute(1, 0, 2).unbind(2) for x in (B_NBL, C_NBL))
    outputs = []
    for Delta_EB, Delta_c_EB, B_BN, C_BN in zip(Delta, Delta_c, B, C, strict=True):
        s_EBN = torch.exp(Delta_EB[..., None] * A_E1N) * s_EBN + Delta_c_EB[..., None] * B_BN
        outputs.append((s_EBN * C_BN).sum(-1))
    y_EBL = torch.stack(outputs, dim=-1)
    if D_E is not None:
        y_EBL = y_EBL + D_E.to(dtype)[:, None, None] * wide_c_EBL
    if z_EBL is not None:
        y_EBL = y_EBL * functional.silu(z_EBL.to(dtype))
    return y_EBL.to(c_EBL.dtype)


def _choose(implementation: str, c_EBL: Tensor, *others: Tensor | None) -> Any:
    """The function for these tensors."""
    check_known(implementation, IMPLEMENTATIONS, "selective scan")
    is_double = any(x is not None and x.dtype == torch.float64 for x in (c_EBL, *others))
    if implementation == "reference" or (implementation == "auto" and (is_double or not c_EBL.is_cuda)):
        return selective_scan_ref
    if implementation == "mamba-ssm":
        return _mamba_ssm
    try:
        import triton

        from tunescope.kernels.selective_scan_triton import selective_scan_triton
    except ImportError as error:
        raise UserError(
            "Triton cannot be imported, which the selective scan would run in",
            cause=str(error),
            cure="install torch for CUDA, which brings it along, or take the implementation reference",
        ) from error
    if is_double or not (c_EBL.is_cuda or triton.knobs.runtime.interpret):
        raise UserError(
            f"the Triton kernel cannot scan {c_EBL.dtype} on {c_EBL.device.type}",
            cause="it takes fp32, fp16 and bf16 on a GPU",
            cure="take the implementation auto or reference",
        )
    return selective_scan_triton


def _mamba_ssm(
    c_EBL: Tensor,
    delta_EBL: Tensor,
    A_EN: Tensor,
    B_NBL: Tensor,
    C_NBL: Tensor,
    D_E: Tensor | None,
    z_EBL: Tensor | None,
    delta_bias_E: Tensor,
) -> Tensor:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise not_importable("mamba-ssm", error) from error
    c_BEL, delta_BEL, B_BNL, C_BNL = (x.transpose(0, 1) for x in (c_EBL, delta_EBL, B_NBL, C_NBL))
    z_BEL = None if z_EBL is None else z_EBL.transpose(0, 1)
    D_E = None if D_E is None else D_E.float()  # the kernel takes what belongs to a channel in fp32 only
    y_BEL = selective_scan_fn(
        c_BEL, delta_BEL, A_EN.float(), B_BNL, C_BNL, D_E, z_BEL, delta_bias_E.float(), delta_softplus=True
    )
    return y_BEL.transpose(0, 1)
