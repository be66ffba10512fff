"""A sweep before it runs: cells -> steps -> a graph in which every shared step stands once.

    tokens -> stage 1 -> student -> eval

Each step needs the one before it in its cell, and its key holds the keys of all steps before; so each step has one
parent, whatever cells share it, and the graph is a forest whose roots are token shards.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hm.cell import Cell
from hm.files import atomic_write, to_json
from hm.store import Store, content_key
from slurm.estimate import Estimator, tokens_of

KINDS = ("tokens", "stage1", "student", "eval")
TITLES = {"tokens": "tokens", "stage1": "stage 1", "student": "student", "eval": "eval"}
PLANS = "plans"


@dataclass
class Step:
    """One artifact to be had: who needs it, what it needs, what it costs."""

    kind: str
    key: str
    parent: str | None
    settings: dict[str, Any]
    """Of the first cell that needs it, resolved; any other's would give the same."""
    cells: list[str] = field(default_factory=list)
    """Full names (study/cell) of all that need it."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Settings of the cells that are complete with this step, which writes their records."""
    done: bool = False
    device: str = "cpu"
    steps: int = 0
    tokens: int = 0
    hours: float = 0.0
    kept_bytes: float = 0.0
    checkpoint_bytes: float = 0.0
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.key}"

    @property
    def label(self) -> str:
        """What distinguishes it for a reader."""
        first = self.cells[0].partition("/")[2]
        if self.kind == "tokens":
            return f"{self.settings['data']}, tokenizer of {self.settings['teacher']}"
        return first if len(self.cells) == 1 else f"{first} and {len(self.cells) - 1} more"


@dataclass
class Plan:
    """Steps by id, each after the one that it needs; `cells` maps the full name of each cell to its last step."""

    steps: dict[str, Step]
    cells: dict[str, str]
    sources: list[str]
    """What the hours were estimated from."""
    unresolved: dict[str, str] = field(default_factory=dict)

    def to_do(self) -> list[Step]:
        return [s for s in self.steps.values() if not s.done]

    def chain(self, name: str) -> Iterator[Step]:
        """The steps of a cell, the last one first."""
        step: str | None = self.cells[name]
        while step is not None:
            yield self.steps[step]
            step = self.steps[step].parent

    def save(self, store: Store, command: str) -> list[Path]:
        """Keep the plan below each of its studies, for those who watch; the same plan has the same file."""
        studies: dict[str, list[str]] = {}
        for name in self.cells:
            studies.setdefault(name.partition("/")[0], []).append(name)
        shown = ("kind", "key", "parent", "steps", "tokens", "label", "cells")
        written = []
        for study, names in studies.items():
            wanted = {s.id for name in names for s in self.chain(name)}
            steps = [{k: getattr(s, k) for k in shown} for s in self.steps.values() if s.id in wanted]
            about = {"study": study, "command": command, "time": time.time(), "steps": steps, "cells": {n: self.cells[n] for n in names}}
            folder = store.root / study / PLANS
            folder.mkdir(parents=True, exist_ok=True)
            written.append(atomic_write(folder / f"{content_key({'cells': about['cells']})}.json", to_json(about)))
        return written


def make_plan(cells: Iterable[tuple[str, Cell, dict[str, Any]]], estimator: Estimator | None = None) -> Plan:
    """The plan of a sweep's cells, given as (full name, cell, resources of its scale). Nothing is written."""
    estimator = estimator or Estimator()
    steps: dict[str, Step] = {}
    ends: dict[str, str] = {}
    finished: dict[str, set[str]] = {}
    for name, cell, resources in cells:
        parent, plain = None, dataclasses.asdict(cell.s)
        for kind, key in cell.step_keys().items():
            step = steps.get(f"{kind}/{key}")
            if step is None:
                step = steps[f"{kind}/{key}"] = Step(kind, key, parent, plain, resources=resources, device=cell.device.type)
                if kind not in finished:
                    folder = cell.store.root / "artifacts" / kind
                    finished[kind] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
                step.done = key in finished[kind]
                step.steps = {"stage1": cell.stage1_steps, "student": cell.stage2_steps}.get(kind, 0)
                step.tokens = tokens_of(cell, kind)
                step.hours = estimator.hours(cell, kind)
                step.kept_bytes = estimator.kept_bytes(cell, kind)
                step.checkpoint_bytes = estimator.checkpoint_bytes(cell, kind)
            step.cells.append(name)
            parent = step.id
        assert parent is not None
        steps[parent].records.append(plain)
        ends[name] = parent
    ordered = sorted(steps.values(), key=lambda s: KINDS.index(s.kind))
    return Plan({s.id: s for s in ordered}, ends, list(estimator.used), getattr(cell.inputs, "unresolved", {}))


