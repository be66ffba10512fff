"""Which records belong together: the groups that make a table, the rows of a group, the seeds of a row.

A group is what was run and measured alike: one teacher, one text, one length, one evaluation, one budget. In a group,
a record belongs to the row that its "row" names, or else to the one that its settings say; records of a row that
differ in any other setting are rows of their own, with the setting in the label. What is left are seeds. Two
records of one row, seed and settings that gave different students are a conflict: none is taken, and a note says so.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]

SWEEPS = Path(__file__).parent.parent / "sweeps"

PARTS = ("ssm", "conv", "gate")
MIXERS = {"hedgehog": "", "ssm": "+ssm", "ssm_conv": "+ssm+conv", "hedgemamba": "+ssm+conv+gate", "gate": "+gate"}
TEACHERS = ("teacher", "adapted_teacher")
TEACHER, TOKENS = "provenance.teacher", "provenance.artifacts.tokens"
# What two perplexities must share to be compared; of teachers and texts (under its tokenizer) also the content, whatever their names.
YARDSTICK = (*(f"settings.{s}" for s in ("teacher", "data", "validation", "seq_len", "eval.sequences")), TEACHER, TOKENS)
# Settings that say how or where a cell is run or what else is measured, not what is trained.
OPERATIONAL = {f"settings.{s}" for s in (
    "seed", "study", "row", "scale", "force", "device", "scan", "compile", "parallel", "checkpoint_every", "log_every", "export",
    "default_budget", "checkpointing", "tracker", "stage1.micro_batch", "stage2.micro_batch")}
# Settings that older records lack, with the value that they had in effect.
SINCE = {"settings.decay": "head", "settings.ssm_init": "exact", "settings.stage1.train": "maps", "settings.stage1.loss": "cosine",
         "settings.validation_fraction": 0.005, "settings.text_key": "text"}
# Settings that a recipe doesn't read.
UNUSED = {"teacher": ("",), "adapted_teacher": ("mixer", "ssm", "conv", "gate", "decay", "ssm_init", "stage1.", "feature_map.", "mamba.",
                                                "keep_attention"),
          "one_step": ("mixer", "ssm", "conv", "gate", "decay", "ssm_init", "stage1.", "feature_map.")}


def records_of(frame: pd.DataFrame) -> list[Record]:
    """The rows of `frame` as dicts, without what is missing."""
    return [{k: v for k, v in row.items() if not (v is None or (isinstance(v, float) and math.isnan(v)))}
            for row in frame.to_dict("records")]


# --- what a record is --------------------------------------------------------------------------------------

def recipe_of(record: Record) -> str:
    return str(record.get("settings.recipe", "two_stage"))


def mixer_of(record: Record) -> str:
    """The mixer's name, after the parts that were switched on or off on their own."""
    mixer = str(record.get("settings.mixer", "?"))
    if mixer not in MIXERS:  # one that is not a sum of parts, or has more: its name, and the parts that it has
        return "+".join([mixer, *(p for p in PARTS if mixer != "mamba" and record.get(f"settings.{p}"))])
    on = "".join(f"+{p}" for p in PARTS if record.get(f"settings.{p}", f"+{p}" in MIXERS[mixer]))
    return next((name for name, parts in MIXERS.items() if parts == on), f"hedgehog{on}")


def split_of(record: Record) -> str:
    """Stage 1 and stage 2 in percent of both, such as 10/90, as asked for (whole steps miss it a little)."""
    one, two = (record.get(f"settings.stage{stage}_tokens", tokens_of(record, stage)) for stage in (1, 2))
    if not isinstance(one, int | float) or not isinstance(two, int | float) or one + two <= 0:
        return "?/?"
    percent = 100 * one / (one + two)
    shown, rest = round(percent, 1), round(100 - percent, 1)
    if one and two and not (shown and rest):  # so little that it would look like none
        return f"{percent:.1g}/{100 - percent:.6g}" if not shown else f"{percent:.6g}/{100 - percent:.1g}"
    return f"{shown:g}/{rest:g}"


