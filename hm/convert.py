"""Teacher -> student: what is copied, what is new, what is frozen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hm.adapters import adapter_for, check_config
from hm.config import MIXERS, FeatureMap, check_choice, check_ssm
from hm.errors import UserError
from hm.mixer import KINDS, Mixer, MixerSpec
from hm.modeling import StudentConfig, StudentForCausalLM

PROJECTIONS = dict.fromkeys(("qkv_proj", "o_proj", "q_norm", "k_norm"), "projections")


def convert(
    teacher: PreTrainedModel,
    mixer: str = "hedgemamba",
    *,
    ssm: bool | None = None,
    conv: bool | None = None,
    gate: bool | None = None,
    keep_attention: int | Sequence[int] | str | None = None,
    feature_map: FeatureMap | None = None,
    copy_projections: bool | None = None,
    decay: str = "head",
    ssm_init: str = "exact",
    scan: str = "auto",
    seed: int = 0,
) -> StudentForCausalLM:
    """A new student from a teacher; the teacher is not touched.

    Args:
        mixer: a name of `MIXERS`; `ssm`, `conv` and `gate` switch its parts on or off.
        keep_attention: n to keep attention in every n-th layer (the n-th, 2n-th, ...), or the layers' indices.
        copy_projections: start q, k, v and o from the teacher; by default True, except for mixer="mamba".
        decay: of the SSM: "head" (one per head, as in Mamba-2) or "channel" (per channel and state, as in Mamba-1).
        ssm_init: "exact" (nothing decays: the student starts as linear attention) or "decay" (heads remember 10 to 1000 tokens).
        seed: of what starts at random.

    Raises:
        UserError: unknown mixer, decay or ssm_init, a teacher that `check_config` refuses, layers that don't exist.
    """
    check_choice("mixer", mixer, MIXERS)
    check_ssm(mixer, decay, ssm_init)
    parts = {n: MIXERS[mixer][n] if v is None else v for n, v in (("ssm", ssm), ("conv", conv), ("gate", gate))}
    if not parts["ssm"]:
        decay, ssm_init = "head", "exact"  # nothing decays
    check_config(teacher.config)
    adapter = adapter_for(teacher.config)
    feature_map = feature_map or FeatureMap()
    kept = kept_layers(keep_attention, teacher.config.num_hidden_layers)
    spec = MixerSpec(
        kind=mixer, **parts, per_head=feature_map.per_head, softmax=feature_map.softmax,
        copy_projections=mixer != "mamba" if copy_projections is None else copy_projections,
        decay=decay, ssm_init=ssm_init, scan=scan, shape=vars(adapter.shape(teacher.config)).copy(),
    )  # fmt: skip
    config = StudentConfig(teacher_config=teacher.config.to_dict(), mixer=spec.to_dict(), keep_attention=kept)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with teacher.device:
            student = StudentForCausalLM(config, backbone=copy.deepcopy(teacher))
        for mixer_module in student.mixers if spec.copy_projections else []:
            attention = adapter.attention(adapter.layers(teacher)[mixer_module.layer_idx])
            mixer_module.copy_attention(adapter.split(attention, mixer_module.shape))
    finally:
        torch.set_rng_state(generator_state)
    student.to(dtype=teacher.dtype)  # type: ignore[call-arg]
    trainable(student, "stage2")
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def kept_layers(keep_attention: int | Sequence[int] | str | None, num_layers: int) -> list[int]:
    """Indices of the layers that keep attention.

    Raises:
        UserError: for an index that the teacher doesn't have, or anything that is neither a number nor a list.
    """
    value = keep_attention
    if value is None or value == [] or value == 0:
        return []
    if isinstance(value, str):
        try:
            value = [int(v) for v in value.strip("[]() ").split(",")] if "," in value or "[" in value else int(value)
        except ValueError:
            raise UserError(f"keep_attention={keep_attention} is no number and no list; write 4 or [3,7,11].") from None
    kept = list(range(value - 1, num_layers, value)) if isinstance(value, int) and 0 < value <= num_layers else value
    if not isinstance(kept, Sequence) or not all(isinstance(i, int) and 0 <= i < num_layers for i in kept):
        raise UserError(
            f"keep_attention={keep_attention} names a layer that the teacher doesn't have; its layers are 0 to {num_layers - 1}."
        )
    return sorted(set(kept))


def is_new(student: StudentForCausalLM, name: str) -> bool:
    """Whether a parameter (by name) is not copied from the teacher."""
    part = part_of(student, name)
    return part not in ("embeddings", "backbone", "attention") and not (
        part == "projections" and student.config.mixer["copy_projections"]
    )


def part_of(student: StudentForCausalLM, name: str) -> str:
    """The part a parameter belongs to: embeddings, backbone (norms, MLPs), attention (kept), projections, or a new part."""
    if any(name == n for n, _ in embeddings(student)):
        return "embeddings"
    pieces = name.split(".")
    table = PROJECTIONS | KINDS[student.config.mixer["kind"]].PARTS
    attention = student.adapter.attention_name
    if attention not in pieces:
        return "backbone"
    at = pieces.index(attention)
    kept = int(pieces[at - 1]) in student.config.keep_attention
    if kept:
        return "attention"
    if pieces[at + 1] not in table:
        raise UserError(f"{name}: PARTS of the mixer {student.config.mixer['kind']!r} does not say what part {pieces[at + 1]!r} is; add it there.")
    return table[pieces[at + 1]]


def embeddings(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """The input and output embeddings' parameters by name (one entry if they are tied)."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    wanted = {id(p) for m in modules for p in m.parameters()}
    return [(n, p) for n, p in model.named_parameters() if id(p) in wanted]


