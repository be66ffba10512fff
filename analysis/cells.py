"""Records of one row -> its cells: what was measured, against the teachers, what it cost; and the paper's values."""

from __future__ import annotations

import math
import statistics
from typing import Any

from analysis import paper
from analysis.abilities import abilities
from analysis.rows import (
    TEACHERS,
    Record,
    comparable,
    device_seconds,
    human,
    number,
    recipe_of,
    same_items,
    settings_that_matter,
    tokens_of,
)
from analysis.table import Cell


def cells_of(records: list[Record], usable: list[Record], notes: list[str]) -> dict[str, Cell]:
    if not records:
        return {}
    first = records[0]
    cells: dict[str, Cell | None] = {"ppl": perplexity(records), "bits_per_byte": _mean(records, "bits_per_byte"),
                                     "ppl_start": _mean(records, "ppl_start")}
    ppls = values_of(records, "ppl")
    if ppls:
        cells["seeds"] = Cell(1 if recipe_of(first) == "teacher" else len(ppls))
        for recipe in TEACHERS:
            if reference := values_of(references(recipe, first, usable, notes), "ppl"):
                cells[f"gap_{recipe}_pct"] = Cell(100 * (statistics.fmean(ppls) / statistics.fmean(reference) - 1))
    cells |= _accuracies(records, references("teacher", first, usable, []))
    cells |= {name: Cell(*point) for name, point in abilities(records).items()}
    if "params.total" in first:
        cells["params_millions"] = Cell(first["params.total"] / 1e6)
    for stage in (1, 2):
        if (count := tokens_of(first, stage)) is not None:
            cells[f"stage{stage}_tokens"] = Cell(count)
    return {key: cell for key, cell in (cells | _cost(records)).items() if cell is not None}


def values_of(records: list[Record], metric: str) -> list[float]:
    """The metric's value in each record that has it."""
    return [float(r[f"metrics.{metric}.value"]) for r in records if f"metrics.{metric}.value" in r]


def _mean(records: list[Record], metric: str) -> Cell | None:
    values = values_of(records, metric)
    return Cell(statistics.fmean(values)) if values else None


def perplexity(records: list[Record]) -> Cell | None:
    """Mean and standard deviation over seeds; of one, or a teacher (which has none), the standard error."""
    values = values_of(records, "ppl")
    if not values:
        return None
    if len(values) == 1 or recipe_of(records[0]) == "teacher":
        errors = [r["metrics.ppl.stderr"] for r in records if "metrics.ppl.stderr" in r]
        return Cell(statistics.fmean(values), errors[0] if errors else None, one_seed=bool(errors))
    return Cell(statistics.fmean(values), statistics.stdev(values))


def _accuracies(records: list[Record], teachers: list[Record]) -> dict[str, Cell]:
    """Each task's mean over seeds with the harness's standard error, the mean of all ten, and both minus the teacher's; of seeds that
    were asked other numbers of items those that were asked as many as the teacher, or else the most."""
    cells: dict[str, Cell] = {}
    for task in paper.TASKS:
        answered = [r for r in records if f"metrics.{task}.value" in r]
        alike, reference = same_items(task, answered, [r for r in teachers if f"metrics.{task}.value" in r])
        answered = alike or same_items(task, answered)[0]
        if values := values_of(answered, task):
            errors = [r[f"metrics.{task}.stderr"] for r in answered if f"metrics.{task}.stderr" in r]
            spread = math.sqrt(statistics.fmean(e * e for e in errors)) if errors else None
            cells[task] = Cell(statistics.fmean(values), spread, items=number(answered[0], f"metrics.{task}.n"))
            if reference:
                cells[f"{task}_minus_teacher"] = Cell(statistics.fmean(values) - statistics.fmean(values_of(reference, task)))
    for suffix in ("", "_minus_teacher"):
        of_all = [cells[f"{task}{suffix}"] for task in paper.TASKS if f"{task}{suffix}" in cells]
        if len(of_all) == len(paper.TASKS):
            errors = [c.spread for c in of_all if c.spread is not None]
            spread = math.sqrt(sum(e * e for e in errors)) / len(of_all) if len(errors) == len(of_all) else None
            items = sum(cells[task].items or 0 for task in paper.TASKS)
            cells[f"mean_accuracy{suffix}"] = Cell(statistics.fmean(c.value for c in of_all), spread, items=items)  # type: ignore[misc]
    return cells


