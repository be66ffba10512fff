"""Differences between two cells in log perplexity (nats per token), with an interval, and corrections for many of them.

Two kinds of chance move a difference: other seeds, and other validation text. Which of them the interval covers
depends on what the records hold, and `how` says it:

- two seeds or more in common: the seeds' differences, each between two cells with the same seed (Student's t). With
  the loss of every validation sequence beside the records, the sequences' own paired error is added.
- one seed: the paired differences of the validation sequences, or without them both records' standard errors, which
  is wider, since the sequences are the same. What another seed would give is unknown then, so the interval is widened
  by SEED_MARGIN on either side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.rows import Record, same_items, text
from hm.errors import UserError

SEED_MARGIN = 0.05
"""Log perplexity. Of all pairs of seeds of one cell under results/, one in forty differs by more: HedgeMamba at a tenth of its
budget, and once at 50/50. The standard deviation over the seeds of a cell is mostly about 1%."""

SEED_POINTS = 1.0
"""Points of accuracy in one task by which seeds of one cell may differ by chance; of a mean over tasks the root of their number less."""

LEVEL = 0.05
BATCHES = 10


@dataclass(frozen=True)
class Difference:
    """`value` with its 95% interval, and the p-value of no difference (two-sided).

    `nats` differences are of log perplexity; others are of accuracies, in points.
    """

    value: float
    low: float
    high: float
    p: float
    how: str

    @property
    def percent(self) -> str:
        """A difference of log perplexity as "-4.2% (-5.0% to -3.4%; paired over 3 seeds)"."""
        value, low, high = (f"{100 * math.expm1(min(v, 20)):+.3g}%" for v in (self.value, self.low, self.high))
        return f"{value} ({low} to {high}; {self.how})"

    @property
    def points(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f} points; {self.how})"


def difference(a: Sequence[Record], b: Sequence[Record], root: str | Path) -> Difference | None:
    """Mean of ln ppl(a) - ln ppl(b) over the seeds that both have; a teacher, which has no seed, goes with each.

    None if they have no seed, or no perplexity, in common.
    """
    pairs = [(x, y) for x, y in _paired(a, b) if "metrics.ppl.value" in x and "metrics.ppl.value" in y]
    if not pairs:
        return None
    by_seed = [math.log(x["metrics.ppl.value"] / y["metrics.ppl.value"]) for x, y in pairs]
    value = float(np.mean(by_seed))
    by_sequence = _sequences(pairs, root)
    if len(pairs) > 1:
        parts = [_part(by_seed)] + ([_serial_part(by_sequence)] if by_sequence is not None else [])
        how = f"paired over {len(pairs)} seeds" + (f" and {len(by_sequence)} sequences" if by_sequence is not None else "")
        return _interval(value, parts, 0.0, how)
    if by_sequence is not None:
        return _interval(value, [_serial_part(by_sequence)], SEED_MARGIN, f"paired over {len(by_sequence)} sequences, one seed")
    (x, y), = pairs
    errors = [r.get("metrics.ppl.stderr", math.nan) / r["metrics.ppl.value"] for r in (x, y)]
    if any(math.isnan(e) for e in errors):
        return None
    return _interval(value, [(math.hypot(*errors), math.inf)], SEED_MARGIN, "standard errors of one seed")


def accuracy_difference(a: Sequence[Record], b: Sequence[Record], tasks: Sequence[str]) -> Difference | None:
    """Mean over `tasks` of accuracy(a) - accuracy(b), in points, over the seeds that answered the same items of all of them.

    The error is the harness's (over items) and, from two seeds in common on, that of the seeds; of fewer the value is the
    mean over all records, and SEED_POINTS are added for chance. None if a task is missing in one of them, or its standard
    error, or was asked with other items.
    """
    values, variances = [], []
    by_seed: list[dict[str, float]] = []
    for task in tasks:
        asked = [[r for r in records if f"metrics.{task}.value" in r and f"metrics.{task}.stderr" in r] for records in (a, b)]
        asked = same_items(task, *asked)
        if not all(asked):
            return None
        x, y = (float(np.mean([r[f"metrics.{task}.value"] for r in records])) for records in asked)
        values.append(x - y)
        variances += [float(np.mean([r[f"metrics.{task}.stderr"] ** 2 for r in records])) for records in asked]
        by_seed.append({_seed(p if _seeded(p) else q): p[f"metrics.{task}.value"] - q[f"metrics.{task}.value"] for p, q in _paired(*asked)})
    items = (math.sqrt(sum(variances)) / len(tasks), math.inf)
    seeds = set.intersection(*map(set, by_seed))
    if len(seeds) > 1:
        each = [float(np.mean([found[seed] for found in by_seed])) for seed in seeds]
        return _interval(float(np.mean(each)), [items, _part(each)], 0.0, f"standard errors of the harness and of {len(seeds)} seeds")
    return _interval(float(np.mean(values)), [items], SEED_POINTS / math.sqrt(len(tasks)),
                     f"standard errors of the harness, {'one seed' if seeds else 'no seed in common'}")


def holm(differences: Sequence[Difference]) -> list[float]:
    """The p-values after Holm's correction, in the given order (Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    adjusted, largest = [0.0] * len(differences), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(differences) - rank) * differences[i].p))
        adjusted[i] = largest
    return adjusted


