"""What a table is: columns, rows, and cells of a number with its spread, its mark and its remark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from analysis.paper import Above
from analysis.rows import human

ONE_SEED = "†"
SINGLE = f"{ONE_SEED} one seed: ± is the standard error over the evaluated sequences."
BOLD = ("Bold, and italic (underlined in LaTeX): the best and second best student without attention, where ahead of the next by more than the "
        "error of the difference.")


@dataclass(frozen=True)
class Column:
    """`key` names it in CSV, with the unit; `label` is for readers; `better` is "down", "up" or "".

    Tables too wide for a page are printed block by block. `ranked`: best and second best are marked.
    """

    key: str
    label: str
    kind: str = "text"
    better: str = ""
    block: str = "perplexity"
    ranked: bool = False

    @property
    def header(self) -> str:
        return self.label + {"down": " ↓", "up": " ↑", "": ""}[self.better]


@dataclass(frozen=True)
class Cell:
    """`spread` follows the ±: standard deviation over seeds, or the standard error of one if `one_seed`.

    `mark` is "best", "second" or "". `items`: how many were asked, where a column's cells compare only on equally many.
    """

    value: float | Above
    spread: float | None = None
    one_seed: bool = False
    remark: str = ""
    mark: str = ""
    items: float | None = None


@dataclass
class Row:
    """`cells`: column key -> Cell, without the missing ones; `commands` reproduce the records behind them.

    `paths`: those records, relative to the folder they were read from; `mixer`: what its plots are coloured by.
    """

    label: str
    cells: dict[str, Cell] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    ranked: bool = True
    hybrid: bool = False


@dataclass
class Table:
    """`columns` starts with that of the row labels and has none that is empty in all rows."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]


def mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Mark the best and second best student without attention of each ranked column, each only if it is clear of the next.

    Clear: further away than the error of the difference, the root of the sum of squares of what follows the ±; nothing is
    where there is no ±.
    """
    for column in (c for c in columns if c.ranked):
        sign = -1 if column.better == "up" else 1
        runners = [(sign * cell.value, math.inf if cell.spread is None else cell.spread, row) for row in rows if row.ranked and not row.hybrid  # type: ignore[operator]
                   if (cell := row.cells.get(column.key))]
        if len({row.cells[column.key].items for _, _, row in runners}) > 1:
            continue
        runners.sort(key=lambda runner: runner[0])
        for mark, (value, error, row), (following, its, _) in zip(("best", "second"), runners, runners[1:], strict=False):
            if following - value <= math.hypot(error, its):
                break
            row.cells[column.key] = replace(row.cells[column.key], mark=mark)


def number_text(value: float | Above | None, kind: str) -> str:
    """A value as readers see it, in the decimals of its column's `kind`; a missing one is a dash."""
    if value is None:
        return "–"
    if isinstance(value, Above):
        return f"> {number_text(value.bound, 'count' if kind == 'ppl' else kind)}"
    if kind == "tokens":
        return human(value)
    if kind == "millions":
        return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    if kind in ("hours", "gb", "ms"):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    if kind == "points":
        return f"{value:+.2f}"
    decimals = {"ppl": 2 if abs(value) < 1000 else 0, "pct": 1, "acc": 2, "bits": 4, "nats": 3, "count": 0, "ratio": 2}
    return f"{value:.{decimals[kind]}f}"
