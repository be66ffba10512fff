"""The definition, each token as a sum over all before it, in float64: the reference of the other back ends."""

import torch
from torch import Tensor

from hm.ops.recurrent import complete, is_per_channel


def naive_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `hm.ops.linear_recurrence`; y and the state are float64 whatever the inputs' dtype.

    y_t = sum_{s<=t} W_ts (q_t . k_s) v_s / sum_{s<=t} W_ts (q_t . k_s)
    W_ts = delta_s exp(-A sum_{s<r<=t} delta_r)

    With a delta per channel and an A per channel and state, W depends on both, and y has them inside its sums.
    """
    B, L, H, _ = q.shape
    group = H // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
    if is_per_channel(q, delta, A):
        delta, A = (t.double() for t in complete(q, v, delta, A))
        return _per_channel(q, k, v, delta, A, initial_state, normalize)
    delta = q.new_ones(B, L, H) if delta is None else delta.double()
    A = q.new_zeros(H) if A is None else A.double()

    log_decay = (-delta * A).cumsum(1).transpose(1, 2)  # (B, H, L), of a state from before the sequence
    between = log_decay[..., :, None] - log_decay[..., None, :]  # (B, H, t, s)
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    weight = between.masked_fill(future, -torch.inf).exp() * delta.transpose(1, 2)[..., None, :]

    scores = torch.einsum("bthn,bshn->bhts", q, k) * weight
    numerator = torch.einsum("bhts,bshp->bthp", scores, v)
    denominator = scores.sum(-1).transpose(1, 2)[..., None]  # (B, L, H, 1)
    h = torch.einsum("bhs,bshn,bshp->bhnp", weight[:, :, -1], k, v)
    z = torch.einsum("bhs,bshn->bhn", weight[:, :, -1], k)[..., None]
    if initial_state is not None:
        h0 = initial_state.double()
        since_start = log_decay.exp()  # (B, H, L)
        carried = since_start[:, :, -1, None, None] * h0
        from_start = torch.einsum("bht,bthn,bhnp->bthp", since_start, q, h0)
        P = v.shape[-1]
        numerator, h = numerator + from_start[..., :P], h + carried[..., :P]
        if normalize:
            denominator, z = denominator + from_start[..., P:], z + carried[..., P:]
    if not normalize:
        return numerator, h
    return numerator / denominator, torch.cat([h, z], dim=-1)


def _per_channel(
    q: Tensor, k: Tensor, v: Tensor, delta: Tensor, A: Tensor, initial_state: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """As `naive_scan`, for k and v of every query head; delta: (B, L, H, P), A: (H, P, N)."""
    P = v.shape[-1]
    values, since_start, y = torch.cat([v, torch.ones_like(v)], dim=-1), delta.cumsum(1), []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        passed = since_start[:, now] - since_start[:, : t + 1]  # (B, s, H, P), the sum of delta after s
        weight = torch.exp(-A * passed[..., None]) * delta[:, : t + 1, ..., None]  # (B, s, H, P, N)
        h, z = (
            torch.einsum("bshpn,bshn,bshp->bhnp", weight, k[:, : t + 1], x[:, : t + 1]) for x in values.split(P, dim=-1)
        )
        if initial_state is not None:
            decay = torch.exp(-A * since_start[:, t, ..., None]).transpose(-1, -2)  # (B, H, N, P)
            h0 = initial_state.double()
            h = h + decay * h0[..., :P]
            z = z + decay * h0[..., P:] if normalize else z
        numerator, denominator = (torch.einsum("bhn,bhnp->bhp", q[:, t], x) for x in (h, z))
        y.append(numerator / denominator if normalize else numerator)
    return torch.stack(y, dim=1), torch.cat([h, z], dim=-1) if normalize else h
