"""One token at a time: the step that generation takes, and a loop over it."""

import torch
from torch import Tensor

TINY = 1e-20


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def is_per_channel(q: Tensor, delta: Tensor | None, A: Tensor | None) -> bool:
    """Whether delta and A are one per channel (and state) rather than one per head; q of a step or a sequence."""
    return (A is not None and A.dim() == 3) or (delta is not None and delta.dim() == q.dim())


def complete(q: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None) -> tuple[Tensor, Tensor]:
    """delta: (..., H, P) and A: (H, P, N) of the form per channel, ones and zeros where None."""
    (H, N), P = q.shape[-2:], v.shape[-1]
    dtype = accumulation_dtype(q, v)
    delta = torch.ones(*q.shape[:-1], P, dtype=dtype, device=q.device) if delta is None else delta
    return delta, torch.zeros(H, P, N, dtype=dtype, device=q.device) if A is None else A


def divide(y: Tensor, channels: int = -1) -> Tensor:
    """y: (..., P + 1), or (..., 2 P) with channels = P: numerators, then their denominators -> (..., P).

    The bound keeps 0 / 0 (padding) from becoming NaN; it is no epsilon: the size of delta cancels exactly.
    """
    return y[..., :channels] / y[..., channels:].clamp_min(TINY)


def step(
    state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token. q: (B, H, N); k: (B, G, N); v: (B, G, P); delta: (B, H) and A: (H,), or delta: (B, H, P) and
    A: (H, P, N), or None; state: as `hm.ops.linear_recurrence` returns it, or None for zeros.

    Returns y: (B, H, P) in the dtype of v, and the new state in float32 at least; the old one is not changed.
    """
    dtype = accumulation_dtype(q, k, v)
    repeats, P, per_channel = q.shape[1] // k.shape[1], v.shape[-1], is_per_channel(q, delta, A)
    values, keys = v.to(dtype).repeat_interleave(repeats, 1), k.to(dtype).repeat_interleave(repeats, 1)
    if normalize:
        ones = torch.ones_like(values if per_channel else values[..., :1])
        values = torch.cat([values, ones], dim=-1)
    decay = None
    if per_channel:
        delta, A = (t.to(dtype) for t in complete(q, v, delta, A))
        decay = torch.exp(-delta[..., None] * A).transpose(-1, -2)  # (B, H, N, P)
        delta, decay = (torch.cat([t, t], dim=-1) if normalize else t for t in (delta, decay))
        values = values * delta
    else:
        if A is not None:
            rate = A.to(dtype) if delta is None else delta.to(dtype) * A.to(dtype)
            decay = torch.exp(-rate)[..., None, None]
        if delta is not None:
            values = values * delta.to(dtype)[..., None]
    new = keys[..., None] * values[..., None, :]
    if state is not None:
        new = new + (state.to(dtype) if decay is None else state.to(dtype) * decay)
    y = (q.to(dtype)[..., None, :] @ new)[..., 0, :]
    return (divide(y, P) if normalize else y).to(v.dtype), new


def recurrent_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """`step` over the sequence; shapes as in `hm.ops.linear_recurrence`."""
    state, outputs = initial_state, []
    deltas = [None] * q.shape[1] if delta is None else delta.unbind(1)
    for q_t, k_t, v_t, delta_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), deltas, strict=True):
        y, state = step(state, q_t, k_t, v_t, delta_t, A, normalize)
        outputs.append(y)
    assert state is not None, "a sequence has at least one token"
    return torch.stack(outputs, dim=1), state
