"""Where a claim can be judged: cells of one teacher, text and budget, found by what they are in whatever study they lie."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from functools import cached_property

from analysis.rows import (
    MIXERS,
    TEACHER,
    TEACHERS,
    TOKENS,
    YARDSTICK,
    Record,
    agreeing,
    human,
    hybrid,
    mixer_of,
    natural,
    recipe_of,
    scale_of,
    settings_that_matter,
    split_of,
    text,
    tokens_of,
)

# What may differ between two cells whose mixers are compared: the mixer, and nothing else.
_COMPARED = {f"settings.{s}" for s in ("mixer", "ssm", "conv", "gate", "budget", "stage1_tokens", "stage2_tokens")}


@dataclass
class Cells:
    """The seeds of one cell. `settings`: what it shares with the cells that it may be compared with."""

    name: str
    records: list[Record]
    settings: dict[str, str]

    @property
    def ppl(self) -> float:
        values = [r["metrics.ppl.value"] for r in self.records if "metrics.ppl.value" in r]
        return sum(values) / len(values) if values else float("inf")

    @property
    def params(self) -> float:
        return max((r.get("params.total", 0) for r in self.records), default=0)

    @property
    def seeds(self) -> int:
        return len(self.records)


def _best(found: list[Cells]) -> Cells:
    return min(found, key=lambda c: (c.seeds < 2, c.ppl))


def _varied(a: Cells, b: Cells) -> list[str]:
    """The settings in which two cells differ, apart from those of a stage 1 that only one of them has."""
    varied = sorted(k for k in {*a.settings, *b.settings} if a.settings.get(k) != b.settings.get(k))
    without = any(r.get("settings.stage1_tokens") == 0 for r in (*a.records, *b.records))
    return [k for k in varied if not (without and k.startswith("settings.stage1."))]


def unlike(a: Cells, b: Cells) -> str:
    """In which settings two cells of students differ that may be compared, apart from their mixers and tokens; "" if in none."""
    if {recipe_of(r) for r in [*a.records, *b.records]} != {"two_stage"}:
        return ""
    shown = ", ".join(f"{k.removeprefix('settings.')} {a.settings.get(k, 'null')} / {b.settings.get(k, 'null')}" for k in _varied(a, b))
    return shown and f"each at its own settings: {shown}"


@dataclass
class Place:
    """One yardstick (teacher, text, length, evaluation) and budget; `yard` holds the yardstick's other budgets too."""

    label: str
    budget: float
    size: float
    yard: list[Record]
    notes: list[str] = field(default_factory=list)
    known: dict[tuple[str, str, str], list[Cells]] = field(default_factory=dict)

    @cached_property
    def students(self) -> list[Record]:
        return [r for r in self.yard if r.get("settings.budget") == self.budget and recipe_of(r) not in TEACHERS]

    @cached_property
    def kinds(self) -> dict[tuple[str, str, str], list[Record]]:
        """The students by recipe, mixer and split (one-step students have neither); without hybrids."""
        found: dict[tuple[str, str, str], list[Record]] = {}
        for r in self.students:
            if not hybrid(r):
                recipe = recipe_of(r)
                found.setdefault((recipe, *(("", "") if recipe == "one_step" else (mixer_of(r), split_of(r)))), []).append(r)
        return found

    @property
    def splits(self) -> list[str]:
        """The splits of its two-stage students, those with little stage 1 first."""
        return sorted({split for recipe, _, split in self.kinds if recipe == "two_stage" and split != "?/?"}, key=natural)

    @property
    def mixers(self) -> list[str]:
        """The mixers of its two-stage students: those of the paper's ladder first, then others by name."""
        run = {mixer for recipe, mixer, _ in self.kinds if recipe == "two_stage"}
        return [m for m in MIXERS if m in run] + sorted(run - set(MIXERS))

    def variants(self, mixer: str, split: str, recipe: str = "two_stage") -> list[Cells]:
        """The cells of one mixer and split, one for each setting of the rest."""
        kind = (recipe, mixer, split)
        if kind not in self.known:
            self.known[kind] = self._cells(recipe if recipe == "one_step" else f"{mixer} {split}", self.kinds.get(kind, []))
        return self.known[kind]

    def _cells(self, name: str, records: list[Record]) -> list[Cells]:
        made: dict[tuple, list[Record]] = {}
        for r in records:
            key = tuple(sorted((k, v) for k, v in settings_that_matter(r).items() if k not in _COMPARED))
            made.setdefault(key, []).append(r)
        found = [Cells(name, agreeing(name, group, self.notes), dict(key)) for key, group in made.items()]
        return [cells for cells in found if cells.records]

    def everything(self) -> list[Cells]:
        """All cells of students but hybrids, and the teachers that go with them; the name of one of several settings says its own."""
        found = [c for c in (self.teacher(),) if c]
        for recipe, mixer, split in sorted(self.kinds, key=lambda kind: natural(" ".join(kind))):
            variants = self.variants(mixer, split, recipe)
            varied = [k for k in dict.fromkeys(k for c in variants for k in c.settings)
                      if len({c.settings.get(k, "null") for c in variants}) > 1]
            for cells in variants:
                said = ", ".join(f"{k.removeprefix('settings.')}={cells.settings.get(k, 'null')}" for k in varied)
                found.append(Cells(f"{cells.name} ({said})" if said else cells.name, cells.records, cells.settings))
        adapted = [a for c in found[1:] if (a := self.adapted(c))]
        return [*found, *{a.records[0]["path"]: a for a in adapted}.values()]

    def best(self, mixer: str, split: str, recipe: str = "two_stage") -> Cells | None:
        """Of its variants, the one with the lowest perplexity; one of a single seed only if all are."""
        found = self.variants(mixer, split, recipe)
        return _best(found) if found else None

    def matched(self, one: tuple[str, str], other: tuple[str, str]) -> tuple[Cells, Cells] | None:
        """A cell of each (mixer, split) with the same settings (of several such, most seeds, then lowest perplexity); if no
        two have the same settings, each at its best."""
        first, second = self.variants(*one), self.variants(*other)
        if not first or not second:
            return None
        same = [(a, b) for a in first for b in second if not _varied(a, b)]
        if same:
            return min(same, key=lambda p: (-min(p[0].seeds, p[1].seeds), p[0].ppl + p[1].ppl))
        return _best(first), _best(second)

    def teacher(self) -> Cells | None:
        """The untouched teacher."""
        kind = ("teacher", "", "")
        if kind not in self.known:
            self.known[kind] = self._cells("teacher", [r for r in self.yard if recipe_of(r) == "teacher"])
        return next(iter(self.known[kind]), None)

    def adapted(self, like: Cells) -> Cells | None:
        """The adapted teacher that saw as many tokens as `like` did in stage 2, within 2%; of several the best."""
        tokens = tokens_of(like.records[0], 2) or 0
        near = [r for r in self.yard if recipe_of(r) == "adapted_teacher"
                and abs((tokens_of(r, 2) or 0) - tokens) <= max(0.02 * tokens, 1)]
        return min(self._cells("adapted_teacher", near), key=lambda c: c.ppl, default=None)

    def command(self, what: str, seeds: int) -> str:
        """The sweep that adds `what` here, with seeds 0 to `seeds` - 1; cells that are done are not run again."""
        first = self.students[0] if self.students else self.yard[0]
        typed = ["python", "sweep.py", "-m", *what.split(), f"scale={first.get('settings.scale', 'tiny')}"]
        if self.budget:  # the rows of the budget study are parts of the scale's own budget
            typed.append(f"{'default_budget' if '+study=budget' in what else 'budget'}={human(self.budget)}")
        usual = scale_of(str(first.get("settings.scale", "tiny")))
        for name in ("teacher", "data", "validation", "seq_len", "eval.sequences"):
            value = first.get(f"settings.{name}")
            if value is not None and value != usual.get(name):
                typed.append(f"{name}={text(value) if isinstance(value, float) else value}")
        typed.append(f"seed={','.join(map(str, range(seeds)))}")
        return shlex.join(filter(None, typed))