def trainable(model: PreTrainedModel, stage: str) -> list[tuple[str, nn.Parameter]]:
    """Set requires_grad for a stage and return what is trainable, as `to_train` says."""
    chosen = to_train(model, stage)
    model.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def to_train(model: PreTrainedModel, stage: str) -> list[tuple[str, nn.Parameter]]:
    """stage1: the feature maps. mixers: all of the mixers. stage2 (also the one-step and the adapted-teacher recipe):
    all but the embeddings."""
    if stage == "stage2":
        frozen = {n for n, _ in embeddings(model)}
        return [(n, p) for n, p in model.named_parameters() if n not in frozen]
    if not isinstance(model, StudentForCausalLM):
        return []
    if stage == "mixers":
        return [(n, p) for n, p in model.named_parameters() if part_of(model, n) not in ("embeddings", "backbone", "attention")]
    return [(n, p) for n, p in model.named_parameters() if part_of(model, n) == "feature map"]


@dataclass
class Report:
    """What conversion did, by part: number of parameters, whether copied or new, whether trainable in the stage."""

    rows: list[tuple[str, str, int, int]]
    mixer: str
    layers: int
    kept: list[int]

    @property
    def counts(self) -> dict:
        by_part = {part: count for part, _, count, _ in self.rows}
        return {
            "total": sum(by_part.values()),
            "new": sum(c for _, origin, c, _ in self.rows if origin == "new"),
            "trainable": sum(t for *_, t in self.rows),
            "by_part": by_part,
        }

    def __str__(self) -> str:
        head = f"{self.mixer}: {self.layers - len(self.kept)} of {self.layers} layers converted"
        if self.kept:
            head += f" (hybrid: attention kept in layers {', '.join(map(str, self.kept))})"
        lines = [head, f"  {'part':<14}{'origin':<8}{'parameters':>14}{'trainable':>14}{'frozen':>14}"]
        for part, origin, count, train in self.rows:
            lines.append(f"  {part:<14}{origin:<8}{count:>14,}{train:>14,}{count - train:>14,}")
        c = self.counts
        lines.append(f"  {'total':<14}{'':<8}{c['total']:>14,}{c['trainable']:>14,}{c['total'] - c['trainable']:>14,}")
        return "\n".join(lines)


def report(student: StudentForCausalLM, stage: str = "stage2") -> Report:
    """Parameters by part for a student, as `stage` would train it (`str()` of it is a table for people)."""
    training = {n for n, _ in to_train(student, stage)}
    rows: dict[tuple[str, str], list[int]] = {}
    for name, parameter in student.named_parameters():
        origin = "new" if is_new(student, name) else "copied"
        row = rows.setdefault((part_of(student, name), origin), [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if name in training else 0
    config = student.config
    kind = parts_name(config.mixer)
    return Report([(p, o, c, t) for (p, o), (c, t) in rows.items()], kind, config.num_hidden_layers, config.keep_attention)


def parts_name(spec: dict) -> str:
    """hedgehog, +ssm, +ssm+conv+gate, ...; a mixer of another kind by its name, with what was switched on or off, such as +gate."""
    if KINDS[spec["kind"]] is not Mixer:
        return spec["kind"] + "".join(f"{'+' if spec[p] else '-'}{p}" for p, on in MIXERS[spec["kind"]].items() if spec[p] != on)
    on = [p for p in ("ssm", "conv", "gate") if spec[p]]
    return "+" + "+".join(on) if on else "hedgehog"


def teacher_counts(model: PreTrainedModel) -> dict:
    """Parameter counts of a teacher in the form of `Report.counts`."""
    frozen = {id(p) for _, p in embeddings(model)}
    total = sum(p.numel() for p in model.parameters())
    embedded = sum(p.numel() for p in model.parameters() if id(p) in frozen)
    return {"total": total, "new": 0, "trainable": 0, "by_part": {"embeddings": embedded, "backbone": total - embedded}}
