"""The typed settings of one cell, and the sentence that a wrong one is answered with.

A cell is one point of a study: a teacher, a mixer, a budget, a split, a seed. What the study varies is flat at the
top (`mixer=`, `stage1_tokens=`); what is rarely touched sits in groups (`stage2.lr=`). `Settings` is what a user may
type; `Settings.resolve()` checks it and fills in what follows from it, without touching a GPU or loading a weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

from hm.errors import UserError

TASKS = ("arc_challenge", "arc_easy", "social_iqa", "piqa", "lambada_openai", "boolq", "race", "logiqa", "winogrande",
         "hellaswag")  # fmt: skip
"""The paper's zero-shot tasks, by lm-eval's names."""
MIXERS: dict[str, dict[str, bool]] = {
    "hedgehog": {"ssm": False, "conv": False, "gate": False},
    "ssm": {"ssm": True, "conv": False, "gate": False},
    "ssm_conv": {"ssm": True, "conv": True, "gate": False},
    "hedgemamba": {"ssm": True, "conv": True, "gate": True},
    "gate": {"ssm": False, "conv": False, "gate": True},
    "hedgehog_bypass": {"ssm": False, "conv": False, "gate": False},
    "mamba": {"ssm": True, "conv": True, "gate": True},
}
RECIPES = ("two_stage", "one_step", "teacher", "adapted_teacher")
TRACKERS = ("tensorboard", "wandb")
PARALLEL = ("auto", "ddp", "fsdp")
LOSSES = ("ce", "kl", "ce+kl")
TRAINED = ("maps", "mixer")
ALIGNMENTS = ("cosine", "mse")
DECAYS = ("head", "channel")
SSM_INITS = ("exact", "decay")
SCANS = ("auto", "fused", "ssd", "selective_scan", "chunked", "recurrent", "naive")
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1), "seq_len": (2, math.inf), "checkpoint_every": (1, math.inf),
    "log_every": (1, math.inf), "sequences": (1, math.inf), "batch_size": (1, math.inf), "warmup": (0, 1),
    "min_lr": (0, 1), "kl_weight": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.99999),
    "weight_decay": (0, math.inf), "clip": (0, math.inf), "validation_fraction": (1e-9, 0.5),
    "limit": (2, math.inf), "task_batch": (1, math.inf), "stride": (1, math.inf),
}  # fmt: skip
"""What a number may be, by the setting's last name."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def setting(default: Any, help: str, example: str, choices: Collection[str] | None = None) -> Any:
    """A dataclass field that carries its own line of `--help`."""
    meta = {"help": help, "example": example, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class FeatureMap:
    """phi, METHOD's equation of stage 1."""

    per_head: bool = setting(False, "one W, b per head instead of one per layer (the paper's counts say per layer)", "true")
    softmax: str = setting("joint", "softmax over all 2d features, or over each half", "separate", ("joint", "separate"))


@dataclass
class Stage:
    """How one stage is trained."""

    lr: float = setting(1e-3, "peak learning rate of parameters copied from the teacher", "3e-4")
    lr_new: float | None = setting(None, "peak learning rate of new parameters; null: the same as lr", "1e-2")
    warmup: float = setting(0.05, "part of the steps with linear warm-up", "0.02")
    min_lr: float = setting(0.1, "the cosine ends at this part of the peak", "0.0")
    weight_decay: float = setting(0.1, "AdamW weight decay, on matrices only", "0.0")
    beta1: float = setting(0.9, "AdamW beta1", "0.9")
    beta2: float = setting(0.95, "AdamW beta2", "0.99")
    clip: float = setting(1.0, "clip the gradient to this norm; 0 switches it off", "0.5")
    batch_size: int = setting(8, "sequences per step", "48")
    micro_batch: int | None = setting(None, "sequences per backward pass (gradient accumulation); null: all at once", "4")


@dataclass
class Stage1(Stage):
    lr: float = setting(1e-2, "peak learning rate: of the feature maps, or with train=mixer of what is copied", "3e-3")
    weight_decay: float = setting(0.0, "AdamW weight decay, on matrices only", "0.1")
    feed: str = setting(
        "teacher", "whose hidden states the student's layers see", "student", ("teacher", "student")
    )
    train: str = setting("maps", "what learns: the feature maps (the paper's), or the whole mixer with every part", "mixer", TRAINED)
    loss: str = setting("cosine", "1 - cos to attention's output (the paper's), or its relative squared error", "mse", ALIGNMENTS)


@dataclass
class Stage2(Stage):
    loss: str = setting("ce", "next-token cross-entropy, KL to the teacher's logits, or both", "ce+kl", LOSSES)
    kl_weight: float = setting(0.9, "weight of the KL in loss=ce+kl (cross-entropy gets the rest)", "0.5")


@dataclass
class Evaluate:
    """Perplexity at the training length is always measured; what else is, is said here."""

    sequences: int | None = setting(200, "validation sequences for perplexity; null: all", "1000")
    batch_size: int = setting(8, "sequences per evaluation batch", "32")
    tasks: Any = setting(None, "lm-eval tasks: a list, or all (the paper's ten); null: none", "[arc_easy,piqa]")
    data: str = setting("hub", "items of the tasks: hub, or a folder of <task>.jsonl (plain, .xz, .gz, .zst), each line with the fields that the task reads", "data/eval")
    limit: int | None = setting(None, "items of each task; null: all", "50")
    task_batch: int = setting(64, "requests per batch of lm-eval", "16")
    lengths: Any = setting(None, "longer sequences, also beyond what the teacher was made for, whose perplexity is measured by position; null: none", "[512,1024]")
    stride: int | None = setting(None, "also perplexity from a window of seq_len tokens moved by so many, of which the last so many count: the same tokens with more before them; it costs seq_len/stride times as much; null: not", "128")
    recall: bool = setting(False, "multi-query associative recall on random pairs of tokens", "true")
    needle: Any = setting(None, "lengths of text, also beyond what the teacher was made for, in which a number is hidden and asked for; null: none", "[512,1024]")
    generation: bool = setting(False, "score generated continuations: repetition, distinct n-grams, teacher's likelihood", "true")
    agreement: bool = setting(False, "top-1 agreement with the teacher and KL to it on held-out text", "true")
    diagnostics: bool = setting(False, "per layer: decay, memory length, gate, and perplexity with a part taken out", "true")

    def resolve(self) -> Evaluate:
        """A copy whose lists are lists (or null): eval.tasks=all becomes the ten names, 1024 becomes [1024].

        Raises:
            UserError: an unknown task, a length that is none.
        """
        e = dataclasses.replace(self)
        e.tasks = list(TASKS) if e.tasks == "all" else as_list(e.tasks)
        for task in e.tasks or []:
            check_choice("eval.tasks", task, ("all", *TASKS))
        for name, least in (("lengths", 2), ("needle", 64)):
            sizes = as_list(getattr(e, name))
            if not all(isinstance(n, int) and n >= least for n in sizes or []):
                raise UserError(f"eval.{name}={getattr(e, name)} must be a list of lengths of at least {least} tokens, such as eval.{name}=[1024,4096].")
            setattr(e, name, sizes and sorted(sizes))
        return e


@dataclass
class MambaInit:
    """The one-step baseline's mixer."""

    copy_projections: bool = setting(False, "start C, B, x and output projections from the teacher's q, k, v, o", "true")


@dataclass
class Settings:
    """What a user may type. `resolve()` turns it into what is run."""

    scale: str = setting("tiny", "the scale that the defaults come from (a file of sweeps/scale/)", "smollm2")
    study: str = setting("default", "name of the study that the records are filed under; -m +study=NAME sets it", "mixer")
    row: str | None = setting(None, "row of the study's table that this cell fills", "hedgemamba")
    teacher: str = setting("tiny", "tiny, smollm2, a hub id, a folder, or a .gguf file", "EleutherAI/pythia-1b")
    recipe: str = setting("two_stage", "what is trained; typed, it names a file of sweeps/recipe, which sets this and more", "one_step", RECIPES)
    mixer: str = setting("hedgemamba", "what replaces attention", "hedgehog", MIXERS)
    ssm: bool | None = setting(None, "switch the SSM of the mixer on or off; null: as the mixer says", "false")
    conv: bool | None = setting(None, "switch the convolution on or off; null: as the mixer says", "false")
    gate: bool | None = setting(None, "switch the gate on or off; null: as the mixer says", "true")
    decay: str = setting("head", "decay of the SSM: one per head (Mamba-2) or per channel and state (Mamba-1)", "channel", DECAYS)
    ssm_init: str = setting("exact", "start of the SSM: exact (nothing decays, linear attention) or decay (memories of 10 to 1000 tokens, from head to head)", "decay", SSM_INITS)
    budget: Any = setting(None, "tokens of both stages together, or a part of default_budget", "20M")
    stage1_tokens: Any = setting(None, "tokens of stage 1, or a part of the budget", "10%")
    stage2_tokens: Any = setting(None, "tokens of stage 2, or a part of the budget", "18M")
    default_budget: Any = setting("500k", "budget where none of the three is given (set by the scale)", "1B")
    seed: int = setting(0, "seed of new parameters and of the data's order", "1")
    data: str = setting("docstrings", "docstrings, a file, folder or glob of text, or hf:<name>", "hf:openwebtext")
    validation: str | None = setting(None, "own validation text; null: a document-disjoint part of data", "val.jsonl.xz")
    text_key: str = setting("text", "the key or column of JSON lines and datasets that holds the text", "content")
    validation_fraction: float = setting(0.005, "part of the documents held out where validation is null", "0.01")
    seq_len: int = setting(256, "tokens per sequence", "1024")
    keep_attention: Any = setting(None, "layers that keep attention: every n-th, or a list; null: none", "[3,7,11]")
    scan: str = setting("auto", "back end of the recurrence", "chunked", SCANS)
    device: str = setting("auto", "auto (cuda if there is one), cpu, cuda", "cpu", ("auto", "cpu", "cuda"))
    precision: str = setting("auto", "auto: bf16 on cuda, fp32 on cpu", "bf16", ("auto", "fp32", "bf16"))
    compile: bool | None = setting(None, "torch.compile for training, layer by layer; null: on cuda", "false")
    checkpointing: bool = setting(False, "compute activations again in the backward pass instead of keeping them", "true")
    export: str | None = setting(None, "leave the finished student in this new folder, with tokenizer and model card", "student")
    parallel: str = setting("auto", "of several processes (accelerate launch): ddp, or fsdp to cut the model over them; auto: ddp", "fsdp", PARALLEL)
    force: bool = setting(False, "run a finished cell again, beside the old one", "true")
    checkpoint_every: int = setting(200, "steps between checkpoints", "1000")
    log_every: int = setting(10, "steps between logged losses", "50")
    tracker: str = setting("tensorboard", "TensorBoard's event files (in runs/tensorboard), or Weights & Biases as well", "wandb", TRACKERS)
    feature_map: FeatureMap = field(default_factory=FeatureMap)
    mamba: MambaInit = field(default_factory=MambaInit)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    eval: Evaluate = field(default_factory=Evaluate)

    def resolve(self) -> Settings:
        """A checked copy in which budget, stage1_tokens and stage2_tokens are numbers and the parts are booleans.

        Raises:
            UserError: for anything that can be seen to be wrong without loading a weight.
        """
        s = cast(Settings, dataclasses.replace(self))
        for section, value in [("", s), *((g + ".", getattr(s, g)) for g in GROUPS)]:
            for f in dataclasses.fields(value):
                choices, typed = f.metadata.get("choices"), getattr(value, f.name)
                if choices:
                    check_choice(section + f.name, typed, choices)
                low, high = LIMITS.get(f.name, (0, math.inf))
                if f.name in LIMITS and typed is not None and not low <= typed <= high:
                    wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                    name, example = section + f.name, f.metadata["example"]
                    raise UserError(f"{name}={typed} must be {wanted}, such as {name}={example}.")
        s.budget, s.stage1_tokens, s.stage2_tokens = split_tokens(s)
        if s.recipe == "teacher":
            s.seed = 0  # nothing about it is drawn
        if s.recipe == "one_step":
            if self.mixer not in ("mamba", "hedgemamba"):
                raise UserError(f"recipe=one_step trains a plain Mamba, so mixer={self.mixer} does not go with it; leave mixer out.")
            s.mixer = "mamba"
        elif s.mixer == "mamba" and s.recipe == "two_stage":
            raise UserError("mixer=mamba has no structured start, so it takes recipe=one_step, not recipe=two_stage.")
        check_ssm(s.mixer, s.decay, s.ssm_init)
        s.eval = self.eval.resolve()
        if s.export is not None and s.recipe == "teacher":
            raise UserError(f"export={s.export} does not go with recipe=teacher, which trains nothing; leave it out.")
        parts = MIXERS[s.mixer]
        for part in ("ssm", "conv", "gate"):
            typed = getattr(s, part)
            if s.mixer == "mamba" and typed is False:
                raise UserError(f"{part}=false can't be had with mixer=mamba, which is a whole block; leave {part} out.")
            setattr(s, part, parts[part] if typed is None else typed)
        if not s.ssm:
            s.decay, s.ssm_init = "head", "exact"  # nothing decays
        for name, stage in (("stage1", s.stage1), ("stage2", s.stage2)):
            if stage.micro_batch is not None and (stage.micro_batch < 1 or stage.batch_size % stage.micro_batch):
                raise UserError(f"{name}.micro_batch={stage.micro_batch} must divide {name}.batch_size={stage.batch_size}.")
            for rate in ("lr", "lr_new"):
                if getattr(stage, rate) is not None and not 0 < getattr(stage, rate) < math.inf:
                    raise UserError(f"{name}.{rate}={getattr(stage, rate)} must be a positive number, such as 1e-3.")
            tokens = s.stage1_tokens if name == "stage1" else s.stage2_tokens
            per_step = stage.batch_size * s.seq_len
            if 0 < tokens < per_step:
                raise UserError(
                    f"{name}_tokens={tokens} is less than one step of {name}.batch_size x seq_len = {per_step} tokens; "
                    f"raise it to {per_step} or make the batch smaller."
                )
        return s


GROUPS = ("feature_map", "mamba", "stage1", "stage2", "eval")


def as_list(value: Any) -> list | None:
    """A list, one value or a text such as "[1024,4096]" as a list without doubles; nothing (also []) as None."""
    if isinstance(value, str):
        value = [int(v) if v.isdigit() else v for v in re.split(r"[\s,]+", value.strip("[]() ")) if v]
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return list(dict.fromkeys(values)) or None


def tokens(value: Any, name: str = "tokens", budget: int | None = None) -> int:
    """A token count: 50k, 20M, 1B, 1e9, 1000, or with a budget also "10%".

    Raises:
        UserError: if it is none of these, negative, or no whole number.
    """
    text = str(value).strip().replace("_", "")
    if text.endswith("%") and budget is not None:
        part = _number(text[:-1], name, value)
        if not 0 <= part <= 100:
            raise UserError(f"{name}={value} is no part of the budget; write 0% to 100%, or a count like 20M.")
        return round(part / 100 * budget)
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMbBtT]?)", text)
    if not match:
        raise UserError(f"{name}={value} is no token count; write it like 50k, 20M, 1B or 1e9.")
    count = _number(match[1], name, value) * _UNITS[match[2].lower()]
    if count == math.inf:
        raise UserError(f"{name}={value} is too large; write it like 50k, 20M, 1B or 1e9.")
    if abs(count - round(count)) > 1e-6 * max(1.0, count):
        raise UserError(f"{name}={value} is no whole number of tokens; write it like 50k, 20M, 1B or 1e9.")
    return round(count)


