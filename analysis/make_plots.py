"""Plots from records: `python analysis/make_plots.py` writes <out>/<study>/plots/<plot>.{pdf,png,svg}.

The same records give the same bytes. What is drawn is plots.py's business; here is how. Colours are those of Okabe
and Ito, which colour-blind readers tell apart; fonts are embedded; the width is that of a column.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis import command
from analysis.bench import load_bench
from analysis.fonts import families
from analysis.plots import Plot, Series, all_plots, speed_plots
from analysis.rows import borrowed, human, records_of

COLOURS = {"teacher": "#000000", "adapted_teacher": "#7f7f7f", "hedgehog": "#e69f00", "ssm": "#56b4e9", "ssm_conv": "#009e73",
           "hedgemamba": "#0072b2", "gate": "#d55e00", "one_step": "#cc79a7", "paper": "#7f7f7f"}
OTHER = "#b0a000"
STYLE: Any = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 6.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "hedgemamba", "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.5, "axes.axisbelow": True,
         "lines.linewidth": 1.2, "lines.markersize": 3.5, "legend.frameon": False, "axes.linewidth": 0.6, "figure.dpi": 100}
WIDTH = 3.35
MANY = 12
"""From as many figures on, they are drawn by one process per core: a figure takes about a third of a second."""
LINES: Any = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (9, 2)), "longdashdot": (0, (9, 2, 1, 2))}
HATCHES = {"solid": "", "dash": "////", "dot": "....", "dashdot": "xxxx", "longdash": "\\\\\\\\", "longdashdot": "++++"}
NO_DATE = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}


def draw(plot: Plot) -> Figure:
    """`plot` as a figure of one column's width, or of two where there are many bars."""
    bars = [s for s in plot.series if s.kind == "bar"]
    names = list(dict.fromkeys(x for s in bars for x in s.x))
    labelled = [s for s in plot.series if s.kind != "band" and not (s.kind == "bar" and [s.label] == s.x)]
    with mpl.rc_context(STYLE | {"font.family": families()}):
        width = WIDTH if sum(len(s.x) for s in bars) <= 12 else 2 * WIDTH
        letters = round(19 * width)
        labels = {id(s): textwrap.fill(s.label, letters - 8) for s in labelled}
        columns = 2 if width == WIDTH else 4
        columns = columns if max(map(len, labels.values()), default=0) <= letters // columns - 8 else 1
        note = textwrap.wrap(_literal(plot.note), round(23 * width))
        below = 0.13 * -(-sum(label.count("\n") + 1 for label in labels.values()) // columns) + 0.11 * len(note) + 0.04 * max(0, max(map(len, names), default=0) - 16)
        figure = Figure(figsize=(width, 2.4 + below))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = [line for text in (plot.title, plot.place) for line in textwrap.wrap(text, round(14 * width))]
        title = axes.set_title("\n".join(lines), loc="left", y=1)
        title.set_parse_math(False)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        for axis, log in ((axes.xaxis, plot.log_x), (axes.yaxis, plot.log_y and _wide(plot.series))):
            if log:
                (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log", subs=(2, 5))
                values = [v for series in plot.series for v in (series.x if axis is axes.xaxis else series.y) if v > 0]
                axis.set_minor_formatter(_minor_ticks(values))
            elif "tokens" in axis.get_label_text():
                axis.set_major_locator(MaxNLocator(6))
            if log or "tokens" in axis.get_label_text():
                axis.set_major_formatter(lambda value, _: human(value))
        if plot.heat:
            x, y, z = plot.heat
            mesh = axes.pcolormesh(x, y, np.array(z), shading="nearest", cmap="viridis", vmax=1, rasterized=True)
            figure.colorbar(mesh, ax=axes, label="cosine similarity", use_gridspec=False)
            axes.grid(False)
        for i, series in enumerate(bars):
            alone = [series.label] == series.x
            step = 0.8 / (1 if alone else len(bars))
            at = [names.index(x) + (0 if alone else (i - (len(bars) - 1) / 2) * step) for x in series.x]
            axes.bar(at, series.y, 0.92 * step, color=_colour(series), label="_" if alone else _literal(labels[id(series)]), yerr=_errors(series),
                     error_kw={"elinewidth": 0.7}, hatch=HATCHES[series.dash], edgecolor="white", linewidth=0)
        for series in plot.series:
            if series.kind != "bar":
                _line(axes, series, names, _literal(labels.get(id(series), "")))
        at_x = {x for series in plot.series for x in series.x}
        if plot.log_x and len(at_x) == 1:  # Matplotlib has no logarithmic axis for a single value
            axes.set_xlim(min(at_x) / 2, 2 * max(at_x))
        if {y for series in plot.series for y in series.y} == {0}:
            axes.set_ylim(0, 1)
        if names:
            tilted = len(names) > 4
            axes.set_xticks(range(len(names)), [_literal(n) for n in names], rotation=30 if tilted else 0, ha="right" if tilted else "center")
            axes.grid(False, axis="x")
        if labelled or note:
            figure.legend(loc="outside lower left", ncols=columns, handlelength=2.8, columnspacing=1, title="\n".join(note), title_fontsize=6, alignment="left")
        ConstrainedLayoutEngine().execute(figure)  # once for all three formats; as the figure's own engine it would run for each
    return figure


def _line(axes, series: Series, names: list[str], label: str) -> None:
    """A line, points or a band; on an axis of names only what is at one of them."""
    kept = [i for i, x in enumerate(series.x) if not names or x in names]
    x, y = [names.index(series.x[i]) if names else series.x[i] for i in kept], [series.y[i] for i in kept]
    colour = _colour(series)
    if series.kind == "band":
        axes.fill_between(x, y, [series.top[i] for i in kept], color=colour, alpha=0.15, linewidth=0)  # type: ignore[index]
        return
    errors = _errors(series)
    points = series.kind == "points"
    axes.errorbar(x, y, yerr=[errors[i] for i in kept] if errors else None, fmt="D" if points else "o" if len(x) <= 20 else "",
                  linestyle="" if points else LINES[series.dash], color=colour, label=label, elinewidth=0.7, capsize=1.5,
                  markerfacecolor="white" if series.colour == "paper" else colour)


def _wide(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis has enough to show: less than a factor of four has hardly a round number for a tick."""
    values = [v for s in series for v in (*s.y, *(s.top or ()))]
    return max(values) > 4 * min(values)


def _minor_ticks(values: Sequence[float]) -> FuncFormatter:
    """Labels at 2 and 5 between the powers of ten where `values` span less than three of them."""
    few = bool(values) and max(values) < 500 * min(values)
    return FuncFormatter(lambda value, _: human(value) if few else "")


def _errors(series: Series) -> list[float] | None:
    if not series.error or all(e is None for e in series.error):
        return None
    return [e or 0 for e in series.error]


def _colour(series: Series) -> str:
    return COLOURS.get(series.colour, OTHER)


def _literal(text: str) -> str:
    """`text` without Matplotlib's mathematics."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path, out: str | Path) -> list[Path]:
    """The figure as <path>.pdf, .png and .svg, without dates."""
    files = []
    with mpl.rc_context(STYLE):
        for ending, metadata in NO_DATE.items():
            data = io.BytesIO()
            figure.savefig(data, format=ending, dpi=200, metadata=metadata)
            files.append(command.write_file(path.with_name(f"{path.name}.{ending}"), data.getvalue(), out))
    return files


def file_names(plots: Sequence[Plot]) -> list[str]:
    """A name for each plot: the kind's, and where there are several of it, what tells them apart."""
    names: list[str] = []
    for plot in plots:
        several = sum(p.name == plot.name for p in plots) > 1
        title = plot.title.partition(":")[0].lower() if sum(p.name == plot.name and p.place == plot.place for p in plots) > 1 else ""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{title} {plot.place}").strip("-")[:60] if several else ""
        name = f"{plot.name}-{slug}" if slug else plot.name
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def make(options: argparse.Namespace) -> None:
    """Write what was asked for, and say what could not be drawn."""
    jobs = planned(options)
    few = list(itertools.islice(jobs, MANY))
    if len(few) < MANY:
        files = [file for job in few for file in _write(job)]
    else:  # the first figures are drawn while the others are planned
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            files = [file for done in [pool.submit(_write, job) for job in itertools.chain(few, jobs)] for file in done.result()]
    command.say("\n".join(f"wrote {file}" for file in files), sys.stderr)


def planned(options: argparse.Namespace) -> Iterator[tuple[Plot, Path, str]]:
    """Each plot with its path and the output folder; says which can't be drawn."""
    frame = command.read(options.runs)
    benches, _ = load_bench(options.bench or Path(options.out) / "bench")
    records = records_of(frame)

    def plots_of(study: str) -> tuple[list[Plot], list[str]]:
        mine, others = ([r for r in records if (r["study"] == study) == own] for own in (True, False))
        return all_plots(mine + borrowed(mine, others, []))

    of_studies = ((study, command.folder_name(study), plots_of(study)) for study in command.chosen(frame, options.study, options.runs))
    for study, folder, (plots, missing) in itertools.chain(of_studies, [("", "speed", speed_plots(benches))]):
        command.say("\n".join(f"{study}: {line}" if study else line for line in missing), sys.stderr)
        for plot, name in zip(plots, file_names(plots), strict=True):
            yield plot, Path(options.out) / folder / "plots" / name, options.out


def _write(job: tuple[Plot, Path, str]) -> list[Path]:
    plot, path, out = job
    return save(draw(plot), path, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 after one sentence on standard error."""
    parser = command.parser("Make plots (PDF, PNG, SVG) from records.")
    parser.add_argument("--bench", help="folder with the files of `python -m hm.bench` (default: OUT/bench)")
    return command.run(make, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
