"""What a record says of a model beyond its perplexity and tasks: other lengths, recall, a needle, generated text, agreement
with the teacher, and what a part is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from analysis.rows import Record, number
from analysis.table import Column, Row, number_text

SINGLE = {"agreement_top1": "agreement.top1", "agreement_kl": "agreement.kl", "repetition": "generation.greedy.repetition",
          "teacher_nll": "generation.sampled.teacher_nll"}
"""Names of numbers -> where they stand among a record's metrics."""
PARTS = ("ssm", "conv", "gate")
PAIRS = (4, 16, 64)
_ASKED, _WORTH, _LENGTHS = "recall, agreement with the teacher, generated text", "change of perplexity without a part", "perplexity at other lengths"
COLUMNS = [
    *[Column(f"recall_{pairs}", f"recall,\n{pairs} pairs", "acc", "up", _ASKED) for pairs in PAIRS],
    Column("agreement_top1", "top-1\nagreement", "acc", "up", _ASKED),
    Column("agreement_kl", "KL,\nnats", "nats", "down", _ASKED),
    Column("repetition", "repetition\n%", "acc", "", _ASKED),
    Column("teacher_nll", "teacher's\nnats", "nats", "down", _ASKED),
    *[Column(f"without_{part}", f"without\n{name}", "points", "", _WORTH) for part, name in zip(PARTS, ("SSM", "conv", "gate"), strict=True)],
]
"""Of tables, beside those of `length_columns`."""
_NAMES = tuple({"ppl_at_", "needle_", *(column.key for column in COLUMNS)})
"""What the keys of these columns begin with."""
Point = tuple[float, float | None]
"""A value and its standard error."""


def abilities(records: list[Record]) -> dict[str, Point]:
    """Means over the records (seeds of one row): those of SINGLE, "ppl_at_<length>", "without_<part>" (the change of
    perplexity), "recall_<pairs>" at the longest length that was asked, and "needle_<length>".

    All seeds answer the same questions, so the error is that of the questions: the root mean square over the seeds.
    """
    found: dict[str, list[Point]] = {}
    for r in records:
        for name, where in SINGLE.items():
            if (value := number(r, f"metrics.{where}.value")) is not None:
                found.setdefault(name, []).append((value, number(r, f"metrics.{where}.stderr")))
        own: dict[str, Point] = {}
        for part in PARTS:
            if (change := number(r, f"metrics.diagnostics.without.{part}")) is not None:
                own[f"without_{part}"] = change, None
        own |= {f"ppl_at_{length}": point for length, point in at_lengths(r).items()}
        own |= {f"recall_{pairs}": point for pairs, point in recall(r).items()}
        own |= {f"needle_{length}": point for length, point in needle(r).items()}
        for name, point in own.items():
            found.setdefault(name, []).append(point)
    return {name: mean(points) for name, points in found.items()}


def at_lengths(record: Record) -> dict[int, Point]:
    """{length: perplexity} of eval.lengths."""
    lengths, ppl, stderr = (record.get(f"metrics.ppl_at_length.{name}") for name in ("lengths", "ppl", "stderr"))
    if not (isinstance(lengths, list) and isinstance(ppl, list) and isinstance(stderr, list) and len(lengths) == len(ppl) == len(stderr)):
        return {}
    rows: list[Record] = [{"length": n, "ppl": p, "stderr": e} for n, p, e in zip(lengths, ppl, stderr, strict=True)]
    return {int(r["length"]): (r["ppl"], number(r, "stderr")) for r in rows if number(r, "length") is not None and number(r, "ppl") is not None}


def recall(record: Record) -> dict[int, Point]:
    """{pairs: accuracy in percent} of multi-query associative recall, each at the longest length that was asked."""
    asked = sorted(_measured(record, "recall", "length", "pairs"), key=lambda x: (x["length"], x["pairs"]))
    return {int(x["pairs"]): (x["accuracy"], x.get("stderr")) for x in asked}


def needle(record: Record) -> dict[int, Point]:
    """{length: accuracy in percent}, the mean over where the needle lay; without an error."""
    at: dict[int, list[float]] = {}
    for x in _measured(record, "needle", "length", "depth"):
        at.setdefault(int(x["length"]), []).append(x["accuracy"])
    return {length: (statistics.fmean(values), None) for length, values in at.items()}


def mean(points: list[Point]) -> Point:
    errors = [error for _, error in points if error is not None]
    return statistics.fmean(value for value, _ in points), math.sqrt(statistics.fmean(e * e for e in errors)) if errors else None


def _measured(record: Record, name: str, *keys: str) -> list[dict[str, Any]]:
    """The entries of a list of measurements that have a finite accuracy and each of the keys."""
    entries = record.get(f"metrics.{name}")
    wanted = ("accuracy", *keys)
    return [x for x in (entries if isinstance(entries, list) else []) if isinstance(x, dict) and all(number(x, k) is not None for k in wanted)
            and (x.get("stderr") is None or number(x, "stderr") is not None)]


def compared(rows: Sequence[Row]) -> None:
    """Leave out what only teachers were asked where there are students to compare with."""
    asked = {key for row in rows if row.ranked for key in row.cells}
    for row in rows if any(row.ranked for row in rows) else ():
        row.cells = {key: cell for key, cell in row.cells.items() if key in asked or not key.startswith(_NAMES)}


def length_columns(keys: Iterable[str]) -> list[Column]:
    """A column for each "needle_<length>" and "ppl_at_<length>" among the keys."""
    kinds = {"needle_": ("needle\nin {}", "acc", "up", _ASKED), "ppl_at_": ("ppl at\n{}", "ppl", "down", _LENGTHS)}
    found = []
    for kind, (title, unit, better, block) in kinds.items():
        lengths = sorted(int(key.removeprefix(kind)) for key in set(keys) if key.startswith(kind))
        found += [Column(f"{kind}{n}", title.format(n), unit, better, block) for n in lengths]
    return found


def notes(keys: Collection[str]) -> list[str]:
    """What the columns of these keys mean."""
    found = []
    if pairs := [p for p in PAIRS if f"recall_{p}" in keys]:
        chance = ", ".join(number_text(100 / p, "acc") for p in pairs)
        known = ", ".join(number_text(100 * sum(1 / i for i in range(1, p + 1)) / p, "acc") for p in pairs)
        found.append("recall: share of the values of so many pairs of random tokens that are named again, among these values, in sequences of the "
                     f"longest length that was asked; by chance {chance}, and {known} by knowing which were named already and no pairs. "
                     "± of these columns: standard error over the sequences.")
    if any(key.startswith("needle_") for key in keys):
        found.append("needle: share of numbers in a text of so many tokens that are named again, the mean over depths.")
    if {"agreement_top1", "agreement_kl"} & set(keys):
        found.append("Agreement: share of positions of held-out text whose most likely token is the teacher's, and KL(teacher || model) per token.")
    if {"repetition", "teacher_nll"} & set(keys):
        found.append("repetition: share of 4-grams of greedy continuations that were there before; teacher's nats: its loss on sampled ones, per token.")
    if any(key.startswith("without_") for key in keys):
        found.append("without: how much the perplexity changes when the part is put back to the identity in all layers.")
    return found
