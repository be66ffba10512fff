"""The Triton kernels of `hm.ops.fused`. Its docstring has the equations; here is one kernel for each.

Names and shapes, for batch b, query head h, key/value head g = h // R, chunk i of C tokens:

    q (B, L, H, N)   k (B, L, G, N)   v (B, L, G, P)    any strides, but 1 in the last dimension
    delta (B, L, H)  A (H,)                             float32, contiguous, read where HAS_DELTA, HAS_DECAY
    states (B, H, chunks, N, P), norms (B, H, chunks, N)        what enters a chunk
    exits  (B, H, chunks, N, P), exit_norms (B, H, chunks, N)   the gradient of what leaves it
    y, g (B, L, H, P);  den, gz (B, L, H)               g = dy / den, gz = -(dy . y) / den

s and t are tokens of a chunk, s that of a key and t that of a query; n and p are blocks of BN features and BP values.
Products run in the inputs' dtype (float32 not as TF32), sums in float32. Tokens past L read as zeros.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_decay(delta, A, b, h, i, L, H, C: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr):
    """delta (C,), the log decay from the chunk's start through each token (C,), and that of the whole chunk."""
    t = i * C + tl.arange(0, C)
    if HAS_DELTA:
        d = tl.load(delta + (b * L + t) * H + h, mask=t < L, other=0.0)
    else:
        d = tl.where(t < L, 1.0, 0.0)
    rate = tl.load(A + h) if HAS_DECAY else 0.0
    return d, -tl.cumsum(d * rate, 0), -tl.sum(d * rate, 0)


