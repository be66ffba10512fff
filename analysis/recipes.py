"""The study of recipes: how much of the gap that the paper's recipe leaves another way of training closes, budget by budget.

Seed by seed, gap = ln(a row's perplexity / the adapted teacher's of the same budget and seed), in nats per token. What is left
of the paper's gap is that, as a share of the gap of the row named "paper".
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from analysis import abilities
from analysis.cells import perplexity
from analysis.rows import (
    TEACHERS,
    Record,
    agreeing,
    apart,
    commands_of,
    human,
    hybrid,
    hybrid_mark,
    in_order,
    number,
    paths_of,
    recipe_of,
    split_of,
    text,
)
from analysis.table import BOLD, SINGLE, Cell, Column, Row, Table, mark_best

FIRST = ("teacher", "adapted_teacher", "paper")


@dataclass
class Recipe:
    """One row at one budget: a record for each seed, and by seed its gap and what that leaves of the paper's, in percent."""

    records: list[Record]
    gaps: dict[str, float]
    left: dict[str, float]
    error: float | None = None  # of the gap of one seed, from both standard errors over the sequences

    @property
    def gap(self) -> Cell | None:
        return _over_seeds(self.gaps, self.error)


def at_budgets(records: list[Record], notes: list[str]) -> dict[float, dict[str, Recipe]]:
    """Budget -> row -> recipe. The untouched teacher, which has no budget, is at all of them."""
    budgets = sorted({b for r in records if recipe_of(r) != "teacher" and (b := number(r, "settings.budget"))})
    named = _named(records)
    return {budget: _recipes([(name, r) for name, r in named if recipe_of(r) == "teacher" or number(r, "settings.budget") == budget], budget, notes)
            for budget in budgets}


def _named(records: list[Record]) -> list[tuple[str, Record]]:
    """Each record with its row, and with its split where the row was run with several, maybe at different budgets."""
    splits: dict[str, set[str]] = {}
    for r in records:
        splits.setdefault(_name(r), set()).add(split_of(r))
    return [(name if (name := _name(r)) in FIRST or len(splits[name]) == 1 else f"{name} ({split_of(r)})", r) for r in records]


def _recipes(named: list[tuple[str, Record]], budget: float, notes: list[str]) -> dict[str, Recipe]:
    rows: dict[str, list[Record]] = {}
    for label, r in apart(named, notes):
        rows.setdefault(label, []).append(r)
    taken = {label: found for label in sorted(rows, key=_order) if (found := agreeing(f"{label} at {human(budget)}", rows[label], notes))}
    adapted = [found for found in taken.values() if recipe_of(found[0]) == "adapted_teacher" and _ppls(found)]
    reference = min(adapted, key=lambda found: statistics.fmean(_ppls(found).values()), default=[])
    gaps = {label: _gaps(found, reference) for label, found in taken.items()}
    papers = gaps.get("paper", {})
    if any(gap <= 0 for gap in papers.values()):
        papers = {}  # nothing to be a share of
    return {label: Recipe(found, gaps[label], _left(gaps[label], papers) if recipe_of(found[0]) not in TEACHERS else {}, _error(found, reference))
            for label, found in taken.items()}


def _left(gaps: dict[str, float], papers: dict[str, float]) -> dict[str, float]:
    return {seed: 100 * gaps[seed] / papers[seed] for seed in gaps if seed in papers}


def _name(record: Record) -> str:
    name = str(record.get("row") or record.get("settings.row") or record["cell"])
    return name.partition(" (")[0] if recipe_of(record) in TEACHERS else name + hybrid_mark(record)


def _order(label: str) -> tuple:
    return (FIRST.index(label) if label in FIRST else len(FIRST), in_order("recipes", label))


def _ppls(records: list[Record]) -> dict[str, float]:
    return {text(r.get("settings.seed", "null")): r["metrics.ppl.value"] for r in records if "metrics.ppl.value" in r}


def _gaps(records: list[Record], reference: list[Record]) -> dict[str, float]:
    own, theirs = _ppls(records), _ppls(reference)
    if recipe_of(records[0]) == "teacher":
        own = dict.fromkeys(theirs, *own.values()) if len(own) == 1 else {}
    return {seed: math.log(own[seed] / theirs[seed]) for seed in own if seed in theirs}


