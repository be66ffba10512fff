"""`python analysis/reproduce.py` fills REPRODUCE.md with the numbers of the records under results/.

Between `<!-- made: NAME -->` and `<!-- end -->` stands what is made from records; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pandas as pd

from analysis import command
from analysis.claims import judge
from analysis.formats import markdown_text, to_markdown
from analysis.load import load_records
from analysis.rows import device_seconds, human, recipe_of, records_of, text
from analysis.tables import build, studies
from hm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("row", "ppl", "seeds", "gap_teacher_pct", "gap_adapted_teacher_pct", "paper_ppl", "paper_gap_teacher_pct")


def filled(page: str, results: Path) -> str:
    """`page` with each block made anew from the records under `results`.

    Raises:
        UserError: a block that nothing makes, or no record.
    """
    frames = {folder.name: load_records(folder) for folder in sorted(results.iterdir()) if folder.is_dir() and any(folder.rglob("record.json"))}
    made = {"verdicts": lambda: verdicts(load_records(results)), "costs": lambda: costs(frames), "numbers": lambda: numbers(frames)}

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise UserError(f"REPRODUCE.md asks for a block {name!r}; there are {', '.join(made)}.")
        return f"<!-- made: {name} -->\n{made[name]()}\n<!-- end -->"

    return re.sub(r"<!-- made: (\w+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def verdicts(frame: pd.DataFrame) -> str:
    """Claim, what the paper has, our verdict and where."""
    rows = [(f"{c.id}: {c.text}", c.paper, f"**{c.verdict}**", c.where, c.why) for c in judge(frame)]
    return _grid(("claim", "paper", "here", "at", "why"), rows, raw=(2,))


def costs(frames: dict[str, pd.DataFrame]) -> str:
    """What each folder of results/ took: every stage that was trained counts once, whatever cells share it."""
    rows = []
    for name, frame in frames.items():
        records = records_of(frame)
        steps: dict[str, float] = {}
        for r in records:
            for step, seconds in device_seconds(r).items():
                steps[str(r.get(f"provenance.artifacts.{step}", r["path"] + step))] = seconds
        memory = [v for r in records for k, v in r.items() if k.startswith("peak_memory.") and isinstance(v, int | float)]
        budgets = {r["settings.budget"] for r in records if recipe_of(r) != "teacher" and isinstance(r.get("settings.budget"), int | float)}
        devices = sorted({str(r.get("provenance.device", "?")) for r in records})
        teachers = sorted({text(r.get("settings.teacher", "?")) for r in records})
        rows.append((f"[results/{name}](results/{name})", ", ".join(teachers), ", ".join(map(human, sorted(budgets))), str(len(records)),
                     ", ".join(devices), f"{sum(steps.values()) / 3600:.2f}", f"{max(memory) / 1e9:.1f}" if memory else "–"))
    return _grid(("records", "teacher", "budget", "cells", "device", "device-hours", "peak memory, GB"), rows, raw=(0,))


def numbers(frames: dict[str, pd.DataFrame]) -> str:
    """The perplexities of each study beside the paper's."""
    made = []
    for name, frame in frames.items():
        for study in studies(frame):
            for table in build(frame, study):
                columns = [c for c in table.columns if c.key in SHOWN or study == "recipes"]
                rows = [replace(row, commands=[], cells={c.key: row.cells[c.key] for c in columns if c.key in row.cells}) for row in table.rows]
                small = replace(table, name=f"results/{name}: {table.name}", columns=columns, rows=rows, notes=[], caption=table.caption.partition(" Paper:")[0])
                made.append(to_markdown(small).rstrip())
    return "\n\n".join(made)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], raw: Sequence[int] = ()) -> str:
    lines = [header, ["---"] * len(header), *[[v if i in raw else markdown_text(v) for i, v in enumerate(row)] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make(options: argparse.Namespace) -> None:
    """Fill the page, or say that it is up to date."""
    page = Path(options.page)
    new = filled(page.read_text(encoding="utf-8"), Path(options.results))
    command.write_file(page, new.encode(), page.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(description="Fill REPRODUCE.md with the numbers of the records under results/.")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of results (default: results)")
    parser.add_argument("--page", default=str(ROOT / "REPRODUCE.md"), help="the page to fill (default: REPRODUCE.md)")
    return command.run(make, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