@triton.jit
def causal(log_decay, C: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_DECAY: tl.constexpr):
    """exp(decay from s to t) where s <= t, else 0: (C, C) as [t, s], or as [s, t] if TRANSPOSED."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if TRANSPOSED:
        seen, between = row <= column, log_decay[None, :] - log_decay[:, None]
    else:
        seen, between = row >= column, log_decay[:, None] - log_decay[None, :]
    if HAS_DECAY:
        return tl.exp(tl.where(seen, between, float("-inf")))
    return tl.where(seen, 1.0, 0.0)


@triton.jit
def tile(base, row, column, row_stride, column_stride, rows, columns):
    """The tile of a matrix at rows x columns, zeros outside of it."""
    return tl.load(base + row[:, None] * row_stride + column[None, :] * column_stride,
                   mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)  # fmt: skip


@triton.jit
def times_vector(base, vector, row, row_stride, rows, N, C: tl.constexpr, BN: tl.constexpr):
    """Rows of a matrix times a float32 vector: (C,).

    In a loop of its own: Triton 3.6 overwrites, now and then, a tile that a pipelined loop uses in a matrix product
    and outside of one (seen on Hopper: other results from run to run).
    """
    total = tl.zeros((C,), tl.float32)
    for first in tl.range(0, N, BN, num_stages=1):
        n = first + tl.arange(0, BN)
        total += tl.sum(tile(base, row, n, row_stride, 1, rows, N) * tl.load(vector + n, mask=n < N, other=0.0)[None, :], 1)
    return total


@triton.jit
def states_kernel(
    k, v, delta, A, initial, states, norms, last, L, H, R, N, P, chunks, k_b, k_l, k_g, v_b, v_l, v_g,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORM: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """h <- exp(decay) h + sum_s exp(decay from s) delta_s k_s v_s^T, chunk after chunk; z alike with ones for v."""
    i_p, i_n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    n, p = i_n * BN + tl.arange(0, BN), i_p * BP + tl.arange(0, BP)
    k += b * k_b + h // R * k_g
    v += b * v_b + h // R * v_g
    width = P + 1 if NORM else P
    state, z = tl.zeros((BN, BP), tl.float32), tl.zeros((BN,), tl.float32)
    if HAS_INITIAL:
        state = tile(initial + bh * N * width, n, p, width, 1, N, P)
        if NORM:
            z = tl.load(initial + bh * N * width + n * width + P, mask=n < N, other=0.0)
    inside = (n < N)[:, None] & (p < P)[None, :]
    for i in range(chunks):
        at = bh * chunks + i
        tl.store(states + at * N * P + n[:, None] * P + p[None, :], state.to(states.dtype.element_ty), mask=inside)
        if NORM and i_p == 0:
            tl.store(norms + at * N + n, z, mask=n < N)
        s = i * C + tl.arange(0, C)
        d, log_decay, whole = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
        weight = d * tl.exp(whole - log_decay)
        k_T, v_s = tile(k, n, s, 1, k_l, N, L), tile(v, s, p, v_l, 1, L, P)
        weighted = (v_s * weight[:, None]).to(v_s.dtype)
        state = tl.dot(k_T, weighted, state * tl.exp(whole), input_precision="ieee")
        if NORM:
            z = z * tl.exp(whole) + tl.sum(k_T * weight[None, :], 1)
    if HAS_LAST:
        tl.store(last + bh * N * width + n[:, None] * width + p[None, :], state, mask=inside)
        if NORM and i_p == 0:
            tl.store(last + bh * N * width + n * width + P, z, mask=n < N)


@triton.jit
def output_kernel(
    q, k, v, delta, A, states, norms, y, den, L, H, R, N, P, chunks, q_b, q_l, q_h, k_b, k_l, k_g, v_b, v_l, v_g,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """y_t = (exp(decay to t) q_t . h + sum_{s<=t} exp(decay from s to t) delta_s (q_t . k_s) v_s) / the same of z, 1."""
    i_p, i, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    t, p, at = i * C + tl.arange(0, C), i_p * BP + tl.arange(0, BP), bh * chunks + i
    q += b * q_b + h * q_h
    k += b * k_b + h // R * k_g
    v += b * v_b + h // R * v_g
    scores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, BP), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        q_t = tile(q, t, n, q_l, 1, L, N)
        scores = tl.dot(q_t, tile(k, n, t, 1, k_l, N, L), scores, input_precision="ieee")
        out = tl.dot(q_t, tile(states + at * N * P, n, p, P, 1, N, P), out, input_precision="ieee")
    if NORM:
        below = times_vector(q, norms + at * N, t, q_l, L, N, C, BN)
    d, log_decay, _ = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
    scores *= causal(log_decay, C, False, HAS_DECAY) * d[None, :]
    v_s = tile(v, t, p, v_l, 1, L, P)
    out = tl.dot(scores.to(v_s.dtype), v_s, out * tl.exp(log_decay)[:, None], input_precision="ieee")
    if NORM:
        below = tl.maximum(below * tl.exp(log_decay) + tl.sum(scores, 1), 1e-20)
        out = out / below[:, None]
        if i_p == 0:
            tl.store(den + (b * L + t) * H + h, below, mask=t < L)
    row = y + ((b * L + t) * H + h)[:, None] * P + p[None, :]
    tl.store(row, out.to(y.dtype.element_ty), mask=(t < L)[:, None] & (p < P)[None, :])


@triton.jit
def scale_kernel(
    dy, y, den, g, gz, L, H, P, dy_b, dy_l, dy_h, C: tl.constexpr, BP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """g = dy / den and gz = -(dy . y) / den, the gradients of numerator and denominator. Not NORM: dy and -(dy . y)."""
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    t, p = i * C + tl.arange(0, C), tl.arange(0, BP)
    given = tile(dy + b * dy_b + h * dy_h, t, p, dy_l, 1, L, P).to(tl.float32)
    at, inside = (b * L + t) * H + h, (t < L)[:, None] & (p < P)[None, :]
    found = tl.load(y + at[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    along = -tl.sum(given * found, 1)
    if NORM:
        below = tl.load(den + at, mask=t < L, other=1.0)
        along, given = along / below, given / below[:, None]
    tl.store(g + at[:, None] * P + p[None, :], given.to(g.dtype.element_ty), mask=inside)
    tl.store(gz + at, along, mask=t < L)


@triton.jit
def exits_kernel(
    q, g, gz, delta, A, states, norms, dlast, exits, exit_norms, boundary, dinitial, L, H, N, P, chunks, q_b, q_l, q_h,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORM: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """dh <- exp(decay) dh + sum_t exp(decay to t) q_t g_t^T, from the last chunk back; dz alike with gz for g.

    boundary: (B, H, chunks + 1, programs), this program's part of h . dh + z . dz at each chunk's start.
    """
    i_p, i_n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    n, p = i_n * BN + tl.arange(0, BN), i_p * BP + tl.arange(0, BP)
    q += b * q_b + h * q_h
    g += (b * L * H + h) * P
    width = P + 1 if NORM else P
    inside = (n < N)[:, None] & (p < P)[None, :]
    dstate, dz = tl.zeros((BN, BP), tl.float32), tl.zeros((BN,), tl.float32)
    if HAS_LAST:
        dstate = tile(dlast + bh * N * width, n, p, width, 1, N, P)
        if NORM:
            dz = tl.load(dlast + bh * N * width + n * width + P, mask=n < N, other=0.0)
    for back in range(chunks):
        i = chunks - 1 - back
        at = bh * chunks + i
        tl.store(exits + at * N * P + n[:, None] * P + p[None, :], dstate.to(exits.dtype.element_ty), mask=inside)
        if NORM and i_p == 0:
            tl.store(exit_norms + at * N + n, dz, mask=n < N)
        t = i * C + tl.arange(0, C)
        _, log_decay, whole = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
        q_T, g_t = tile(q, n, t, 1, q_l, N, L), tile(g, t, p, H * P, 1, L, P)
        weighted = (g_t * tl.exp(log_decay)[:, None]).to(g_t.dtype)
        dstate = tl.dot(q_T, weighted, dstate * tl.exp(whole), input_precision="ieee")
        if NORM:
            along = tl.load(gz + (b * L + t) * H + h, mask=t < L, other=0.0) * tl.exp(log_decay)
            dz = dz * tl.exp(whole) + tl.sum(q_T * along[None, :], 1)
        if HAS_DECAY:
            part = tl.sum(dstate * tile(states + at * N * P, n, p, P, 1, N, P))
            if NORM and i_p == 0:
                part += tl.sum(dz * tl.load(norms + at * N + n, mask=n < N, other=0.0))
            programs = tl.num_programs(0) * tl.num_programs(1)
            tl.store(boundary + (at + bh) * programs + i_n * tl.num_programs(0) + i_p, part)
    if HAS_INITIAL:
        tl.store(dinitial + bh * N * width + n[:, None] * width + p[None, :], dstate, mask=inside)
        if NORM and i_p == 0:
            tl.store(dinitial + bh * N * width + n * width + P, dz, mask=n < N)


@triton.jit
def dq_kernel(
    g, gz, k, v, delta, A, states, norms, dq, L, H, R, N, P, chunks, k_b, k_l, k_g, v_b, v_l, v_g,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """dq_t = exp(decay to t) (h g_t + z gz_t) + sum_{s<=t} exp(decay from s to t) delta_s (g_t . v_s + gz_t) k_s."""
    i_n, i, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    t, n, at = i * C + tl.arange(0, C), i_n * BN + tl.arange(0, BN), bh * chunks + i
    g += (b * L * H + h) * P
    k += b * k_b + h // R * k_g
    v += b * v_b + h // R * v_g
    dscores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, BN), tl.float32)
    for first in range(0, P, BP):
        p = first + tl.arange(0, BP)
        g_t = tile(g, t, p, H * P, 1, L, P)
        dscores = tl.dot(g_t, tile(v, p, t, 1, v_l, P, L), dscores, input_precision="ieee")
        out = tl.dot(g_t, tile(states + at * N * P, p, n, 1, P, P, N), out, input_precision="ieee")
    if NORM:
        along = tl.load(gz + (b * L + t) * H + h, mask=t < L, other=0.0)
        dscores += along[:, None]
        out += along[:, None] * tl.load(norms + at * N + n, mask=n < N, other=0.0)[None, :]
    d, log_decay, _ = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
    dscores *= causal(log_decay, C, False, HAS_DECAY) * d[None, :]
    k_s = tile(k, t, n, k_l, 1, L, N)
    out = tl.dot(dscores.to(k_s.dtype), k_s, out * tl.exp(log_decay)[:, None], input_precision="ieee")
    row = dq + ((b * L + t) * H + h)[:, None] * N + n[None, :]
    tl.store(row, out.to(dq.dtype.element_ty), mask=(t < L)[:, None] & (n < N)[None, :])


@triton.jit
def dk_kernel(
    q, v, g, gz, delta, A, exits, exit_norms, dk, L, H, R, N, P, chunks, q_b, q_l, q_h, v_b, v_l, v_g,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """dk_s = delta_s (exp(decay from s) (dh v_s + dz) + sum_{t>=s} exp(decay from s to t) (g_t . v_s + gz_t) q_t)."""
    i_n, i, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    s, n, at = i * C + tl.arange(0, C), i_n * BN + tl.arange(0, BN), bh * chunks + i
    v += b * v_b + h // R * v_g
    g += (b * L * H + h) * P
    dscores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, BN), tl.float32)
    for first in range(0, P, BP):
        p = first + tl.arange(0, BP)
        v_s = tile(v, s, p, v_l, 1, L, P)
        dscores = tl.dot(v_s, tile(g, p, s, 1, H * P, P, L), dscores, input_precision="ieee")
        out = tl.dot(v_s, tile(exits + at * N * P, p, n, 1, P, P, N), out, input_precision="ieee")
    if NORM:
        dscores += tl.load(gz + (b * L + s) * H + h, mask=s < L, other=0.0)[None, :]
        out += tl.load(exit_norms + at * N + n, mask=n < N, other=0.0)[None, :]
    d, log_decay, whole = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
    dscores *= causal(log_decay, C, True, HAS_DECAY) * d[:, None]
    q_t = tile(q + b * q_b + h * q_h, s, n, q_l, 1, L, N)
    weight = d * tl.exp(whole - log_decay)
    out = tl.dot(dscores.to(q_t.dtype), q_t, out * weight[:, None], input_precision="ieee")
    row = dk + ((b * L + s) * H + h)[:, None] * N + n[None, :]
    tl.store(row, out.to(dk.dtype.element_ty), mask=(s < L)[:, None] & (n < N)[None, :])


@triton.jit
def dv_kernel(
    q, k, v, g, gz, delta, A, exits, exit_norms, dv, dweight, L, H, R, N, P, chunks,
    q_b, q_l, q_h, k_b, k_l, k_g, v_b, v_l, v_g,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """dv_s = delta_s u_s, u_s = exp(decay from s) k_s . dh + sum_{t>=s} exp(decay from s to t) (q_t . k_s) g_t.

    dweight: (programs, B, L, H), this program's part of u_s . v_s and of the same with gz for g and 1 for v.
    """
    i_p, i, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    s, p, at = i * C + tl.arange(0, C), i_p * BP + tl.arange(0, BP), bh * chunks + i
    q += b * q_b + h * q_h
    k += b * k_b + h // R * k_g
    scores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, BP), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        k_s = tile(k, s, n, k_l, 1, L, N)
        scores = tl.dot(k_s, tile(q, n, s, 1, q_l, N, L), scores, input_precision="ieee")
        out = tl.dot(k_s, tile(exits + at * N * P, n, p, P, 1, N, P), out, input_precision="ieee")
    d, log_decay, whole = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
    to_end = tl.exp(whole - log_decay)
    scores *= causal(log_decay, C, True, HAS_DECAY)
    g_t = tile(g + (b * L * H + h) * P, s, p, H * P, 1, L, P)
    out = tl.dot(scores.to(g_t.dtype), g_t, out * to_end[:, None], input_precision="ieee")
    if HAS_DELTA or HAS_DECAY:
        part = tl.sum(out * tile(v + b * v_b + h // R * v_g, s, p, v_l, 1, L, P), 1)
        if NORM and i_p == 0:
            below = tl.load(gz + (b * L + s) * H + h, mask=s < L, other=0.0)
            ones = times_vector(k, exit_norms + at * N, s, k_l, L, N, C, BN)
            part += ones * to_end + tl.sum(scores * below[None, :], 1)
        rows = tl.num_programs(2) // H * L
        tl.store(dweight + (i_p * rows + b * L + s) * H + h, part, mask=s < L)
    row = dv + ((b * L + s) * H + h)[:, None] * P + p[None, :]
    tl.store(row, (out * d[:, None]).to(dv.dtype.element_ty), mask=(s < L)[:, None] & (p < P)[None, :])


@triton.jit
def decay_kernel(
    dweight, gz, boundary, delta, A, ddelta, dA, L, H, chunks, parts, programs,
    C: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradients of delta (B, L, H) and, one number for each chunk (B, H, chunks), of A.

    With e_s = delta_s times `dv_kernel`'s sum over its programs, the gradient of the rate delta_t A is the sum of e over the chunk from t on, less
    h . dh where the chunk ends. (Not NORM: less the sum of y_t . dy_t over the same tokens; else these are zero,
    since y does not change where all weights of a token do by the same factor.)
    """
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    t = i * C + tl.arange(0, C)
    row, rows = (b * L + t) * H + h, tl.num_programs(1) // H * L * H
    d, _, _ = chunk_decay(delta, A, b, h, i, L, H, C, HAS_DELTA, HAS_DECAY)
    direct = tl.zeros((C,), tl.float32)
    for part in range(parts):
        direct += tl.load(dweight + part * rows + row, mask=t < L, other=0.0)
    found = direct
    if HAS_DECAY:
        moved = d * direct
        if not NORM:
            moved += tl.load(gz + row, mask=t < L, other=0.0)
        j = tl.arange(0, BLOCK)
        after = tl.sum(tl.load(boundary + (bh * (chunks + 1) + i + 1) * programs + j, mask=j < programs, other=0.0))
        drate = tl.sum(moved, 0) - tl.cumsum(moved, 0) + moved - after
        found += drate * tl.load(A + h)
        tl.store(dA + bh * chunks + i, tl.sum(drate * d, 0))
    if HAS_DELTA:
        tl.store(ddelta + row, found, mask=t < L)
