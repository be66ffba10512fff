"""The definition, with an explicit L x L matrix in float64: the reference of the other back ends."""

import torch
from torch import Tensor


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
    """
    B, L, H, _ = q.shape
    group = H // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
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
