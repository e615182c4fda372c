"""The kernels of nf4_triton: 4-bit weights decoded in registers, between loading them and the matrix product.

What a program multiplies is of one expert: rows are sorted by expert, and each program finds its expert and its rows
from where they end. So the host need not know how many rows an expert has; it starts programs for the most tiles there
can be, and those without a tile leave at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

# E experts, N out, K in, R rows, Q adapter rank. A byte holds the values of two columns k, the even one in its high
# nibble: so a tile of bytes is two tiles of weights, one of even columns and one of odd ones, and no nibble need be put
# beside its neighbour. H: bytes of a row, K / 2. C: blocks of 64 columns, which share a scale; V = 32: bytes of such.

import triton
import triton.language as tl

from tunescope.kernels.nf4_decode import decode, decode_in_order, decode_scaled, scaled_tables, tables_of

BLOCK_K = 64  # columns at a time: a scale is of whole multiples of it
BLOCK_K_ = tl.constexpr(BLOCK_K)


@triton.jit
def _scale(absmax, block, absmax2_ptr, offset, code2_ptr):
    """absmax of blocks (their numbers within the expert), its own quantisation undone where it has one."""
    if absmax2_ptr is None:
        scale = absmax
    else:
        scale = tl.load(code2_ptr + absmax) * tl.load(absmax2_ptr + block // 256) + offset
    return scale


@triton.jit
def _tile(slot, ends_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """The expert of a tile of rows, its first row, and the row behind the expert's last: none left beyond all tiles."""
    expert_E = tl.arange(0, BLOCK_E)
    end_E = tl.load(ends_ptr + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(ends_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    tiles_E = (end_E - start_E + (BLOCK_R - 1)) // BLOCK_R
    behind_E = tl.cumsum(tiles_E, 0)
    expert = tl.sum((behind_E <= slot).to(tl.int32), 0)
    is_it_E = expert_E == expert
    first_tile = tl.sum(tl.where(is_it_E, behind_E - tiles_E, 0), 0)
    row = tl.sum(tl.where(is_it_E, start_E, 0), 0) + (slot - first_tile) * BLOCK_R
    return expert, row, tl.sum(tl.where(is_it_E, end_E, 0), 0)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x_ptr, packed_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code2_ptr, code_ptr, ends_ptr, u_ptr, b_ptr, y_ptr,
    num_rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    UNROLL: tl.constexpr, SPLIT: tl.constexpr, SCALE_SUMS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """y (SPLIT, R, N), of SPLIT parts of the columns each: x_ptr (R, 2, K / 2), even columns before odd ones.

    Grid: tiles of rows, tiles of N, parts. SCALE_SUMS: each block's sum is scaled, in fp32, and not its weights: exact,
    and less work than scaling the weights as long as rows are few. WEIGHTS_FIRST: the product is transposed, so that of
    a matrix instruction's two sizes the one that is at least 64 on Hopper is of N and not of rows.
    """
    H: tl.constexpr = K // 2
    V: tl.constexpr = BLOCK_K_ // 2
    BLOCKS_ROW: tl.constexpr = K // BLOCK_K_
    STEPS: tl.constexpr = BLOCKS_ROW // (UNROLL * SPLIT)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    expert, first_row, end_row = _tile(tl.program_id(0), ends_ptr, E, BLOCK_E, BLOCK_R)
    if first_row >= end_row:
        return
    part = tl.program_id(2)
    expert = expert.to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_R = first_row + tl.arange(0, BLOCK_R)
    # What lies beyond is read from the last row there is, and not stored.
    from_N = tl.minimum(n_N, N - 1)
    from_R = tl.minimum(row_R, num_rows - 1).to(tl.int64)
    v_V = tl.arange(0, V)

    absmax_ptr += expert * ((N * K + BLOCK - 1) // BLOCK)
    offset = 0.0
    if absmax2_ptr is not None:
        absmax2_ptr += expert * (((N * K + BLOCK - 1) // BLOCK + 255) // 256)
        offset = tl.load(offset_ptr + expert)
    tables = tables_of(code_ptr) if USE_ASM else (0, 0, 0, 0)
    column = part * (STEPS * UNROLL)  # in blocks of BLOCK_K
    bytes_NV = packed_ptr + expert * N * H + (from_N * H + column * V)[:, None] + v_V[None, :]
    x_RV = x_ptr + (from_R * K + column * V)[:, None] + v_V[None, :]
    block_N = (from_N * BLOCKS_ROW + column) // (BLOCK // BLOCK_K_)
    absmax_N = tl.load(absmax_ptr + block_N)
    SHAPE: tl.constexpr = (BLOCK_N, BLOCK_R) if WEIGHTS_FIRST else (BLOCK_R, BLOCK_N)
    total = tl.zeros(SHAPE, tl.float32)
    for step in range(STEPS):
        for at in tl.static_range(UNROLL):
            # One block ahead: its absmax would else be waited for.
            ahead = tl.minimum(column + step * UNROLL + at + 1, BLOCKS_ROW - 1)
            ahead_N = (from_N * BLOCKS_ROW + ahead) // (BLOCK // BLOCK_K_)
            absmax_ahead_N = tl.load(absmax_ptr + ahead_N)
            scale_N = _scale(absmax_N, block_N, absmax2_ptr, offset, code2_ptr)
            tile_NV = tl.load(bytes_NV + at * V)
            even_RV = tl.load(x_RV + at * V)
            odd_RV = tl.load(x_RV + (at * V + H))
            if SCALE_SUMS:
                even_NV, odd_NV = decode(tile_NV, code_ptr, tables, dtype, USE_ASM)
                if WEIGHTS_FIRST:
                    of_block = tl.dot(even_NV, tl.trans(even_RV), input_precision="ieee")
                    of_block = tl.dot(odd_NV, tl.trans(odd_RV), of_block, input_precision="ieee")
                    total += of_block * scale_N[:, None]
                else:
                    of_block = tl.dot(even_RV, tl.trans(even_NV), input_precision="ieee")
                    of_block = tl.dot(odd_RV, tl.trans(odd_NV), of_block, input_precision="ieee")
                    total += of_block * scale_N[None, :]
            else:
                even_NV, odd_NV = decode_scaled(tile_NV, scale_N[:, None], code_ptr, tables, dtype, USE_ASM)
                if WEIGHTS_FIRST:
                    total = tl.dot(even_NV, tl.trans(even_RV), total, input_precision="ieee")
                    total = tl.dot(odd_NV, tl.trans(odd_RV), total, input_precision="ieee")
                else:
                    total = tl.dot(even_RV, tl.trans(even_NV), total, input_precision="ieee")
                    total = tl.dot(odd_RV, tl.trans(odd_NV), total, input_precision="ieee")
            absmax_N, block_N = absmax_ahead_N, ahead_N
        bytes_NV += UNROLL * V
        x_RV += UNROLL * V

    if WEIGHTS_FIRST:
        total = tl.trans(total)
    if u_ptr is not None:  # noqa: SIM102 (known when it is compiled; what follows is not)
        if part == 0:
            q_Q = tl.arange(0, BLOCK_Q)
            mask_Q = (q_Q < Q)[None, :]
            u_RQ = tl.load(u_ptr + (from_R * Q)[:, None] + q_Q[None, :], mask=mask_Q, other=0.0)
            b_NQ = tl.load(b_ptr + expert * N * Q + from_N[:, None] * Q + q_Q[None, :], mask=mask_Q, other=0.0)
            total = tl.dot(u_RQ.to(dtype), tl.trans(b_NQ.to(dtype)), total, input_precision="ieee")
    at_RN = (part.to(tl.int64) * num_rows + row_R)[:, None] * N + n_N[None, :]
    mask_RN = (row_R < end_row)[:, None] & (n_N < N)[None, :]
    tl.store(y_ptr + at_RN, total.to(y_ptr.dtype.element_ty), mask=mask_RN)


@triton.jit(do_not_specialize=["num_rows"])
def dx_kernel(
    dy_ptr, packed_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code2_ptr, code_ptr, ends_ptr, du_ptr, a_ptr, dx_ptr,
    num_rows,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    SPLIT: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """dx (SPLIT, R, K), of SPLIT parts of N each.

    Grid: tiles of rows, tiles of K, parts. WEIGHTS_FIRST: the product is transposed, so that of a matrix instruction's
    two sizes the larger, which is at least 64 on Hopper, is of columns and not of rows.
    """
    H: tl.constexpr = K // 2
    V: tl.constexpr = BLOCK_K_ // 2
    BLOCK_H: tl.constexpr = BLOCK_C * V
    BLOCKS_ROW: tl.constexpr = K // BLOCK_K_
    STEPS: tl.constexpr = (N + BLOCK_N * SPLIT - 1) // (BLOCK_N * SPLIT)
    IS_EVEN: tl.constexpr = N % (BLOCK_N * SPLIT) == 0
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    expert, first_row, end_row = _tile(tl.program_id(0), ends_ptr, E, BLOCK_E, BLOCK_R)
    if first_row >= end_row:
        return
    part = tl.program_id(2)
    expert = expert.to(tl.int64)
    row_R = first_row + tl.arange(0, BLOCK_R)
    from_R = tl.minimum(row_R, num_rows - 1).to(tl.int64)
    c_C = tl.minimum(tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), BLOCKS_ROW - 1)
    byte_CV = c_C[:, None] * V + tl.arange(0, V)[None, :]
    n_N = part * (STEPS * BLOCK_N) + tl.arange(0, BLOCK_N)

    packed_ptr += expert * N * H
    absmax_ptr += expert * ((N * K + BLOCK - 1) // BLOCK)
    offset = 0.0
    if absmax2_ptr is not None:
        absmax2_ptr += expert * (((N * K + BLOCK - 1) // BLOCK + 255) // 256)
        offset = tl.load(offset_ptr + expert)
    tables = tables_of(code_ptr) if USE_ASM else (0, 0, 0, 0)
    block_NC = (tl.minimum(n_N, N - 1)[:, None] * BLOCKS_ROW + c_C[None, :]) // (BLOCK // BLOCK_K_)
    absmax_NC = tl.load(absmax_ptr + block_NC)
    if WEIGHTS_FIRST:
        even = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
        odd = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    else:
        even = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        odd = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for _ in range(STEPS):
        from_N = tl.minimum(n_N, N - 1)
        ahead_N = tl.minimum(n_N + BLOCK_N, N - 1)
        ahead_NC = (ahead_N[:, None] * BLOCKS_ROW + c_C[None, :]) // (BLOCK // BLOCK_K_)
        absmax_ahead_NC = tl.load(absmax_ptr + ahead_NC)
        scale_NC = _scale(absmax_NC, block_NC, absmax2_ptr, offset, code2_ptr)
        tile_NCV = tl.load(packed_ptr + from_N[:, None, None] * H + byte_CV[None, :, :])
        if IS_EVEN:
            dy_RN = tl.load(dy_ptr + (from_R * N)[:, None] + n_N[None, :])
        else:
            dy_RN = tl.load(dy_ptr + (from_R * N)[:, None] + n_N[None, :], mask=n_N[None, :] < N, other=0.0)
        even_NCV, odd_NCV = decode_scaled(tile_NCV, scale_NC[:, :, None], code_ptr, tables, dtype, USE_ASM)
        even_NH = tl.reshape(even_NCV, (BLOCK_N, BLOCK_H))
        odd_NH = tl.reshape(odd_NCV, (BLOCK_N, BLOCK_H))
        if WEIGHTS_FIRST:
            dy_NR = tl.trans(dy_RN)
            even = tl.dot(tl.trans(even_NH), dy_NR, even, input_precision="ieee")
            odd = tl.dot(tl.trans(odd_NH), dy_NR, odd, input_precision="ieee")
        else:
            even = tl.dot(dy_RN, even_NH, even, input_precision="ieee")
            odd = tl.dot(dy_RN, odd_NH, odd, input_precision="ieee")
        absmax_NC, block_NC = absmax_ahead_NC, ahead_NC
        n_N += BLOCK_N

    if WEIGHTS_FIRST:
        even = tl.trans(even)
        odd = tl.trans(odd)
    dx_RK = tl.reshape(tl.join(even, odd), (BLOCK_R, 2 * BLOCK_H))
    k_K = tl.program_id(1) * (2 * BLOCK_H) + tl.arange(0, 2 * BLOCK_H)
    if du_ptr is not None:  # noqa: SIM102
        if part == 0:
            q_Q = tl.arange(0, BLOCK_Q)
            du_RQ = tl.load(du_ptr + (from_R * Q)[:, None] + q_Q[None, :], mask=q_Q[None, :] < Q, other=0.0)
            mask_QK = (q_Q < Q)[:, None] & (k_K < K)[None, :]
            a_QK = tl.load(a_ptr + expert * Q * K + q_Q[:, None] * K + k_K[None, :], mask=mask_QK, other=0.0)
            dx_RK = tl.dot(du_RQ.to(dtype), a_QK.to(dtype), dx_RK, input_precision="ieee")
    at_RK = (part.to(tl.int64) * num_rows + row_R)[:, None] * K + k_K[None, :]
    mask_RK = (row_R < end_row)[:, None] & (k_K < K)[None, :]
    tl.store(dx_ptr + at_RK, dx_RK.to(dx_ptr.dtype.element_ty), mask=mask_RK)


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code2_ptr, code_ptr, w_ptr,
    NUMBERS: tl.constexpr, K: tl.constexpr, EXPERT: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_B: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """w (E, N, K), experts and rows EXPERT and ROW values apart, of packed (E, NUMBERS / 2), NUMBERS = N * K. Grid:
    tiles of BLOCK_B blocks of 32 bytes, experts.

    USE_ASM: w is bf16, and w_ptr points to its pairs, as int32. To be compiled without fusing multiplications and
    additions: bitsandbytes rounds after each.
    """
    V: tl.constexpr = BLOCK_K_ // 2
    BLOCKS: tl.constexpr = (NUMBERS + BLOCK - 1) // BLOCK
    expert = tl.program_id(1).to(tl.int64)
    b_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    from_B = tl.minimum(b_B, NUMBERS // BLOCK_K_ - 1)
    mask_B = b_B < NUMBERS // BLOCK_K_
    block_B = from_B // (BLOCK // BLOCK_K_)
    offset = 0.0
    if absmax2_ptr is not None:
        absmax2_ptr += expert * ((BLOCKS + 255) // 256)
        offset = tl.load(offset_ptr + expert)
    byte_BV = from_B[:, None] * V + tl.arange(0, V)[None, :]
    tile_BV = tl.load(packed_ptr + expert * (NUMBERS // 2) + byte_BV)
    absmax_B = tl.load(absmax_ptr + expert * BLOCKS + block_B)
    scale_B = _scale(absmax_B, block_B, absmax2_ptr, offset, code2_ptr)
    BLOCKS_ROW: tl.constexpr = K // BLOCK_K_
    at_B = (from_B // BLOCKS_ROW).to(tl.int64) * ROW + (from_B % BLOCKS_ROW) * BLOCK_K_ + expert * EXPERT
    if USE_ASM:
        pair_BV = decode_in_order(tile_BV, scaled_tables(scale_B, code_ptr))
        tl.store(w_ptr + (at_B // 2)[:, None] + tl.arange(0, V)[None, :], pair_BV, mask=mask_B[:, None])
    else:
        even_BV = tl.load(code_ptr + (tile_BV >> 4)) * scale_B[:, None]
        odd_BV = tl.load(code_ptr + (tile_BV & 15)) * scale_B[:, None]
        w_BK = tl.reshape(tl.join(even_BV, odd_BV), (BLOCK_B, BLOCK_K_))
        at_BK = at_B[:, None] + tl.arange(0, BLOCK_K_)[None, :]
        tl.store(w_ptr + at_BK, w_BK.to(w_ptr.dtype.element_ty), mask=mask_B[:, None])


@triton.jit
def scales_kernel(
    absmax_ptr, absmax2_ptr, offset_ptr, code2_ptr, scale_ptr, S: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """scale (E, S). Grid: tiles of S, experts. To be compiled as dequantize_kernel."""
    expert = tl.program_id(1).to(tl.int64)
    s_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_S = s_S < S
    absmax_S = tl.load(absmax_ptr + expert * S + s_S, mask=mask_S, other=0)
    absmax2_ptr += expert * ((S + 255) // 256)
    from_S = tl.minimum(s_S, S - 1)
    scale_S = _scale(absmax_S, from_S, absmax2_ptr, tl.load(offset_ptr + expert), code2_ptr)
    tl.store(scale_ptr + expert * S + s_S, scale_S, mask=mask_S)
