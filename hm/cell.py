"""One cell of a study: tokens -> stage 1 -> stage 2 -> evaluation -> record; each step is looked up before it is computed.

Each step's key is a hash of what determines its result: the content of the teacher and of the text, and the settings
that matter to it, through the keys of the steps before. So cells that share a step share its artifact, whatever study
they belong to, and a cell that is done is found done. `Cell.run` does all steps; `Cell.step_keys` and `Cell.run_step`
are for those who plan many cells and run each shared step once.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hm import parallel
from hm.check import check, pick_device
from hm.config import MIXERS, Settings, Stage1, human
from hm.convert import convert, parts_name, report, teacher_counts, to_train
from hm.data import Batches, DataSpec, TokenDataset, tokenize, validation_batches
from hm.errors import Interrupted, UserError
from hm.evaluate import summarise, token_losses
from hm.export import export, exported
from hm.files import weight_errors
from hm.inputs import Inputs
from hm.measure import enough_text, measure, wanted
from hm.mixer import KINDS, Mixer, own_feature_map
from hm.modeling import StudentForCausalLM, load_student
from hm.objectives import STAGE1, Align, FineTune
from hm.progress import progress_bar, say
from hm.provenance import provenance
from hm.record import write_record
from hm.store import Store, atomic_write, content_key, to_json
from hm.tasks import ask_hub
from hm.teacher import load_teacher
from hm.tracking import Watch, open_trackers
from hm.train import Run, train

FORMAT = 1
"""Raised when a change of the code changes what a step computes from the same settings."""


class Cell:
    """A resolved cell in a store. `run()` gives its record.

    device: of the machine that will run it, where that is not this one. inputs: what the cells of one sweep share.
    stop: asked again and again while a step runs; once it says True, the step saves its state and raises `Interrupted`.
    """

    def __init__(self, settings: Settings, store: Store, *, device: torch.device | None = None, inputs: Inputs | None = None,
                 stop: Callable[[], bool] = lambda: False):  # fmt: skip
        self.inputs, self.stop = inputs or Inputs(), stop
        self.s, self.store = check(settings, device, self.inputs), store
        self.device = device or pick_device(self.s.device)
        self.precision = self.s.precision
        if self.precision == "auto":
            self.precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.spec = DataSpec(self.s.data, self.s.validation, self.s.text_key, validation_fraction=self.s.validation_fraction)
        self.untouched = self.s.recipe == "teacher"
        self.is_student = self.s.recipe in ("two_stage", "one_step")
        self.stage1_steps = self._steps("stage1") if self.s.recipe == "two_stage" else 0
        self.stage2_steps = self._steps("stage2")

    def _steps(self, stage: str) -> int:
        return getattr(self.s, f"{stage}_tokens") // (getattr(self.s, stage).batch_size * self.s.seq_len)

    # --- keys

    @cached_property
    def tokens_key(self) -> str:
        return self.inputs.tokens_key(self.s.teacher, self.spec)

    @cached_property
    def base_key(self) -> dict[str, Any]:
        """What every training step's result depends on."""
        s = self.s
        return {"format": FORMAT, "teacher": self.inputs.teacher(s.teacher), "tokens": self.tokens_key, "seq_len": s.seq_len,
                "seed": s.seed, "precision": self.precision}  # fmt: skip

    @cached_property
    def stage1_key(self) -> str | None:
        if self.stage1_steps == 0:
            return None
        s = self.s
        what: dict[str, Any] = {"step": "stage1", **self.base_key, "stage": recipe_of(s.stage1), "steps": self.stage1_steps,
                                "feature_map": vars(s.feature_map), "keep_attention": self.kept_in_stage1}  # fmt: skip
        if s.stage1.train == "mixer":
            what |= self.mixer_key
        elif own_feature_map(s.mixer):
            what["mixer"] = s.mixer
        return content_key(what)

    @property
    def kept_in_stage1(self) -> Any:
        """Layers that stage 1 leaves out: where the teacher feeds the feature maps, what other students keep is trained
        as well, so that they share it."""
        return self.s.keep_attention if self.s.stage1.feed == "student" or self.s.stage1.train == "mixer" else None

    @property
    def mixer_key(self) -> dict[str, Any]:
        """What makes the mixer, apart from its feature maps."""
        s = self.s
        what: dict[str, Any] = {"ssm": s.ssm, "conv": s.conv, "gate": s.gate}
        if s.mixer == "mamba":
            what |= {"mixer": s.mixer, "mamba": vars(s.mamba)}
        elif KINDS[s.mixer] is not Mixer:  # a name of a plain one says no more than its parts
            what["mixer"] = s.mixer
        varied = {"decay": (s.decay, "head"), "ssm_init": (s.ssm_init, "exact")}
        return what | {name: value for name, (value, default) in varied.items() if value != default}

    @cached_property
    def student_key(self) -> str | None:
        s = self.s
        if self.untouched:
            return None
        what: dict[str, Any] = {"step": "student", **self.base_key, "recipe": s.recipe, "stage": recipe_of(s.stage2),
                                "steps": self.stage2_steps, "first_block": self.first_block}  # fmt: skip
        if self.is_student:
            what |= self.mixer_key | {"feature_map": vars(s.feature_map), "keep_attention": s.keep_attention,
                                      "stage1": self.stage1_key}  # fmt: skip
        return content_key(what)

    @cached_property
    def key(self) -> str:
        sequences, seq_len = self.s.eval.sequences, self.s.seq_len
        return content_key({"step": "eval", "format": FORMAT, "teacher": self.inputs.teacher(self.s.teacher),
                            "tokens": self.tokens_key, "student": self.student_key, "sequences": sequences,
                            "seq_len": seq_len, "precision": self.precision, **wanted(self.s)})  # fmt: skip

    @property
    def parts(self) -> str:
        """hedgehog, +ssm, +ssm+conv+gate, ..."""
        return parts_name({"kind": self.s.mixer, "ssm": self.s.ssm, "conv": self.s.conv, "gate": self.s.gate})

    @property
    def first_block(self) -> int:
        """Stage 2 goes on in the text where stage 1 of the same budget ends."""
        s = self.s
        return 0 if s.recipe == "one_step" else s.stage1_tokens // (s.stage1.batch_size * s.seq_len) * s.stage1.batch_size

    @property
    def name(self) -> str:
        """hedgemamba-10-90-s0, teacher, adapted_teacher-s1, ..."""
        s = self.s
        if s.row:
            base = "".join(c if c.isalnum() or c in "._" else "-" for c in s.row).strip("-")
        elif s.recipe == "two_stage":
            share = 100 * s.stage1_tokens / max(1, s.budget)
            named = {tuple(p.values()): m for m, p in reversed(MIXERS.items()) if KINDS[m] is Mixer}
            parts = (bool(s.ssm), bool(s.conv), bool(s.gate))
            typed = self.parts.strip("+").replace("+", "_").replace("-", "_no_")
            mixer = typed if KINDS[s.mixer] is not Mixer else named.get(parts, typed)
            base = f"{mixer}{'-channel' if s.decay == 'channel' else ''}{'-decay' if s.ssm_init == 'decay' else ''}-{share:.3g}-{100 - share:.3g}"
        else:
            base = s.recipe
        base += "-hybrid" if self.is_student and s.keep_attention else ""
        return base if self.untouched else f"{base}-s{s.seed}"

    # --- steps

    def step_keys(self) -> dict[str, str]:
        """The steps of this cell by kind, each with its artifact's key, in their order: each needs those before it."""
        keys = {"tokens": self.tokens_key, "stage1": self.stage1_key, "student": self.student_key, "eval": self.key}
        return {kind: key for kind, key in keys.items() if key}

    def run_step(self, kind: str) -> None:
        """Compute one step's artifact, and what it needs as far as that is missing."""
        if kind != "tokens":
            self.enough_text()
        steps: dict[str, Callable[[], object]]
        steps = {"tokens": self.tokens, "stage1": self.stage1, "student": self.student, "eval": self.evaluate}
        steps[kind]()

    def tokens(self) -> Path:
        """The token shards."""

        def build(work: Path) -> dict:
            start = time.perf_counter()
            vocab = self.inputs.config(self.s.teacher).vocab_size

            def shown(tokens: int, size: int) -> None:
                bar.update(size - bar.n)
                if self.stop():
                    raise Interrupted("tokenising was asked to stop; whole shards are kept")

            with progress_bar(desc="tokenise", unit="B", unit_scale=True) as bar:
                tokenize(self.spec, self.inputs.tokenizer(self.s.teacher), work, vocab_size=vocab, progress=shown)
            return {"seconds": time.perf_counter() - start}

        about = {"data": self.s.data, "validation": self.s.validation}
        return parallel.on_main(lambda: self.store.artifact("tokens", self.tokens_key, build, about))

    @cached_property
    def train_tokens(self) -> TokenDataset:
        return TokenDataset(self.tokens(), "train")

    def enough_text(self) -> None:
        """Refuse text that is too short for a batch of any stage, or for evaluation, before anything is trained."""
        s = self.s
        for name, stage, steps in (("stage1", s.stage1, self.stage1_steps), ("stage2", s.stage2, self.stage2_steps)):
            if steps:
                parallel.rows(stage.batch_size, f"{name}.")
                Batches(self.train_tokens, s.seq_len, stage.batch_size, s.seed)
        enough_text(s, TokenDataset(self.tokens(), "validation"))

    def teacher(self) -> PreTrainedModel:
        return self.on_device(load_teacher(self.s.teacher))

    def on_device(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(device=self.device)  # type: ignore[call-arg]

    def fresh_student(self, teacher: PreTrainedModel, stage1: bool = False) -> StudentForCausalLM:
        """A converted student; stage1: as stage 1 trains it, which for feature maps alone is a plain Hedgehog student,
        or one of a mixer that has other feature maps, without its parts."""
        s = self.s
        plain = stage1 and s.stage1.train == "maps"
        kept = self.kept_in_stage1 if stage1 else s.keep_attention
        parts = {"ssm": False, "conv": False, "gate": False} if plain else {"ssm": s.ssm, "conv": s.conv, "gate": s.gate}
        if s.mixer == "mamba":
            return convert(teacher, "mamba", keep_attention=kept, copy_projections=s.mamba.copy_projections, scan=s.scan, seed=s.seed)
        return convert(teacher, "hedgehog" if plain and not own_feature_map(s.mixer) else s.mixer, **parts, keep_attention=kept, feature_map=s.feature_map,
                       decay=s.decay, ssm_init=s.ssm_init, scan=s.scan, seed=s.seed)

    @contextmanager
    def watched(self, name: str, work: Path, key: str, steps: int, stage: Any) -> Iterator[Run]:
        """The run of one stage in its work folder, with all who watch it (through the first of several processes)."""

        def trackers() -> list:
            return open_trackers(self.store.root / "tensorboard" / s.study, f"{self.name} {name}", key, s.tracker)

        s = self.s
        run = Run(f"{self.name} {name}", work, key, self.device, self.precision, s.checkpoint_every, s.log_every,
                  lambda step: self.stop(), s.compile, s.checkpointing, s.parallel)  # fmt: skip
        if parallel.rank() > 0:
            yield run
            return
        with Watch(work, steps, stage.batch_size * s.seq_len, trackers, self.stop) as watch:
            yield dataclasses.replace(run, stop=watch)

    def stage1(self, teacher: PreTrainedModel | None = None) -> Path | None:
        """The artifact with what stage 1 learns, the feature maps or whole mixers; None without a stage 1."""
        if self.stage1_key is None:
            return None
        key, s = self.stage1_key, self.s

        def build(work: Path) -> dict:
            source = teacher or self.teacher()
            student = self.fresh_student(source, stage1=True)
            objective = Align(source, student, s.stage1.feed, s.stage1.train, s.stage1.loss)
            batches = Batches(self.train_tokens, s.seq_len, s.stage1.batch_size, s.seed)
            with self.watched("stage 1", work, key, self.stage1_steps, s.stage1) as run:
                result = train(objective, batches.batch, self.stage1_steps, s.stage1, run)
            if parallel.rank() > 0:
                return result
            learnt = {n: p.detach().cpu().contiguous() for n, p in to_train(student, STAGE1[s.stage1.train])}
            with weight_errors():
                save_file(learnt, work / self.stage1_file)
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
            return result

        return parallel.artifact(self.store, "stage1", key, build, self.described())

    @property
    def stage1_file(self) -> str:
        return "feature_maps.safetensors" if self.s.stage1.train == "maps" else "mixers.safetensors"

    def converted(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """What stage 2 starts from: the student with what stage 1 learnt, or a teacher to be adapted."""
        if not self.is_student:
            return teacher
        s, student = self.s, self.fresh_student(teacher)
        folder = self.stage1(teacher)
        if folder is not None:
            learnt = load_file(folder / self.stage1_file, device=str(self.device))
            kept = student.config.keep_attention
            expected = {n for n, _ in to_train(student, STAGE1[s.stage1.train])}
            learnt = {n: t for n, t in learnt.items() if not any(f".layers.{i}." in n for i in kept)}
            if set(learnt) != expected:
                raise UserError(f"{folder} holds other parameters than this student has; delete the folder and run again.")
            student.load_state_dict(learnt, strict=False)
        return student

    def student(self) -> Path:
        """The artifact with the trained student (or adapted teacher), as `save_pretrained` writes it."""
        assert self.student_key is not None
        key, s = self.student_key, self.s

        def build(work: Path) -> dict:
            teacher = self.teacher()
            model = self.converted(teacher)
            result: dict[str, Any] = {"steps": 0, "tokens": 0, "seconds": 0.0}
            if isinstance(model, StudentForCausalLM):
                say(str(report(model)))
                model.config.recipe = self.described()
            if self.stage2_steps:
                distils = s.stage2.loss != "ce"
                own = self.teacher() if distils and model is teacher else teacher
                objective = FineTune(model, s.stage2.loss, own if distils else None, s.stage2.kl_weight)
                batches = Batches(self.train_tokens, s.seq_len, s.stage2.batch_size, s.seed, self.first_block)
                name = {"two_stage": "stage 2", "one_step": "one step"}.get(s.recipe, "adapt teacher")
                with self.watched(name, work, key, self.stage2_steps, s.stage2) as run:
                    result = train(objective, batches.batch, self.stage2_steps, s.stage2, run)
            if parallel.rank() > 0:
                return result
            counts = report(model).counts if isinstance(model, StudentForCausalLM) else adapted_counts(model)
            with weight_errors():
                model.save_pretrained(work / "model")
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
            return result | {"params": counts}

        return parallel.artifact(self.store, "student", key, build, self.described())

    def finished(self) -> PreTrainedModel:
        """What this cell is about: the trained student, the adapted teacher, or the teacher."""
        if self.untouched:
            return self.teacher()
        folder = str(self.student() / "model")
        return load_student(folder) if self.is_student else load_teacher(folder)

    def evaluate(self) -> Path:
        """The artifact with what was measured of the finished model and, as ppl_start, right after conversion
        (metrics.json), and with the loss of each validation sequence (losses.json)."""

        def build(work: Path) -> None:
            s = self.s
            held = TokenDataset(self.tokens(), "validation")

            @contextmanager
            def explained(what: str):
                try:
                    yield
                except UserError:
                    raise
                except (ValueError, OverflowError) as error:  # the last steps of training spoilt it, or exp(loss) is too large
                    stage = "stage2" if self.stage2_steps else "stage1"
                    remedy = f"lower {stage}.lr (now {getattr(s, stage).lr:g})" if self.training_steps() else "choose precision=fp32"
                    raise UserError(f"{self.name} {what}: no perplexity can be given ({error}); {remedy}.") from error

            def losses_of(model: PreTrainedModel, what: str) -> list[Tensor]:
                batches = list(validation_batches(held, s.seq_len, s.eval.batch_size, s.eval.sequences))
                return token_losses(self.on_device(model), batches, precision=self.precision, progress=what)

            with explained("evaluate"):
                model = self.finished()
                losses = losses_of(model, "evaluate")
                found: dict[str, Any] = summarise(losses, held.text_bytes / len(held))
                found |= measure(model, s, held, tokenizer=self.inputs.tokenizer(s.teacher), teacher=self.teacher, precision=self.precision)
            if self.is_student:
                with explained("evaluate start"):
                    found["ppl_start"] = summarise(losses_of(self.converted(self.teacher()), "evaluate start"))["ppl"]
            per_sequence = torch.cat([loss.mean(1) for loss in losses]).tolist()
            atomic_write(work / "losses.json", to_json({"tokens": self.tokens_key, "seq_len": s.seq_len, "loss": per_sequence}))
            atomic_write(work / "metrics.json", to_json(found, indent=1))

        return parallel.on_main(lambda: self.store.artifact("eval", self.key, build, self.described()))

    # --- the record

    def described(self) -> dict:
        """The settings as plain data, for people and records."""
        return dataclasses.asdict(self.s)

    def done(self) -> dict | None:
        """The record of this cell in this study, if there is one and force=true doesn't ask for another."""
        folder = self.store.run_path(self.s.study, self.name, self.key)
        record = None if self.s.force else self.store.read_record(folder)
        if record:
            say(f"{self.s.study}/{self.name}: already done ({folder / 'record.json'}); force=true runs it again")
        return record

    def run(self) -> dict:
        """Do what is missing, write the record into the cell's run folder, and return it."""
        if self.s.export:
            exported(self.s.export, self.key)
        if record := parallel.on_main(self.done):
            parallel.on_main(lambda: self.export(record))
            return record
        if self.s.force:
            parallel.on_main(self.forget)
        there = ", ".join(kind for kind, key in self.step_keys().items() if self.store.has(kind, key))
        say(f"{self.s.study}/{self.name}: {self.summary()}{f'; there already: {there}' if there else ''}")
        ask_hub(self.s.eval)
        started = provenance()["started"]
        for kind in self.step_keys():
            self.run_step(kind)
        return parallel.on_main(lambda: write_record(self, started))

    def export(self, record: dict) -> None:
        """Leave the finished model where export= says."""
        if not self.s.export:
            return
        if exported(self.s.export, self.key):
            say(f"{self.name}: its export is in {self.s.export} already")
        else:
            say(f"{self.name}: exported to {export(self.finished(), self.inputs.tokenizer(self.s.teacher), record, self.s.export)}")

    def training_steps(self) -> list[tuple[str, str]]:
        return [(kind, key) for kind, key in (("stage1", self.stage1_key), ("student", self.student_key)) if key]

    def forget(self) -> None:
        """Drop this cell's own results, so that they are computed again; what it shares (tokens, stage 1) stays."""
        for kind, key in (("student", self.student_key), ("eval", self.key)):
            if key:
                final = self.store.path(kind, key)
                for folder in (final, *final.parent.glob(f".{key}.work-*")):
                    shutil.rmtree(folder, ignore_errors=True)

    def summary(self) -> str:
        s = self.s
        if self.untouched:
            return f"the teacher {s.teacher}, untouched"
        what = {"two_stage": self.parts, "one_step": "mamba in one step"}.get(s.recipe, "the teacher, fine-tuned")
        return f"{what}; {human(self.stage1_steps * s.stage1.batch_size * s.seq_len)} + {human(s.stage2_tokens)} tokens, seed {s.seed}"


def recipe_of(stage: Any) -> dict:
    """A stage's settings that determine its result (how a batch is cut up for memory does not). What came after the
    first records is left out at its default, so that their keys stay."""
    later = {"train": "maps", "loss": "cosine"} if isinstance(stage, Stage1) else {}
    given = dataclasses.asdict(stage)
    return {k: v for k, v in given.items() if k != "micro_batch" and not (k in later and v == later[k])}


def adapted_counts(model: PreTrainedModel) -> dict:
    counts = teacher_counts(model)
    return counts | {"trainable": counts["total"] - counts["by_part"]["embeddings"]}
