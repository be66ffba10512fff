"""Tables from records: `python analysis/make_tables.py` writes <out>/<study>/tables/<study>.{md,tex,csv}.

Beside them it keeps the records that they were made from, and all of these as one flat file (records.parquet,
records.csv). The same records give the same bytes. What the tables hold is tables.py's business.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

if __package__ in (None, ""):  # run as a script: the repository's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from analysis import command
from analysis.bench import load_bench, speed_tables
from analysis.export import keep_records, write_flat
from analysis.formats import FORMATS
from analysis.rows import records_of, text
from analysis.tables import build


def print_table(runs: str | Path, study: str, file: TextIO | None = None) -> None:
    """Print the Markdown of one study's tables to `file` (standard output); skipped ones to standard error.

    Raises:
        UserError: if there is no record, or none of this study.
    """
    frame = command.read(runs)
    command.say(FORMATS["md"](build(frame, command.chosen(frame, study, runs)[0])), file or sys.stdout)


def write_tables(texts: dict[str, str], study: str, out: str | Path) -> list[Path]:
    """Write <out>/<study>/tables/<study>.{md,tex,csv}, given as ending -> text; a file that would not change is not touched.

    Raises:
        UserError: if `out` can't be written.
    """
    name = command.folder_name(study)
    folder = Path(out) / name / "tables"
    return [command.write_file(folder / f"{name}.{ending}", content.encode(), out) for ending, content in texts.items()]


def make(options: argparse.Namespace) -> None:
    """Write and print what was asked for."""
    frame = command.read(options.runs)
    names = command.chosen(frame, options.study, options.runs)
    records = records_of(frame)
    made = {name: build(frame, name, records) for name in names}
    teachers = {text(r.get("settings.teacher")) for r in records if r["study"] == "main"}
    if options.study is None and "scale" not in names and len(teachers) > 1:
        made["scale"] = build(frame, "scale", records)
    benches, problems = load_bench(options.bench or Path(options.out) / "bench")
    for name, reason in problems:
        command.say(f"skipped {name}: {reason}", sys.stderr)
    if benches and options.study is None:
        made["speed"] = speed_tables(benches)
    for study, tables in made.items():
        texts = {ending: write(tables) for ending, write in FORMATS.items()}
        files = write_tables(texts, study, options.out)
        if study in names:
            files += write_flat(frame, study, options.out)
            keep_records(options.runs, frame, study, options.out)
        if study != "speed" or options.bench:  # those that lie in OUT/bench need not be of this machine
            command.say(texts["md"], sys.stdout)
        command.say("\n".join(f"wrote {path}" for path in files), sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 after one sentence on standard error."""
    parser = command.parser("Make Markdown, LaTeX and CSV tables, and flat files for pandas, from records.")
    parser.add_argument("--bench", help="folder with the files of `python -m hm.bench` (default: OUT/bench)")
    return command.run(make, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
