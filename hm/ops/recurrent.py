"""One token at a time: the step that generation takes, and a loop over it."""

import torch
from torch import Tensor

TINY = 1e-20


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def divide(y: Tensor) -> Tensor:
    """y: (..., P + 1), numerators and one denominator -> (..., P).

    The bound keeps 0 / 0 (padding) from becoming NaN; it is no epsilon: the size of delta cancels exactly.
    """
    return y[..., :-1] / y[..., -1:].clamp_min(TINY)


def step(
    state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token. state: (B, H, N, P + 1), or (B, H, N, P) if not `normalize`, None for zeros; q: (B, H, N);
    k: (B, G, N); v: (B, G, P); delta: (B, H) or None for ones; A: (H,) or None for zeros.

    Returns y: (B, H, P) in the dtype of v, and the new state in float32 at least; the old one is not changed.
    """
    dtype = accumulation_dtype(q, k, v)
    H, G = q.shape[1], k.shape[1]
    values = v.to(dtype)
    if normalize:
        values = torch.nn.functional.pad(values, (0, 1), value=1.0)
    update = (k.to(dtype)[..., None] * values[..., None, :]).repeat_interleave(H // G, 1)  # (B, H, N, P + 1)
    if delta is not None:
        update = update * delta.to(dtype)[..., None, None]
    if state is not None:
        state = state.to(dtype)
        if A is not None:
            rate = A.to(dtype) if delta is None else delta.to(dtype) * A.to(dtype)
            state = state * torch.exp(-rate)[..., None, None]
        update = update + state
    y = (q.to(dtype)[..., None, :] @ update)[..., 0, :]
    return (divide(y) if normalize else y).to(v.dtype), update


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
