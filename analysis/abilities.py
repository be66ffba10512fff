"""What a record says of a model beyond its perplexity and tasks: other lengths, recall, a needle, generated text, agreement
with the teacher, and what a part is worth."""

from __future__ import annotations

import math
import statistics
from typing import Any

from analysis.rows import Record, number

SINGLE = {"agreement_top1": "agreement.top1", "agreement_kl": "agreement.kl", "repetition": "generation.greedy.repetition",
          "teacher_nll": "generation.sampled.teacher_nll"}
"""Names of numbers -> where they stand among a record's metrics."""
PARTS = ("ssm", "conv", "gate")
Point = tuple[float, float | None]
"""A value and its standard error."""


def abilities(records: list[Record]) -> dict[str, Point]:
    """Means over the records (seeds of one row): those of SINGLE, "ppl_at_<length>", "without_<part>" (the change of
    perplexity), "recall_<pairs>" at the longest length that was asked, and "needle" there.

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
        for (_, pairs), point in sorted(recall(r).items()):
            own[f"recall_{pairs}"] = point
        for _, point in sorted(needle(r).items()):
            own["needle"] = point
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


def recall(record: Record) -> dict[tuple[int, int], Point]:
    """{(length, pairs): accuracy in percent} of multi-query associative recall."""
    return {(int(x["length"]), int(x["pairs"])): (x["accuracy"], x.get("stderr")) for x in _measured(record, "recall", "length", "pairs")}


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
