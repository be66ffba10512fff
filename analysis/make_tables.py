"""Tables from records: `python analysis/make_tables.py` writes <out>/<study>/tables/<study>.{md,tex,csv}.

The same records give the same bytes. What the tables hold is tables.py's business; here is how it is written.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if __package__ in (None, ""):  # run as a script: the repository's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from analysis import paper
from analysis.load import load_records
from analysis.paper import Above
from analysis.tables import ONE_SEED, TITLES, Cell, Column, Row, Table, build, number_text, studies
from hm.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


# --- text --------------------------------------------------------------------------------------------------

def _shown(row: Row, column: Column) -> str:
    """The text of one cell, before any format's escapes; a missing one is a dash."""
    if column.key == "row":
        return row.label
    cell = row.cells.get(column.key)
    if cell is None:
        return "–"
    spread = "" if cell.spread is None else f" ± {number_text(cell.spread, column.kind)}"
    return number_text(cell.value, column.kind) + spread + (f" {ONE_SEED}" if cell.one_seed else "") + (
        f" ({cell.remark})" if cell.remark else "")


def _blocks(table: Table) -> list[tuple[str, list[Column]]]:
    names = list(dict.fromkeys(c.block for c in table.columns))
    return [(name, [table.columns[0], *[c for c in table.columns[1:] if c.block == name]]) for name in names]


def _line(text: str) -> str:
    """One line without control characters, whatever a name or command holds."""
    spaced = "".join(" " if c.isspace() else c for c in text)
    return "".join(c for c in spaced if unicodedata.category(c)[0] != "C")


def _commands(table: Table) -> dict[str, list[str]]:
    """Command -> the rows that it makes."""
    made: dict[str, list[str]] = {}
    for row in table.rows:
        for command in row.commands:
            made.setdefault(_line(command), []).append(_line(row.label))
    return made


def _markdown_text(text: str) -> str:
    text = re.sub(r"([\\`*|\[\]$~]|(?<!\w)_|_(?!\w))", r"\\\1", _line(text))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def to_markdown(table: Table) -> str:
    """A heading, the caption, a table that is aligned in a terminal too, the notes and the commands."""
    lines = [f"### {_markdown_text(table.name)}", "", _markdown_text(table.caption)]
    for _, columns in _blocks(table):
        grid = [[_markdown_text(c.header) for c in columns]]
        grid += [[_markdown_text(_shown(row, c)) for c in columns] for row in table.rows]
        widths = [max(3, *map(len, texts)) for texts in zip(*grid, strict=True)]
        rule = ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]
        lines.append("")
        for texts in [grid[0], rule, *grid[1:]]:
            padded = [t.rjust(w) for t, w in zip(texts[1:], widths[1:], strict=True)]
            lines.append(f"| {' | '.join([texts[0].ljust(widths[0]), *padded])} |")
    lines += ["", *[f"- {_markdown_text(note)}" for note in table.notes]]
    if commands := _commands(table):
        longest = max((len(run) for c in commands for run in re.findall("`+", c)), default=0)
        fence = "`" * max(3, longest + 1)
        lines += ["", "Commands:", "", f"{fence}sh"]
        lines += [f"# {', '.join(rows)}\n{command}" for command, rows in commands.items()]
        lines.append(fence)
    return "\n".join(lines).rstrip() + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", '"': "''",
          **{c: f"\\{c}" for c in "&%$#_{}"}, **{c: f"${c}$" for c in "<>|"},
          "±": r"$\pm$", "–": "--", "↓": r"$\downarrow$", "↑": r"$\uparrow$", ONE_SEED: r"$^\dagger$"}


def _latex_text(text: str) -> str:
    """`text` for plain LaTeX; letters beyond ASCII lose their accents, or become a question mark."""
    out = []
    for c in _line(text):
        plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        out.append(_LATEX.get(c) or (c if c.isascii() else "".join(_LATEX.get(p, p) for p in plain) or "?"))
    joined = "".join(out)
    return "{}" + joined if joined[:1] in ("[", "*") else joined


def _latex_header(column: Column) -> str:
    parts = [_latex_text(part) for part in column.header.split("\n")]
    return parts[0] if len(parts) == 1 else r"\shortstack{" + r"\\".join(parts) + "}"


