"""What a step will cost: device-hours and bytes, before it has run.

Training time comes from measured throughput (results/bench/training*.json) where there is a row for the stage, scaled
by the floating-point operations of a token; else from these operations alone, at an assumed rate. A token takes
6 operations per trainable parameter and 2 per frozen one, and 2 per parameter of a teacher that only runs forward.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hm.adapters import adapter_for
from hm.cell import Cell
from hm.convert import kept_layers, teacher_counts
from hm.errors import UserError
from hm.mixer import MixerSpec, build_mixer
from hm.text import source_files

BENCH = Path(__file__).parent.parent / "results" / "bench"
RATES = {"cuda": (0.25 * 990e12, "25% of the 990 TFLOP/s of one H100"), "cpu": (50e9, "50 GFLOP/s a process")}
"""Floating-point operations a second that are assumed where nothing was measured."""
KNOWN_TOKENS = {"hf:openwebtext": 9.0e9}
FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Parameters of a teacher, of its embeddings, of its student, and of what stage 1 learns."""

    teacher: int
    embeddings: int
    student: int
    stage1: int


class Estimator:
    """Estimates for the cells of one plan."""

    def __init__(self, bench: Path = BENCH):
        self.bench_folder = bench
        self.used: dict[str, None] = {}
        self._sizes: dict[str, Sizes] = {}

    @cached_property
    def bench(self) -> list[dict[str, Any]]:
        """Rows of `python -m hm.bench training` on one device: {"what", "parameters", "tokens_per_second", "device_type", ...}."""
        found = []
        for file in sorted(self.bench_folder.glob("training*.json")):
            try:
                measured = json.loads(file.read_text())
                found += [{"device": measured["device"], **row} for row in measured["rows"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} can't be read as benchmark rows ({error!r}); make it again or delete it.") from error
        return [r for r in found if {"what", "parameters", "tokens_per_second", "device_type"} <= r.keys() and r.get("gpus", 1) == 1]

    def sizes(self, cell: Cell) -> Sizes:
        """Counted without weights: the teacher is built on PyTorch's meta device, and one mixer in place of each attention."""
        s = cell.s
        name = repr((s.teacher, s.mixer, s.ssm, s.conv, s.gate, s.decay, s.feature_map, s.keep_attention, s.stage1.train))
        if name not in self._sizes:
            config = cell.inputs.config(s.teacher)
            adapter = adapter_for(config)
            with torch.device("meta"):
                teacher = AutoModelForCausalLM.from_config(config)
                mixer = build_mixer(MixerSpec.of(s, adapter.shape(config)), 0)
            layers = config.num_hidden_layers - len(kept_layers(s.keep_attention, config.num_hidden_layers))
            counts = teacher_counts(teacher)
            replaced = parameters(adapter.attention(adapter.layers(teacher)[0]))
            learnt = [mixer] if s.stage1.train == "mixer" else [m for n, m in mixer.named_children() if mixer.PARTS.get(n) == "feature map"]
            student = counts["total"] + layers * (parameters(mixer) - replaced)
            self._sizes[name] = Sizes(counts["total"], counts["by_part"]["embeddings"], student, layers * sum(map(parameters, learnt)))
        return self._sizes[name]

    def flops(self, cell: Cell, kind: str) -> float:
        """Floating-point operations of a step."""
        if kind == "tokens":
            return 0.0
        s, n = cell.s, self.sizes(cell)
        if kind == "stage1":
            return tokens_of(cell, kind) * (6.0 * n.stage1 + 2.0 * n.teacher)
        if kind == "eval":
            models = [n.teacher] if not cell.is_student else [n.student, n.student]  # a student also at its start
            return (s.eval.sequences or 1000) * s.seq_len * 2.0 * sum(models)
        trained = n.student if cell.is_student else n.teacher
        frozen = n.embeddings + (n.teacher if s.stage2.loss != "ce" else 0)
        return tokens_of(cell, kind) * (6.0 * (trained - n.embeddings) + 2.0 * frozen)

    def hours(self, cell: Cell, kind: str) -> float:
        """Hours of one device. `used` gathers what they were estimated from."""
        if kind == "tokens":
            return 0.0
        flops = self.flops(cell, kind)
        stage = {"stage1": "stage1", "student": "stage2" if cell.is_student else "teacher"}.get(kind)
        n = self.sizes(cell)
        rows = [r for r in self.bench if r["what"] == stage and r["device_type"] == cell.device.type]
        if rows and flops:
            size = n.student if stage == "stage2" else n.teacher
            row = min(rows, key=lambda r: (abs(math.log(r["parameters"] / size)), -r["tokens_per_second"]))
            self.used[f"{row['tokens_per_second']:,.0f} tokens/s measured in {stage} of {row['parameters'] / 1e6:.0f}M parameters on {row['device']}"] = None
            return tokens_of(cell, kind) / (row["tokens_per_second"] * row["parameters"] / size) / 3600
        rate, words = RATES[cell.device.type]
        if flops:
            self.used[f"operations per token at {words}"] = None
        return flops / rate / 3600

    def kept_bytes(self, cell: Cell, kind: str) -> float:
        """What a step's artifact takes on the disk; NaN where that can't be known before it is made."""
        manifest = cell.store.path(kind, cell.step_keys()[kind]) / "artifact.json"
        if manifest.is_file():
            return sum(f["size"] for f in json.loads(manifest.read_text())["files"].values())
        if kind == "tokens":
            width = 2 if cell.inputs.config(cell.s.teacher).vocab_size <= 1 << 16 else 4
            return width * sum(text_tokens(part.strip()) for part in cell.s.data.split(" + "))
        n = self.sizes(cell)
        sizes = {"stage1": n.stage1, "student": n.student if cell.is_student else n.teacher}
        return FP32 * sizes.get(kind, 0)

    def checkpoint_bytes(self, cell: Cell, kind: str) -> float:
        """What a step takes while it runs: two checkpoints of what is trained, with both of AdamW's moments."""
        n = self.sizes(cell)
        trained = {"stage1": n.stage1, "student": (n.student if cell.is_student else n.teacher) - n.embeddings}
        return 2 * 3 * FP32 * trained.get(kind, 0)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tokens_of(cell: Cell, kind: str) -> int:
    """Training tokens of a step."""
    stage = {"stage1": (cell.s.stage1, cell.stage1_steps), "student": (cell.s.stage2, cell.stage2_steps)}.get(kind)
    return stage[0].batch_size * stage[1] * cell.s.seq_len if stage else 0


def text_tokens(part: str) -> float:
    """A guess of how many tokens a text has, at 4 bytes a token; compressed files are taken to hold 3 times their size."""
    if part == "docstrings":
        return 25e6 / 4
    if part.startswith("hf:"):
        return KNOWN_TOKENS.get(part, math.nan)
    return sum(f.stat().st_size * (3 if f.suffix in (".xz", ".zst", ".gz") else 1) for f in source_files(part)) / 4