def _error(records: list[Record], reference: list[Record]) -> float | None:
    errors = [number(r, "metrics.ppl.stderr") for r in (records[0], *reference[:1])]
    values = [number(r, "metrics.ppl.value") for r in (records[0], *reference[:1])]
    return math.hypot(*(e / v for e, v in zip(errors, values, strict=True))) if None not in errors + values else None  # type: ignore[operator]


def _over_seeds(values: dict[str, float], error: float | None = None) -> Cell | None:
    if not values:
        return None
    mean = statistics.fmean(values.values())
    return Cell(mean, statistics.stdev(values.values())) if len(values) > 1 else Cell(mean, error, one_seed=error is not None)


def table(name: str, caption: str, records: list[Record], notes: list[str]) -> Table:
    """Rows are recipes; at each budget perplexity, gap, what is left of the paper's gap, and the number of seeds."""
    found = at_budgets(records, notes)
    columns = [Column("row", "recipe")]
    rows: dict[str, Row] = {}
    for budget, recipes in found.items():
        at = human(budget)
        block = "perplexity" if len(found) < 3 else f"{at} tokens"
        columns += [Column(f"ppl_{at}", f"ppl\n{at}", "ppl", "down", block, ranked=True),
                    Column(f"log_gap_{at}", f"gap\n{at}", "nats", "down", block, ranked=True),
                    Column(f"left_pct_{at}", f"left %\n{at}", "pct", "down", block), Column(f"seeds_{at}", f"seeds\n{at}", "count", block=block)]
        for label, recipe in recipes.items():
            row = rows.setdefault(label, Row(label, ranked=recipe_of(recipe.records[0]) not in TEACHERS,
                                             hybrid=bool(hybrid(recipe.records[0]))))
            cells = {"ppl": perplexity(recipe.records), "log_gap": recipe.gap, "left_pct": _over_seeds(recipe.left),
                     "seeds": Cell(len(_ppls(recipe.records)))}
            row.cells |= {f"{key}_{at}": cell for key, cell in cells.items() if cell is not None}
            row.cells |= {f"{name}_{at}": Cell(*point) for name, point in abilities.abilities(recipe.records).items()}
            commands = [c for r in recipe.records for c in commands_of(r)]
            row.commands = list(dict.fromkeys([*row.commands, *commands]))
            row.paths = list(dict.fromkeys([*row.paths, *paths_of(recipe.records)]))
        without = [label for label, recipe in recipes.items() if _ppls(recipe.records) and not recipe.gaps]
        if without:
            notes.append(f"No gap at {at} for {', '.join(without)}: no adapted teacher of this budget has a seed in common.")
        fewer = [f"{label} {len(recipe.gaps)}" for label, recipe in recipes.items()
                 if 0 < len(recipe.gaps) < len(_ppls(recipe.records)) and recipe_of(recipe.records[0]) != "teacher"]
        if fewer:
            notes.append(f"Gaps at {at} are over fewer seeds than perplexities, those that the adapted teacher has too: {', '.join(fewer)}.")
        if not any(recipe.left for recipe in recipes.values()):
            notes.append(f"Nothing is said to be left at {at}: there is no row named paper with a gap above 0.")
    abilities.compared(list(rows.values()))
    filled = {key for row in rows.values() for key in row.cells}
    for at in map(human, found):
        asked = {key.removesuffix(f"_{at}") for key in filled if key.endswith(f"_{at}")}
        more = [*abilities.COLUMNS, *abilities.length_columns(asked)]
        columns += [replace(c, key=f"{c.key}_{at}", block=f"{c.block}, {at} tokens") for c in more if c.key in asked]
        notes += abilities.notes(asked)
    columns = [c for c in columns if c.key == "row" or c.key in filled]
    ordered = [rows[label] for label in sorted(rows, key=_order)]
    mark_best(ordered, columns)
    return Table(name, caption, columns, ordered, [*_explained(ordered), *dict.fromkeys(notes)])


def _explained(rows: list[Row]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells.values()]
    notes = ["gap: ln(perplexity / the adapted teacher's of the same budget and seed), nats per token, over the seeds that both have.",
             "left: the gap as a share of the gap of the row named paper, seed by seed."]
    notes += ["±: standard deviation over as many seeds as the column says."] if any(c.spread is not None and not c.one_seed for c in cells) else []
    notes += [SINGLE] if any(c.one_seed for c in cells) else []
    return notes + ([BOLD] if any(c.mark for c in cells) else [])