def number(record: Record, name: str) -> float | None:
    """The finite number at `name`, or None."""
    value = record.get(name)
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if finite else None  # type: ignore[arg-type]


def tokens_of(record: Record, stage: int) -> float | None:
    value = record.get(f"tokens.stage{stage}", record.get(f"settings.stage{stage}_tokens"))
    return float(value) if isinstance(value, int | float) else None


def device_seconds(record: Record) -> dict[str, float]:
    """Seconds of one device that each training step (stage1, student) took: its time, times the processes that shared it."""
    return {step: seconds * (number(record, f"provenance.processes.{step}") or 1) for step in ("stage1", "student")
            if (seconds := number(record, f"timing.{step}_seconds")) is not None}


def hybrid(record: Record) -> str:
    """The layers that keep attention, as text; empty for a student without any."""
    kept = record.get("settings.keep_attention")
    if kept in (None, "", "null", "none", "[]", 0, "0", []) or recipe_of(record) in TEACHERS:
        return ""
    return ",".join(map(str, kept)) if isinstance(kept, list) else text(kept)


def hybrid_mark(record: Record) -> str:
    """What follows the name of a row of hybrids."""
    return f" (hybrid, keep_attention={layers})" if (layers := hybrid(record)) else ""


def settings_that_matter(record: Record) -> dict[str, str]:
    """The settings that decide what is trained, apart from the seed, as text; those that an older record lacks as they were in effect."""
    unused = UNUSED.get(recipe_of(record), ())
    if record.get("settings.stage1_tokens") == 0:
        unused += ("stage1.",)  # how it would have been trained
    given = record | {k: v for k, v in SINCE.items() if k not in record}
    given["settings.precision"] = record.get("provenance.precision", record.get("settings.precision"))  # what auto was
    if given.get("settings.stage2.loss") != "ce+kl":
        given.pop("settings.stage2.kl_weight", None)
    return {k: text(v) for k, v in given.items() if k.startswith("settings.") and k not in OPERATIONAL
            and (k in YARDSTICK or not (k.startswith("settings.eval.")
                                        or k.removeprefix("settings.").startswith(unused or ("\0",))))}


def differing(records: list[Record]) -> list[str]:
    """The settings that matter in which the records aren't all the same."""
    seen = [settings_that_matter(r) for r in records]
    names = {name for settings in seen for name in settings}
    return sorted(n for n in names if len({settings.get(n, "null") for settings in seen}) > 1)


def comparable(a: Record, b: Record) -> bool:
    """Whether their perplexities are over the same sequences. (A null setting isn't in a frame.)"""
    nullable = ("settings.validation", "settings.eval.sequences")
    return all(text(a.get(k, "null")) == text(b.get(k, "null"))
               for k in YARDSTICK if k in nullable or (k in a and k in b))


# --- groups ------------------------------------------------------------------------------------------------