class StudentT:
    """Student's t of `freedom` degrees (infinite: the normal distribution). `scipy.stats`, which has it too, takes a second to import.

    Raises:
        UserError: SciPy is missing.
    """

    def __init__(self, freedom: float):
        try:
            from scipy import special
        except ImportError as error:
            raise UserError("verdicts and fits need SciPy, which is not installed; pip install -e '.[report]' adds it.") from error
        self.freedom, self.special, self.normal = freedom, special, math.isinf(freedom)

    def quantile(self, p: float) -> float:
        return float(self.special.ndtri(p) if self.normal else self.special.stdtrit(self.freedom, p))


def _paired(a: Sequence[Record], b: Sequence[Record]) -> list[tuple[Record, Record]]:
    if b and not any(map(_seeded, b)):
        return [(x, b[0]) for x in a]
    if a and not any(map(_seeded, a)):
        return [(a[0], y) for y in b]
    seeds = {_seed(r): r for r in b}
    return [(x, seeds[_seed(x)]) for x in a if _seed(x) in seeds]


def _seeded(record: Record) -> bool:
    return record.get("settings.recipe") != "teacher"


def _seed(record: Record) -> str:
    return text(record.get("settings.seed", "null"))


def _sequences(pairs: Sequence[tuple[Record, Record]], root: str | Path) -> list[float] | None:
    """The differences of the loss of each validation sequence, mean over the pairs; None where a file is missing."""
    found = []
    for pair in pairs:
        a, b = (_losses(Path(root) / record["path"]) for record in pair)
        if a is None or b is None or a[0] != b[0] or a[1].shape != b[1].shape:
            return None
        found.append(a[1] - b[1])
    if len({len(f) for f in found}) != 1 or len(found[0]) < 2:
        return None
    return np.mean(found, axis=0).tolist()


def _losses(record: Path) -> tuple[Any, np.ndarray] | None:
    """What the record's losses.json was measured on, and the mean loss in nats per token of each validation sequence."""
    try:
        data = json.loads(record.with_name("losses.json").read_text())
        losses = np.array(data["loss"], dtype=np.float64)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if losses.ndim != 1 or not np.isfinite(losses).all():
        return None
    return (data.get("tokens"), data.get("seq_len")), losses


def _part(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of the mean, and its degrees of freedom."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1


def _serial_part(values: Sequence[float]) -> tuple[float, float]:
    """`_part` of values in the order of the text, of which neighbours can be alike (parts of one document): that of the
    means of BATCHES stretches, which hardly are."""
    if len(values) < 2 * BATCHES:
        return _part(values)
    return _part([float(stretch.mean()) for stretch in np.array_split(values, BATCHES)])


def _interval(value: float, parts: Sequence[tuple[float, float]], margin: float, how: str) -> Difference:
    """From independent errors with their degrees of freedom: the half-widths that they would have alone, added like errors
    (MOVER: Zou and Donner, Statistics in Medicine 27, 2008). Welch's and Satterthwaite's approximation is narrower and right
    in 88% instead of 95% where one part has two seeds."""
    alone = [(error, StudentT(freedom)) for error, freedom in parts]

    def half(level: float) -> float:
        return math.hypot(*(error * t.quantile(1 - level / 2) for error, t in alone))

    far = max(0.0, abs(value) - margin)
    low, high = 1e-15, 1.0  # p is the level at which the interval ends at no difference
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if half(middle) < far else (middle, high)
    wide = half(LEVEL) + margin
    return Difference(value, value - wide, value + wide, high, how)
