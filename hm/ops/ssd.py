"""The recurrence on CUDA, by the pure-Triton `ssd` operator of mamba-ssm (Mamba-2's form)."""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hm.ops.recurrent import divide

KERNEL_MODULE = "mamba_ssm.ops.triton.ssd_combined"
CHUNK = 256  # one size for all lengths: each new size would be autotuned anew, for over a minute
LANES = 8  # the kernel's value channels come in multiples of this


@functools.cache
def load_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """mamba-ssm's `mamba_chunk_scan_combined`, also from an installation without the compiled extension.

    `import mamba_ssm` needs `selective_scan_cuda`, which the Triton operators do not: where it fails, the
    submodule is imported under an empty parent package, which is then withdrawn so that others still meet the
    true error. Raises ImportError if mamba-ssm or what its operator needs (triton, einops) is missing.
    """
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    try:
        module = importlib.import_module(KERNEL_MODULE)
    except ImportError:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or "mamba_ssm" in sys.modules:
            raise
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
        try:
            module = importlib.import_module(KERNEL_MODULE)
        finally:
            del sys.modules["mamba_ssm"]
    return module.mamba_chunk_scan_combined


@functools.cache
def why_unavailable() -> str | None:
    """Why the operator can't be imported, in a few words, or None if it can."""
    try:
        load_kernel()
    except ImportError as error:
        return str(error)
    return None


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
    """Shapes as in `hm.ops.linear_recurrence`. Matrix products run in the inputs' dtype, float32 as TF32 and
    float64 as float32; states accumulate in float32.

    The length is padded to whole chunks with delta = 0, which is exact: the kernel has given NaN for other
    lengths (state-spaces/mamba#352). Keys are repeated, as the kernel wants as many groups of k as of q.
    """
    (B, L, H, _), P = q.shape, v.shape[-1]
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    dtype = torch.float32 if dtype == torch.float64 else dtype
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
    y, state = load_kernel()(
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
