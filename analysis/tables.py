"""Records -> the tables of a study, as data (make_tables.py writes them out).

A record belongs to the row that its "row" names, or else to the one that its settings say. The records of a
row are its seeds: mean and standard deviation are over them. Where two records claim the same row and seed
under different keys, or a row's seeds differ in more than the seed, none is taken and the table's notes say
which. The paper's figures stand in columns of their own.
"""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis import paper
from analysis.paper import Above

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]

TITLES = {"main": "Main comparison", "mixer": "Parts of the mixer", "split": "Tokens by stage",
          "budget": "Total budget", "one_step": "One step instead of two", "demo": "The demo"}
PARTS = ("ssm", "conv", "gate")
MIXERS = {"hedgehog": "", "ssm": "+ssm", "ssm_conv": "+ssm+conv", "hedgemamba": "+ssm+conv+gate",
          "gate": "+gate"}
TEACHERS = ("teacher", "adapted_teacher")
DEMO_ORDER = ("teacher", "<", "hedgemamba 10/90", "<=", "hedgehog 10/90", "<", "0/100", "<", "one_step")
ONE_SEED = "†"
# What two perplexities must share to be compared.
YARDSTICK = tuple(f"settings.{s}" for s in ("teacher", "data", "validation", "seq_len", "eval.sequences"))
# Settings that say how or where a cell is run, not what it computes.
OPERATIONAL = {f"settings.{s}" for s in (
    "seed", "study", "row", "scale", "force", "device", "scan", "compile", "checkpoint_every", "log_every",
    "default_budget", "stage1.micro_batch", "stage2.micro_batch", "eval.batch_size")}


@dataclass(frozen=True)
class Column:
    """`key` names it in CSV, with the unit; `label` is for readers; `better` is "down", "up" or "".

    Tables too wide for a page are printed block by block.
    """

    key: str
    label: str
    kind: str = "text"
    better: str = ""
    block: str = "perplexity"

    @property
    def header(self) -> str:
        return self.label + {"down": " ↓", "up": " ↑", "": ""}[self.better]


@dataclass(frozen=True)
class Cell:
    """`spread` follows the ±: standard deviation over seeds, or the standard error of one if `one_seed`."""

    value: float | Above
    spread: float | None = None
    one_seed: bool = False
    remark: str = ""


@dataclass
class Row:
    """`cells`: column key -> Cell, without the missing ones; `commands` reproduce the records behind them."""

    label: str
    cells: dict[str, Cell] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


