"""What a training step minimises: alignment (stage 1) or fine-tuning (stage 2, one-step and adapted teacher).

An objective owns its models, says which parameters it trains, and computes one micro-batch's gradients itself, so
that stage 1 can go back through one layer at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hm.adapters import adapter_for, capture_attention
from hm.convert import is_new, trainable
from hm.losses import cosine_loss, cross_entropy, kl_divergence
from hm.mixer import SelectiveDecay
from hm.modeling import StudentForCausalLM


class Objective(ABC):
    """`model`: what is trained; `parameters`: [(name, parameter, is it new)]; `flags`: what its settings' names begin
    with, for messages."""

    flags = "stage2."
    model: PreTrainedModel
    parameters: list[tuple[str, nn.Parameter, bool]]

    @abstractmethod
    def backward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradients of scale * loss for tokens (b, L + 1); returns {"loss": ..., ...}, detached scalars."""

    def project(self) -> None:
        """Between the last `backward` of a step and the optimiser: keep the parameters where they are defined."""
        for module in self.model.modules():
            if isinstance(module, SelectiveDecay):
                module.project_gradient()

    def suspect(self, chunks: Sequence[Tensor], losses: dict[str, float]) -> str:
        """Where the non-finite loss of a step comes from, in words; chunks: the step's micro-batches (b, L + 1)."""
        layers = adapter_for(getattr(self.model, "backbone", self.model).config).layers(
            getattr(self.model, "backbone", self.model)
        )
        found: list[str] = []

        def hook(index: int):
            def check(module: nn.Module, args: tuple, output) -> None:
                out = output[0] if isinstance(output, tuple) else output
                if not found and not torch.isfinite(out).all():
                    found.append(f"the output of layer {index} is the first that is not finite")

            return check

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
        try:
            with torch.no_grad():
                for tokens in chunks:
                    self.model(input_ids=tokens[:, :-1])
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else "every layer's output is finite, so it comes from the loss or the gradients"


class Align(Objective):
    """Stage 1: 1 - cos(student's mixer output, teacher's attention output), mean over tokens and layers.

    feed="teacher": each mixer sees the teacher's hidden state at its depth; one teacher pass, then gradients of one
    layer at a time. feed="student": it sees the student's own running hidden state; one backward through all layers.
    """

    flags = "stage1."

    def __init__(self, teacher: PreTrainedModel, student: StudentForCausalLM, feed: str = "teacher"):
        self.teacher, self.feed = teacher.eval(), feed
        self.model = self.student = student
        self.parameters = [(n, p, True) for n, p in trainable(student, "stage1")]

    def backward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        inputs = tokens[:, :-1]
        mixers = self.student.mixers
        backbone = self.teacher.base_model
        with torch.no_grad(), capture_attention(self.teacher) as captured:
            backbone(input_ids=inputs, use_cache=False)
        targets = [captured[m.layer_idx] for m in mixers]
        if self.feed == "teacher":
            losses = []
            for mixer, seen in zip(mixers, targets, strict=True):
                y, _ = mixer(seen.hidden, position_embeddings=seen.position_embeddings)
                loss = cosine_loss(y, seen.output)
                (loss * (scale / len(mixers))).backward()
                losses.append(loss.detach())
        else:
            outputs: list[Tensor] = []
            handles = [m.register_forward_hook(lambda mod, args, out: outputs.append(out[0])) for m in mixers]
            try:
                self.model(input_ids=inputs, logits_to_keep=1)
            finally:
                for handle in handles:
                    handle.remove()
            parts = [cosine_loss(y, seen.output) for y, seen in zip(outputs, targets, strict=True)]
            (torch.stack(parts).mean() * scale).backward()
            losses = [p.detach() for p in parts]
        by_layer = {f"layer.{m.layer_idx}": loss for m, loss in zip(mixers, losses, strict=True)}
        return {"loss": torch.stack(losses).mean(), **by_layer}

    def suspect(self, chunks: Sequence[Tensor], losses: dict[str, float]) -> str:
        bad = [name.split(".")[1] for name, value in losses.items() if name.startswith("layer.") and not math.isfinite(value)]
        return f"the alignment loss of layer {bad[0]} is the first that is not finite" if bad else "no layer stands out"


class FineTune(Objective):
    """Next-token cross-entropy, KL to the teacher's logits, or both: (1 - kl_weight) * ce + kl_weight * kl."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss: str = "ce",
        teacher: PreTrainedModel | None = None,
        kl_weight: float = 0.9,
        parameters: PreTrainedModel | None = None,
    ):
        """Trains all of `model` but its embeddings, or everything in `parameters` if that is given (pre-training)."""
        self.model, self.loss, self.teacher = model, loss, teacher
        self.kl_weight = {"ce": 0.0, "kl": 1.0, "ce+kl": kl_weight}[loss]
        if parameters is not None:
            self.flags = "--"
            self.parameters = [(n, p, False) for n, p in parameters.named_parameters()]
            return
        chosen = trainable(model, "stage2")
        self.parameters = [(n, p, isinstance(model, StudentForCausalLM) and is_new(model, n)) for n, p in chosen]

    def backward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        logits = self.model(input_ids=inputs, use_cache=False).logits
        ce = cross_entropy(logits, labels) if self.kl_weight < 1 else logits.new_zeros(())
        if self.kl_weight == 0:
            (ce * scale).backward()
            return {"loss": ce.detach()}
        assert self.teacher is not None
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=inputs, use_cache=False).logits
        kl = kl_divergence(logits, teacher_logits)
        loss = (1 - self.kl_weight) * ce + self.kl_weight * kl
        (loss * scale).backward()
        return {"loss": loss.detach(), "ce": ce.detach(), "kl": kl.detach()}