def groups(records: list[Record], study: str) -> dict[str, list[Record]]:
    """What was run and measured alike, under a name of what tells the groups apart ("" if there is one).

    A teacher has no budget, so it is in the groups of every budget, and so is an adapted teacher whose budget no student
    has (of those with as many tokens in stage 2, if there are any). The budget study is about budgets, so there the
    scale's budget (default_budget) tells groups apart; the scale study is about teachers and is one group. Recipes are
    compared at all budgets of one yardstick.
    """
    if study == "scale":
        return {"": records}
    budget = {"budget": "settings.default_budget", "recipes": ""}.get(study, "settings.budget")
    names = (*YARDSTICK, "settings.scale")
    yards: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        yards.setdefault(tuple(text(r.get(n, "null")) for n in names), []).append(r)
    made: dict[tuple[str, ...], list[Record]] = {}
    for yard, members in yards.items():
        students = [r for r in members if recipe_of(r) not in TEACHERS]
        budgets = {_budget(r, budget) for r in students or members if recipe_of(r) != "teacher"} or {""}
        for b in budgets:
            own = [r for r in members if recipe_of(r) != "teacher" and _budget(r, budget) == b]
            shared = [r for r in members if recipe_of(r) == "teacher"]
            shared += [r for r in members if recipe_of(r) == "adapted_teacher" and _budget(r, budget) not in budgets and (
                _as_long(r, own) or not _as_long(r, students))]
            made[(*yard, b)] = [*shared, *own]
    labels = [n.removeprefix("settings.") for n in (*names, "settings.budget")]
    varied = [i for i in range(len(labels)) if len({key[i] for key in made}) > 1]
    named: dict[str, list[Record]] = {}
    for key, members in sorted(made.items(), key=lambda pair: [natural(part) for part in pair[0]]):
        said = {labels[i]: key[i] for i in varied if key[i] not in ("", "null")}
        if said.get("scale") == said.get("teacher"):
            said.pop("scale", None)
        content = {what: said.pop(name, "") for what, name in (("teacher", TEACHER), ("tokens", TOKENS))}
        parts = [value if label in ("teacher", "scale") else f"{label} {value}" for label, value in said.items()]
        if ", ".join(parts) in named:  # teachers or texts of one name
            parts += [f"{what} {key[:8]}" for what, key in content.items() if key]
        named.setdefault(", ".join(parts), []).extend(members)
    return named


def _as_long(record: Record, others: list[Record]) -> bool:
    return any(tokens_of(record, 2) == tokens_of(other, 2) for other in others)


def _budget(record: Record, name: str) -> str:
    return amount(record.get(name, ""))


# --- rows --------------------------------------------------------------------------------------------------

def derived_row(record: Record, study: str) -> str:
    """The row that the settings of `record` say."""
    recipe, mixer, split = recipe_of(record), mixer_of(record), split_of(record)
    if recipe != "two_stage":
        return recipe
    whose = "" if mixer == "hedgemamba" else f"{mixer} "
    if study == "mixer":
        return MIXERS.get(mixer) or mixer
    if study == "split":
        return whose + split
    if study == "budget" and (budget := record.get("settings.budget")):
        return whose + amount(budget)
    if study == "demo":
        return "0/100" if (mixer, split) == ("hedgemamba", "0/100") else f"{mixer} {split}"
    return mixer


def row_name(record: Record, study: str, published: set[str], several_teachers: bool = False) -> str:
    """The row that `record` fills: its own "row", else by its settings. Hybrids have rows of their own.

    `published` are the paper's rows: one that only names the mixer is completed to what the paper calls it.
    """
    derived, mixer = derived_row(record, study), mixer_of(record)
    name = str(record.get("row") or record.get("settings.row") or derived)
    if derived in published and name == mixer:
        name = derived
    name += hybrid_mark(record)
    return f"{name}, {text(record.get('settings.teacher', '?'))}" if several_teachers else name


def apart(named: list[tuple[str, Record]], notes: list[str]) -> list[tuple[str, Record]]:
    """The same, with the settings in the label where records of one name differ in them."""
    by_name: dict[str, list[Record]] = {}
    for name, record in named:
        by_name.setdefault(name, []).append(record)
    told: list[tuple[str, Record]] = []
    for name, group in by_name.items():
        varied = differing(group)
        few = [v for v in varied if not any(v in follow and of in varied for of, follow in _FOLLOW.items())]
        if len({_said(r, few) for r in group}) == len({_said(r, varied) for r in group}):
            varied = few
        if varied:
            notes.append(f"{name} was run with several settings of "
                         f"{', '.join(v.removeprefix('settings.') for v in varied)}: a row for each.")
        told += [(f"{name} ({what})" if (what := _said(r, varied)) else name, r) for r in group]
    return told


_FOLLOW = {"settings.mixer": [f"settings.{p}" for p in PARTS], "settings.stage1_tokens": ["settings.stage2_tokens"],
           "settings.stage2.loss": ["settings.stage2.kl_weight"]}
"""Settings -> those that need not be said beside them, unless nothing else tells two rows apart."""


