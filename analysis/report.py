"""The page: `python analysis/report.py --study NAME` writes <out>/NAME/report.html, without --study <out>/report.html.

One file that needs no network: the data as JSON, page/page.js that shows them, and Plotly's JavaScript for the plots.
With --watch the page of a running sweep is made anew until no cell is open; it loads itself again in the browser.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

if __package__ in (None, ""):  # run as a script: the repository's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pandas as pd

from analysis import command, paper
from analysis.bench import Bench, load_bench, speed_tables
from analysis.claims import judge
from analysis.formats import shown
from analysis.paper import Above
from analysis.plots import Plot, all_plots, speed_plots
from analysis.rows import mixer_of, recipe_of, records_of, text
from analysis.state import sweep_state
from analysis.table import Table
from analysis.tables import build, studies
from hm.errors import UserError

REFRESH = 30
# Okabe and Ito's colours, on light and on dark ground (make_plots.py has the same on white).
COLOURS = {"teacher": ("#000000", "#ffffff"), "adapted_teacher": ("#7f7f7f", "#a8a8a8"), "hedgehog": ("#e69f00", "#e69f00"),
           "ssm": ("#56b4e9", "#56b4e9"), "ssm_conv": ("#009e73", "#1fbf93"), "hedgemamba": ("#0072b2", "#4a9fd8"),
           "gate": ("#d55e00", "#f07a26"), "one_step": ("#cc79a7", "#d98fb8"), "paper": ("#7f7f7f", "#a8a8a8"), "other": ("#b0a000", "#c9b915")}


def page(frame: pd.DataFrame, out_folder: Path, title: str, benches: Sequence[Bench], state: dict[str, Any]) -> str:
    """The page as HTML. `out_folder` is where it will lie: links to records are relative to it."""
    root = Path(frame.attrs.get("root", "."))
    records = records_of(frame)
    ids = {r["path"]: i for i, r in enumerate(records)}
    tables = [(study, table) for study in studies(frame) for table in build(frame, study, records)]
    tables += [("speed", table) for table in speed_tables(list(benches))]
    plots, missing = all_plots(records)
    speed, without = speed_plots(benches)
    teachers = sorted({text(r.get("settings.teacher", "?")) for r in records})
    data = {
        "title": title, "colours": COLOURS, "state": state, "problems": [list(p) for p in frame.attrs.get("problems", [])],
        "summary": f"{len(records)} record{'s' * (len(records) != 1)}, {len(studies(frame))} stud{'ies' if len(studies(frame)) != 1 else 'y'}, "
                   f"teacher{'s' * (len(teachers) != 1)}: {', '.join(teachers) or 'none yet'}. What is measured here stands beside what the paper reports of {paper.TEACHER}.",
        "footer": f"Paper: {paper.TITLE}, arXiv {paper.ARXIV}; its figures are quoted from public reading notes.",
        "claims": [_claim(claim, ids) for claim in judge(frame)] if records else [],
        "tables": [_table(study, table, records, ids) for study, table in tables],
        "plots": [_plot(plot, ids) for plot in [*plots, *speed]], "missing": [*missing, *without],
        "records": _records(records, root, out_folder),
    }
    parts = {name: resources.files("analysis").joinpath(f"page/page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    head, rest = parts["html"].replace("{{title}}", _html(title)).replace("{{css}}", parts["css"]).split("{{data}}")
    before, rest = rest.split("{{plotly}}")
    middle, end = rest.split("{{js}}")
    return "".join([head, _embedded(data), before, _script(plotly()), middle, _script(parts["js"]), end])


def plotly() -> str:
    """Plotly's JavaScript. Raises UserError, with what to install, if the package is missing."""
    try:
        return resources.files("plotly").joinpath("package_data/plotly.min.js").read_text("utf-8")
    except ModuleNotFoundError as error:
        raise UserError("the page needs Plotly, which is not installed; pip install -e '.[report]' adds it.") from error


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _script(code: str) -> str:
    """`code` so that no string in it ends its script element."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _embedded(data: Any) -> str:
    """`data` as JSON that no HTML parser can take for markup. Numbers have six digits."""
    plain = json.dumps(_brief(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _brief(value: Any) -> Any:
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(k): _brief(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_brief(v) for v in value]
    return value


def _claim(claim: Any, ids: dict[str, int]) -> dict[str, Any]:
    data = asdict(claim)
    for finding in data["findings"]:
        finding["records"] = [ids[p] for p in finding.pop("paths") if p in ids]
    return data


def _table(study: str, table: Table, records: list[dict[str, Any]], ids: dict[str, int]) -> dict[str, Any]:
    rows = []
    for row in table.rows:
        own = [ids[p] for p in row.paths if p in ids]
        behind = [records[i] for i in own]
        kinds = sorted({_kind(r) for r in behind})
        cells = {c.key: {"value": cell.value.bound if isinstance(cell.value, Above) else cell.value, "mark": cell.mark, "text": shown(row, c)}
                 for c in table.columns if (cell := row.cells.get(c.key))}
        search = " ".join([row.label, *row.commands, *(str(r.get("settings.mixer", "")) for r in behind)]).lower()
        rows.append({"label": row.label, "records": own, "cells": cells, "mixers": kinds, "search": search,
                     "teachers": sorted({text(r["settings.teacher"]) for r in behind if "settings.teacher" in r}),
                     "colour": kinds[0] if len(kinds) == 1 else None})
    columns = [{"key": c.key, "header": c.header, "block": c.block} for c in table.columns[1:]]
    return {"study": study, "name": table.name, "caption": table.caption, "columns": columns, "rows": rows, "notes": table.notes}


def _kind(record: dict[str, Any]) -> str:
    return mixer_of(record) if recipe_of(record) == "two_stage" else recipe_of(record)


def _plot(plot: Plot, ids: dict[str, int]) -> dict[str, Any]:
    data = asdict(plot)
    for series in data["series"]:
        series["records"] = [[ids[p] for p in of_point if p in ids] for of_point in series.pop("paths")]
    return data


def _records(records: list[dict[str, Any]], root: Path, out_folder: Path) -> dict[str, Any]:
    """All records by column; what is the same in all of them stands once."""
    rows = [{**{k: v for k, v in r.items() if k not in ("path", "curves") and not (isinstance(v, list) and len(v) > 60)},
             "_href": quote(Path(os.path.relpath(root / r["path"], out_folder)).as_posix())} for r in records]
    names = sorted({name for row in rows for name in row})
    missing = object()
    constant = {n: rows[0].get(n) for n in names if len(rows) > 1 and rows[0].get(n, missing) is not missing
                and all(row.get(n, missing) == rows[0][n] for row in rows)}
    varying = [n for n in names if n not in constant]
    return {"columns": varying, "constant": constant, "rows": [[row.get(n) for n in varying] for row in rows]}


def make(options: argparse.Namespace) -> None:
    """Write the page once, or with --watch until no cell is open."""
    while True:
        state = sweep_state(options.runs, options.study)
        _write(options, state)
        if options.watch is None or not state.open:
            return
        time.sleep(options.watch)


def _write(options: argparse.Namespace, state: Any) -> None:
    try:
        frame = command.read(options.runs)
    except UserError:
        if not state.open:
            raise
        frame = pd.DataFrame()
    folder, title = Path(options.out), "Attention to Mamba, reproduced"
    if options.study is not None:
        if not state.open:
            command.chosen(frame, options.study, options.runs)
        attrs = frame.attrs
        frame = frame[frame["study"] == options.study] if len(frame) else frame
        frame.attrs = attrs
        folder, title = folder / command.folder_name(options.study), f"{options.study} · {title}"
    benches = load_bench(options.bench or Path(options.out) / "bench")[0] if options.study is None else []
    html = page(frame, folder, title, benches, asdict(state) | {"refresh": options.watch or REFRESH})
    file = command.write_file(folder / "report.html", html.encode(), options.out)
    command.say(f"wrote {file} ({len(html.encode()) / 1e6:.1f} MB)", sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 after one sentence on standard error."""
    parser = command.parser("Make the page of verdicts, tables and plots from records.")
    parser.add_argument("--bench", help="folder with the files of `python -m hm.bench` (default: OUT/bench)")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="make it anew this often while cells are open")
    return command.run(make, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