def _number(text: str, name: str, value: Any) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name}={value} is no number; write it like 50k, 20M, 1B, 1e9 or 10%.") from None


def human(count: int) -> str:
    """The shortest form that `tokens` reads back as the same count: 50k, 20M, 1.5B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            text = f"{count / size:g}{unit}"
            return text if tokens(text) == count and len(text) < len(str(count)) else str(count)
    return str(count)


def split_tokens(s: Settings) -> tuple[int, int, int]:
    """Any two of budget, stage1_tokens and stage2_tokens give the third; three that disagree are an error.

    Returns (budget, stage1_tokens, stage2_tokens). One-step cells spend the whole budget in one go, which is counted
    as stage 2; the untouched teacher spends nothing; the adapted teacher passes over
    stage 1's tokens and is trained on stage 2's.
    """
    if s.recipe == "teacher":
        return 0, 0, 0
    default = tokens(s.default_budget, "default_budget")
    both_stages = s.stage1_tokens is not None and s.stage2_tokens is not None
    budget = tokens(s.budget, "budget", default) if s.budget is not None else None
    base = budget if budget is not None else default
    one = tokens(s.stage1_tokens, "stage1_tokens", base) if s.stage1_tokens is not None else None
    two = tokens(s.stage2_tokens, "stage2_tokens", base) if s.stage2_tokens is not None else None
    if s.recipe == "one_step":
        if one:
            raise UserError(f"stage1_tokens={s.stage1_tokens} does not go with recipe=one_step, which has one stage; leave it out.")
        if budget is not None and two is not None and two != budget:
            raise UserError(
                f"budget={s.budget} and stage2_tokens={s.stage2_tokens} don't agree, and recipe=one_step has one "
                "stage; give one of them."
            )
        return (base, 0, base) if two is None else (two, 0, two)
    if both_stages and budget is None and "%" in f"{s.stage1_tokens}{s.stage2_tokens}":
        budget = default
    if both_stages and budget is not None and one + two != budget:  # type: ignore[operator]
        raise UserError(
            f"budget={s.budget or human(budget)}, stage1_tokens={s.stage1_tokens} and stage2_tokens={s.stage2_tokens} don't add up "
            f"({one} + {two} is not {budget}); give two of the three."
        )
    if both_stages:
        budget = one + two  # type: ignore[operator]
    else:
        budget = base
        if two is None:
            one = round(0.1 * budget) if one is None else one
            two = budget - one
        else:
            one = budget - two
    if one is None or two is None or one < 0 or two < 0:
        big = "stage1_tokens" if two is not None and two < 0 else "stage2_tokens"
        raise UserError(
            f"{big}={getattr(s, big)} is more than the budget of {human(budget)} tokens; "  # type: ignore[arg-type]
            f"raise budget= or lower {big}=."
        )
    return budget, one, two  # type: ignore[return-value]


def check_ssm(mixer: str, decay: str, ssm_init: str = "exact") -> None:
    """Raise a UserError for a decay or a start that is unknown or that the mixer can't have."""
    check_choice("decay", decay, DECAYS)
    check_choice("ssm_init", ssm_init, SSM_INITS)
    if mixer == "mamba" and ssm_init != "exact":
        raise UserError(f"ssm_init={ssm_init} can't be had with mixer=mamba, which has Mamba-2's own start; leave ssm_init out.")
    if mixer == "mamba" and decay != "head":
        raise UserError(f"decay={decay} can't be had with mixer=mamba, which is Mamba-2's block with one decay per head; leave decay out.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a UserError that names the nearest right value if `value` is not among `choices`."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.4)
        hint = f"did you mean {name}={near[0]}? " if near else ""
        raise UserError(f"{name}={value} is not known; {hint}Known: {', '.join(map(str, choices))}.")


