"""Records and benchmarks -> plots, as data: make_plots.py draws them with Matplotlib, the page with Plotly.

A plot that lacks its data is left out, and one line says what is missing. A mixer has one colour everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis import paper
from analysis.abilities import mean, needle, recall
from analysis.bench import Bench
from analysis.places import Cells, Place, places
from analysis.recipes import at_budgets
from analysis.rows import MIXERS, TEACHERS, Record, borrowed, human, mixer_of, number, paths_of, recipe_of
from analysis.stats import LEVEL, StudentT
from analysis.table import number_text

PAPER = "paper (Pythia-1B, 10B tokens)"
STYLES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass
class Series:
    """`colour` is a mixer's, recipe's or "paper"; `kind`: line, points, bar, or band (between `y` and `top`).

    `error` are half lengths (or None), `hover` a text for each point, `paths` the records behind each point (where `error` is
    over seeds, one for each seed).
    """

    label: str
    colour: str
    x: list[Any]
    y: list[float]
    kind: str = "line"
    error: list[float | None] | None = None
    top: list[float] | None = None
    dash: str = "solid"
    hover: list[str] = field(default_factory=list)
    paths: list[list[str]] = field(default_factory=list)


@dataclass
class Plot:
    """`series`, or for a heat map `heat`: (x, y, z) with z[y][x]. `place`: teacher, text and budget."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    heat: tuple[list[float], list[float], list[list[float]]] | None = None
    place: str = ""
    note: str = ""


def all_plots(records: list[Record]) -> tuple[list[Plot], list[str]]:
    """The plots that the data give, and for each of the others a line that says what it needs.

    What is about one budget is drawn for the largest of each teacher and text.
    """
    found: list[Plot] = []
    missing: list[str] = []
    largest = {id(p.yard): p for p in places(records)}.values()
    for name, (needs, make) in _KINDS.items():
        made = [plot for place in largest for plot in make(place)]
        found += made
        missing += [] if made else [f"{name}: not drawn, needs {needs}"]
    return found, missing


def speed_plots(benches: Sequence[Bench]) -> tuple[list[Plot], list[str]]:
    """The plots of the benchmarks, or a line that says what they need."""
    found = list(_speed(benches))
    return found, [] if found else ["decoding: not drawn, needs a file of `python -m hm.bench inference`"]


# --- what points are made of -------------------------------------------------------------------------------

def _mean(cells: Cells, metric: str) -> tuple[float, float | None] | None:
    """Mean over seeds and their standard deviation; of one seed the standard error."""
    values = [r[f"metrics.{metric}.value"] for r in cells.records if f"metrics.{metric}.value" in r]
    if not values:
        return None
    errors = [r[f"metrics.{metric}.stderr"] for r in cells.records if f"metrics.{metric}.stderr" in r]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else errors[0] if errors else None


def _colour(cells: Cells) -> str:
    first = cells.records[0]
    return mixer_of(first) if recipe_of(first) == "two_stage" else recipe_of(first)


def _paths(cells: Cells) -> list[str]:
    return paths_of(cells.records)


def _gap(cells: Cells, teacher: float) -> tuple[float, float | None, str] | None:
    """Gap to the teacher in percent, its spread, and a line that says the perplexity."""
    found = _mean(cells, "ppl")
    if found is None:
        return None
    ppl, spread = found
    gap = 100 * (ppl / teacher - 1)
    shown = f"{cells.name}: ppl {ppl:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    return gap, None if spread is None else 100 * spread / teacher, f"{shown}, gap {gap:.1f}%, {cells.seeds} seed{'s' * (cells.seeds > 1)}"


def _gaps(label: str, colour: str, points: Sequence[tuple[Any, Cells]], teacher: float, kind: str = "line", dash: str = "solid") -> Series:
    series = Series(label, colour, [], [], kind, [], dash=dash)
    for x, cells in points:
        if found := _gap(cells, teacher):
            series.x.append(x)
            series.y.append(found[0])
            series.error.append(found[1])  # type: ignore[union-attr]
            series.hover.append(found[2])
            series.paths.append([r["path"] for r in cells.records])
    return series


