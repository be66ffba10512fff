"""The recurrence on CUDA, by the pure-Triton `ssd` operator of mamba-ssm (Mamba-2's form)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hm.ops.kernels import load_kernel, why_refused
from hm.ops.recurrent import divide

KERNEL = ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
CHUNK = 256  # one size for all lengths: each new size would be autotuned anew, for over a minute
LANES = 8  # the kernel's value channels come in multiples of this


def refusal(device: torch.device, d_state: int, decay: str, dtype: torch.dtype) -> str | None:
    """Why `ssd_scan` can't serve this, as the end of a sentence, or None."""
    if decay != "head":
        return f"has one decay per head, not decay={decay}"
    return why_refused(KERNEL, device, dtype)


def ssd_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `hm.ops.linear_recurrence`, for decays per head. Matrix products run in the inputs' dtype,
    float32 as TF32; states accumulate in float32.

    The length is padded to whole chunks with delta = 0, which is exact: the kernel has given NaN for other
    lengths (state-spaces/mamba#352). Keys are repeated, as the kernel wants as many groups of k as of q.
    """
    (B, L, H, _), P = q.shape, v.shape[-1]
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    repeats, pad = H // k.shape[2], -L % CHUNK

    def every_head(x: Tensor) -> Tensor:
        return x if repeats == 1 else x.repeat_interleave(repeats, 2)

    def whole_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x

    ones = [v.new_ones(*v.shape[:3], 1)] if normalize else []
    channels = P + len(ones)
    lanes = -channels % LANES
    values = F.pad(torch.cat([v, *ones], dim=-1), (0, lanes))
    delta = torch.ones(B, L, H, device=q.device) if delta is None else delta
    A = torch.zeros(H, device=q.device) if A is None else A
    if initial_state is not None:  # (B, H, N, P + 1) here, (B, H, P + 1, N) there
        initial_state = F.pad(initial_state.float(), (0, lanes)).transpose(-1, -2).contiguous()
    y, state = load_kernel(*KERNEL)(
        whole_chunks(every_head(values), dtype),
        whole_chunks(delta, torch.float32),
        -A.float(),
        whole_chunks(every_head(k), dtype),
        whole_chunks(q, dtype),
        CHUNK,
        initial_states=initial_state,
        return_final_states=True,
    )
    y, state = y[:, :L, :, :channels].float(), state[:, :, :channels].transpose(-1, -2)
    return (divide(y) if normalize else y), state