def names() -> dict[str, dataclasses.Field]:
    """Every setting by its full name: {"mixer": Field, "stage2.lr": Field, ...}."""
    found: dict[str, dataclasses.Field] = {}
    for f in dataclasses.fields(Settings):
        inside = names_in(f.name) if f.name in GROUPS else {}
        found |= {f"{f.name}.{n}": g for n, g in inside.items()} or {f.name: f}
    return found


def names_in(group: str) -> dict[str, dataclasses.Field]:
    """The settings of a group: {"lr": Field, ...}."""
    return {f.name: f for f in dataclasses.fields(getattr(Settings(), group))}


def check_names(given: list[str]) -> None:
    """Raise a UserError for the first name that is no setting, with the nearest right one."""
    known = names()
    for name in given:
        if name not in known and name not in GROUPS:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4) or [
                k for k in known if k.split(".")[-1] == name.split(".")[-1]
            ]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"there is no setting {name!r}{hint} (python sweep.py --help lists them all).")


def from_dict(values: dict[str, Any]) -> Settings:
    """Settings from nested or dotted names; a wrong name or type is a UserError."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in GROUPS and not isinstance(value, dict):
            one = next(iter(names_in(name)))
            raise UserError(f"{name}={value} is a group of settings; name one of them, such as {name}.{one}.")
        if isinstance(value, dict) and name in GROUPS:
            flat |= {f"{name}.{k}": v for k, v in value.items()}
        else:
            flat[name] = value
    check_names(list(flat))
    known, settings = names(), Settings()
    for name, value in flat.items():
        group, _, leaf = name.rpartition(".")
        target = getattr(settings, group) if group else settings
        setattr(target, leaf, _typed(name, value, known[name]))
    return settings


def _typed(name: str, value: Any, f: dataclasses.Field) -> Any:
    """`value` as the field's type; "3e-4" is a float, "4" an int."""
    kinds = {"bool": bool, "int": int, "float": float, "str": str}
    options = [kinds[k.strip()] for k in str(f.type).split("|") if k.strip() in kinds]
    if (value is None and "None" in str(f.type)) or not options:
        return value
    kind = options[0]
    try:
        if value is None or (isinstance(value, bool) and kind is not bool) or isinstance(value, (list, dict)):
            raise ValueError
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise UserError(f"{name}={value} must be {wanted}, such as {name}={f.metadata['example']}.") from None


def help_text() -> str:
    """Every setting with its meaning, default, choices and an example."""
    lines = []
    for name, f in names().items():
        default = getattr(getattr(Settings(), name.split(".")[0]), name.split(".")[1]) if "." in name else getattr(Settings(), name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        choices = f.metadata.get("choices")
        lines.append(f"  {name:<27}{f.metadata['help']}")
        also = f"  one of: {', '.join(choices)}" if choices else ""
        example = f"{'+' if name == 'study' else ''}{name}={f.metadata['example']}"
        lines.append(f"  {'':<27}  default: {shown}   example: {example}{also}")
    return "\n".join(lines)


