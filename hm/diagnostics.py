"""Whether the parts of a student are used at all: per layer, what the parts do, and what is lost without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hm.evaluate import summarise, token_losses
from hm.mixer import BaseMixer, MambaMixer, Mixer
from hm.modeling import StudentForCausalLM

PARTS = ("ssm", "conv", "gate")
WATCHED = 4
"""Sequences whose delta and gate are looked at; all of a layer's numbers are held at once."""
QUANTILES = tuple(i / 10 for i in range(11))


@torch.no_grad()
def diagnose(
    student: StudentForCausalLM, token_batches: Sequence[Tensor], *, precision: str = "fp32"
) -> dict[str, Any]:
    """What each layer's decay, gate and convolution do on batches of tokens (b, L + 1), and what they are worth.

    Returns:
        {"quantiles": QUANTILES, "layers": [...], "without": {part: change of perplexity where the part is the
        identity in all layers}}. A layer is {"layer", "without": {part: change of perplexity where it is the identity
        in this layer}} with what its mixer has of:
        "decay_rate": quantiles over heads (or channels and states) of the mean over tokens of delta * A, where a
        token multiplies the state by exp(-delta * A); "memory_tokens": 1 / its median, null for no decay;
        "delta_spread": standard deviation over mean of delta over tokens, mean over heads (0: it selects nothing);
        "gate": {"mean", "std", "closed": share below 0.1}; "conv_past": norm of the taps of the past over all taps.
    """
    seen: dict[int, dict[str, list[Tensor]]] = {m.layer_idx: {} for m in student.mixers}
    before = perplexity_of(student, token_batches, precision)
    with observed(student.mixers, seen):
        perplexity_of(student, [torch.cat(list(token_batches))[:WATCHED]], precision)
    layers = []
    for mixer in student.mixers:
        row: dict[str, Any] = {"layer": mixer.layer_idx} | statistics(mixer, seen[mixer.layer_idx])
        row["without"] = {p: change(student, [mixer], p, token_batches, before, precision) for p in parts_of(mixer)}
        layers.append(row)
    without = {p: change(student, student.mixers, p, token_batches, before, precision) for p in parts_of(student.mixers[0])}
    return {"quantiles": list(QUANTILES), "layers": layers, "without": without}


def parts_of(mixer: BaseMixer) -> list[str]:
    """The parts that can be put back to the identity: those that `Mixer` has and that can be absent from it."""
    return [p for p in PARTS if isinstance(mixer, Mixer) and getattr(mixer, p) is not None]


def perplexity_of(student: StudentForCausalLM, batches: Sequence[Tensor], precision: str) -> float:
    return summarise(token_losses(student, batches, precision=precision))["ppl"]["value"]


def change(
    student: StudentForCausalLM, mixers: Sequence[BaseMixer], part: str, batches: Sequence[Tensor], before: float, precision: str
) -> float:
    """Perplexity with `part` at the identity in `mixers`, less that with it."""
    kept = [getattr(m, part) for m in mixers]
    try:
        for mixer in mixers:
            setattr(mixer, part, None)
        return perplexity_of(student, batches, precision) - before
    finally:
        for mixer, module in zip(mixers, kept, strict=True):
            setattr(mixer, part, module)


@contextmanager
def observed(mixers: Sequence[BaseMixer], seen: dict[int, dict[str, list[Tensor]]]) -> Iterator[None]:
    """Within the context, each forward adds to seen[layer]: "delta" (tokens, heads or more), "A", "gate" (tokens, D)."""
    handles = []

    def watch_decay(mixer: BaseMixer) -> None:
        recur, notes = mixer.recur, seen[mixer.layer_idx]

        def noting(q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None, *rest: Any, **options: Any) -> Tensor:
            if delta is not None and A is not None:
                notes.setdefault("delta", []).append(delta.float().flatten(0, 1).cpu())
                notes["A"] = [A.double().cpu()]
            return recur(q, k, v, delta, A, *rest, **options)

        mixer.recur = noting  # type: ignore[method-assign]

    def watch_gate(module: nn.Module, layer: int, read: Any) -> None:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen[layer].setdefault("gate", []).append(read(output).float().flatten(0, 1).cpu())

        handles.append(module.register_forward_hook(hook))

    for mixer in mixers:
        watch_decay(mixer)
        if isinstance(mixer, Mixer) and mixer.gate is not None:
            watch_gate(mixer.gate, mixer.layer_idx, lambda out: out)
        elif isinstance(mixer, MambaMixer):
            watch_gate(mixer.z_proj, mixer.layer_idx, F.silu)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.recur
        for handle in handles:
            handle.remove()


def statistics(mixer: BaseMixer, seen: dict[str, list[Tensor]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "delta" in seen:
        delta, (A,) = torch.cat(seen["delta"]).double(), seen["A"]
        mean = delta.mean(0)
        rate = (mean[(..., *[None] * (A.dim() - mean.dim()))] * A).flatten().sort().values
        found["decay_rate"] = [rate[round(q * (len(rate) - 1))].item() for q in QUANTILES]
        median = found["decay_rate"][len(QUANTILES) // 2]
        found["memory_tokens"] = 1 / median if median > 0 else None
        found["delta_spread"] = (delta.std(0) / mean).mean().item()
    if "gate" in seen:
        gate = torch.cat(seen["gate"])
        found["gate"] = {"mean": gate.mean().item(), "std": gate.std().item(), "closed": (gate.abs() < 0.1).double().mean().item()}
    conv = getattr(mixer, "conv", None)
    if conv is not None:
        found["conv_past"] = (conv.weight[:, :-1].norm() / conv.weight.norm().clamp_min(1e-20)).item()
    return found

