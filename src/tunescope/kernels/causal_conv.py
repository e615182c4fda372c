"""Depthwise causal convolution over time with SiLU, as Mamba-1 uses it: the plain reference, and Triton kernels.

    y[e, b, t] = SiLU( bias[e] + sum over j of weight[e, j] * x[e, b, t - (W - 1) + j] ),   x = 0 before t = 0

The last tap meets the current step. Each thread of a kernel holds groups of V consecutive time steps, 16 bytes of the
input, and reads the group before (backward: also the one after) for the taps that reach out of its own. All loads are
then whole aligned vectors, and the shift by 1 to 3 steps is a choice of registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunescope.errors import UserError
from tunescope.families.family import SCANS
from tunescope.kernels.common import check_known, not_importable, time_contiguous

IMPLEMENTATIONS = ("auto", *SCANS)
TRITON_WIDTHS = (2, 3, 4)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_NUM_WARPS = 4
_MIN_GROUPS = 32 * _NUM_WARPS  # of a program: one for each thread
_MAX_FORWARD_GROUPS = 2 * _MIN_GROUPS  # two groups per thread in flight; 32 registers
_MAX_BACKWARD_GROUPS = _MIN_GROUPS  # at most 56 registers; with two groups per thread 72

# E channels, B batch, L time steps, W taps, V time steps in a group; P groups of a channel, over batch and time.
# M groups of a program: BLOCK_E channels times BLOCK_P groups of each.


def causal_conv1d_silu(
    x_EBL: torch.Tensor, weight_EW: torch.Tensor, bias_E: torch.Tensor, *, implementation: str = "auto"
) -> torch.Tensor:
    """SiLU of the causal convolution of each channel, in x's shape and dtype, contiguous. All inputs get gradients.

    x_EBL: (E, ..., L), channels first and time last, with any batch axes between or none. Channels and batch may have
    any stride; x is copied where time has another stride than 1, or where several batch axes do not flatten.
    weight_EW, bias_E: of any float dtype, also another than x's. Products, sum, bias and SiLU are fp32, and the output
    is rounded once; float64 stays float64. A gradient has the dtype of its input. Autocast changes none of this.

    implementation: `triton` takes fp32, fp16 and bf16 and 2 to 4 taps; the same input gives the same bits again.
    `mamba-ssm` is the CUDA kernel of the package causal-conv1d. `reference` is plain torch. `auto` is `triton` for what
    it takes on a GPU, else `reference`.

    Raises ValueError for shapes that do not fit, UserError for an implementation that cannot run here.
    """
    if x_EBL.dim() < 2 or weight_EW.dim() != 2 or not len(x_EBL) == len(weight_EW) == bias_E.numel():
        shapes = [tuple(tensor.shape) for tensor in (x_EBL, weight_EW, bias_E)]
        raise ValueError(
            "x, weight and bias must be (E, ..., L), (E, W) and (E,); they are {}, {} and {}".format(*shapes)
        )
    chosen = _choose(implementation, x_EBL, weight_EW)
    if chosen == "reference":
        return causal_conv1d_silu_ref(x_EBL, weight_EW, bias_E)
    run = _CausalConv1dSilu.apply if chosen == "triton" else _mamba_ssm
    flat_EBL = x_EBL.unsqueeze(1) if x_EBL.dim() == 2 else x_EBL.flatten(1, -2)
    return run(time_contiguous(flat_EBL), weight_EW, bias_E).view(x_EBL.shape)


def causal_conv1d_silu_ref(x_EBL: torch.Tensor, weight_EW: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """What the kernels must equal: fp32 inside, float64 for float64 x. (torch's conv1d would heed autocast.)"""
    dtype = torch.promote_types(x_EBL.dtype, torch.float32)
    length, num_taps = x_EBL.shape[-1], weight_EW.shape[1]
    column = (-1,) + (1,) * (x_EBL.dim() - 1)
    x_pad = functional.pad(x_EBL.to(dtype), (num_taps - 1, 0))
    pre_EBL = bias_E.to(dtype).view(column)
    for tap, weight_E in enumerate(weight_EW.to(dtype).unbind(1)):
        pre_EBL = pre_EBL + weight_E.view(column) * x_pad[..., tap : tap + length]
    return functional.silu(pre_EBL).to(x_EBL.dtype)


def _choose(implementation: str, x: torch.Tensor, weight_EW: torch.Tensor) -> str:
    check_known(implementation, IMPLEMENTATIONS, "causal convolution")
    is_taken = x.dtype in TRITON_DTYPES and weight_EW.shape[1] in TRITON_WIDTHS
    if implementation == "auto":
        return "triton" if x.is_cuda and is_taken else "reference"
    if implementation == "triton" and not (is_taken and (x.is_cuda or triton.knobs.runtime.interpret)):
        raise UserError(
            f"the Triton kernel cannot convolve {x.dtype} on {x.device.type} with {weight_EW.shape[1]} taps",
            cause="it takes fp32, fp16 and bf16 on a GPU, and 2 to 4 taps",
            cure="take the implementation auto or reference",
        )
    return implementation


def _mamba_ssm(x_EBL: torch.Tensor, weight_EW: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        raise not_importable("causal-conv1d", error) from error
    y_BEL = causal_conv1d_fn(x_EBL.transpose(0, 1), weight_EW, bias_E, activation="silu")
    return y_BEL.transpose(0, 1).contiguous()  # a view again where the package kept the strides of x


@triton.jit
def _columns_of_4(x_M4):
    even_M2, odd_M2 = tl.split(tl.reshape(x_M4, (x_M4.shape[0], 2, 2)))
    c0, c2 = tl.split(even_M2)
    c1, c3 = tl.split(odd_M2)
    return c0, c1, c2, c3


@triton.jit
def _columns(x_MV):
    """The 4 or 8 columns of a tile whose rows lie in one thread each: no instruction at all."""
    if x_MV.shape[1] == 4:
        columns = _columns_of_4(x_MV)
    else:
        even_M4, odd_M4 = tl.split(tl.reshape(x_MV, (x_MV.shape[0], 4, 2)))
        even = _columns_of_4(even_M4)
        odd = _columns_of_4(odd_M4)
        columns = even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]
    return columns


@triton.jit
def _tile_of_4(c0, c1, c2, c3):
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (c0.shape[0], 4))


