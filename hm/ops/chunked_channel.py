"""The recurrence with a decay per channel and state, in plain PyTorch: a block of tokens at a time.

Every channel and state forgets at a pace of its own, so no matrix product stands for the sum over the past: written
as products of exp(cumulative decays), it would need exponents above 0, which overflow. So the state goes from token
to token, by one fused multiply-add each, and all that surrounds it (decays, what is added, outputs) is computed for a
whole block at once. Linear in the length; the backward pass keeps the state between blocks and computes the inside
of a block again.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hm.ops.recurrent import accumulation_dtype, complete, divide

BLOCK_ELEMENTS, LEAST_BLOCK = 2**20, 16
"""A block has at most so many elements of state (4 MiB in float32, to stay in the caches), but at least LEAST_BLOCK
tokens, since one state per block is kept for the backward pass."""


def chunked_channel_scan(
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
    """Shapes as in `hm.ops.linear_recurrence`. A block has at most `chunk_size` tokens."""
    (B, L, H, N), P = q.shape, v.shape[-1]
    dtype = accumulation_dtype(q, k, v)
    delta, A = (t.to(dtype) for t in complete(q, v, delta, A))
    kinds = 2 if normalize else 1
    if initial_state is None:
        h = torch.zeros(B, H, kinds, P, N, dtype=dtype, device=q.device)
    else:
        h = initial_state.to(dtype).view(B, H, N, kinds, P).movedim(2, -1)
    block = min(chunk_size, max(LEAST_BLOCK, BLOCK_ELEMENTS // h.numel()))
    outputs = []
    for q_c, k_c, v_c, delta_c in zip(*(t.split(block, dim=1) for t in (q, k, v, delta)), strict=True):
        if torch.is_grad_enabled() and block < L:
            y, h = checkpoint(_block, h, q_c, k_c, v_c, delta_c, A, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = _block(h, q_c, k_c, v_c, delta_c, A)
        outputs.append(y)
    return torch.cat(outputs, dim=1), h.movedim(-1, 2).reshape(B, H, N, kinds * P)


def _block(h: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """h: (B, H, 1 or 2, P, N), numerators and denominators; the others as in `chunked_channel_scan`, for c tokens.
    Returns y: (B, c, H, P) and h after the block."""
    repeats, normalize = q.shape[2] // k.shape[2], h.shape[2] == 2
    q, k, v = (t.to(h.dtype).transpose(0, 1) for t in (q, k, v))  # (c, B, heads, ...)
    k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    delta = delta.transpose(0, 1)
    decay = torch.exp(-delta[..., None] * A)[:, :, :, None]  # (c, B, H, 1, P, N)
    values = torch.stack([v * delta, delta] if normalize else [v * delta], dim=3)  # (c, B, H, 1 or 2, P)
    states = []
    for added_t, decay_t in zip((values[..., None] * k[:, :, :, None, None]).unbind(0), decay.unbind(0), strict=True):
        h = torch.addcmul(added_t, h, decay_t)
        states.append(h)
    y = (torch.stack(states) @ q[:, :, :, None, :, None]).squeeze(-1).flatten(-2)
    return (divide(y, v.shape[-1]) if normalize else y).transpose(0, 1), h
