"""The Triton kernels of the selective scan: no build, no atomics, fp32 inside.

A program is one warp. It takes BLOCK_E channels of one sequence and walks over time in tiles of T = 8 K steps. A thread
holds blocks of eight steps in registers, where the recurrence is plain multiply-adds; the K blocks of a tile lie in
different threads and are joined by a scan over K. The N states of a channel are taken one after another.
sums_kernel alone is of another kind: it adds up what programs of backward leave in memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# ruff: noqa: RUF005
# (Triton knows its values' types itself, and its tuples grow by + alone.)

# E channels, B sequences, L time steps, N states per channel, W threads.
# Of a program: E channels at a time, R of them in different threads, T steps of a tile, K blocks of a tile.
# "Steps" are a tuple of eight tensors EK.

import triton
import triton.language as tl

from tunescope.kernels.selective_scan_parts import (
    LOG2_E,
    are_channels,
    chain,
    column_sums,
    decays,
    delta_until_end,
    end_of_gradients,
    first_sum,
    load,
    shared_steps,
    sigmoid,
    softplus,
    states_of,
    steps_of,
    store,
    sum_of_steps,
    sums_over_channels,
    tile_of,
)

# Numbers that differ between calls. Triton would compile anew for each that is, or is not, divisible by 16.
_FORWARD_NUMBERS = [
    "c_stride_e", "c_stride_b", "delta_stride_e", "delta_stride_b", "z_stride_e", "z_stride_b",
    "B_stride_n", "B_stride_b", "C_stride_n", "C_stride_b", "num_channels", "length_units",
]  # fmt: skip
_BACKWARD_NUMBERS = [*_FORWARD_NUMBERS, "dy_stride_e", "dy_stride_b"]
_TILE_NUMBERS = [
    "delta_stride_e", "delta_stride_b", "x_stride_e", "x_stride_b", "z_stride_e", "z_stride_b",
    "B_stride_n", "B_stride_b", "num_channels", "length_units",
]  # fmt: skip


@triton.jit(do_not_specialize=_FORWARD_NUMBERS)
def forward_kernel(
    c_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, states_ptr,
    c_stride_e, c_stride_b, delta_stride_e, delta_stride_b, z_stride_e, z_stride_b,
    B_stride_n, B_stride_b, C_stride_n, C_stride_b, num_channels, length_units,
    N: tl.constexpr, BLOCK_E: tl.constexpr, T: tl.constexpr, R: tl.constexpr, SAVE: tl.constexpr, UNIT: tl.constexpr,
    EVEN_E: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """y (E, B, L), and the states after every SAVE steps: (B, S, N, E), the last step's not among them.

    With IS_SPLIT the states are there already, SAVE is T, and a program has one tile; else it has all, and T is SAVE
    or a multiple of it. Strides and length are counted in units of UNIT. EVEN_E: the last program has no channel too
    many. Grid: blocks of channels, B, runs of tiles.
    """
    length = length_units * UNIT
    b = tl.program_id(1).to(tl.int64)
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_E = are_channels(e_E, num_channels, EVEN_E)
    row_E1 = e_E.to(tl.int64)[:, None]
    bias_E1 = load(bias_ptr, e_E, in_E)[:, None]
    B_ptr += b * (B_stride_b * UNIT)
    C_ptr += b * (C_stride_b * UNIT)
    states_ptr += b * (tl.cdiv(length, SAVE) - 1) * (N * num_channels)

    tile = tl.program_id(2)  # the first of all, or the only one
    end_tile = tile + 1 if IS_SPLIT else tl.cdiv(length, T)
    while tile < end_tile:  # not a range: Triton's interpreter cannot take a bound from a tensor
        tl.debug_barrier()  # other threads read the states of the tile before than wrote them
        t0 = tile * T
        t_ET = t0 + tl.broadcast_to(tl.arange(0, T)[None, :], (BLOCK_E, T))
        t_RT = t0 + tl.broadcast_to(tl.arange(0, T)[None, :], (R, T))
        in_ET = in_E[:, None] & (t_ET < length)
        c_ET = load(c_ptr, row_E1 * (c_stride_e * UNIT) + b * (c_stride_b * UNIT) + t_ET, in_ET)
        # Beyond the end c is 0, and so is dy in backward: states decay there, or not, for nobody.
        v_ET = load(delta_ptr, row_E1 * (delta_stride_e * UNIT) + b * (delta_stride_b * UNIT) + t_ET, in_ET)
        delta_ET = softplus(v_ET + bias_E1)
        delta = steps_of(delta_ET)
        delta_c = steps_of(delta_ET * c_ET)
        block_delta_EK = sum_of_steps(delta)
        D_E1 = load(D_ptr, e_E, in_E)[:, None] if HAS_D else tl.zeros([BLOCK_E, 1], tl.float32)
        o = steps_of(c_ET * D_E1)
        after_EK = t0 + 8 + 8 * tl.broadcast_to(tl.arange(0, T // 8)[None, :], block_delta_EK.shape)
        saved_EK = in_E[:, None] & (after_EK % SAVE == 0) & (after_EK < length)
        saved_at_EK = (after_EK // SAVE - 1) * (N * num_channels) + e_E[:, None]
        start_ptr = states_ptr + (t0 // SAVE - 1) * (N * num_channels)

        # One state ahead: with three warps to an issue slot, nothing else covers the way to the L2 cache.
        next_B_RT = tl.load(B_ptr + t_RT, t_RT < length, 0.0)
        next_C_RT = tl.load(C_ptr + t_RT, t_RT < length, 0.0)
        next_A_E = load(A_ptr, e_E * N, in_E)
        next_start_E = load(start_ptr, e_E, in_E & (t0 > 0))
        for n in range(N):
            B = shared_steps(next_B_RT, BLOCK_E)
            C = shared_steps(next_C_RT, BLOCK_E)
            rate_E1 = next_A_E[:, None] * LOG2_E
            start_E = next_start_E
            following = tl.minimum(n + 1, N - 1)  # a mask would cost more than the last one's loading twice
            next_B_RT = tl.load(B_ptr + following * (B_stride_n * UNIT) + t_RT, t_RT < length, 0.0)
            next_C_RT = tl.load(C_ptr + following * (C_stride_n * UNIT) + t_RT, t_RT < length, 0.0)
            next_A_E = load(A_ptr, e_E * N + following, in_E)
            next_start_E = load(start_ptr + following * num_channels, e_E, in_E & (t0 > 0))
            _, states, after_block_EK = states_of(delta, delta_c, block_delta_EK, rate_E1, B, start_E)
            if not IS_SPLIT:
                store(states_ptr + n * num_channels, saved_at_EK, after_block_EK, saved_EK)
            o_before = o
            o = ()
            for j in tl.static_range(8):
                o = o + (o_before[j] + C[j] * states[j + 1],)

        y_ET = tile_of(o)
        if HAS_Z:
            z_ET = load(z_ptr, row_E1 * (z_stride_e * UNIT) + b * (z_stride_b * UNIT) + t_ET, in_ET)
            y_ET *= z_ET * sigmoid(z_ET)
        store(y_ptr, row_E1 * (length * tl.num_programs(1)) + b * length + t_ET, y_ET, in_ET)
        tile += 1


@triton.jit(do_not_specialize=_BACKWARD_NUMBERS)
def backward_kernel(
    c_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, dy_ptr, states_ptr, carries_ptr,
    dc_ptr, ddelta_ptr, dz_ptr, dBC_ptr, per_channel_ptr,
    c_stride_e, c_stride_b, delta_stride_e, delta_stride_b, z_stride_e, z_stride_b, dy_stride_e, dy_stride_b,
    B_stride_n, B_stride_b, C_stride_n, C_stride_b, num_channels, length_units,
    N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    UNIT: tl.constexpr, EVEN_E: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients, from a program's last tile to its first.

    carries: (B, tiles - 1, N, E), the gradient that reaches the last state of each tile from the tile after it. With
    IS_SPLIT they are there already, and a program has one tile; else it has all, and each leaves its predecessor's.
    dBC: (blocks of channels, 2, N, B, L), gradients of B and of C from these channels.
    per_channel: (B, runs of tiles, N + 2, E), gradients of A, of the bias and of D from this run.
    Grid: blocks of BLOCKS * BLOCK_E channels, B, runs of tiles. The rest is as in forward_kernel.
    """
    length = length_units * UNIT
    batch = tl.num_programs(1)
    b = tl.program_id(1).to(tl.int64)
    num_tiles = tl.cdiv(length, T)
    first_tile = tl.program_id(2)  # of all, or the only one
    last_tile = first_tile if IS_SPLIT else num_tiles - 1
    B_ptr += b * (B_stride_b * UNIT)
    C_ptr += b * (C_stride_b * UNIT)
    states_ptr += b * (num_tiles - 1) * (N * num_channels)
    carries_ptr += b * (num_tiles - 1) * (N * num_channels)
    dBC_ptr += (tl.program_id(0).to(tl.int64) * (2 * N) * batch + b) * length
    per_channel_ptr += (b * tl.num_programs(2) + tl.program_id(2)) * (N + 2) * num_channels

    for block in range(BLOCKS):
        e_E = (tl.program_id(0) * BLOCKS + block) * BLOCK_E + tl.arange(0, BLOCK_E)
        in_E = are_channels(e_E, num_channels, EVEN_E)
        row_E1 = e_E.to(tl.int64)[:, None]
        bias_E1 = load(bias_ptr, e_E, in_E)[:, None]
        D_E1 = load(D_ptr, e_E, in_E)[:, None] if HAS_D else tl.zeros([BLOCK_E, 1], tl.float32)
        dbias_E = tl.zeros([BLOCK_E], tl.float32)
        dD_E = tl.zeros([BLOCK_E], tl.float32)

        tile = last_tile
        while tile >= first_tile:
            tl.debug_barrier()  # other threads read what the tile before has written than wrote it
            t0 = tile * T
            t_ET = t0 + tl.broadcast_to(tl.arange(0, T)[None, :], (BLOCK_E, T))
            t_RT = t0 + tl.broadcast_to(tl.arange(0, T)[None, :], (R, T))
            in_ET = in_E[:, None] & (t_ET < length)
            c_at_ET = row_E1 * (c_stride_e * UNIT) + b * (c_stride_b * UNIT) + t_ET
            delta_at_ET = row_E1 * (delta_stride_e * UNIT) + b * (delta_stride_b * UNIT) + t_ET
            z_at_ET = row_E1 * (z_stride_e * UNIT) + b * (z_stride_b * UNIT) + t_ET
            dy_at_ET = row_E1 * (dy_stride_e * UNIT) + b * (dy_stride_b * UNIT) + t_ET
            out_at_ET = row_E1 * (length * batch) + b * length + t_ET
            c_ET = load(c_ptr, c_at_ET, in_ET)
            delta_ET = softplus(load(delta_ptr, delta_at_ET, in_ET) + bias_E1)
            do_ET = load(dy_ptr, dy_at_ET, in_ET)
            if HAS_Z:
                z_ET = load(z_ptr, z_at_ET, in_ET)
                do_ET *= z_ET * sigmoid(z_ET)
            delta = steps_of(delta_ET)
            delta_c = steps_of(delta_ET * c_ET)
            do = steps_of(do_ET)
            o = steps_of(c_ET * D_E1)
            block_delta_EK = sum_of_steps(delta)
            zero_EK = tl.zeros_like(block_delta_EK)
            d_input = (zero_EK,) * 8  # of delta * c
            d_delta = d_input  # by way of the decay
            e_EK = tl.broadcast_to(e_E[:, None], zero_EK.shape)
            k_EK = tl.broadcast_to(tl.arange(0, T // 8)[None, :], zero_EK.shape)
            start_ptr = states_ptr + (tile - 1) * (N * num_channels)
            carry_ptr = carries_ptr + tile * (N * num_channels)

            # Threads with an odd row have sums for C, the others for B.
            row_W = tl.arange(0, R * T // 8) // (T // 8)
            step_W = first_sum(row_W & ~1, R)
            t_WI = (t0 + tl.arange(0, R * T // 8) % (T // 8) * 8 + step_W)[:, None] + tl.arange(0, 16 // R)[None, :]
            dBC_at_WI = ((row_W & 1) * (N * batch * length))[:, None] + t_WI

            # One state ahead: they come from DRAM, and are wanted early.
            next_start_E = load(start_ptr, e_E, in_E & (tile > 0))
            for n in range(N):
                start_E = next_start_E
                next_start_E = load(start_ptr + (n + 1) * num_channels, e_E, in_E & (tile > 0) & (n + 1 < N))
                B_RT = tl.load(B_ptr + n * (B_stride_n * UNIT) + t_RT, t_RT < length, 0.0)
                B = shared_steps(B_RT, BLOCK_E)
                C_RT = tl.load(C_ptr + n * (C_stride_n * UNIT) + t_RT, t_RT < length, 0.0)
                C = shared_steps(C_RT, BLOCK_E)
                A_E1 = load(A_ptr, e_E * N + n, in_E)[:, None]
                carry_E = load(carry_ptr + n * num_channels, e_E, in_E & (tile < num_tiles - 1))
                dA_E = load(per_channel_ptr + n * num_channels, e_E, in_E & (tile < last_tile))
                decay, states, _ = states_of(delta, delta_c, block_delta_EK, A_E1 * LOG2_E, B, start_E)

                # g, the gradient of a state: of what it gives out, and back, what reaches it from the state after it.
                end_EK = end_of_gradients(decay, C, do)
                back_EK, carry_EK = chain(tl.exp2(block_delta_EK * (A_E1 * LOG2_E)), end_EK, carry_E, REVERSE=True)
                if not IS_SPLIT:
                    is_carry_EK = in_E[:, None] & (k_EK == 0) & (tile > 0)
                    store(carry_ptr + (n - N) * num_channels, e_EK, carry_EK, is_carry_EK)
                dBC_n_ptr = dBC_ptr + n * batch * length
                if BLOCKS > 1:
                    dBC_WI = load(dBC_n_ptr, dBC_at_WI, (t_WI < length) & (block > 0))
                dA_EK = zero_EK
                o_before = o
                d_input_before = d_input
                d_delta_before = d_delta
                o = ()
                d_input = ()
                d_delta = ()
                dB = ()
                dC = ()
                for j in tl.static_range(7, -1, -1):
                    g_EK = C[j] * do[j] + back_EK
                    back_EK = decay[j] * g_EK
                    d_exponent_EK = back_EK * states[j]
                    dA_EK += d_exponent_EK * delta[j]
                    o = (o_before[j] + C[j] * states[j + 1],) + o
                    d_delta = (d_delta_before[j] + d_exponent_EK * A_E1,) + d_delta
                    d_input = (d_input_before[j] + g_EK * B[j],) + d_input
                    dB = (g_EK * delta_c[j],) + dB
                    dC = (do[j] * states[j + 1],) + dC
                store(per_channel_ptr + n * num_channels, e_E, dA_E + tl.sum(dA_EK, axis=1), in_E)
                sums_WI = sums_over_channels(dB + dC, R)
                if BLOCKS > 1:
                    sums_WI += dBC_WI
                store(dBC_n_ptr, dBC_at_WI, sums_WI, t_WI < length)

            # Loaded again: kept, they would cost the loop over states its registers.
            c_ET = load(c_ptr, c_at_ET, in_ET)
            v_ET = load(delta_ptr, delta_at_ET, in_ET) + bias_E1
            do_ET = tile_of(do)
            if HAS_Z:
                z_ET = load(z_ptr, z_at_ET, in_ET)
                gate_ET = sigmoid(z_ET)
                dz_ET = load(dy_ptr, dy_at_ET, in_ET) * tile_of(o) * gate_ET * (1 + z_ET * (1 - gate_ET))
                store(dz_ptr, out_at_ET, dz_ET, in_ET)
            d_input_ET = tile_of(d_input)
            store(dc_ptr, out_at_ET, tile_of(delta) * d_input_ET + D_E1 * do_ET, in_ET)
            ddelta_ET = (c_ET * d_input_ET + tile_of(d_delta)) * sigmoid(v_ET)
            store(ddelta_ptr, out_at_ET, ddelta_ET, in_ET)
            dbias_E += tl.sum(ddelta_ET, axis=1)
            dD_E += tl.sum(do_ET * c_ET, axis=1)
            tile -= 1

        store(per_channel_ptr, N * num_channels + e_E, dbias_E, in_E)
        store(per_channel_ptr, (N + 1) * num_channels + e_E, dD_E, in_E)


@triton.jit(do_not_specialize=_TILE_NUMBERS)
def tile_ends_kernel(
    delta_ptr, A_ptr, B_ptr, x_ptr, z_ptr, bias_ptr, ends_ptr, tile_delta_ptr,
    delta_stride_e, delta_stride_b, x_stride_e, x_stride_b, z_stride_e, z_stride_b, B_stride_n, B_stride_b,
    num_channels, length_units,
    N: tl.constexpr, BLOCK_E: tl.constexpr, T: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    EVEN_E: tl.constexpr, HAS_Z: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each tile alone passes on to the tile after it: (B, tiles - 1, N, E). Its last state, if x is c.

    REVERSE: x is dy, and B is C; to the tile before it, the gradient of that one's last state.
    tile_delta: (B, tiles - 1, E), the sum of Δ over each of these tiles. Grid: blocks of channels, B, tiles - 1.
    """
    length = length_units * UNIT
    b = tl.program_id(1).to(tl.int64)
    slot = b * tl.num_programs(2) + tl.program_id(2)
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_E = are_channels(e_E, num_channels, EVEN_E)
    row_E1 = e_E.to(tl.int64)[:, None]
    t0 = (tl.program_id(2) + REVERSE) * T
    t_ET = t0 + tl.broadcast_to(tl.arange(0, T)[None, :], (BLOCK_E, T))
    t_RT = t0 + tl.broadcast_to(tl.arange(0, T)[None, :], (R, T))
    in_ET = in_E[:, None] & (t_ET < length)
    v_ET = load(delta_ptr, row_E1 * (delta_stride_e * UNIT) + b * (delta_stride_b * UNIT) + t_ET, in_ET)
    delta_ET = softplus(v_ET + load(bias_ptr, e_E, in_E)[:, None])
    x_ET = load(x_ptr, row_E1 * (x_stride_e * UNIT) + b * (x_stride_b * UNIT) + t_ET, in_ET)
    if REVERSE:
        if HAS_Z:
            z_ET = load(z_ptr, row_E1 * (z_stride_e * UNIT) + b * (z_stride_b * UNIT) + t_ET, in_ET)
            x_ET *= z_ET * sigmoid(z_ET)
    else:
        x_ET *= delta_ET
    delta = steps_of(delta_ET)
    x = steps_of(x_ET)
    # Exponents of their own for all steps, rather than steps from one to the next: then no step waits for another.
    until_end, block_delta_EK = delta_until_end(delta, REVERSE)
    store(tile_delta_ptr, slot * num_channels + e_E, tl.sum(block_delta_EK, axis=1), in_E)
    B_ptr += b * (B_stride_b * UNIT)
    ends_ptr += slot * (N * num_channels)
    for n in range(N):
        B = shared_steps(tl.load(B_ptr + n * (B_stride_n * UNIT) + t_RT, t_RT < length, 0.0), BLOCK_E)
        rate_E1 = load(A_ptr, e_E * N + n, in_E)[:, None] * LOG2_E
        decay = decays(until_end, rate_E1)
        end_EK = decay[0] * (B[0] * x[0])
        for j in tl.static_range(1, 8):
            end_EK += decay[j] * (B[j] * x[j])
        store(ends_ptr + n * num_channels, e_E, tl.sum(end_EK, axis=1), in_E)


@triton.jit(do_not_specialize=["num_channels", "num_ends"])
def carries_kernel(
    A_ptr, ends_ptr, tile_delta_ptr, num_channels, num_ends,
    N: tl.constexpr, BLOCK_E: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Adds to what each tile alone passes on what it passes on of what reached it. Grid: channels, B, N."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2)
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_E = e_E < num_channels
    rate_E = load(A_ptr, e_E * N + n, in_E) * LOG2_E
    carry_E = tl.zeros([BLOCK_E], tl.float32)
    i = 0
    while i < num_ends:
        own = ()
        decay = ()
        for j in tl.static_range(8):  # all on their way at once
            slot = b * num_ends + (num_ends - 1 - i - j if REVERSE else i + j)
            is_end_E = in_E & (i + j < num_ends)
            own = own + (load(ends_ptr + (slot * N + n) * num_channels, e_E, is_end_E),)
            decay = decay + (tl.exp2(load(tile_delta_ptr + slot * num_channels, e_E, is_end_E) * rate_E),)
        for j in tl.static_range(8):
            slot = b * num_ends + (num_ends - 1 - i - j if REVERSE else i + j)
            carry_E = own[j] + decay[j] * carry_E
            store(ends_ptr + (slot * N + n) * num_channels, e_E, carry_E, in_E & (i + j < num_ends))
        i += 8


@triton.jit(do_not_specialize=["num_blocks", "num_steps", "num_runs", "num_channels"])
def sums_kernel(
    dBC_ptr, per_channel_ptr, dB_ptr, dC_ptr, dA_ptr, dbias_ptr, dD_ptr,
    num_blocks, num_steps, num_runs, num_channels,
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_A: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C (N, B, L), A (N, E), bias and D (E,) from what backward_kernel's programs have left.

    num_steps: B * L. HAS_A: not where there is one run, which has left the gradient of A as it is.
    Grid: blocks of COLUMNS columns of dBC (num_blocks, 2, N, B, L), then of those of per_channel (num_runs, N + 2, E)
    that are wanted.
    """
    num_shared = N * num_steps
    programs_shared = tl.cdiv(2 * num_shared, COLUMNS)
    if tl.program_id(0) < programs_shared:
        at_I = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        sums_I = column_sums(dBC_ptr, num_blocks, 2 * num_shared, at_I, ROWS)
        store(dB_ptr, at_I, sums_I, at_I < num_shared)
        store(dC_ptr, at_I - num_shared, sums_I, (at_I >= num_shared) & (at_I < 2 * num_shared))
    else:
        of_A = N * num_channels
        at_I = (tl.program_id(0) - programs_shared) * COLUMNS + tl.arange(0, COLUMNS) + (0 if HAS_A else of_A)
        sums_I = column_sums(per_channel_ptr, num_runs, of_A + 2 * num_channels, at_I, ROWS)
        if HAS_A:
            store(dA_ptr, at_I, sums_I, at_I < of_A)
        store(dbias_ptr, at_I - of_A, sums_I, (at_I >= of_A) & (at_I < of_A + num_channels))
        if HAS_D:
            is_D_I = (at_I >= of_A + num_channels) & (at_I < of_A + 2 * num_channels)
            store(dD_ptr, at_I - of_A - num_channels, sums_I, is_D_I)