@dataclass
class Table:
    """`columns` starts with that of the row labels and has none that is empty in all rows."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]


COLUMNS = [
    Column("ppl", "ppl", "ppl", "down"),
    Column("seeds", "seeds", "count"),
    Column("gap_teacher_pct", "gap %", "pct", "down"),
    Column("gap_adapted_teacher_pct", "gap to\nadapted %", "pct", "down"),
    Column("ppl_start", "start ppl", "ppl", "down"),
    Column("params_millions", "params M", "millions"),
    Column("stage1_tokens", "stage 1", "tokens"),
    Column("stage2_tokens", "stage 2", "tokens"),
    Column("paper_ppl", "paper\nppl", "ppl", "down"),
    Column("paper_gap_teacher_pct", "paper\ngap %", "pct", "down"),
    Column("paper_params_millions", "paper\nparams M", "millions"),
    *[Column(t, f"{paper.METRICS[t].short} %", "acc", "up", "accuracies") for t in paper.TASKS],
    *[Column(f"paper_{t}", f"paper\n{paper.METRICS[t].short} %", "acc", "up", "the paper's accuracies")
      for t in paper.TASKS],
]


def studies(frame: pd.DataFrame) -> list[str]:
    """The names of the studies that have records, sorted."""
    return sorted(set(frame["study"])) if len(frame) else []


def build(frame: pd.DataFrame, study: str) -> list[Table]:
    """The tables of one study, from the records of all of them (a teacher's may lie in another study).

    One table, or one for each teacher and scale that the study was run with. The rows are the paper's, run or
    not, then what else was run; a study that the paper doesn't know has one row for each cell.
    """
    records = [{k: v for k, v in row.items() if not (v is None or (isinstance(v, float) and math.isnan(v)))}
               for row in frame.to_dict("records")]
    mine = [r for r in records if r["study"] == study]
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in mine:
        run_with = (text(record.get(f"settings.{s}", "")) for s in ("scale", "teacher") if study in TITLES)
        groups.setdefault(tuple(run_with), []).append(record)
    tables = []
    for which, group in sorted(groups.items()):
        name = f"{study} ({', '.join(filter(None, which))})" if len(groups) > 1 else study
        tables.append(_table(study, name, group, [r for r in records if r["study"] != study]))
    return tables


def _table(study: str, name: str, mine: list[Record], others: list[Record]) -> Table:
    notes: list[str] = []
    caption = _caption(study, mine)
    mine = mine + _borrowed(mine, others, notes)
    published = _published(study)
    rows: dict[str, list[Record]] = {label: [] for label in published}
    named = [(row_name(r, study), r) for r in mine] if study in TITLES else _cell_names(mine)
    for label, record in sorted(named, key=lambda pair: _natural(pair[0])):
        rows.setdefault(label, []).append(record)
    if "teacher" in rows:
        rows = {"teacher": rows.pop("teacher"), **rows}
    taken = {label: _agreeing(label, records, notes) for label, records in rows.items()}
    usable = [r for records in taken.values() for r in records]
    made = []
    for label, records in taken.items():
        cells = _cells(records, usable, notes) | _paper_cells(published.get(label, {}))
        commands = [str(r["provenance.command"]) for r in records if r.get("provenance.command")]
        made.append(Row(label, cells, list(dict.fromkeys(commands))))
    if study == "budget" and any(_human(r.get("settings.budget", 0)) != label
                                 for label in paper.TABLES["budget"].rows for r in taken[label]):
        notes.append("Rows are named by the paper's budgets; ours are in the columns of the stages.")
    if study == "demo":
        notes.append(_ordering(taken))
    filled = {key for row in made for key in row.cells}
    if study == "demo":  # its rows are of several of the paper's tables, so only what it measures is shown
        filled -= {f"paper_{task}" for task in paper.TASKS if task not in filled}
    columns = [Column("row", "row"), *[c for c in COLUMNS if c.key in filled]]
    return Table(name, caption, columns, made, [*_general_notes(made, usable), *dict.fromkeys(notes)])


def _caption(study: str, records: list[Record]) -> str:
    if study not in TITLES:
        return f"Study {study}, one row for each cell."
    ours = []
    for setting, what in (("teacher", "teacher"), ("scale", "scale"), ("data", "data"),
                          ("seq_len", "sequence length")):
        values = {text(r[f"settings.{setting}"]) for r in records if f"settings.{setting}" in r}
        ours += [f"{what} {', '.join(sorted(values, key=_natural))}"] if values else []
    published = paper.TABLES.get(study, paper.TABLES["main"]).caption.rstrip(".")
    return f"{TITLES[study]}. Ours: {'; '.join(ours)}. Paper: {published}."


def _published(study: str) -> dict[str, dict[str, Any]]:
    """The rows of a study with the paper's values (also "params_millions") and a "remark" on them."""
    main, one_step = paper.TABLES["main"].rows, paper.TABLES["one_step"].rows["one_step"]
    if study == "demo":
        split = paper.TABLES["split"].rows
        return {"teacher": main["teacher"], "hedgemamba 10/90": split["10/90"],
                "hedgehog 10/90": {**main["hedgehog"], "remark": "50/50"}, "0/100": split["0/100"],
                "one_step": one_step, "adapted_teacher": {}}
    if study not in TITLES:
        return {}
    table = paper.TABLES[study]
    rows: dict[str, dict[str, Any]] = {name: {**values} for name, values in table.rows.items()}
    for name, millions in table.params_millions.items():
        rows[name]["params_millions"] = millions
    return {"teacher": main["teacher"], **rows}


# --- which record belongs to which row ---------------------------------------------------------------------

def row_name(record: Record, study: str) -> str:
    """The row that `record` fills: its own "row", else by its settings. Hybrids have rows of their own."""
    derived, mixer = _derived(record, study), _mixer(record)
    name = str(record.get("row") or record.get("settings.row") or derived)
    if derived in _published(study) and name in (mixer, f"{mixer} {_split(record)}"):
        name = derived
    kept = record.get("settings.keep_attention")
    if kept in (None, "", "null", "none", "[]", 0, "0", []) or record.get("settings.recipe") in TEACHERS:
        return name
    layers = ",".join(map(str, kept)) if isinstance(kept, list) else text(kept)
    return f"{name} (hybrid, keep_attention={layers})"


def _derived(record: Record, study: str) -> str:
    recipe, mixer, split = record.get("settings.recipe", "two_stage"), _mixer(record), _split(record)
    if recipe != "two_stage":
        return str(recipe)
    whose = "" if mixer == "hedgemamba" else f"{mixer} "
    if study == "mixer":
        return MIXERS.get(mixer) or mixer
    if study == "split":
        return whose + split
    if study == "budget" and (budget := record.get("settings.budget")):
        return whose + _human(budget)
    if study == "demo":
        return "0/100" if (mixer, split) == ("hedgemamba", "0/100") else f"{mixer} {split}"
    return mixer


def _mixer(record: Record) -> str:
    """The mixer's name, after the parts that were switched on or off on their own."""
    mixer = str(record.get("settings.mixer", "?"))
    if mixer not in MIXERS:
        return mixer
    on = "".join(f"+{p}" for p in PARTS if record.get(f"settings.{p}", f"+{p}" in MIXERS[mixer]))
    return next((name for name, parts in MIXERS.items() if parts == on), f"hedgehog{on}")


def _split(record: Record) -> str:
    """Stage 1 and stage 2 in percent of both, such as 10/90, as asked for (whole steps miss it a little)."""
    one, two = (record.get(f"settings.stage{stage}_tokens", _tokens(record, stage)) for stage in (1, 2))
    if not isinstance(one, int | float) or not isinstance(two, int | float) or one + two <= 0:
        return "?/?"
    percent = 100 * one / (one + two)
    return f"{round(percent, 1):g}/{round(100 - percent, 1):g}"


def _tokens(record: Record, stage: int) -> float | None:
    value = record.get(f"tokens.stage{stage}", record.get(f"settings.stage{stage}_tokens"))
    return float(value) if isinstance(value, int | float) else None


def _cell_names(records: list[Record]) -> list[tuple[str, Record]]:
    """Row names where none are known: the cell's, with the settings that cells of one name differ in."""
    by_name: dict[str, list[Record]] = {}
    for r in records:
        by_name.setdefault(str(r.get("row") or r.get("settings.row") or r["cell"]), []).append(r)
    named = []
    for name, group in by_name.items():
        varied = _differing(group)
        for r in group:
            what = ", ".join(f"{s.removeprefix('settings.')}={text(r.get(s, 'null'))}" for s in varied)
            named.append((f"{name} ({what})" if what else name, r))
    return named


def _differing(records: list[Record]) -> list[str]:
    """The settings, of those that matter, in which the records aren't all the same."""
    names = {k for r in records for k in r if k.startswith("settings.") and k not in OPERATIONAL}
    return sorted(k for k in names if len({text(r.get(k, "null")) for r in records}) > 1)


def _borrowed(mine: list[Record], others: list[Record], notes: list[str]) -> list[Record]:
    """Teachers of other studies, measured as this one's students are, where it has none of its own."""
    found: list[Record] = []
    students = [r for r in mine if r.get("settings.recipe") not in TEACHERS]
    for recipe in TEACHERS:
        own = [r for r in mine if r.get("settings.recipe") == recipe]
        wanting = [s for s in students if not any(_comparable(r, s) for r in own)]
        lent = [r for r in others if r.get("settings.recipe") == recipe and any(
            _comparable(r, s) and (recipe == "teacher" or _tokens(r, 2) == _tokens(s, 2)) for s in wanting)]
        several = len({_tokens(r, 2) for r in lent}) > 1
        for r in lent:
            row = f"{recipe} ({_human(_tokens(r, 2) or 0)} tokens)" if several else recipe
            found.append({**r, "row": row})
            notes.append(f"The {row} record is that of study {r['study']}.")
    return found


def _comparable(a: Record, b: Record) -> bool:
    """Whether their perplexities are over the same sequences. (A null setting isn't in a frame.)"""
    nullable = ("settings.validation", "settings.eval.sequences")
    return all(text(a.get(k, "null")) == text(b.get(k, "null"))
               for k in YARDSTICK if k in nullable or (k in a and k in b))


def _agreeing(name: str, records: list[Record], notes: list[str]) -> list[Record]:
    """One record for each seed; none where they conflict. Teachers that measure the same don't."""
    recipes, ppls = ({r.get(k) for r in records} for k in ("settings.recipe", "metrics.ppl.value"))
    if recipes == {"teacher"} and len(ppls) == 1:
        return [min(records, key=lambda r: (r.get("settings.seed", 0), _natural(r["path"])))]
    by_seed: dict[str, dict[str, list[Record]]] = {}
    for r in sorted(records, key=lambda r: (str(r.get("provenance.started", "")), _natural(r["path"]))):
        by_seed.setdefault(text(r.get("settings.seed", "null")), {}).setdefault(r["key"], []).append(r)
    taken = []
    for seed, by_key in sorted(by_seed.items(), key=lambda pair: _natural(pair[0])):
        runs = [group[-1] for _, group in sorted(by_key.items())]
        if len(runs) > 1:
            notes.append(f"Conflict in row {name}, seed {seed}: {_why(runs)}; none is taken.")
            continue
        taken += runs
        values = [r.get("metrics.ppl.value") for r in by_key[runs[0]["key"]]]
        if len(set(values)) > 1:
            shown = ", ".join(number_text(v, "ppl") for v in values)
            times = f"{len(values)} times"
            notes.append(f"Row {name}, seed {seed} was run {times} (ppl {shown}); the last one counts.")
    if _differing(taken):
        notes.append(f"Conflict in row {name} over its seeds: {_why(taken)}; none is taken.")
        return []
    return taken


def _why(records: list[Record]) -> str:
    """Which records clash, and in what."""
    varied = [f"{s.removeprefix('settings.')} {' / '.join(text(r.get(s, 'null')) for r in records)}"
              for s in _differing(records)]
    same = "the same settings but other data, weights or code"
    reason = f"other settings ({'; '.join(varied)})" if varied else same
    cells = " and ".join(f"{r['cell']} (key {r['key']})" for r in records)
    return f"{cells} have {reason}"


# --- the cells of a row ------------------------------------------------------------------------------------

def _cells(records: list[Record], usable: list[Record], notes: list[str]) -> dict[str, Cell]:
    if not records:
        return {}
    first = records[0]
    cells: dict[str, Cell | None] = {metric: _measured(records, metric) for metric in paper.COLUMNS}
    ppls, starts = _values(records, "ppl"), _values(records, "ppl_start")
    if ppls:
        cells["seeds"] = Cell(1 if first.get("settings.recipe") == "teacher" else len(ppls))
        for recipe in TEACHERS:
            if reference := _reference(recipe, first, usable, notes):
                cells[f"gap_{recipe}_pct"] = Cell(100 * (statistics.fmean(ppls) / reference - 1))
    if starts:
        cells["ppl_start"] = Cell(statistics.fmean(starts))
    if "params.total" in first:
        cells["params_millions"] = Cell(first["params.total"] / 1e6)
    for stage in (1, 2):
        if (count := _tokens(first, stage)) is not None:
            cells[f"stage{stage}_tokens"] = Cell(count)
    return {key: cell for key, cell in cells.items() if cell is not None}


def _values(records: list[Record], metric: str) -> list[float]:
    return [float(r[f"metrics.{metric}.value"]) for r in records if f"metrics.{metric}.value" in r]


def _measured(records: list[Record], metric: str) -> Cell | None:
    """Mean and standard deviation over seeds; of one, or a teacher (which has none), the standard error."""
    values = _values(records, metric)
    if not values:
        return None
    if len(values) == 1 or records[0].get("settings.recipe") == "teacher":
        errors = [r[f"metrics.{metric}.stderr"] for r in records if f"metrics.{metric}.stderr" in r]
        return Cell(statistics.fmean(values), errors[0] if errors else None, one_seed=bool(errors))
    return Cell(statistics.fmean(values), statistics.stdev(values))


def _reference(recipe: str, like: Record, usable: list[Record], notes: list[str]) -> float | None:
    """Perplexity of the teacher to compare `like` with; of several adapted ones, that of as many tokens."""
    found = [r for r in usable if r.get("settings.recipe") == recipe and _comparable(r, like)]
    if recipe == "adapted_teacher" and found:
        trained = {_tokens(r, 2) or 0 for r in found}
        if len(trained) > 1:
            found = [r for r in found if _tokens(r, 2) == _tokens(like, 2)]
        elif like.get("settings.recipe") not in TEACHERS and trained != {_tokens(like, 2)}:
            notes.append(f"The adapted teacher was trained on {_human(min(trained))} tokens, "
                         "which is not what stage 2 of every row had.")
    values = _values(found, "ppl")
    return statistics.fmean(values) if values else None


def _paper_cells(published: dict[str, Any]) -> dict[str, Cell]:
    values = {f"paper_{k}": v for k, v in published.items() if k != "remark"}
    cells = {k: Cell(v) for k, v in values.items() if v is not None}
    gap, remark = paper.gap(published.get("ppl")), published.get("remark", "")
    if gap is not None:
        cells["paper_ppl"] = Cell(published["ppl"], remark=remark)
        cells["paper_gap_teacher_pct"] = Cell(gap, remark=remark)
    return cells


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
    if any(cell.spread is not None and not cell.one_seed for _, cell in cells):
        notes.append("± is the standard deviation over as many seeds as the column says.")
    if any(cell.one_seed for _, cell in cells):
        notes.append(f"{ONE_SEED} one seed: ± is the standard error over the evaluated sequences or items.")
    if any(key.startswith("paper_") for key in keys):
        notes.append(f"Columns marked paper: the published figures ({paper.TITLE}, arXiv {paper.ARXIV}) of "
                     f"{paper.TEACHER}, quoted from public reading notes, not results of this project. "
                     "Perplexities of different teachers don't compare; relative gaps do.")
    if any(_reference("teacher", r, usable, []) is None for r in usable):
        notes.append("A gap is missing where no teacher was measured on the same data, length and sequences.")
    return notes


def _ordering(taken: dict[str, list[Record]]) -> str:
    """Whether teacher < two-stage HedgeMamba <= Hedgehog < 0/100 < one-step, seed by seed."""
    names, signs = DEMO_ORDER[::2], DEMO_ORDER[1::2]
    wanted = f"Expected ordering of ppl: {' '.join(DEMO_ORDER)}"
    teacher = _values(taken["teacher"], "ppl")
    reference = {"teacher": statistics.fmean(teacher)} if teacher else {}
    seeds: dict[str, dict[str, float]] = {}
    for name in names[1:]:
        for r in taken[name]:
            ppl = seeds.setdefault(text(r.get("settings.seed", "null")), dict(reference))
            for value in _values([r], "ppl"):
                ppl[name] = value
    if not seeds:
        return f"{wanted}: nothing is run yet."
    held, failed = 0, ""
    for seed, ppl in sorted(seeds.items(), key=lambda pair: _natural(pair[0])):
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


# --- text --------------------------------------------------------------------------------------------------

def text(value: Any) -> str:
    """A setting as text; of a path, which differs from machine to machine, the last part. 3.0 is 3."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) else str(value)


def _natural(label: str) -> list[tuple[int, float, str]]:
    """A sort key by which 2M comes before 10M, and 900k before both."""
    size = {"k": 1e3, "M": 1e6, "B": 1e9}
    return [(0, float(n) * size.get(unit, 1), "") if n else (1, 0.0, other)
            for n, unit, other in re.findall(r"([0-9]+(?:\.[0-9]+)?)([kMB]\b)?|([^0-9]+)", label)]


def _human(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:g}"


def number_text(value: float | Above | None, kind: str) -> str:
    """A value as readers see it, in the decimals of its column's `kind`; a missing one is a dash."""
    if value is None:
        return "–"
    if isinstance(value, Above):
        return f"> {number_text(value.bound, 'count' if kind == 'ppl' else kind)}"
    if kind == "tokens":
        return _human(value)
    decimals = {"ppl": 2 if abs(value) < 1000 else 0, "pct": 1, "acc": 2, "count": 0}
    if kind == "millions":
        return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return f"{value:.{decimals[kind]}f}"