def places(records: list[Record]) -> list[Place]:
    """All places with a student, from the smallest teacher and budget to the largest."""
    yards: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        yards.setdefault(tuple(text(r.get(n, "null")) for n in YARDSTICK), []).append(r)
    made = []
    for yard in yards.values():
        budgets = {r["settings.budget"] for r in yard if recipe_of(r) not in TEACHERS
                   and isinstance(r.get("settings.budget"), int | float) and r["settings.budget"] > 0}
        untouched = [r.get("params.total", 0) for r in yard if recipe_of(r) in TEACHERS]
        size = max(untouched, default=min((r.get("params.total", 0) for r in yard), default=0))
        for budget in budgets:
            made.append(Place(f"{text(yard[0].get('settings.teacher', '?'))}, {human(budget)} tokens", float(budget), float(size), yard))
    made.sort(key=lambda p: (p.size, p.budget, natural(p.label)))
    seen: dict[str, list[Place]] = {}
    for place in made:
        seen.setdefault(place.label, []).append(place)
    for same in seen.values():
        for place in same if len(same) > 1 else ():
            first = place.yard[0]
            parts = (text(first.get(n, "null"))[: 8 if n in (TEACHER, TOKENS) else None] for n in YARDSTICK[1:])
            place.label += f" ({', '.join(p for p in parts if p != 'null')})"
    return made
