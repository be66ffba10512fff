"""The recurrence on CUDA, by the compiled `selective_scan` of mamba-ssm (Mamba-1's form, the paper's)."""

import functools

import torch
from torch import Tensor

from hm.ops.chunked_channel import chunked_channel_scan
from hm.ops.kernels import load_kernel, why_refused
from hm.ops.recurrent import complete, divide, is_per_channel

KERNEL = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
MAX_STATE = 256  # the kernel refuses more


def refusal(device: torch.device, d_state: int, decay: str, dtype: torch.dtype) -> str | None:
    """Why `selective_scan` can't serve this, as the end of a sentence, or None."""
    return why_refused(KERNEL, device, dtype)


def selective_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `hm.ops.linear_recurrence`, for decays of both forms.

    The kernel runs every channel by itself, in the inputs' dtype (delta too is rounded to it), with float32 states.
    - The denominator is a recurrence of ones under the same decay: one more channel per head where the decay is per
      head, P more where it is per channel.
    - y is a sum over states, so more than 256 states are run in passes of 256 and added.
    - Keys and values are repeated for the query heads of a group: the kernel pairs each group of k with one of q.
    - It can't start from a state. Per head, what an initial state adds is a matrix product and is added; per
      channel, a sequence that has one goes through `chunked_channel_scan` instead, which is exact and slow.
    - It has no gradient for the last state, which is therefore returned detached.
    """
    (B, L, H, N), (G, P), per_channel = q.shape, v.shape[2:], is_per_channel(q, delta, A)
    if per_channel and initial_state is not None:
        return chunked_channel_scan(q, k, v, delta, A, initial_state, normalize=normalize)
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    if per_channel:
        delta, A = complete(q, v, delta, A)
    else:
        delta = torch.ones(B, L, H, device=q.device) if delta is None else delta
        A = torch.zeros(H, device=q.device) if A is None else A
    if normalize:
        v = torch.cat([v, torch.ones_like(v if per_channel else v[..., :1])], dim=-1)
    C = v.shape[-1]  # channels per head

    def rows(x: Tensor) -> Tensor:
        """(B, L, G or H, X) -> (B, H, X, L) in the kernel's dtype, tokens side by side as it wants them."""
        x = x.to(dtype).permute(0, 2, 3, 1)
        return x.contiguous() if x.shape[1] == H else x.repeat_interleave(H // G, 1).contiguous()

    def every_channel(x: Tensor, dim: int) -> Tensor:
        """One per head, or one per channel of which the denominators have the same -> C per head."""
        return torch.cat([x] * (C // P), dim) if per_channel else x.unsqueeze(dim).expand(*x.shape[:dim], C, *x.shape[dim:])

    u, steps = (rows(x).view(B, H * C, L) for x in (v, every_channel(delta, 3)))
    rates = -(every_channel(A, 1) if per_channel else A[:, None, None].expand(H, C, N)).float().reshape(H * C, N)
    keys, queries = rows(k), rows(q)
    passes = [
        load_kernel(*KERNEL)(
            u,
            steps,
            rates[:, n : n + MAX_STATE].contiguous(),
            keys[:, :, n : n + MAX_STATE],
            queries[:, :, n : n + MAX_STATE],
            return_last_state=True,
        )
        for n in range(0, N, MAX_STATE)
    ]
    y = sum(out.float() for out, _ in passes).view(B, H, C, L).permute(0, 3, 1, 2)
    state = torch.cat([last for _, last in passes], dim=-1).detach().view(B, H, C, N).transpose(-1, -2)
    if initial_state is not None:
        carried = torch.exp(-(delta.float() * A.float()).cumsum(1))[..., None]  # (B, L, H, 1)
        h = initial_state.float()
        y = y + carried * torch.einsum("blhn,bhnc->blhc", q.float(), h)
        state = state + (carried[:, -1, :, None] * h).detach()
    return (divide(y, P) if normalize else y), state
