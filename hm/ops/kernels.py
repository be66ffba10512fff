"""Importing the CUDA operators of mamba-ssm, which need not be installed."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def load_kernel(module: str, name: str) -> Callable[..., Any]:
    """`name` of mamba-ssm's `module`, also from an installation without the compiled extension.

    `import mamba_ssm` needs `selective_scan_cuda`, which the Triton operators do not: where it fails, the
    submodule is imported under an empty parent package, which is then withdrawn so that others still meet the
    true error. Raises ImportError if mamba-ssm or what the operator itself needs (triton, einops, and for
    `selective_scan` the extension) is missing.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or "mamba_ssm" in sys.modules:
            raise
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
        try:
            found = importlib.import_module(module)
        finally:
            del sys.modules["mamba_ssm"]
    return getattr(found, name)


@functools.cache
def why_unavailable(module: str, name: str) -> str | None:
    """Why the operator can't be imported, in a few words, or None if it can."""
    try:
        load_kernel(module, name)
    except ImportError as error:
        return str(error)
    return None


def why_refused(kernel: tuple[str, str], device: torch.device, dtype: torch.dtype) -> str | None:
    """What speaks against running the kernel there, as the end of a sentence, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device}"
    if dtype == torch.float64:
        return "computes in float32 at most, not in float64"
    if reason := why_unavailable(*kernel):
        return f"needs mamba-ssm, which can't be imported here ({reason}; see the extra hedgemamba[cuda])"
    return None