def _cost(records: list[Record]) -> dict[str, Cell]:
    """What one seed of the row costs: both stages, whether or not the first was shared with another row."""
    hours, rates, memory = [], [], []
    kinds = {r.get("provenance.device_type") for r in records if isinstance(r.get("provenance.device_type"), str)}
    for r in records:
        peaks = [v for step in ("stage1", "student") if (v := number(r, f"peak_memory.{step}")) is not None]
        hours += [sum(seconds.values()) / 3600] if (seconds := device_seconds(r)) else []
        rates += [rate] if (rate := number(r, "timing.student_tokens_per_second")) is not None else []
        memory += [max(peaks)] if peaks else []
    name = "gpu_hours" if kinds == {"cuda"} else "cpu_hours" if kinds == {"cpu"} else ""
    cells = {name: Cell(statistics.fmean(hours))} if hours and name else {}
    cells |= {"tokens_per_second": Cell(statistics.fmean(rates))} if rates else {}
    return cells | ({"peak_memory_gb": Cell(max(memory) / 1e9)} if memory else {})


def references(recipe: str, like: Record, usable: list[Record], notes: list[str]) -> list[Record]:
    """The teachers to compare `like` with; of several adapted ones, those of as many tokens, at the best of their rates."""
    found = [r for r in usable if recipe_of(r) == recipe and comparable(r, like)]
    if recipe == "adapted_teacher" and found:
        trained = {tokens_of(r, 2) or 0 for r in found}
        if len(trained) > 1:
            found = [r for r in found if tokens_of(r, 2) == tokens_of(like, 2)]
        elif recipe_of(like) not in TEACHERS and trained != {tokens_of(like, 2)}:
            notes.append(f"The adapted teacher was trained on {human(min(trained))} tokens, "
                         "which is not what stage 2 of every row had.")
        found = _best_settings(found, notes)
    return found


def _best_settings(records: list[Record], notes: list[str]) -> list[Record]:
    """Of records that differ in more than the seed, those whose settings gave the lowest mean perplexity."""
    alike: dict[tuple, list[Record]] = {}
    for r in records:
        alike.setdefault(tuple(sorted(settings_that_matter(r).items())), []).append(r)
    if len(alike) < 2:
        return records
    notes.append("Of adapted teachers that were trained in several ways, gaps are to the best.")
    return min(alike.values(), key=lambda group: statistics.fmean(values_of(group, "ppl") or [math.inf]))


def paper_cells(published: dict[str, Any]) -> dict[str, Cell]:
    cells = {f"paper_{k}": Cell(v) for k, v in published.items() if k != "remark" and v is not None}
    gap, remark = paper.gap(published.get("ppl")), published.get("remark", "")
    if gap is not None:
        cells["paper_ppl"] = Cell(published["ppl"], remark=remark)
        cells["paper_gap_teacher_pct"] = Cell(gap, remark=remark)
    teacher = paper.TABLES["main"].rows["teacher"]
    accuracies = {t: published[t] for t in paper.TASKS if published.get(t) is not None}
    if len(accuracies) == len(paper.TASKS):
        minus = {t: v - teacher[t] for t, v in accuracies.items()}
        cells |= {f"paper_{t}_minus_teacher": Cell(v) for t, v in minus.items()}
        cells["paper_mean_accuracy"] = Cell(statistics.fmean(accuracies.values()))
        cells["paper_mean_accuracy_minus_teacher"] = Cell(statistics.fmean(minus.values()))
    return cells