@triton.jit
def _tile(columns):
    """The inverse of `_columns`."""
    if len(columns) == 4:
        tile_MV = _tile_of_4(columns[0], columns[1], columns[2], columns[3])
    else:
        even_M4 = _tile_of_4(columns[0], columns[2], columns[4], columns[6])
        odd_M4 = _tile_of_4(columns[1], columns[3], columns[5], columns[7])
        tile_MV = tl.reshape(tl.join(even_M4, odd_M4), (columns[0].shape[0], 8))
    return tile_MV


@triton.jit
def _mask(time_M, length, inside_M, V: tl.constexpr, UNIT: tl.constexpr):
    """Which of the V steps from time_M on exist. Where length is a multiple of V: a whole group does or does not."""
    mask_MV = (inside_M & (time_M >= 0) & (time_M < length))[:, None]
    if UNIT != V:
        mask_MV = mask_MV & (time_M[:, None] + tl.arange(0, V)[None, :] < length)
    return mask_MV


@triton.jit
def _load(row_ptr_M, time_M, length, inside_M, V: tl.constexpr, UNIT: tl.constexpr):
    """V tensors (M,) in fp32: the steps from time_M on, 0 outside of the row."""
    ptr_MV = row_ptr_M[:, None] + (time_M[:, None] + tl.arange(0, V)[None, :])
    mask_MV = _mask(time_M, length, inside_M, V, UNIT)
    return _columns(tl.load(ptr_MV, mask=mask_MV, other=0.0).to(tl.float32))


@triton.jit
def _store(row_ptr_M, columns, time_M, length, inside_M, V: tl.constexpr, UNIT: tl.constexpr):
    ptr_MV = row_ptr_M[:, None] + (time_M[:, None] + tl.arange(0, V)[None, :])
    value_MV = _tile(columns).to(row_ptr_M.dtype.element_ty)
    tl.store(ptr_MV, value_MV, mask=_mask(time_M, length, inside_M, V, UNIT))


@triton.jit
def _load_taps(weight_ptr, channel_M, num_channels, W: tl.constexpr):
    taps: tl.tuple = ()
    for j in tl.static_range(W):
        tap_M = tl.load(weight_ptr + channel_M * W + j, mask=channel_M < num_channels, other=0.0)
        taps += (tap_M.to(tl.float32),)
    return taps


@triton.jit
def _pre_activation(x, first: tl.constexpr, taps, bias_M, W: tl.constexpr):
    """The convolution at the step whose oldest tap meets x[first]."""
    pre_M = bias_M
    for j in tl.static_range(W):
        pre_M += taps[j] * x[first + j]
    return pre_M