# --- for people


def describe(plan: Plan, most_lines: int | None = None) -> str:
    """The graph as an indented tree with tokens, hours, bytes and state, and a summary; `most_lines` cuts the tree."""
    children: dict[str | None, list[Step]] = {}
    for step in plan.steps.values():
        children.setdefault(step.parent, []).append(step)
    rows = [("step", "what", "tokens", "hours", "keeps", "state")]

    def add(step: Step, depth: int) -> None:
        shared = f"  (shared by {len(step.cells)} cells)" if len(step.cells) > 1 else ""
        what = "  " * depth + TITLES[step.kind]
        rows.append((what, step.label + shared, about(step.tokens), span(step.hours),
                     size(step.kept_bytes), "done" if step.done else "to do"))  # fmt: skip
        for child in children.get(step.id, []):
            add(child, depth + 1)

    for root in children[None]:
        add(root, 0)
    left = max(0, len(rows) - 1 - most_lines) if most_lines is not None else 0
    lines = table(rows[: len(rows) - left])
    if left:
        lines.append(f"... and {left} more steps (plan=true shows all)")
    return "\n".join([*lines, *summary(plan)])


def summary(plan: Plan) -> list[str]:
    todo, all_steps = plan.to_do(), list(plan.steps.values())
    shared = [s for s in all_steps if len(s.cells) > 1]
    saved = sum(s.tokens * (len(s.cells) - 1) for s in all_steps)
    device = "GPU" if any(s.device == "cuda" for s in all_steps) else "CPU"
    here = ", planned for a machine with GPUs" if device == "GPU" and not torch.cuda.is_available() else ""
    lines = [
        f"{len(plan.cells)} cells, {len(all_steps)} steps: {len(all_steps) - len(todo)} done, {len(todo)} to do; "
        f"{len(shared)} shared, which saves {about(saved) or 0} training tokens{here}",
        f"to do: {about(sum(s.tokens for s in todo)) or 0} training tokens, {span(sum(s.hours for s in todo)) or '0 h'} of {device} time"
        f" (estimated from {'; '.join(plan.sources) or 'nothing'})",
        f"storage: {size(sum(s.kept_bytes for s in todo if not math.isnan(s.kept_bytes))) or 'nothing'} to keep"
        + (" and a text of unknown size" if any(math.isnan(s.kept_bytes) for s in todo) else "")
        + f", {size(max((s.checkpoint_bytes for s in todo), default=0)) or 'nothing'} for checkpoints of the largest step while it runs",
    ]
    for why in plan.unresolved.values():
        lines.append(f"not resolved: {why} Its sizes are known, its content and tokenizer are not, so what is already done is not seen.")
    return lines


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def span(value: float) -> str:
    """Hours to two digits or so, as h or min; empty for none."""
    if value <= 0:
        return ""
    return f"{value:,.0f} h" if value >= 10 else f"{value:.1f} h" if value >= 0.1 else f"{60 * value:.1f} min" if value >= 1 / 600 else "< 0.1 min"


def about(count: int) -> str:
    """A count to three digits: 74.8k, 9B."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g}{unit}"
    return str(count or "")


def size(count: float) -> str:
    if math.isnan(count):
        return "?"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B" if count else ""
