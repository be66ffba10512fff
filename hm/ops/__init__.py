"""The one operator: a normalised linear recurrence with one decay per head and step.

    h_t = exp(-delta_t A) h_{t-1} + delta_t k_t (outer) v_t
    z_t = exp(-delta_t A) z_{t-1} + delta_t k_t
    y_t = (q_t . h_t) / (q_t . z_t)

Linear attention is A = 0, delta = 1. `naive` is the definition, written out; every other back end is tested
against it.
"""

import torch
from torch import Tensor

from hm.errors import UserError
from hm.ops.chunked import chunked_scan
from hm.ops.naive import naive_scan
from hm.ops.recurrent import recurrent_scan, step
from hm.ops.ssd import ssd_scan, why_unavailable

__all__ = ["SCANS", "linear_recurrence", "resolve_scan", "step"]

SCANS = ("auto", "chunked", "ssd", "recurrent", "naive")


def resolve_scan(scan: str, device: torch.device | str, d_state: int) -> str:
    """The back end that `scan` means on `device`; "auto": "ssd" on CUDA if importable, else "chunked".

    d_state: features per head (N), which limits none of these back ends. Raises UserError for a scan that is
    unknown or that the machine can't run.
    """
    on_cuda = torch.device(device).type == "cuda"
    if scan == "auto":
        return "ssd" if on_cuda and why_unavailable() is None else "chunked"
    if scan == "selective_scan":
        raise UserError("scan=selective_scan is not available in this version: use scan=auto or chunked.")
    if scan not in SCANS:
        raise UserError(f"scan={scan} is not known: use one of {', '.join(SCANS)}.")
    if scan == "ssd":
        if not on_cuda:
            raise UserError(f"scan=ssd needs a CUDA device, not {device}: use scan=auto or scan=chunked.")
        if reason := why_unavailable():
            raise UserError(
                f"scan=ssd can't run here ({reason}): install mamba-ssm with the extra hedgemamba[cuda], "
                "or use scan=chunked."
            )
    return scan


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
    v: (B, L, G, P); delta: (B, L, H) >= 0 or None for ones; A: (H,) >= 0 or None for zeros (no decay).
    initial_state: what an earlier call or `step` returned, or None for zeros.
    `normalize=False` leaves out the denominator: y_t = q_t . h_t.
    chunk_size: tokens per chunk of `chunked`; it changes the speed, not the result, and `ssd` has its own.

    Returns y: (B, L, H, P) in the dtype of v, and with `return_state` also the state after the last token:
    (B, H, N, P + 1) with z as the last column if `normalize`, else (B, H, N, P), in float32 at least.
    Gradients flow through all tensors. Autocast has no effect inside.

    Raises ValueError for shapes that don't fit, UserError as `resolve_scan`.
    """
    _check_shapes(q, k, v, delta, A, initial_state, chunk_size, normalize)
    scan = resolve_scan(scan, q.device, q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        inputs = (q, k, v, delta, A, initial_state)
        if scan == "chunked":
            y, state = chunked_scan(*inputs, normalize=normalize, chunk_size=chunk_size)
        else:
            run = {"ssd": ssd_scan, "recurrent": recurrent_scan, "naive": naive_scan}[scan]
            y, state = run(*inputs, normalize=normalize)
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
    expected = {
        "k": (k, (B, L, G, N)),
        "v": (v, (B, L, G, P)),
        "delta": (delta, (B, L, H)),
        "A": (A, (H,)),
        "initial_state": (initial_state, (B, H, N, P + 1 if normalize else P)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
