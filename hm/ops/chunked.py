"""The recurrence in chunks, in plain PyTorch: matrix products inside a chunk, a short scan between chunks.

Linear in the sequence length in time and memory, forward and backward (Mamba-2's algorithm, arXiv 2405.21060,
section 6, with the denominator as one more value channel). Dimension names in the comments: n chunks of
c tokens, G key/value heads, R = H / G query heads on each, S states on each (1 if its query heads share one,
else R), P value channels (with the one for the denominator), N features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hm.ops.chunked_channel import chunked_channel_scan
from hm.ops.recurrent import accumulation_dtype, divide, is_per_channel

SEGMENT_ELEMENTS = 2**21
"""On a CPU the chunks are taken by so many elements of q (8 MiB in float32) at a time: whole tensors of a long sequence
fall out of the caches and are mapped anew at every step, which made a token of 32k cost 2.5 times that of 1k."""


def chunked_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `hm.ops.linear_recurrence`. Any length; computes in float32, or float64 if an input is.

    Without delta, A and an initial state the query heads of a group share one state, which is kept once. Decays per
    channel and state go to `chunked_channel_scan`.
    """
    if is_per_channel(q, delta, A):
        return chunked_channel_scan(q, k, v, delta, A, initial_state, normalize=normalize, chunk_size=chunk_size)
    (B, L, H, N), G = q.shape, k.shape[2]
    R, c, P = H // G, min(chunk_size, L), v.shape[-1] + normalize
    dtype = accumulation_dtype(q, k, v)
    if initial_state is not None:
        h = initial_state.to(dtype).view(B, G, R, N, P).transpose(-1, -2)
    else:
        h = torch.zeros(B, G, 1 if delta is None and A is None else R, P, N, dtype=dtype, device=q.device)
    segment = max(1, SEGMENT_ELEMENTS // (B * c * H * N)) * c if q.device.type == "cpu" else L
    deltas = [None] * -(-L // segment) if delta is None else delta.split(segment, dim=1)
    outputs = []
    for q_s, k_s, v_s, delta_s in zip(*(t.split(segment, dim=1) for t in (q, k, v)), deltas, strict=True):
        y, h = _segment(h, q_s, k_s, v_s, delta_s, A, normalize, min(c, q_s.shape[1]))
        outputs.append(y)
    state = h.transpose(-1, -2).expand(B, G, R, N, P).reshape(B, H, N, P)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def _segment(
    h: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None, normalize: bool, c: int
) -> tuple[Tensor, Tensor]:
    """h: (B, G, S, P, N), the state before; the others as in `chunked_scan`. Returns y: (B, L, H, P) and h after."""
    (B, L, H, N), G = q.shape, k.shape[2]
    R, S, n, pad, dtype = H // G, h.shape[2], -(-L // c), -L % c, h.dtype

    def chunks(x: Tensor, heads: tuple[int, ...]) -> Tensor:
        """(B, L, heads, X) -> (B, n, heads, c, X), zero-padded: such a token adds and decays nothing."""
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, pad)) if pad else x.to(dtype)
        return x.view(B, n, c, *heads, x.shape[-1]).movedim(2, -2)

    def per_token(x: Tensor) -> Tensor:
        """(B, L, H) -> (B, n, G, R, c)."""
        return chunks(x[..., None], (G, R)).squeeze(-1)

    q, k = chunks(q, (G, R)).reshape(B, n, G, R * c, N), chunks(k, (G,)).contiguous()
    v = chunks(F.pad(v.to(dtype), (0, 1), value=1.0) if normalize else v, (G,))
    P = v.shape[-1]
    vT = v.transpose(-1, -2)[:, :, :, None].expand(-1, -1, -1, S, -1, -1)  # (B, n, G, S, P, c)
    if delta is not None:
        vT = vT * per_token(delta)[..., None, :]

    scores = (q @ k.transpose(-1, -2)).view(B, n, G, R, c, c)
    if A is None:
        scores = scores.tril_()
    else:
        rate = A.to(dtype) if delta is None else delta.to(dtype) * A.to(dtype)
        log_decay = per_token((-rate).expand(B, L, H)).cumsum(-1)  # since the chunk's start
        future = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        between = log_decay[..., :, None] - log_decay[..., None, :]
        scores = scores * between.masked_fill_(future, -torch.inf).exp_()
    q, scores = q.view(B, n, G, S, -1, N), scores.view(B, n, G, S, -1, c)
    y = scores @ vT.transpose(-1, -2)  # (B, n, G, S, R * c / S, P)

    to_end = vT if A is None else vT * (log_decay[..., -1:] - log_decay).exp()[..., None, :]
    added = (to_end.reshape(B, n, G, S * P, c) @ k).view(B, n, G, S, P, N)
    if A is None:
        states = torch.cat([h[:, None], added], dim=1).cumsum(1)  # before each chunk and after the last
    else:
        states = _scan(h, added, log_decay[..., -1].exp())
    carried = q @ states[:, :-1].transpose(-1, -2)
    y = y + (carried if A is None else carried * log_decay.exp()[..., None])

    y = divide(y) if normalize else y
    return y.view(B, n, G, R, c, -1).movedim(-2, 2).reshape(B, n * c, H, -1)[:, :L], states[:, -1]


def _scan(h: Tensor, added: Tensor, decay: Tensor) -> Tensor:
    """States before each chunk and after the last: (B, n + 1, G, S, P, N).

    h: (B, G, S, P, N); added: (B, n, G, S, P, N); decay: (B, n, G, S), over a whole chunk.
    """
    states = [h]
    for added_here, decay_here in zip(added.unbind(1), decay[..., None, None].unbind(1), strict=True):
        h = torch.addcmul(added_here, h, decay_here)
        states.append(h)
    return torch.stack(states, dim=1)