def _alike(points: Iterable[tuple[Any, list[Cells]]]) -> list[tuple[Any, Cells]]:
    """A cell at each point where there is one of the same other settings: of several such lines the longest, then the best."""
    lines: dict[tuple, list[tuple[Any, Cells]]] = {}
    for x, variants in points:
        for cells in variants:
            lines.setdefault(tuple(sorted(cells.settings.items())), []).append((x, cells))
    return max(lines.values(), key=lambda line: (len(line), -statistics.fmean(cells.ppl for _, cells in line)), default=[])


def _seeds(series: Sequence[Series]) -> str:
    """What the error bars of `series` are."""
    counts = sorted({len(behind) for s in series if s.error for behind in s.paths})
    if counts in ([], [1]):
        return "One seed; error bars: standard error over the sequences." if counts else ""
    rest = " (one seed: standard error over the sequences)" if counts[0] == 1 else ""
    return f"Error bars: standard deviation over {' or '.join(str(n) for n in counts if n > 1)} seeds{rest}."


def _teacher(place: Place) -> float | None:
    teacher = place.teacher()
    found = _mean(teacher, "ppl") if teacher else None
    return found[0] if found else None


def _published(rows: dict[Any, Any]) -> Series:
    """The paper's gaps at the keys of `rows`, {x: row}."""
    gaps = {x: gap for x, row in rows.items() if isinstance(gap := paper.gap(row["ppl"]), float)}
    return Series(PAPER, "paper", list(gaps), list(gaps.values()), "line", dash="dash",
                  hover=[f"paper, {x if isinstance(x, str) else f'{x:g}'}: gap {gap:.1f}%" for x, gap in gaps.items()])


# --- the plots ---------------------------------------------------------------------------------------------

def _budget(place: Place) -> Iterator[Plot]:
    """Gap against budget with a power law, per yardstick; the paper's budgets beside it."""
    teacher, series = _teacher(place), []
    if teacher is None:
        return
    for mixer, split in (("hedgemamba", "10/90"), ("hedgehog", "10/90")):
        curve = _gaps(f"{mixer} {split}", mixer, _alike((p.budget, p.variants(mixer, split)) for p in places(place.yard)), teacher)
        if len(curve.x) > 1:
            series += [curve, *_power_law(curve)]
    if series:
        published = paper.TABLES["budget"].rows
        series.append(_published({float(b.removesuffix("B")) * 1e9: row for b, row in published.items()}))
        positive = all(y > 0 for s in series for y in s.y)
        yield Plot("budget", "Gap to the teacher against the budget", "tokens of both stages", "gap to the teacher, %", series,
                   log_x=True, log_y=positive, place=place.label.rpartition(",")[0],
                   note=f"{_seeds(series)} Fit: power law, least squares of the logarithms, with the 95% interval of the line; from three budgets on.")