# Strides and length come in units of UNIT steps. It is V where all of them are multiples of V, else 1: so the compiler
# sees that every group is aligned, which it does not of an argument that is a multiple of 8 but not of 16.
_SIZES = ["channel_stride", "batch_stride", "num_channels", "num_batch", "num_units", "num_groups"]


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    channel_stride, batch_stride, num_channels, num_batch, num_units, num_groups,
    W: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of groups (fastest, so that neighbours share lines of the cache), blocks of channels."""
    index_M = tl.arange(0, BLOCK_E * BLOCK_P)
    channel_M = tl.program_id(1) * BLOCK_E + index_M // BLOCK_P
    group_M = tl.program_id(0) * BLOCK_P + index_M % BLOCK_P
    batch_M = group_M // num_groups
    time_M = group_M % num_groups * V
    inside_M = (channel_M < num_channels) & (batch_M < num_batch)
    length = num_units * UNIT

    row_M = x_ptr + (channel_M.to(tl.int64) * channel_stride + batch_M.to(tl.int64) * batch_stride) * UNIT
    x = _load(row_M, time_M - V, length, inside_M, V, UNIT) + _load(row_M, time_M, length, inside_M, V, UNIT)
    taps = _load_taps(weight_ptr, channel_M, num_channels, W)
    bias_M = tl.load(bias_ptr + channel_M, mask=channel_M < num_channels, other=0.0).to(tl.float32)
    y: tl.tuple = ()
    for i in tl.static_range(V):
        pre_M = _pre_activation(x, V + i - (W - 1), taps, bias_M, W)
        y += (pre_M * tl.sigmoid(pre_M),)
    y_row_M = y_ptr + (channel_M.to(tl.int64) * num_batch + batch_M) * length
    _store(y_row_M, y, time_M, length, inside_M, V, UNIT)


@triton.jit(do_not_specialize=[*_SIZES, "dy_channel_stride", "dy_batch_stride"])
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    channel_stride, batch_stride, dy_channel_stride, dy_batch_stride,
    num_channels, num_batch, num_units, num_groups,
    W: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels. A program walks its channels' whole batch and time, so that dweight and dbias are sums
    in its registers: no partials in memory, no second kernel, and always the same order of adding.
    """
    index_M = tl.arange(0, BLOCK_E * BLOCK_P)
    channel_M = tl.program_id(0) * BLOCK_E + index_M // BLOCK_P
    length = num_units * UNIT
    taps = _load_taps(weight_ptr, channel_M, num_channels, W)
    bias_M = tl.load(bias_ptr + channel_M, mask=channel_M < num_channels, other=0.0).to(tl.float32)
    dbias_M = tl.zeros((BLOCK_E * BLOCK_P,), tl.float32)
    dtaps: tl.tuple = ()
    for _ in tl.static_range(W):
        dtaps += (tl.zeros((BLOCK_E * BLOCK_P,), tl.float32),)

    start = 0
    while start < num_batch * num_groups:  # not a range: under NumPy 2.4 the interpreter cannot count to an argument
        group_M = start + index_M % BLOCK_P
        batch_M = group_M // num_groups
        time_M = group_M % num_groups * V
        inside_M = (channel_M < num_channels) & (batch_M < num_batch)
        row_M = x_ptr + (channel_M.to(tl.int64) * channel_stride + batch_M.to(tl.int64) * batch_stride) * UNIT
        x = _load(row_M, time_M - V, length, inside_M, V, UNIT) + _load(row_M, time_M, length, inside_M, V, UNIT)
        x += _load(row_M, time_M + V, length, inside_M, V, UNIT)
        dy_row_M = dy_ptr + (channel_M.to(tl.int64) * dy_channel_stride + batch_M.to(tl.int64) * dy_batch_stride) * UNIT
        dy = _load(dy_row_M, time_M, length, inside_M, V, UNIT)
        dy += _load(dy_row_M, time_M + V, length, inside_M, V, UNIT)

        dpre: tl.tuple = ()  # of the group and of the W - 1 steps after it, whose taps reach back into the group
        for i in tl.static_range(V + W - 1):
            pre_M = _pre_activation(x, V + i - (W - 1), taps, bias_M, W)
            sigmoid_M = tl.sigmoid(pre_M)
            dpre += (dy[i] * sigmoid_M * (1 + pre_M * (1 - sigmoid_M)),)
        dx: tl.tuple = ()
        for i in tl.static_range(V):
            dbias_M += dpre[i]
            dx_M = taps[W - 1] * dpre[i]
            for k in tl.static_range(1, W):
                dx_M += taps[W - 1 - k] * dpre[i + k]
            dx += (dx_M,)
        dx_row_M = dx_ptr + (channel_M.to(tl.int64) * num_batch + batch_M) * length
        _store(dx_row_M, dx, time_M, length, inside_M, V, UNIT)
        added: tl.tuple = ()
        for j in tl.static_range(W):
            dtap_M = dtaps[j]
            for i in tl.static_range(V):
                dtap_M += dpre[i] * x[V + i - (W - 1) + j]
            added += (dtap_M,)
        dtaps = added
        start += BLOCK_P

    channel_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    for j in tl.static_range(W):
        dtap_E = tl.sum(tl.reshape(dtaps[j], (BLOCK_E, BLOCK_P)), axis=1)
        tl.store(dweight_ptr + channel_E * W + j, dtap_E, mask=channel_E < num_channels)
    dbias_E = tl.sum(tl.reshape(dbias_M, (BLOCK_E, BLOCK_P)), axis=1)
    tl.store(dbias_ptr + channel_E, dbias_E, mask=channel_E < num_channels)


