"""Regional torch.compile: what repeats in a model is compiled once, not the whole model layer by layer; and one step
as a CUDA graph, so that Python launches one thing instead of thousands.

A region is a module whose `forward` is replaced while a run lasts. Hooks and wrappers (FSDP, capturing) stay outside
of it, and all layers of one kind share one compiled graph, so that compiling takes seconds and not a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


AttentionInterface.register("causal_sdpa", sdpa_attention_forward)


@contextmanager
def unmasked(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """While the context lasts, attention in these models is causal without a mask, as it may be where nothing is
    padding: Transformers would build one as a tensor while a CUDA graph is recorded, and attention then be slow."""
    configs = [model.config for model in models]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "causal_sdpa"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _recomputed(forward: Callable) -> Callable:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class Replayed:
    """step(tokens) -> tensors, recorded as a CUDA graph at its third call and replayed from then on.

    Recording fixes shapes and addresses: the tensors that it returns, and the gradients that the step leaves in
    parameters, are the same ones each time, and written anew (parameters' `grad` must not be set to None after it).
    """

    EAGER = 2  # calls that compile, and choose kernels

    def __init__(self, step: Callable[[Tensor], Any]):
        self.step, self.calls, self.graph = step, 0, torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    @property
    def recorded(self) -> bool:
        return self.calls > self.EAGER

    def __call__(self, tokens: Tensor) -> Any:
        self.calls += 1
        if not self.recorded:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                found = self.step(tokens)
            torch.cuda.current_stream().wait_stream(self.stream)
            return found
        if self.calls == self.EAGER + 1:
            torch.cuda.empty_cache()  # the graph has memory of its own
            self.tokens = tokens.clone()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self.step(self.tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.found
