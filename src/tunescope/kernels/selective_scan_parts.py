"""What the Triton kernels of the selective scan are made of: eight steps in a thread, and scans over threads."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# ruff: noqa: RUF005
# (Triton knows its values' types itself, and its tuples grow by + alone.)

# Of a program: E channels at a time, R of them in different threads, T steps of a tile, K blocks of a tile.
# "Steps" are a tuple of eight tensors EK.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load(ptr, offset, mask):
    return tl.load(ptr + offset, mask, 0.0).to(tl.float32)


@triton.jit
def store(ptr, offset, value, mask):
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask)


@triton.jit
def are_channels(e_E, num_channels, EVEN_E: tl.constexpr):
    """Where e is a channel. EVEN_E: everywhere, and the compiler may know it."""
    return tl.full(e_E.shape, True, tl.int1) if EVEN_E else e_E < num_channels


@triton.jit
def steps_of(x_ET):
    """A tile to its steps: element k of step j is x[8 k + j]. Nothing moves between threads."""
    x = tl.reshape(x_ET, (x_ET.shape[0], x_ET.shape[1] // 8, 2, 2, 2))
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def tile_of(x):
    """The inverse of steps_of."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (x[0].shape[0], x[0].shape[1] * 8))


@triton.jit
def sum_of_steps(x):
    total = x[0]
    for j in tl.static_range(1, 8):
        total += x[j]
    return total


