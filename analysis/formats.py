"""A table in Markdown, LaTeX and CSV. Names and settings come out as text, whatever they hold."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Sequence

from analysis import paper
from analysis.paper import Above
from analysis.table import ONE_SEED, Cell, Column, Row, Table, number_text

_MARKDOWN_MARKS = {"best": ("**", "**"), "second": ("*", "*"), "": ("", "")}
_LATEX_MARKS = {"best": (r"\textbf{", "}"), "second": (r"\underline{", "}"), "": ("", "")}


def shown(row: Row, column: Column) -> str:
    """The text of one cell, before any format's escapes; a missing one is a dash."""
    if column.key == "row":
        return row.label
    cell = row.cells.get(column.key)
    if cell is None:
        return "–"
    spread = "" if cell.spread is None else f" ± {number_text(cell.spread, column.kind)}"
    return number_text(cell.value, column.kind) + spread + (f" {ONE_SEED}" if cell.one_seed else "") + (
        f" ({cell.remark})" if cell.remark else "")


def _blocks(table: Table) -> list[tuple[str, list[Column], list[Row]]]:
    """Name, columns and rows of each block: of the first all rows, of the others those that have something in it."""
    made: list[tuple[str, list[Column], list[Row]]] = []
    for name in dict.fromkeys(c.block for c in table.columns):
        columns = [c for c in table.columns[1:] if c.block == name]
        made.append((name, [table.columns[0], *columns], [r for r in table.rows if not made or any(c.key in r.cells for c in columns)]))
    return made


def _marked(text: str, row: Row, column: Column, marks: dict[str, tuple[str, str]]) -> str:
    before, after = marks[row.cells[column.key].mark if column.key in row.cells else ""]
    return f"{before}{text}{after}"


def _line(text: str) -> str:
    """One line without control characters, whatever a name or command holds."""
    if text.isprintable():
        return text
    spaced = "".join(" " if c.isspace() else c for c in text)
    return "".join(c for c in spaced if unicodedata.category(c)[0] != "C")


def _commands(table: Table) -> dict[str, list[str]]:
    """Command -> the rows that it makes."""
    made: dict[str, list[str]] = {}
    for row in table.rows:
        for command in row.commands:
            made.setdefault(_line(command), []).append(_line(row.label))
    return made


def markdown_text(text: str) -> str:
    """`text` on one line, with what Markdown and HTML would take for their own escaped."""
    text = re.sub(r"([\\`*|\[\]$~]|(?<!\w)_|_(?!\w))", r"\\\1", _line(text))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def to_markdown(table: Table) -> str:
    """A heading, the caption, a table that is aligned in a terminal too, the notes and the commands."""
    lines = [f"### {markdown_text(table.name)}", "", markdown_text(table.caption)]
    blocks = _blocks(table)
    for title, columns, rows in blocks:
        if len(blocks) > 1:
            lines += ["", f"{title}:"]
        grid = [[markdown_text(c.header) for c in columns]]
        grid += [[_marked(markdown_text(shown(row, c)), row, c, _MARKDOWN_MARKS) for c in columns] for row in rows]
        widths = [max(3, *map(len, texts)) for texts in zip(*grid, strict=True)]
        rule = ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]
        lines.append("")
        for texts in [grid[0], rule, *grid[1:]]:
            padded = [t.rjust(w) for t, w in zip(texts[1:], widths[1:], strict=True)]
            lines.append(f"| {' | '.join([texts[0].ljust(widths[0]), *padded])} |")
    lines += ["", *[f"- {markdown_text(note)}" for note in table.notes]]
    if commands := _commands(table):
        longest = max((len(run) for c in commands for run in re.findall("`+", c)), default=0)
        fence = "`" * max(3, longest + 1)
        lines += ["", "Commands:", "", f"{fence}sh"]
        lines += [f"# {', '.join(labels)}\n{command}" for command, labels in commands.items()]
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


def _as_wide_as_a_page(columns: list[Column]) -> list[list[Column]]:
    """The columns in parts of at most eight beside the row labels, or of six where there are more."""
    first, *rest = columns
    size = 8 if len(rest) <= 8 else 6
    return [[first, *rest[i : i + size]] for i in range(0, len(rest), size)]


def to_latex(table: Table) -> str:
    r"""A table environment that needs \usepackage{booktabs} and nothing else."""
    label = re.sub("[^A-Za-z0-9]+", "-", table.name)
    lines = ["% needs \\usepackage{booktabs}"]
    lines += [f"% {', '.join(rows)}: {command}" for command, rows in _commands(table).items()]
    lines += [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}",
              rf"\caption{{{_latex_text(table.caption)}}}", rf"\label{{tab:{label}}}"]
    for number, (columns, rows) in enumerate((part, rows) for _, block, rows in _blocks(table) for part in _as_wide_as_a_page(block)):
        lines += [r"\par\medskip"] * (number > 0)
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule",
                  " & ".join(map(_latex_header, columns)) + r" \\", r"\midrule"]
        lines += [" & ".join(_marked(_latex_text(shown(row, c)), row, c, _LATEX_MARKS) for c in columns) + r" \\" for row in rows]
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
            line = {"table": csv_text(table.name), "row": csv_text(row.label)}
            for column in table.columns[1:]:
                key, cell, whole = column.key, row.cells.get(column.key), _column(table, column)
                line[key] = _csv_number(cell.value if cell else None)
                if any(c.spread is not None for c in whole):
                    line[f"{key}_pm"] = _csv_number(cell.spread if cell else None)
                    which = "stderr" if cell and cell.one_seed else "sd"
                    line[f"{key}_pm_is"] = which if line[f"{key}_pm"] else ""
                if any(c.mark for c in whole):
                    line[f"{key}_mark"] = cell.mark if cell else ""
                if any(c.remark for c in whole):
                    line[f"{key}_remark"] = cell.remark if cell else ""
            rows.append({**line, "command": csv_text("; ".join(row.commands))})
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


def csv_text(text: str) -> str:
    """`text` on one line, with an apostrophe before what a spreadsheet would take for a formula."""
    line = _line(text)
    ours = line in paper.TABLES["mixer"].rows
    return "'" + line if line.strip()[:1] in ("=", "+", "-", "@") and not ours else line


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "md": lambda tables: "\n".join(map(to_markdown, tables)),
    "tex": lambda tables: "\n".join(map(to_latex, tables)),
    "csv": to_csv,
}