class _CausalConv1dSilu(torch.autograd.Function):
    """Keeps its inputs alone: backward computes the pre-activation again, cheaper than reading it."""

    @staticmethod
    def forward(ctx: Any, x_EBL: torch.Tensor, weight_EW: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
        weight_EW, bias_E = weight_EW.contiguous(), bias_E.contiguous()
        ctx.save_for_backward(x_EBL, weight_EW, bias_E)
        y_EBL = torch.empty(x_EBL.shape, dtype=x_EBL.dtype, device=x_EBL.device)
        sizes, blocks = _sizes_and_blocks(x_EBL, [x_EBL], _MAX_FORWARD_GROUPS)
        num_channels, num_batch, _, num_groups = sizes
        grid = triton.cdiv(num_batch * num_groups, blocks["BLOCK_P"]), triton.cdiv(num_channels, blocks["BLOCK_E"])
        strides = _strides(x_EBL, blocks["UNIT"])
        with torch.cuda.device_of(x_EBL):
            _forward_kernel[grid](
                x_EBL, weight_EW, bias_E, y_EBL, *strides, *sizes,
                W=weight_EW.shape[1], **blocks, num_warps=_NUM_WARPS,
            )  # fmt: skip
        return y_EBL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_EBL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_EBL, weight_EW, bias_E = ctx.saved_tensors
        dy_EBL = time_contiguous(dy_EBL)
        dx_EBL = torch.empty(x_EBL.shape, dtype=x_EBL.dtype, device=x_EBL.device)
        dweight_EW, dbias_E = torch.empty_like(weight_EW), torch.empty_like(bias_E)
        sizes, blocks = _sizes_and_blocks(x_EBL, [x_EBL, dy_EBL], _MAX_BACKWARD_GROUPS)
        strides = *_strides(x_EBL, blocks["UNIT"]), *_strides(dy_EBL, blocks["UNIT"])
        with torch.cuda.device_of(x_EBL):
            _backward_kernel[(triton.cdiv(sizes[0], blocks["BLOCK_E"]),)](
                x_EBL, weight_EW, bias_E, dy_EBL, dx_EBL, dweight_EW, dbias_E, *strides, *sizes,
                W=weight_EW.shape[1], **blocks, num_warps=_NUM_WARPS,
            )  # fmt: skip
        return dx_EBL, dweight_EW, dbias_E


def _sizes_and_blocks(
    x_EBL: torch.Tensor, read: list[torch.Tensor], max_groups: int
) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """What a kernel needs to know of x's shape: E, B, L in units and groups of a row; and V, UNIT, BLOCK_E, BLOCK_P.

    Few groups of a channel (batch 1 with a short text) share a program with those of other channels.
    """
    num_channels, num_batch, length = x_EBL.shape
    group = 16 // x_EBL.element_size()
    steps = [length, *(stride for tensor in read for stride in _strides(tensor, 1))]
    unit = group if all(step % group == 0 for step in steps) else 1
    num_groups = triton.cdiv(length, group)
    block_p = min(max(triton.next_power_of_2(num_batch * num_groups), 16), max_groups)
    blocks = {"V": group, "UNIT": unit, "BLOCK_E": max(_MIN_GROUPS // block_p, 1), "BLOCK_P": block_p}
    return (num_channels, num_batch, length // unit, num_groups), blocks


def _strides(x_EBL: torch.Tensor, unit: int) -> tuple[int, int]:
    """Of channel and batch, in units; 0 for an axis of one, whose stride may be anything."""
    channel, batch = (
        (stride // unit if size > 1 else 0) for size, stride in zip(x_EBL.shape[:2], x_EBL.stride()[:2], strict=True)
    )
    return channel, batch
