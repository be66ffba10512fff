"""What a training step minimises: alignment (stage 1) or fine-tuning (stage 2, one-step and adapted teacher).

An objective owns its models, says which parameters it trains, and computes one micro-batch's gradients itself, so
that stage 1 can go back through one layer at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hm.adapters import AttentionRecord, adapter_for, capture_attention
from hm.compile import compiled, regions, unmasked
from hm.convert import is_new, trainable
from hm.losses import NextToken, cosine_loss, next_token_loss, relative_error
from hm.mixer import BaseMixer, SelectiveDecay
from hm.modeling import StudentForCausalLM


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """What makes hidden states of tokens: a teacher or student without its output embedding."""
    transformer: Any = getattr(model, "backbone", model)
    return transformer.base_model


def last_hidden(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, nn.Linear]:
    """tokens (b, L) -> the hidden states (b, L, D) that the output embedding turns into logits, and that embedding."""
    return decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state, model.get_output_embeddings()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    transformer: Any = getattr(model, "backbone", model)
    return list(adapter_for(transformer.config).layers(transformer))


def final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """What of the decoder comes after its layers and has weights."""
    others = (nn.Embedding, nn.ModuleList)
    return [m for m in decoder(model).children() if has_weights(m) and not isinstance(m, others)]


def has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class Objective(ABC):
    """`model`: what is trained; `parameters`: [(name, parameter, is it new)]; `flags`: what its settings' names begin
    with, for messages; `compiled`: whether it computes with torch.compile at present; `reduced`: whether `backward` leaves
    gradients that are means over all processes (hm.parallel)."""

    flags = "stage2."
    compiled = False
    reduced = False
    model: PreTrainedModel
    teacher: PreTrainedModel | None = None
    parameters: list[tuple[str, nn.Parameter, bool]]

    def regions(self) -> list[nn.Module]:
        """The modules to compile, each on its own."""
        return []

    def recomputed(self) -> list[nn.Module]:
        """The modules whose activations need not be kept."""
        return []

    @contextmanager
    def running(self, compile: bool = False, checkpointing: bool = False) -> Iterator[None]:
        """While the context lasts, `backward` uses torch.compile and activation checkpointing as asked."""
        self.compiled = compile
        try:
            with (
                regions(self.regions() if compile else [], self.recomputed() if checkpointing else []),
                unmasked([decoder(m) for m in (self.model, self.teacher) if m is not None] if compile else []),
            ):
                yield
        finally:
            self.compiled = False

    @abstractmethod
    def backward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradients of scale * loss for tokens (b, L + 1); returns {"loss": ..., ...}, detached scalars."""

    def project(self) -> None:
        """Between the last `backward` of a step and the optimiser: keep the parameters where they are defined."""
        for decay in self.decays:
            decay.project_gradient()

    @cached_property
    def decays(self) -> list[SelectiveDecay]:
        return [m for m in self.model.modules() if isinstance(m, SelectiveDecay)]

    def suspect(self, chunks: Sequence[Tensor], losses: dict[str, float]) -> str:
        """Where the non-finite loss of a step comes from, in words; chunks: the step's micro-batches (b, L + 1)."""
        found: list[str] = []

        def hook(index: int):
            def check(module: nn.Module, args: tuple, output) -> None:
                out = output[0] if isinstance(output, tuple) else output
                if not found and not torch.isfinite(out).all():
                    found.append(f"the output of layer {index} is the first that is not finite")

            return check

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(decoder_layers(self.model))]
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                for tokens in chunks:
                    decoder(self.model)(input_ids=tokens[:, :-1], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else "every layer's output is finite, so it comes from the loss or the gradients"


DISTANCES = {"cosine": cosine_loss, "mse": relative_error}
STAGE1 = {"maps": "stage1", "mixer": "mixers"}
"""What `hm.convert.to_train` calls that which stage1.train names."""


class Align(Objective):
    """Stage 1: how far the student's mixers' outputs are from the teacher's attention's, mean over tokens and layers.

    loss: "cosine", 1 - cos, or "mse", the squared error over the target's square. train: "maps" for the feature maps,
    or "mixer" for all of a mixer: its copied projections and every part.

    feed="teacher": each mixer sees the teacher's hidden state at its depth; one teacher pass, then gradients of one
    layer at a time. feed="student": it sees the student's own running hidden state; one backward through all layers.
    """

    flags = "stage1."
    teacher: PreTrainedModel

    def __init__(self, teacher: PreTrainedModel, student: StudentForCausalLM, feed: str = "teacher", train: str = "maps",
                 loss: str = "cosine"):  # fmt: skip
        self.teacher, self.feed, self.distance = teacher.eval(), feed, DISTANCES[loss]
        self.model = self.student = student
        self.parameters = [(n, p, is_new(student, n)) for n, p in trainable(student, STAGE1[train])]

    def regions(self) -> list[nn.Module]:
        """Parts of layers and not layers, so that what looks at attention and mixers stays outside."""
        models = [self.teacher, self.student] if self.feed == "student" else [self.teacher]
        return [part for model in models for layer in decoder_layers(model) for part in layer.children() if has_weights(part)]

    def recomputed(self) -> list[nn.Module]:
        return decoder_layers(self.student) if self.feed == "student" else []

    def backward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        inputs = tokens[:, :-1]
        mixers = self.student.mixers
        backbone = self.teacher.base_model
        with torch.no_grad(), capture_attention(self.teacher) as captured:
            backbone(input_ids=inputs, use_cache=False)
        targets = [captured[m.layer_idx] for m in mixers]
        if self.feed == "teacher":
            losses, align = [], compiled_alignment() if self.compiled else alignment
            for mixer, seen in zip(mixers, targets, strict=True):
                loss = align(mixer, seen, self.distance)
                (loss * (scale / len(mixers))).backward()
                losses.append(loss.detach())
        else:
            outputs: list[Tensor] = []
            handles = [m.register_forward_hook(lambda mod, args, out: outputs.append(out[0])) for m in mixers]
            try:
                decoder(self.model)(input_ids=inputs, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            parts = [self.distance(y, seen.output) for y, seen in zip(outputs, targets, strict=True)]
            (torch.stack(parts).mean() * scale).backward()
            losses = [p.detach() for p in parts]
        by_layer = {f"layer.{m.layer_idx}": loss for m, loss in zip(mixers, losses, strict=True)}
        return {"loss": torch.stack(losses).mean(), **by_layer}

    def suspect(self, chunks: Sequence[Tensor], losses: dict[str, float]) -> str:
        bad = [name.split(".")[1] for name, value in losses.items() if name.startswith("layer.") and not math.isfinite(value)]
        return f"the alignment loss of layer {bad[0]} is the first that is not finite" if bad else "no layer stands out"


def alignment(mixer: BaseMixer, seen: AttentionRecord, distance: Callable) -> Tensor:
    """The distance of what a mixer makes of attention's input to what attention made of it: a scalar."""
    y, _ = mixer(seen.hidden, position_embeddings=seen.position_embeddings)
    return distance(y, seen.output)


@cache
def compiled_alignment() -> Callable:
    return compiled(alignment)


class FineTune(Objective):
    """Next-token cross-entropy, KL to the teacher's logits, or both: (1 - kl_weight) * ce + kl_weight * kl.

    module: what computes `losses` where several processes share the work.
    """

    module: nn.Module | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        loss: str = "ce",
        teacher: PreTrainedModel | None = None,
        kl_weight: float = 0.9,
        pretraining: bool = False,
    ):
        """Trains all of `model` but its embeddings, or everything (pre-training)."""
        self.model, self.loss, self.teacher = model, loss, teacher
        self.kl_weight = {"ce": 0.0, "kl": 1.0, "ce+kl": kl_weight}[loss]
        if pretraining:
            self.flags = "--"
            self.parameters = [(n, p, False) for n, p in model.named_parameters()]
            return
        chosen = trainable(model, "stage2")
        self.parameters = [(n, p, isinstance(model, StudentForCausalLM) and is_new(model, n)) for n, p in chosen]

    def regions(self) -> list[nn.Module]:
        models = [self.model] if self.teacher is None else [self.model, self.teacher]
        return [m for model in models for m in (*decoder_layers(model), *final_norms(model))]

    def recomputed(self) -> list[nn.Module]:
        return decoder_layers(self.model)

    def losses(self, tokens: Tensor) -> NextToken:
        """The losses of tokens (b, L + 1)."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        teacher = None
        if self.kl_weight > 0:
            assert self.teacher is not None
            with torch.no_grad():
                teacher = last_hidden(self.teacher, inputs)
        return next_token_loss(
            *last_hidden(self.model, inputs), labels, kl_weight=self.kl_weight, teacher=teacher, fused=self.compiled
        )

    def backward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        found = (self.module or self.losses)(tokens)
        (found.loss * scale).backward()
        return {n: v.detach() for n, v in found._asdict().items() if self.kl_weight > 0 or n == "loss"}
