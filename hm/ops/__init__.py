"""The one operator: a normalised linear recurrence that forgets.

    h_t = Lambda_t h_{t-1} + delta_t k_t (outer) v_t
    z_t = Lambda_t z_{t-1} + delta_t k_t                     Lambda_t = exp(-delta_t A)
    y_t = (q_t . h_t) / (q_t . z_t)

The decay has two forms. decay=head (Mamba-2's): delta_t and A are one number per head. decay=channel (Mamba-1's, the
paper's): delta_t is one per channel and A one per channel and state, for the P value channels of a head,

    h_t[n, p] = exp(-delta_t[p] A[p, n]) h_{t-1}[n, p] + delta_t[p] k_t[n] v_t[p]

and z has the same Lambda, so it too is one per channel. Linear attention is A = 0, delta = 1. `naive` is the
definition, written out; every other back end is tested against it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hm.errors import UserError
from hm.ops import fused, ssd
from hm.ops import selective_scan as selective_scan_module
from hm.ops.chunked import chunked_scan
from hm.ops.naive import naive_scan
from hm.ops.recurrent import accumulation_dtype, is_per_channel, recurrent_scan, step
from hm.progress import say

__all__ = ["SCANS", "linear_recurrence", "resolve_scan", "step"]


class BackEnd(NamedTuple):
    run: Callable[..., tuple[Tensor, Tensor]]
    refusal: Callable[[torch.device, int, str, torch.dtype], str | None] = lambda *case: None
    """(device, d_state, decay, dtype) -> why not, as the end of a sentence, or None."""


BACK_ENDS = {
    "fused": BackEnd(fused.fused_scan, fused.refusal),
    "ssd": BackEnd(ssd.ssd_scan, ssd.refusal),
    "selective_scan": BackEnd(selective_scan_module.selective_scan, selective_scan_module.refusal),
    "chunked": BackEnd(chunked_scan),
    "recurrent": BackEnd(recurrent_scan),
    "naive": BackEnd(naive_scan),
}
AUTO = {"head": ("fused", "chunked"), "channel": ("selective_scan", "chunked")}
"""What `scan=auto` takes, by the form of the decay: the first that does not refuse."""
SCANS = ("auto", *BACK_ENDS)


def resolve_scan(
    scan: str, device: torch.device | str, d_state: int, decay: str = "head", dtype: torch.dtype = torch.float32
) -> str:
    """The back end that `scan` means for this case; of "auto" it says once per process what it took and why.

    d_state: features per head (N); decay: "head" or "channel"; dtype: of q, k and v. Raises UserError for a scan that
    is unknown or that can't serve the case.
    """
    if scan not in SCANS:
        raise UserError(f"scan={scan} is not known: use one of {', '.join(SCANS)}.")
    case = (torch.device(device), d_state, decay, dtype)
    if scan != "auto":
        if reason := BACK_ENDS[scan].refusal(*case):
            raise UserError(f"scan={scan} {reason}: use scan={_auto(*case)[0]} or scan=auto.")
        return scan
    name, refused = _auto(*case)
    if not torch.compiler.is_compiling():
        _announce(name, decay, refused)
    return name


def _auto(device: torch.device, d_state: int, decay: str, dtype: torch.dtype) -> tuple[str, str]:
    """The first of AUTO that serves the case (the last serves all), and why those before it don't."""
    refused = []
    for name in AUTO[decay]:
        reason = BACK_ENDS[name].refusal(device, d_state, decay, dtype)
        if reason is None:
            break
        refused.append(f"{name} {reason}")
    return name, "; ".join(refused)


@functools.cache
def _announce(name: str, decay: str, refused: str) -> None:
    say(f"scan=auto takes {name} for decay={decay}: {refused or 'the fastest here'}")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    *,
    scan: str = "chunked",
    chunk_size: int = 64,
    normalize: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs the recurrence over a whole sequence; query head h reads key/value head h // (H / G).

    q: (B, L, H, N) and k: (B, L, G, N), both >= 0 if `normalize`, since the denominator must be positive;
    v: (B, L, G, P); delta >= 0 or None for ones, and A >= 0 or None for zeros (no decay): (B, L, H) and (H,) for a
    decay per head, (B, L, H, P) and (H, P, N) for one per channel and state.
    initial_state: what an earlier call or `step` returned, or None for zeros.
    `normalize=False` leaves out the denominator: y_t = q_t . h_t.
    chunk_size: tokens per chunk of `chunked`; it changes the speed, not the result, and the kernels have their own.

    Returns y: (B, L, H, P) in the dtype of v, and with `return_state` also the state after the last token, in float32
    at least: (B, H, N, P + 1) with z as the last column, or (B, H, N, 2 P) with z in the last P for a decay per
    channel; (B, H, N, P) without `normalize`. Gradients flow through all tensors, but not through the state that
    `selective_scan` returns. Autocast has no effect inside.

    Raises ValueError for shapes that don't fit, UserError as `resolve_scan`.
    """
    _check_shapes(q, k, v, delta, A, initial_state, chunk_size, normalize)
    decay = "channel" if is_per_channel(q, delta, A) else "head"
    scan = resolve_scan(scan, q.device, q.shape[-1], decay, accumulation_dtype(q, k, v))
    only: dict[str, dict[str, Any]] = {"chunked": {"chunk_size": chunk_size}, "fused": {"return_state": return_state}}
    with torch.autocast(q.device.type, enabled=False):
        y, state = BACK_ENDS[scan].run(q, k, v, delta, A, initial_state, normalize=normalize, **only.get(scan, {}))
    y = y.to(v.dtype)
    return (y, state) if return_state else y


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    normalize: bool,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must have 4 dimensions, got {q.dim()}, {k.dim()} and {v.dim()}")
    (B, L, H, N), G, P = q.shape, k.shape[2], v.shape[3]
    if L < 1:
        raise ValueError("the sequence must have at least one token")
    if G < 1 or H % G:
        raise ValueError(f"the {H} query heads must be a multiple of the {G} key/value heads")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    per_channel = is_per_channel(q, delta, A)
    channels = P if not normalize else 2 * P if per_channel else P + 1
    expected = {
        "k": (k, (B, L, G, N)),
        "v": (v, (B, L, G, P)),
        "delta": (delta, (B, L, H, P) if per_channel else (B, L, H)),
        "A": (A, (H, P, N) if per_channel else (H,)),
        "initial_state": (initial_state, (B, H, N, channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
