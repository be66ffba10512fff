"""The Triton kernel of `hm.decode.step_in_place`."""

import triton
import triton.language as tl


@triton.jit
def kernel(state, q, k, v, delta, decay, y, H, repeats, N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """A program holds BLOCK_C channels of one head of one sequence, and goes through its part of the N states BLOCK_N at a time.

    state: (B * H, N, ROW), updated, of which the first C count and the rest is filling, so that rows are aligned;
    q: (B * H, N); k: (B * G, N); v: (B * G, P), read as 1 from P on (the denominator); delta, decay: (B * H);
    y: (B * H, parts, C), each part's sum over its states. repeats: H / G.
    """
    head = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    source = head // H * (H // repeats) + head % H // repeats  # the key/value head that it reads
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    value = tl.load(v + source * P + channel, mask=channel < P, other=1.0).to(tl.float32)
    value = value * tl.load(delta + head)
    keep = tl.load(decay + head)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)  # summed over states once, at the end: sums between threads are slow
    for first in range(part * BLOCK_N, N, parts * BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        key = tl.load(k + source * N + n, mask=n < N, other=0.0).to(tl.float32)
        query = tl.load(q + head * N + n, mask=n < N, other=0.0).to(tl.float32)
        place = state + (head * N + n)[:, None] * ROW + channel[None, :]
        inside = (n < N)[:, None] & (channel < ROW)[None, :]
        new = tl.load(place, mask=inside, other=0.0) * keep + key[:, None] * value[None, :]
        tl.store(place, new, mask=inside)
        total += query[:, None] * new
    tl.store(y + (head * parts + part) * C + channel, tl.sum(total, axis=0), mask=channel < C)
