"""The record of a cell whose steps are all done: the one thing that tables and plots are made from.

record.json is an object with "schema": 1, the names of the cell ("study", "cell", "row", "key"), "status" and

    settings     the resolved settings of the cell
    metrics      {name: {"value", "stderr", ...}}; perplexities, accuracies in percent, and what else was evaluated
    params       parameter counts: total, new, trainable, by part
    tokens       trained on, by stage: stage1, stage2
    timing       seconds and tokens per second of each step: tokenise, stage1, student
    peak_memory  bytes, of each training step
    curves       {"stage1", "student"}: what each training step logged, thinned; by column: step, tokens, loss, and of stage 1
                 layer.0, layer.1, ...: the loss of each layer. Losses have five digits. Earlier records have no curves
    provenance   commit, packages, machine, command, and of each training step the number of processes (each with a device)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hm.convert import teacher_counts
from hm.files import atomic_write, to_json
from hm.ops import resolve_scan
from hm.provenance import provenance
from hm.teacher import load_teacher

if TYPE_CHECKING:
    from hm.cell import Cell


CURVE_POINTS = 60


def write_record(cell: Cell, started: str | None = None) -> dict:
    """Write the cell's run folder (record.json comes last) and return its record; beside an older one if force=true.

    started: when the cell was begun, if not just now.
    """
    s, store, made = cell.s, cell.store, provenance()
    folder = store.run_dir(s.study, cell.name, cell.key)
    if s.force and store.read_record(folder):
        folder = store.next_run_dir(s.study, cell.name, cell.key)
    atomic_write(folder / "config.yaml", to_yaml(cell.described()))
    atomic_write(folder / "provenance.json", to_json(made, indent=1))
    evaluated = cell.evaluate()
    metrics = json.loads((evaluated / "metrics.json").read_text())
    if (evaluated / "losses.json").exists():  # evaluations made by earlier versions have none
        atomic_write(folder / "losses.json", (evaluated / "losses.json").read_bytes())
    trained = cell.training_steps()
    results = {kind: store.read_json(kind, key)["result"] for kind, key in trained}
    write_log(folder / "metrics.jsonl", [(kind, store.path(kind, key) / "metrics.jsonl") for kind, key in trained])
    second = results.get("student", {})
    record = {
        "schema": 1, "study": s.study, "cell": cell.name, "row": s.row, "key": cell.key, "status": "done",
        "settings": cell.described(), "metrics": metrics,
        "params": second.get("params") or teacher_counts(load_teacher(s.teacher)),
        "tokens": {"stage1": results.get("stage1", {}).get("tokens", 0), "stage2": second.get("tokens", 0)},
        "timing": {"tokenise": store.read_json("tokens", cell.tokens_key)["result"].get("seconds")}
        | {f"{k}_seconds": r["seconds"] for k, r in results.items()}
        | {f"{k}_tokens_per_second": r["tokens_per_second"] for k, r in results.items() if "tokens_per_second" in r},
        "peak_memory": {k: r.get("peak_memory") for k, r in results.items()},
        "curves": {kind: found for kind, key in trained if (found := curve(store.path(kind, key) / "metrics.jsonl"))},
        "provenance": {**made, "started": started or made["started"], "data": cell.inputs.text(cell.spec),
                       "teacher": cell.inputs.teacher(s.teacher), "precision": cell.precision,
                       "device_type": cell.device.type, "scan": resolve_scan(s.scan, cell.device, 0, s.decay),
                       "processes": {k: r["processes"] for k, r in results.items() if "processes" in r},
                       "artifacts": {"tokens": cell.tokens_key, **dict(trained), "eval": cell.key}},
    }  # fmt: skip
    store.write_record(folder, record)
    cell.export(record)
    return record


def write_log(path: Path, logs: list[tuple[str, Path]]) -> None:
    """The cell's metrics.jsonl: the steps' logs one after the other, each line with its stage."""
    lines = []
    for kind, log in logs:
        if log.exists():
            stage = "stage1" if kind == "stage1" else "stage2"
            lines += [json.dumps({"stage": stage, **json.loads(line)}) for line in log.read_text().splitlines()]
    atomic_write(path, "".join(line + "\n" for line in lines))


def curve(log: Path, points: int = CURVE_POINTS) -> dict[str, list[Any]]:
    """A step's log as columns (see above), at most `points` lines of it: the first, the last and evenly between; {} without one."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if len(lines) > points:
        lines = [lines[round(i * (len(lines) - 1) / (points - 1))] for i in range(points)]
    losses = [name for name in (lines[0] if lines else {}) if name == "loss" or name.startswith("layer.")]
    return {name: [line[name] if name in ("step", "tokens") else float(f"{line[name]:.5g}") for line in lines]
            for name in (("step", "tokens", *losses) if lines else ())}


def to_yaml(settings: dict) -> str:
    """Settings as YAML, for people."""
    import yaml

    return yaml.safe_dump(settings, sort_keys=False)
