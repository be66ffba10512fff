"""Regional torch.compile: what repeats in a model is compiled once, not the whole model layer by layer.

A region is a module whose `forward` is replaced while a run lasts. Hooks and wrappers (FSDP, capturing) stay outside
of it, and all layers of one kind share one compiled graph, so that compiling takes seconds and not a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hm.ops import resolve_scan

BACKEND = "inductor"


def compiled(function: Callable) -> Callable:
    """`function` compiled for the very shapes that it gets, by BACKEND."""
    return torch.compile(function, dynamic=False, backend=BACKEND)


@contextmanager
def regions(compile: Iterable[nn.Module], recompute: Iterable[nn.Module] = ()) -> Iterator[None]:
    """While the context lasts, the forward of each module in `compile` is compiled, and each in `recompute` computes
    its activations again in the backward pass instead of keeping them. Afterwards the modules are as they were, and
    what was compiled is forgotten: PyTorch keeps a few graphs per function, and the next run may need other ones."""
    compile, recompute = list(compile), list(recompute)
    try:
        if compile:
            torch.compiler.assume_constant_result(resolve_scan)  # it asks what can be imported here
        for module in compile:
            module.forward = compiled(module.forward)
        for module in recompute:
            module.forward = _recomputed(module.forward)
        yield
    finally:
        for module in (*compile, *recompute):
            vars(module).pop("forward", None)
        if compile:
            torch.compiler.reset()


def _recomputed(forward: Callable) -> Callable:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
