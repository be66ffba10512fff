"""Records -> the tables of a study, as data (formats.py writes them out; rows.py says which record is in which row).

Perplexities are mean and standard deviation over the seeds of a row; accuracies are the mean over seeds with the
standard error that the evaluation harness gives, since all seeds answer the same items. The paper's figures stand in
columns of their own.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from analysis import abilities, paper, recipes
from analysis.cells import cells_of, paper_cells, references, values_of
from analysis.rows import (
    TEACHERS,
    Record,
    agreeing,
    amount,
    apart,
    borrowed,
    cell_names,
    commands_of,
    groups,
    in_order,
    natural,
    paths_of,
    recipe_of,
    records_of,
    row_name,
    text,
)
from analysis.table import BOLD, SINGLE, Column, Row, Table, mark_best, number_text

if TYPE_CHECKING:
    import pandas as pd

TITLES = {"main": "Main comparison", "mixer": "Parts of the mixer", "split": "Tokens by stage",
          "budget": "Total budget", "one_step": "One step instead of two", "scale": "Sizes of the teacher",
          "controls": "Controls", "recipes": "Recipes", "demo": "The demo"}
DEMO_ORDER = ("teacher", "<", "hedgemamba 10/90", "<=", "hedgehog 10/90", "<", "0/100", "<", "one_step")


def _task_columns(suffix: str, mark: str, kind: str, block: str, better: str, ranked: bool = False) -> list[Column]:
    names = [(t, paper.METRICS[t].short) for t in paper.TASKS] + [("mean_accuracy", "mean")]
    prefix = "paper_" if mark else ""
    return [Column(f"{prefix}{key}{suffix}", f"{mark}{short}", kind, better, block, ranked) for key, short in names]


COLUMNS = [
    Column("ppl", "ppl", "ppl", "down", ranked=True),
    Column("seeds", "seeds", "count"),
    Column("gap_teacher_pct", "gap %", "pct", "down"),
    Column("gap_adapted_teacher_pct", "gap to\nadapted %", "pct", "down"),
    Column("ppl_start", "start ppl", "ppl", "down"),
    Column("bits_per_byte", "bits/byte", "bits", "down"),
    Column("paper_ppl", "paper\nppl", "ppl", "down"),
    Column("paper_gap_teacher_pct", "paper\ngap %", "pct", "down"),
    Column("params_millions", "params M", "millions", block="cost"),
    Column("paper_params_millions", "paper\nparams M", "millions", block="cost"),
    Column("stage1_tokens", "stage 1", "tokens", block="cost"),
    Column("stage2_tokens", "stage 2", "tokens", block="cost"),
    Column("gpu_hours", "GPU-hours", "hours", block="cost"),
    Column("cpu_hours", "CPU-hours", "hours", block="cost"),
    Column("tokens_per_second", "tokens/s", "tokens", block="cost"),
    Column("peak_memory_gb", "memory GB", "gb", block="cost"),
    *_task_columns("", "", "acc", "accuracy, %", "up", ranked=True),
    *_task_columns("_minus_teacher", "", "points", "accuracy minus the teacher's", "up"),
    *abilities.COLUMNS,
    *_task_columns("", "paper\n", "acc", "the paper's accuracy, %", "up"),
    *_task_columns("_minus_teacher", "paper\n", "points", "the paper's accuracy minus its teacher's", "up"),
]


def studies(frame: pd.DataFrame) -> list[str]:
    """The names of the studies that have records, sorted."""
    return sorted(set(frame["study"])) if len(frame) else []


def build(frame: pd.DataFrame, study: str, records: list[Record] | None = None) -> list[Table]:
    """The tables of one study, from the records of all of them (a teacher's may lie in another study).

    One table, or one for each group of what was run and measured alike (rows.py). The rows are the paper's, run or
    not, then what else was run; a study that the paper doesn't know has one row for each cell. Recipes have their budgets
    in columns (recipes.py). `records`: records_of(frame), where they are at hand; many tables need them once.
    """
    records = records_of(frame) if records is None else records
    mine = [r for r in records if r["study"] == study]
    if study == "scale" and not mine:
        mine = [r for r in records if r["study"] == "main"]
    made = groups(mine, study) if study in TITLES else {"": mine}
    tables = []
    for name, group in made.items():
        inside = {r["path"] for r in group}
        others = [r for r in records if r["path"] not in inside]
        tables.append(_table(study, f"{study} ({name})" if name else study, group, others))
    return tables


def _table(study: str, name: str, mine: list[Record], others: list[Record]) -> Table:
    notes: list[str] = []
    caption = _caption(study, mine)
    mine = mine + borrowed(mine, others, notes)
    if study == "recipes":
        return recipes.table(name, caption, mine, notes)
    published = _published(study)
    rows: dict[str, list[Record]] = {label: [] for label in published}
    for label, record in sorted(_named(study, mine, set(published), notes), key=lambda pair: in_order(study, pair[0])):
        rows.setdefault(label, []).append(record)
    if "teacher" in rows:
        rows = {"teacher": rows.pop("teacher"), **rows}
    for label in published:  # where all of its records are told apart by a setting, the bare row says nothing
        if not rows[label] and any(
                other.startswith(f"{label} (") and "(hybrid" not in other for other in rows):
            del rows[label]
    taken = {label: agreeing(label, records, notes) for label, records in rows.items()}
    usable = [r for records in taken.values() for r in records]
    made = []
    for label, records in taken.items():
        whose = label if label in published else label.partition(" (")[0]
        hybrid = "(hybrid" in label
        cells = cells_of(records, usable, notes) | ({} if hybrid else paper_cells(published.get(whose, {})))
        commands = [c for r in records for c in commands_of(r)]
        made.append(Row(label, cells, list(dict.fromkeys(commands)), paths_of(records),
                        all(recipe_of(r) not in TEACHERS for r in records), hybrid))
    if study != "scale":
        for row in made:
            row.cells.pop("bits_per_byte", None)
    abilities.compared(made)
    columns = _columns(study, made)
    mark_best(made, columns)
    if study == "budget" and any(amount(r.get("settings.budget", 0)) != label
                                 for label in paper.TABLES["budget"].rows for r in taken.get(label, [])):
        notes.append("Rows are named by the paper's budgets; ours are in the columns of the stages.")
    if study == "demo":
        notes.append(_ordering(taken))
    return Table(name, caption, columns, made, [*_general_notes(made, usable), *dict.fromkeys(notes)])


def _named(study: str, records: list[Record], published: set[str], notes: list[str]) -> list[tuple[str, Record]]:
    if study not in TITLES:
        return cell_names(records)
    several = study == "scale" and len({text(r.get("settings.teacher", "?")) for r in records}) > 1
    return apart([(row_name(r, study, published, several), r) for r in records], notes)


def _columns(study: str, rows: list[Row]) -> list[Column]:
    """Those that a row fills; of the paper's distances to its teacher, and in the demo of its accuracies, what we measured too."""
    filled = {key for row in rows for key in row.cells}
    for c in COLUMNS:
        beside = c.key.endswith("_minus_teacher") or (study == "demo" and "accuracy" in c.block)
        if c.key.startswith("paper_") and beside and c.key.removeprefix("paper_") not in filled:
            filled.discard(c.key)
    return [Column("row", "row"), *[c for c in COLUMNS if c.key in filled], *abilities.length_columns(filled)]


def _caption(study: str, records: list[Record]) -> str:
    if study not in TITLES:
        return f"Study {study}, one row for each cell and its seeds."
    ours = []
    for setting, what in (("teacher", "teacher"), ("scale", "scale"), ("data", "data"), ("seq_len", "sequence length"),
                          ("budget", "budget")):
        found = [r[f"settings.{setting}"] for r in records
                 if f"settings.{setting}" in r and (setting != "budget" or recipe_of(r) != "teacher")]
        values = {amount(v) if setting == "budget" else text(v) for v in found}
        ours += [f"{what} {', '.join(sorted(values, key=natural))}"] if values else []
    caption = f"{TITLES[study]}. Ours: {'; '.join(ours)}."
    if study in ("controls", "recipes"):
        return caption
    return f"{caption} Paper: {paper.TABLES.get(study, paper.TABLES['main']).caption.rstrip('.')}."


def _published(study: str) -> dict[str, dict[str, Any]]:
    """The rows of a study with the paper's values (also "params_millions") and a "remark" on them."""
    main, one_step = paper.TABLES["main"].rows, paper.TABLES["one_step"].rows["one_step"]
    if study == "demo":
        split = paper.TABLES["split"].rows
        return {"teacher": main["teacher"], "hedgemamba 10/90": split["10/90"],
                "hedgehog 10/90": {**main["hedgehog"], "remark": "50/50"}, "0/100": split["0/100"],
                "one_step": one_step, "adapted_teacher": {}}
    if study not in paper.TABLES or study == "scale":
        return {}
    table = paper.TABLES[study]
    rows: dict[str, dict[str, Any]] = {name: {**values} for name, values in table.rows.items()}
    for name, millions in table.params_millions.items():
        rows[name]["params_millions"] = millions
    return {"teacher": main["teacher"], **rows}


# --- notes -------------------------------------------------------------------------------------------------

def _general_notes(rows: list[Row], usable: list[Record]) -> list[str]:
    cells = [(key, cell) for row in rows for key, cell in row.cells.items()]
    keys = {key for key, _ in cells}
    notes = []
    if any(key.endswith("_pct") for key in keys):
        notes.append("gap: how far the perplexity is above the teacher's.")
    if "ppl_start" in keys:
        notes.append("start ppl: the student's perplexity at conversion, before stage 2.")
    if any(key.startswith("stage") for key in keys):
        notes.append("stage 1, stage 2: tokens.")
    if any(cell.spread is not None and not cell.one_seed and key == "ppl" for key, cell in cells):
        notes.append("± of a perplexity is the standard deviation over as many seeds as the column says.")
    if any(cell.one_seed for _, cell in cells):
        notes.append(SINGLE)
    if keys & set(paper.TASKS):
        notes.append("± of an accuracy is the evaluation harness's standard error over the items.")
    notes += abilities.notes(keys)
    if any(cell.mark for _, cell in cells):
        notes.append(BOLD)
    if keys & {"gpu_hours", "cpu_hours"}:
        devices = sorted({str(r["provenance.device"]) for r in usable if "provenance.device" in r})
        notes.append(f"Hours (of one device, times the devices) and tokens/s: both stages of one seed, tokens/s of stage 2, on {', '.join(devices) or '?'}; cells "
                     "that ran side by side slow each other down.")
    if any(key.startswith("paper_") for key in keys):
        notes.append(f"Columns marked paper: the published figures ({paper.TITLE}, arXiv {paper.ARXIV}) of "
                     f"{paper.TEACHER}, quoted from public reading notes, not results of this project. "
                     "Perplexities of different teachers don't compare; relative gaps do.")
    if any(not values_of(references("teacher", r, usable, []), "ppl") for r in usable):
        notes.append("A gap is missing where no teacher was measured on the same data, length and sequences: the same command with recipe=teacher does.")
    return notes


def _ordering(taken: dict[str, list[Record]]) -> str:
    """Whether teacher < two-stage HedgeMamba <= Hedgehog < 0/100 < one-step, seed by seed."""
    names, signs = DEMO_ORDER[::2], DEMO_ORDER[1::2]
    wanted = f"Expected ordering of ppl: {' '.join(DEMO_ORDER)}"
    teacher = values_of(taken.get("teacher", []), "ppl")
    reference = {"teacher": statistics.fmean(teacher)} if teacher else {}
    seeds: dict[str, dict[str, float]] = {}
    for name in names[1:]:
        for r in taken.get(name, []):
            ppl = seeds.setdefault(text(r.get("settings.seed", "null")), dict(reference))
            for value in values_of([r], "ppl"):
                ppl[name] = value
    if not seeds:
        return f"{wanted}: nothing is run yet."
    held, failed = 0, ""
    for seed, ppl in sorted(seeds.items(), key=lambda pair: natural(pair[0])):
        wrong = [f"no {name}" for name in names if name not in ppl]
        for left, sign, right in zip(names, signs, names[1:], strict=False):
            if left not in ppl or right not in ppl or ppl[left] < ppl[right]:
                continue
            if sign == "<" or ppl[left] != ppl[right]:
                wrong.append(f"{left} ({number_text(ppl[left], 'ppl')}) {sign} {right} "
                             f"({number_text(ppl[right], 'ppl')}) does not hold")
        held += not wrong
        failed += f"; seed {seed}: {', '.join(wrong)}" if wrong else ""
    return f"{wanted}: held in {held} of {len(seeds)} seeds{failed}."