def to_latex(table: Table) -> str:
    r"""A table environment that needs \usepackage{booktabs} and nothing else."""
    label = re.sub("[^A-Za-z0-9]+", "-", table.name)
    lines = ["% needs \\usepackage{booktabs}"]
    lines += [f"% {', '.join(rows)}: {command}" for command, rows in _commands(table).items()]
    lines += [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}",
              rf"\caption{{{_latex_text(table.caption)}}}", rf"\label{{tab:{label}}}"]
    for number, (_, columns) in enumerate(_blocks(table)):
        lines += [r"\par\medskip"] * (number > 0)
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule",
                  " & ".join(map(_latex_header, columns)) + r" \\", r"\midrule"]
        lines += [" & ".join(_latex_text(_shown(row, c)) for c in columns) + r" \\" for row in table.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\scriptsize", "\n".join(
            rf"{_latex_text(note)}\par" for note in table.notes), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """Numbers as they are (not rounded for reading), missing ones empty.

    "x_pm" is the spread of x and "x_pm_is" says which, sd or stderr. All tables of a study go in one file,
    told apart by the column "table". A text that a spreadsheet would take for a formula gets an apostrophe
    before it, unless it is one of the paper's row names.
    """
    rows: list[dict[str, str]] = []
    for table in tables:
        for row in table.rows:
            line = {"table": _csv_text(table.name), "row": _csv_text(row.label)}
            for column in table.columns[1:]:
                key, cell, whole = column.key, row.cells.get(column.key), _column(table, column)
                line[key] = _csv_number(cell.value if cell else None)
                if any(c.spread is not None for c in whole):
                    line[f"{key}_pm"] = _csv_number(cell.spread if cell else None)
                    which = "stderr" if cell and cell.one_seed else "sd"
                    line[f"{key}_pm_is"] = which if line[f"{key}_pm"] else ""
                if any(c.remark for c in whole):
                    line[f"{key}_remark"] = cell.remark if cell else ""
            rows.append({**line, "command": _csv_text("; ".join(row.commands))})
    out = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row if name != "command")
    writer = csv.DictWriter(out, [*names, "command"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _column(table: Table, column: Column) -> list[Cell]:
    return [row.cells[column.key] for row in table.rows if column.key in row.cells]


def _csv_number(value: float | Above | None) -> str:
    if value is None:
        return ""
    return f"> {value.bound:.10g}" if isinstance(value, Above) else f"{value:.10g}"


def _csv_text(text: str) -> str:
    line = _line(text)
    ours = line in paper.TABLES["mixer"].rows
    return "'" + line if line.strip()[:1] in ("=", "+", "-", "@") and not ours else line


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "md": lambda tables: "\n".join(map(to_markdown, tables)),
    "tex": lambda tables: "\n".join(map(to_latex, tables)),
    "csv": to_csv,
}


# --- files and the command ---------------------------------------------------------------------------------

def print_table(runs: str | Path, study: str, file: TextIO | None = None) -> None:
    """Print the Markdown of one study's tables to `file` (standard output); skipped ones to standard error.

    Raises:
        UserError: if there is no record, or none of this study.
    """
    frame = _records(runs)
    _print(FORMATS["md"](build(frame, _chosen(frame, study, runs)[0])), file or sys.stdout)


def write_tables(runs: str | Path, out: str | Path, study: str | None = None) -> dict[str, list[Path]]:
    """Write <out>/<study>/tables/<study>.{md,tex,csv} of one study or all. Returns the files of each study.

    A file that would not change is not touched.

    Raises:
        UserError: if there is no record, none of this study, or `out` can't be written.
    """
    frame = _records(runs)
    return {name: _write(build(frame, name), name, Path(out)) for name in _chosen(frame, study, runs)}


def _records(runs: str | Path) -> pd.DataFrame:
    frame = load_records(runs)
    for name, reason in frame.attrs["problems"]:
        _print(f"skipped {name}: {reason}", sys.stderr)
    if frame.empty:
        raise UserError(f"none of the {len(frame.attrs['problems'])} records under runs={runs} can be used "
                        "(the reasons are above); run their cells again or name another folder.")
    return frame


def _chosen(frame: pd.DataFrame, study: str | None, runs: str | Path) -> list[str]:
    known = studies(frame)
    if study is None:
        return known
    if study not in known:
        near = difflib.get_close_matches(study, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"study={study} has no record under runs={runs}; {hint}There: {', '.join(known)}.")
    return [study]


def keep_records(runs: str | Path, frame: pd.DataFrame, study: str, out: str | Path) -> None:
    """Copy a study's records to <out>/<study>/records/, so that its numbers stay with its tables.

    Records that already lie below `out` are left where they are.
    """
    for name in frame.loc[frame["study"] == study, "path"]:
        source = Path(runs) / name
        if not source.resolve().is_relative_to(Path(out).resolve()):
            _write_file(Path(out) / _folder(study) / "records" / source.parent.name / "record.json", source.read_bytes(), out)


def _folder(study: str) -> str:
    name = re.sub(r"[^\w.+=,@-]", "_", study)
    return name if name.strip(".") else name.replace(".", "_")


def _write(tables: list[Table], study: str, out: Path) -> list[Path]:
    name = _folder(study)
    folder = out / name / "tables"
    return [_write_file(folder / f"{name}.{ending}", text(tables).encode(), out) for ending, text in FORMATS.items()]


def _write_file(path: Path, data: bytes, out: str | Path) -> Path:
    """`data` at `path`, whole or not at all; a file that holds it already is not touched."""
    try:
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            beside.write_bytes(data)
            os.replace(beside, path)
    except OSError as error:
        raise UserError(f"out={out} can't be written ({path}: {error.strerror}); name another folder.") from error
    return path


def _print(text: str, file: TextIO) -> None:
    """Print, with question marks for what the terminal's encoding lacks."""
    coding = getattr(file, "encoding", None) or "utf-8"
    print(text.encode(coding, "replace").decode(coding), file=file)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(description="Make Markdown, LaTeX and CSV tables from records.")
    parser.add_argument("--runs", default=os.environ.get("HM_RUNS") or "runs",
                        help="folder with records, at any depth (default: HM_RUNS, or runs)")
    parser.add_argument("--out", default="results",
                        help="tables go to OUT/STUDY/tables/, the records to OUT/STUDY/records/ (default: results)")
    parser.add_argument("--study", help=f"only this study, such as {', '.join(TITLES)} (default: all)")
    options = parser.parse_args(arguments)
    try:
        frame = _records(options.runs)
        for study in _chosen(frame, options.study, options.runs):
            tables = build(frame, study)
            files = _write(tables, study, Path(options.out))
            keep_records(options.runs, frame, study, options.out)
            _print(FORMATS["md"](tables), sys.stdout)
            _print("\n".join(f"wrote {path}" for path in files), sys.stderr)
    except UserError as error:
        _print(f"error: {error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