def _power_law(curve: Series) -> Iterator[Series]:
    """gap = a D^-b by least squares of the logarithms, and the 95% interval of the fitted line."""
    if len(curve.x) < 3 or min(curve.y) <= 0:
        return
    x, y = np.log(curve.x), np.log(curve.y)
    slope, start = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    spread = math.sqrt(float(((y - start - slope * x) ** 2).sum()) / freedom)
    grid = np.linspace(x.min(), x.max(), 40)
    half = StudentT(freedom).quantile(1 - LEVEL / 2) * spread * np.sqrt(1 / len(x) + (grid - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    fit = start + slope * grid
    at = np.exp(grid).tolist()
    yield Series(f"fit, exponent {slope:.2f}", curve.colour, at, np.exp(fit).tolist(), dash="dot")
    yield Series("95% interval of the fit", curve.colour, at, np.exp(np.maximum(fit - half, -50)).tolist(), "band",
                 top=np.exp(np.minimum(fit + half, 50)).tolist())


def _split(place: Place) -> Iterator[Plot]:
    teacher = _teacher(place)
    if teacher is None:
        return
    series = []
    for i, at in enumerate(places(place.yard)[: -len(STYLES) - 1 : -1]):  # of more budgets the largest
        for mixer in at.mixers:
            curve = _gaps(f"{mixer}, {human(at.budget)}", mixer, _alike((_share(s), at.variants(mixer, s)) for s in at.splits), teacher,
                          dash=STYLES[i % len(STYLES)])
            if len(curve.x) > 1:
                series.append(curve)
    if series:
        rows: dict[Any, Any] = {_share(s): row for s, row in paper.TABLES["split"].rows.items()}
        positive = all(y > 0 for s in series for y in s.y)
        yield Plot("split", "Gap to the teacher against the split", "tokens in stage 1, %", "gap to the teacher, %",
                   [*series, _published(dict(sorted(rows.items())))], log_y=positive, place=place.label.rpartition(",")[0], note=_seeds(series))


def _share(split: str) -> float:
    return float(split.partition("/")[0])


def _mixer(place: Place) -> Iterator[Plot]:
    teacher = _teacher(place)
    if teacher is None:
        return
    run = {s: _alike((m, place.variants(m, s)) for m in place.mixers) for s in place.splits}
    split = max(sorted(run), key=lambda s: len(run[s]), default="")
    if len(run.get(split, [])) < 2:
        return
    series = []
    for mixer, cells in run[split]:
        shown = MIXERS.get(mixer) or mixer
        series.append(_gaps(shown, mixer, [(shown, cells)], teacher, "bar"))
    published = _published(paper.TABLES["mixer"].rows)
    published.kind, published.label = "points", "paper (Pythia-1B, 10B tokens, 50/50)"
    yield Plot("mixer", f"Parts of the mixer at {split}", "", "gap to the teacher, %", [*series, published], place=place.label, note=_seeds(series))


def _recipes(place: Place) -> Iterator[Plot]:
    """The study of recipes: each row's gap to the adapted teacher, a bar for each budget."""
    records, others = ([r for r in place.yard if (r["study"] == "recipes") == own] for own in (True, False))
    records += borrowed(records, others, [])
    mixers = {mixer_of(r) for r in records if recipe_of(r) not in TEACHERS}
    colour = mixers.pop() if len(mixers) == 1 else "other"
    series = []
    for dash, (budget, found) in zip(STYLES, at_budgets(records, []).items(), strict=False):
        rows = {name: (recipe, gap) for name, recipe in found.items() if recipe_of(recipe.records[0]) not in TEACHERS and (gap := recipe.gap)}
        if rows:
            series.append(Series(f"{human(budget)} tokens", colour, list(rows), [gap.value for _, gap in rows.values()],  # type: ignore[misc]
                                 "bar", [gap.spread for _, gap in rows.values()], dash=dash, paths=[[r["path"] for r in recipe.records] for recipe, _ in rows.values()],
                                 hover=[f"{name}: gap {number_text(gap.value, 'nats')}, {len(recipe.gaps)} seeds" for name, (recipe, gap) in rows.items()]))
    if series:
        yield Plot("recipes", "Recipes: gap to the adapted teacher", "", "gap, nats per token", series, place=place.label.rpartition(",")[0],
                   note=f"ln(perplexity / the adapted teacher's of the same budget and seed). {_seeds(series)}")


def _losses(place: Place) -> Iterator[Plot]:
    """Loss against tokens, one plot for each stage; the first seed of each cell."""
    for step, stage, title, label in (("stage1", "stage 1", "Stage 1: cosine loss", "1 - cosine similarity"),
                                      ("student", "stage 2", "Stage 2: training loss", "loss, nats per token")):
        series: list[Series] = []
        used, seen = dict.fromkeys(MIXERS, 0), set()
        for cells in place.everything():
            curve = _curve(cells.records[0], step)
            shared = step == "stage1" and tuple(curve["loss"]) in seen
            if shared or not curve["loss"]:
                continue
            seen.add(tuple(curve["loss"]))
            series.append(Series(cells.name, _colour(cells), curve["tokens"], curve["loss"], dash=_dash(used, cells),
                                 paths=[_paths(cells)[:1]] * len(curve["loss"])))
        if series:
            yield Plot("loss", title, f"tokens of {stage}", label, series, place=place.label, note="One seed of each cell.")


def _cosine(place: Place) -> Iterator[Plot]:
    """Stage 1's cosine similarity by layer and step, of the first HedgeMamba that has a stage 1."""
    for cells in sorted(place.everything(), key=lambda c: (_colour(c) != "hedgemamba", c.ppl)):
        curve = _curve(cells.records[0], "stage1")
        layers = sorted(int(name[6:]) for name in curve if name.startswith("layer.") and name[6:].isdecimal())
        by_cosine = cells.settings.get("settings.stage1.loss") == "cosine"  # another loss says nothing of it
        if layers and len(curve["loss"]) > 1 and by_cosine:
            z = [[1 - loss for loss in curve[f"layer.{i}"]] for i in layers]
            yield Plot("stage1_cosine", "Stage 1: cosine similarity by layer", "tokens of stage 1", "layer",
                       heat=(curve["tokens"], [float(i) for i in layers], z), place=f"{place.label}, {cells.name}")
            break


def _curve(record: Record, step: str) -> dict[str, list[float]]:
    """What a training step logged, by column; empty columns where the record has none."""
    curve = record.get("curves", {}).get(step, {})
    return curve if {"tokens", "loss"} <= set(curve) else {"tokens": [], "loss": []}


def _leading(place: Place) -> list[Cells]:
    """Of each mixer, recipe and teacher the cell with the lowest perplexity."""
    best: dict[str, Cells] = {}
    for cells in sorted(place.everything(), key=lambda c: c.ppl):
        best.setdefault(_colour(cells), cells)
    return [cells for cells in place.everything() if cells.name == best[_colour(cells)].name]


def _downstream(place: Place) -> Iterator[Plot]:
    series: list[Series] = []
    for cells in _leading(place):
        found = {t: m for t in paper.TASKS if (m := _mean(cells, t))}
        if not found:
            continue
        errors = {t: next((r[f"metrics.{t}.stderr"] for r in cells.records if f"metrics.{t}.stderr" in r), None) for t in found}
        series.append(Series(cells.name, _colour(cells), [paper.METRICS[t].short for t in found], [m[0] for m in found.values()], "bar",
                             list(errors.values()), paths=[_paths(cells)] * len(found),
                             hover=[f"{cells.name}, {t}: {m[0]:.2f}%" for t, m in found.items()]))
    if any(s.colour not in TEACHERS for s in series):
        yield Plot("downstream", "Zero-shot accuracy", "", "accuracy, %", series, place=place.label,
                   note="Of each mixer the cell with the lowest perplexity, mean over its seeds. Error bars: the harness's standard error over the items.")


def _position(place: Place) -> Iterator[Plot]:
    series = []
    for cells in _leading(place):
        first = next((r for r in cells.records if isinstance(r.get("metrics.ppl_by_position.ppl"), list)), None)
        if first is None:
            continue
        x, y = first.get("metrics.ppl_by_position.positions"), first["metrics.ppl_by_position.ppl"]
        error = first.get("metrics.ppl_by_position.stderr")
        if isinstance(x, list) and len(x) == len(y):
            series.append(Series(cells.name, _colour(cells), x, y, error=error if isinstance(error, list) and len(error) == len(y) else None,
                                 paths=[[first["path"]]] * len(x)))
    if series:
        yield Plot("position", "Perplexity by position", "position, tokens", "perplexity", series, log_x=True, log_y=True, place=place.label,
                   note="Of each mixer one seed of the cell with the lowest perplexity. Error bars: standard error over the sequences.")


def _recall(place: Place) -> Iterator[Plot]:
    """Recall against the number of pairs at the longest length, and the needle against the length: each mixer's best cell."""
    kinds = (("recall", "Associative recall", "pairs of key and value", recall, "Error bars: standard error over the sequences."),
             ("needle", "A needle in held-out text", "length, tokens", needle, "The mean over where it lies."))
    for name, title, label, measured, about in kinds:
        series: list[Series] = []
        for cells in _leading(place):
            found: dict[float, list[tuple[float, float | None]]] = {}
            for r in cells.records:
                for x, point in measured(r).items():
                    found.setdefault(x, []).append(point)
            points = {x: mean(of_seeds) for x, of_seeds in sorted(found.items())}
            if points:
                series.append(Series(cells.name, _colour(cells), list(points), [p[0] for p in points.values()], error=[p[1] for p in points.values()],
                                     paths=[_paths(cells)] * len(points), hover=[f"{cells.name}, {x}: {p[0]:.1f}%" for x, p in points.items()]))
        if any(s.colour not in TEACHERS for s in series):
            if name == "recall":
                asked = sorted({x for s in series for x in s.x})
                series.append(Series("by chance", "other", asked, [100 / x for x in asked], dash="dot"))
            yield Plot(name, title, label, "accuracy, %", series, log_x=True, place=place.label,
                       note=f"Of each mixer the cell with the lowest perplexity, mean over its seeds. {about}")


def _decay(place: Place) -> Iterator[Plot]:
    """The decay rate of each layer: of each mixer's best cell the median head, of the best of all also the range over heads."""
    found = []
    for cells in _leading(place):
        layers = next((x for r in cells.records if isinstance(x := r.get("metrics.diagnostics.layers"), list)), [])
        rates = {layer["layer"]: layer["decay_rate"] for layer in layers if isinstance(layer, dict) and "layer" in layer
                 and isinstance(layer.get("decay_rate"), list) and layer["decay_rate"]
                 and all(isinstance(v, int | float) for v in layer["decay_rate"])}
        found += [(cells, rates)] if rates else []
    series: list[Series] = []
    for cells, rates in sorted(found, key=lambda pair: pair[0].ppl):
        low, middle, high = ([v[round(q * (len(v) - 1))] for v in rates.values()] for q in (0, 0.5, 1))
        if not series:
            series.append(Series(f"{cells.name}, range over heads", _colour(cells), list(rates), low, "band", top=high))
        series.append(Series(f"{cells.name}, median", _colour(cells), list(rates), middle, paths=[_paths(cells)] * len(rates)))
    if series:
        yield Plot("decay", "Decay rate by layer", "layer", "delta A, per token", series, place=place.label,
                   note="A token multiplies the state by exp(-delta A): 0 forgets nothing.")


def _dash(used: dict[str, int], cells: Cells) -> str:
    """The next line style of this colour. Mixers that have none of their own share one."""
    colour = _colour(cells)
    colour = colour if colour in {*MIXERS, *TEACHERS, "one_step"} else "other"
    count = used.get(colour, 0)
    used[colour] = count + 1
    return STYLES[count % len(STYLES)]


_SPEED = {"decoding": ("Time of a token", "seconds_per_token", 1e3, "ms per token"),
          "decoding_memory": ("Memory of decoding", "peak_memory_bytes", 1e-9, "peak memory, GB"),
          "prefill": ("Prefill", "prefill_tokens_per_second", 1, "tokens/s")}


def _speed(benches: Sequence[Bench]) -> Iterator[Plot]:
    """Against the context: student and teacher, a line for each batch. Running out of memory is a result, in the note."""
    for name, (title, key, factor, label) in _SPEED.items():
        for bench in (b for b in benches if b.kind == "inference"):
            lines: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
            for row in bench.rows:
                context, value = number(row, "context"), number(row, key)
                if context and value is not None and value > 0:
                    which = (str(row.get("shape", "")), str(row.get("model", "?")), number(row, "batch") or 0)
                    lines.setdefault(which, []).append((context, value * factor))
            batches = sorted({batch for *_, batch in lines})
            series: list[Series] = []
            for (shape, model, batch), points in sorted(lines.items()):
                x, y = map(list, zip(*sorted(points), strict=True))
                series.append(Series(", ".join(filter(None, (model, shape, f"batch {batch:g}"))), "hedgemamba" if model == "student" else model, x, y,
                                     dash=STYLES[batches.index(batch) % len(STYLES)], paths=[[f"bench/{bench.path}"]] * len(x)))
            failed = [f"{row.get('model', '?')}, batch {row.get('batch', '?')}, {human(number(row, 'context') or 0)}: {row['status']}"
                      for row in bench.rows if row.get("status", "ok") != "ok"]
            if series:
                yield Plot(name, title, "context, tokens", label, series, log_x=True, log_y=True, place=bench.device, note="; ".join(failed))


_KINDS: dict[str, tuple[str, Callable[[Place], Iterator[Plot]]]] = {
    "budget": ("two budgets of one mixer at 10/90, and the teacher", _budget),
    "split": ("two splits of one mixer, and the teacher", _split),
    "mixer": ("two mixers at one split, and the teacher", _mixer),
    "recipes": ("records of a study named recipes, with adapted teachers of its budgets", _recipes),
    "loss": ("curves in the records", _losses),
    "stage1_cosine": ("curves of a stage 1 in the records", _cosine),
    "downstream": ("accuracies in the records (eval.tasks)", _downstream),
    "position": ("ppl_by_position in the records (eval.lengths)", _position),
    "recall": ("recall or a needle in a student's records (eval.recall, eval.needle)", _recall),
    "decay": ("diagnostics in the records (eval.diagnostics)", _decay),
}