@triton.jit
def shared_steps(x_RT, BLOCK_E: tl.constexpr):
    """The steps of a row that all channels share. A thread has loaded what it needs itself, once for its channels."""
    R: tl.constexpr = x_RT.shape[0]
    K: tl.constexpr = x_RT.shape[1] // 8
    rows = steps_of(x_RT.to(tl.float32))
    steps = ()
    for j in tl.static_range(8):
        repeated = tl.broadcast_to(rows[j][None, :, :], (BLOCK_E // R, R, K))
        steps = steps + (tl.reshape(repeated, (BLOCK_E, K)),)
    return steps


@triton.jit
def _reciprocal(x):
    """1 / x for x of at least 1. A division's care for extreme values would take six instructions more."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    return _reciprocal(1 + tl.exp2(-LOG2_E * x))


@triton.jit
def softplus(x):
    """Exact to float32 at any x: log(1 + w) = 2 atanh(w / (2 + w)) for w up to 1. Beyond 20 it is x itself."""
    w = tl.exp2(-LOG2_E * tl.abs(x))
    s = w * _reciprocal(2 + w)
    s2 = s * s
    series = s2 * (1 / 15) + 1 / 13
    series = s2 * series + 1 / 11
    series = s2 * series + 1 / 9
    series = s2 * series + 1 / 7
    series = s2 * series + 1 / 5
    series = s2 * series + 1 / 3
    return tl.maximum(x, 0.0) + 2 * s * (s2 * series + 1)


@triton.jit
def chain(decay_EK, end_EK, start_E, REVERSE: tl.constexpr):
    """What enters and what leaves each block, where x entering block k leaves it as decay[k] * x + end[k].

    start enters the first block, or the last where time runs backwards.
    """
    K: tl.constexpr = end_EK.shape[1]
    start_E1 = start_E[:, None]
    k_EK = tl.broadcast_to(tl.arange(0, K)[None, :], end_EK.shape)
    order_EK = K - 1 - k_EK if REVERSE else k_EK
    leave_EK = tl.where(order_EK == 0, decay_EK * start_E1 + end_EK, end_EK)
    for level in tl.static_range(5):
        if (1 << level) < K:
            before_EK = _before(k_EK, 1 << level, REVERSE)
            follows_EK = order_EK >= (1 << level)
            leave_EK = tl.where(follows_EK, decay_EK * tl.gather(leave_EK, before_EK, 1) + leave_EK, leave_EK)
            decay_EK = tl.where(follows_EK, decay_EK * tl.gather(decay_EK, before_EK, 1), decay_EK)
    enter_EK = tl.where(order_EK == 0, start_E1, tl.gather(leave_EK, _before(k_EK, 1, REVERSE), 1))
    return enter_EK, leave_EK


@triton.jit
def _before(k_EK, distance, REVERSE: tl.constexpr):
    """The block this much earlier, or later where time runs backwards; any block where there is none."""
    return tl.minimum(k_EK + distance, k_EK.shape[1] - 1) if REVERSE else tl.maximum(k_EK - distance, 0)


@triton.jit
def decays(delta, rate_E1):
    decay = ()
    for j in tl.static_range(8):
        decay = decay + (tl.exp2(delta[j] * rate_E1),)
    return decay


@triton.jit
def delta_until_end(delta, REVERSE: tl.constexpr):
    """The sum of Δ over the steps after each; REVERSE: over each and those before it. And the sum of each block.

    Summed from the end where it is 0 or small: there the decays are that count.
    """
    block_delta_EK = sum_of_steps(delta)
    nothing_E = tl.zeros([block_delta_EK.shape[0]], tl.float32)
    since_EK, _ = chain(tl.full(block_delta_EK.shape, 1.0, tl.float32), block_delta_EK, nothing_E, not REVERSE)
    until_end = ()
    if REVERSE:
        for j in tl.static_range(8):
            since_EK += delta[j]
            until_end = until_end + (since_EK,)
    else:
        for j in tl.static_range(7, -1, -1):
            until_end = (since_EK,) + until_end
            since_EK += delta[j]
    return until_end, block_delta_EK


@triton.jit
def states_of(delta, delta_c, block_delta_EK, rate_E1, B, start_E):
    """The decay of each step; a state before each step and, ninth, after the last; and what leaves each block."""
    decay = decays(delta, rate_E1)
    end_EK = delta_c[0] * B[0]
    for j in tl.static_range(1, 8):
        end_EK = decay[j] * end_EK + delta_c[j] * B[j]
    state_EK, after_block_EK = chain(tl.exp2(block_delta_EK * rate_E1), end_EK, start_E, REVERSE=False)
    states = (state_EK,)
    for j in tl.static_range(8):
        state_EK = decay[j] * state_EK + delta_c[j] * B[j]
        states = states + (state_EK,)
    return decay, states, after_block_EK


@triton.jit
def end_of_gradients(decay, C, do):
    """What each block passes on to the block before it, if nothing reaches it from the block after it."""
    end_EK = decay[7] * (C[7] * do[7])
    for j in tl.static_range(6, -1, -1):
        end_EK = decay[j] * (C[j] * do[j] + end_EK)
    return end_EK


@triton.jit
def sums_over_channels(x, R: tl.constexpr):
    """Sums over channels of sixteen tensors EK, spread over the R * K threads that held them: (R * K, 16 / R).

    Row r * K + k has, for block k, the sums of the 16 / R tensors from first_sum(r) on. Each exchange halves what a
    thread holds, so that there are a third of the exchanges that sixteen sums would take.
    """
    K: tl.constexpr = x[0].shape[1]
    sums = ()
    for i in tl.static_range(16):
        of_thread_RK = tl.sum(tl.reshape(x[i], (x[i].shape[0] // R, R, K)), axis=0)
        sums = sums + (tl.reshape(of_thread_RK, (R * K,)),)
    thread = tl.arange(0, R * K)
    for level in tl.static_range(4):
        both = sums
        sums = ()
        for i in tl.static_range(8 >> level):
            if (1 << level) < R:
                is_upper = (thread // K & (1 << level)) != 0
                kept = tl.where(is_upper, both[i + (8 >> level)], both[i])
                given = tl.where(is_upper, both[i], both[i + (8 >> level)])
                sums = sums + (kept + tl.gather(given, thread ^ ((1 << level) * K), 0),)
            else:
                sums = sums + (tl.join(both[i], both[i + (8 >> level)]),)
    return tl.reshape(sums[0], (R * K, 16 // R))


@triton.jit
def first_sum(r, R: tl.constexpr):
    """Which of the sixteen is a row's first in sums_over_channels: the bits of r in reverse."""
    first = r & 0
    for level in tl.static_range(4):
        if (1 << level) < R:
            first += (r >> level & 1) * (8 >> level)
    return first


@triton.jit
def column_sums(ptr, num_rows, num_columns, at_I, ROWS: tl.constexpr):
    """Of a matrix in memory, the sums of these columns; 0 beyond the last column. ROWS rows are read at once."""
    row_R1 = tl.arange(0, ROWS)[:, None].to(tl.int64)
    in_1I = (at_I < num_columns)[None, :]
    sums_RI = tl.zeros([ROWS, at_I.shape[0]], tl.float32)
    first = 0
    while first < num_rows:
        sums_RI += load(ptr, (first + row_R1) * num_columns + at_I[None, :], (first + row_R1 < num_rows) & in_1I)
        first += ROWS
    return tl.sum(sums_RI, axis=0)
