"""The files of `python -m hm.bench` (JSON, schema 1) -> rows, and the tables of speed and memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from analysis.rows import number
from analysis.table import Cell, Column, Row, Table

SCHEMA = 1
KINDS = ("training", "inference", "operator")
# key in a row of the file -> column of the table: (label, kind, better, factor)
_COLUMNS = {
    "tokens_per_second": ("tokens/s", "tokens", "up", 1),
    "share_of_peak": ("% of peak", "pct", "up", 100),
    "ratio_to_teacher": ("x teacher", "ratio", "up", 1),
    "prefill_tokens_per_second": ("prefill\ntokens/s", "tokens", "up", 1),
    "decode_tokens_per_second": ("decode\ntokens/s", "tokens", "up", 1),
    "seconds_per_token": ("ms/token", "ms", "down", 1e3),
    "forward_ms": ("forward ms", "ms", "down", 1),
    "backward_ms": ("backward ms", "ms", "down", 1),
    "peak_memory_bytes": ("memory GB", "gb", "down", 1e-9),
}
_NAMES = {"training": ("shape", "what", "mixer", "scan", "seq_len", "batch", "compile", "checkpointing"),
          "inference": ("shape", "model", "context", "batch", "compiled"),
          "operator": ("scan", "heads", "head_dim", "d_state", "seq_len", "batch")}
_TITLES = {"training": "Training speed", "inference": "Prefill and decoding", "operator": "The operator, one layer"}


@dataclass
class Bench:
    """One file. `rows` hold what was measured; what a row lacks was not."""

    path: str
    kind: str
    device: str
    command: str
    rows: list[dict[str, Any]]
    commit: str = ""
    compiled: bool = False
    versions: dict[str, str] = field(default_factory=dict)


def load_bench(folder: str | Path) -> tuple[list[Bench], list[tuple[str, str]]]:
    """The files `<folder>/**/*.json` in the order of their names, and (file, reason) for those that can't be used.

    A folder that is not there has no files.
    """
    found, problems = [], []
    root = Path(folder)
    for file in sorted(root.rglob("*.json")):
        name = file.relative_to(root).as_posix()
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("kind") not in KINDS:
                raise ValueError(f"is no benchmark of schema {SCHEMA} and kind {', '.join(KINDS)}")
            if not isinstance(data.get("rows"), list) or not all(isinstance(row, dict) for row in data["rows"]):
                raise ValueError("has no rows, or not as a list of objects")
            found.append(Bench(name, data["kind"], str(data.get("device", "?")), str(data.get("command", "")), data["rows"],
                               str(data.get("git_commit") or ""), data.get("compile") is True, dict(data.get("versions") or {})))
        except (ValueError, OSError, RecursionError) as error:
            problems.append((name, str(error)))
    return found, problems


def speed_tables(benches: list[Bench]) -> list[Table]:
    """A table for each kind and device."""
    made: dict[tuple[str, str], list[Bench]] = {}
    for bench in benches:
        made.setdefault((bench.kind, bench.device), []).append(bench)
    return [_table(kind, device, group) for (kind, device), group in sorted(made.items(), key=lambda p: (KINDS.index(p[0][0]), p[0]))]


def _table(kind: str, device: str, group: list[Bench]) -> Table:
    named = [(_label(row | {"compiled": bench.compiled}, kind), row, bench) for bench in group for row in bench.rows]
    alike = Counter(label for label, *_ in named)
    rows = []
    for label, row, bench in named:
        cells = {key: Cell(value * factor) for key, (*_, factor) in _COLUMNS.items() if (value := number(row, key)) is not None}
        shown = f"{label} ({PurePosixPath(bench.path).stem})" if alike[label] > 1 else label
        rows.append(Row(shown, cells, [bench.command] if bench.command else [], [f"bench/{bench.path}"], ranked=False))
    filled = {key for row in rows for key in row.cells}
    columns = [Column(key, label, unit, better, block="speed")
               for key, (label, unit, better, _) in _COLUMNS.items() if key in filled]
    notes = ["x teacher: tokens/s over those of fine-tuning the teacher, in the same run."] * ("ratio_to_teacher" in filled)
    commits = sorted({bench.commit[:12] for bench in group if bench.commit})
    notes += [f"Commit {', '.join(commits)}."] if commits else []
    return Table(f"speed ({kind}, {device})", f"{_TITLES[kind]} on {device}.", [Column("row", "what"), *columns], rows, notes)


def _label(row: dict[str, Any], kind: str) -> str:
    label = ", ".join(filter(None, (_part(row, name) for name in _NAMES[kind]))) or "?"
    if (gpus := number(row, "gpus")) and gpus > 1:
        label += f", {gpus:g} GPUs ({row.get('parallel', '?')})"
    status = row.get("status", "ok")
    return label if status == "ok" else f"{label}: {status}"


def _part(row: dict[str, Any], name: str) -> str:
    """What the value at `name` adds to a row's label."""
    value = row.get(name)
    if value is None or value is False or value == "":
        return ""
    if value is True:
        return name
    shown = f"{value:g}" if number(row, name) is not None and abs(value) < 1e6 else str(value)
    named = {"seq_len": "length", "context": "length"}.get(name, name)
    return shown if name in ("shape", "what", "mixer", "scan", "model") else f"{named} {shown}"