def _said(record: Record, names: list[str]) -> str:
    given = settings_that_matter(record)
    return ", ".join(f"{n.removeprefix('settings.')}={_readable(record.get(n), given.get(n, 'null'))}" for n in names)


def _readable(value: Any, plain: str) -> str:
    return human(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 1000 else plain


@cache
def listed(study: str) -> dict[str, int]:
    """The rows of a study of sweeps/study with their places in its file; empty where it has none, or none of the name."""
    import yaml

    files = {p.stem: p for p in (SWEEPS / "study").glob("*.yaml")}
    rows = yaml.safe_load(files[study].read_text()).get("rows") if study in files else None
    return {str(name): place for place, name in enumerate(rows or {})}


@cache
def scale_of(name: str) -> dict[str, Any]:
    """The settings of a scale of sweeps/scale by their full names; none where there is no such file."""
    import yaml

    file = {p.stem: p for p in (SWEEPS / "scale").glob("*.yaml")}.get(name)
    given = yaml.safe_load(file.read_text()) if file else {}
    return given | {f"{group}.{name}": value for group, section in given.items() if isinstance(section, dict) for name, value in section.items()}


def in_order(study: str, label: str) -> tuple[int, list[tuple[int, float, str]]]:
    """A sort key: rows as the study's file lists them (each with its settings in brackets or not), then others by name."""
    places = listed(study)
    whose = label if label in places else label.partition(" (")[0]
    return places.get(whose, len(places)), natural(label)


def cell_names(records: list[Record]) -> list[tuple[str, Record]]:
    """Row names where none are known: the cell's without its seed, with the settings that cells of one name differ in."""
    return apart([(str(r.get("row") or r.get("settings.row") or r["cell"].removesuffix(f"-s{text(r.get('settings.seed', ''))}")), r)
                  for r in records], [])


def borrowed(mine: list[Record], others: list[Record], notes: list[str]) -> list[Record]:
    """Teachers of other studies, measured as this one's students are, where it has none of its own (of adapted ones, of their budget)."""
    found: list[Record] = []
    students = [r for r in mine if recipe_of(r) not in TEACHERS]
    for recipe in TEACHERS:
        own = [r for r in mine if recipe_of(r) == recipe]
        alike = {(*(text(s.get(k, "null")) for k in YARDSTICK), tokens_of(s, 2)): s for s in students}
        wanting = [s for s in alike.values() if not any(
            comparable(r, s) and (recipe == "teacher" or _budget(r, "settings.budget") == _budget(s, "settings.budget")) for r in own)]
        lent = [r for r in others if recipe_of(r) == recipe and any(
            comparable(r, s) and (recipe == "teacher" or tokens_of(r, 2) == tokens_of(s, 2)) for s in wanting)]
        lent = list({r["key"]: r for r in lent}.values())
        several = len({tokens_of(r, 2) for r in lent}) > 1
        for r in lent:
            row = f"{recipe} ({human(tokens_of(r, 2) or 0)} tokens)" if several else recipe
            found.append({**r, "row": row})
            notes.append(f"The {row} record is that of study {r['study']}.")
    return found


def agreeing(name: str, records: list[Record], notes: list[str]) -> list[Record]:
    """One record for each seed; none where they conflict. Teachers that measure the same don't.

    Two evaluations of one student (other tasks, another limit) are one record with the metrics of both.
    """
    ppls = {r.get("metrics.ppl.value") for r in records}
    if {recipe_of(r) for r in records} == {"teacher"} and len(ppls) == 1:
        return [_together(sorted(records, key=lambda r: (-(number(r, "settings.seed") or 0), natural(r["path"]))))]
    by_seed: dict[str, dict[str, list[Record]]] = {}
    for r in sorted(records, key=lambda r: (str(r.get("provenance.started", "")), natural(r["path"]))):
        untouched = r.get(TEACHER) if recipe_of(r) == "teacher" else None  # the same whenever and wherever it is measured
        student = str(r.get("provenance.artifacts.student") or untouched or r["key"])
        by_seed.setdefault(text(r.get("settings.seed", "null")), {}).setdefault(student, []).append(r)
    taken = []
    for seed, by_student in sorted(by_seed.items(), key=lambda pair: natural(pair[0])):
        runs = [_together(group) for _, group in sorted(by_student.items())]
        if len(runs) > 1:
            clash = " and ".join(f"{r['cell']} (key {r['key']})" for r in runs)
            notes.append(f"Conflict in row {name}, seed {seed}: {clash} have the same settings but other data, weights or "
                         "code; none is taken.")
            continue
        taken += runs
        values = [r["metrics.ppl.value"] for r in by_student[next(iter(by_student))] if "metrics.ppl.value" in r]
        if len(set(values)) > 1:
            shown = ", ".join(f"{v:.2f}" for v in values)
            notes.append(f"Row {name}, seed {seed} was run {len(values)} times (ppl {shown}); the last one counts.")
    return taken


def _together(records: list[Record]) -> Record:
    """The last record, with the metrics of which earlier ones have more (items of a task, lengths, pairs of tokens), and the
    commands and paths of all."""
    last = dict(records[-1])
    for r in reversed(records[:-1]):
        for metric, values in _metrics(r).items():
            if _extent(values) > _extent(had := _metrics(last).get(metric, {})):
                last = {k: v for k, v in last.items() if k not in had} | values
    return last | {"commands": list(dict.fromkeys(c for r in records for c in commands_of(r))), "paths": [r["path"] for r in records]}


def _metrics(record: Record) -> dict[str, Record]:
    """What belongs to each metric: {"piqa": {"metrics.piqa.value": ..., "metrics.piqa.stderr": ...}}."""
    found: dict[str, Record] = {}
    for name, value in record.items():
        if name.startswith("metrics."):
            found.setdefault(name.split(".")[1], {})[name] = value
    return found


def _extent(values: Record) -> tuple[bool, float, int]:
    """How much was measured, to compare with the same metric of another record."""
    items = [number(values, name) or 0 for name in values if name.endswith(".n")]
    return bool(values), sum(items), sum(len(v) for v in values.values() if isinstance(v, list))


def same_items(task: str, *groups: list[Record]) -> list[list[Record]]:
    """Of each group the records in which the task had the items of all others (as many, of the same version of the task), of
    several such the most."""

    def asked(record: Record) -> tuple[float, str]:
        return number(record, f"metrics.{task}.n") or 0, text(record.get(f"metrics.{task}.version", "null"))

    shared = set.intersection(*({asked(r) for r in group} for group in groups))
    most = max(shared, default=None)
    return [[r for r in group if asked(r) == most] for group in groups]


def commands_of(record: Record) -> list[str]:
    """The commands behind a record, or behind the evaluations that `agreeing` took together."""
    own = record.get("provenance.command")
    return record["commands"] if "commands" in record else [str(own)] if own else []


def paths_of(records: list[Record]) -> list[str]:
    """The files of records, also of those that `agreeing` took together."""
    return [path for r in records for path in r.get("paths", [r["path"]])]


# --- text --------------------------------------------------------------------------------------------------

def text(value: Any) -> str:
    """A setting as text; of a path, which differs from machine to machine, the last part. 3.0 is 3."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) else str(value)


def natural(label: str) -> list[tuple[int, float, str]]:
    """A sort key by which 2M comes before 10M, and 900k before both."""
    size = {"k": 1e3, "M": 1e6, "B": 1e9}
    return [(0, float(n) * size.get(unit, 1), "") if n else (1, 0.0, other)
            for n, unit, other in re.findall(r"([0-9]+(?:\.[0-9]+)?)([kMB]\b)?|([^0-9]+)", label)]


def human(count: float) -> str:
    """1500 as 1.5k, 20000000 as 20M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.4g}"


def amount(value: Any) -> str:
    """A number of tokens as people say it; what is no number as text."""
    return human(value) if isinstance(value, int | float) and not isinstance(value, bool) else text(value)
