"""What a sweep is at, as the store shows it: cells without a record, and steps that are being computed.

A step's folder and claim lie beside its artifact while it is built (hm/store.py); a claim that is held is touched every
few seconds.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STALE = 90
"""Seconds without a sign of life after which a step counts as interrupted."""


@dataclass
class Step:
    """`tokens` done and the last `loss`; `alive`: seconds since its last sign of life, None if it has none."""

    kind: str
    key: str
    tokens: int = 0
    loss: float | None = None
    alive: int | None = None


@dataclass
class State:
    """`open`: study/cell of the runs that were begun and have no record."""

    done: int = 0
    open: list[str] = field(default_factory=list)
    building: list[Step] = field(default_factory=list)


def sweep_state(runs: str | Path, study: str | None = None) -> State:
    """The state of the store `runs`, of one study or all. A folder that is no store has neither open cells nor steps."""
    state, root = State(), Path(runs)
    for folder in sorted(root.glob(f"{study or '*'}/*/")):
        if folder.parent.name == "artifacts":
            continue
        if (folder / "record.json").is_file():
            state.done += 1
        elif (folder / "config.yaml").is_file():
            state.open.append(f"{folder.parent.name}/{folder.name}")
    if state.open:
        state.building = [_step(work) for work in sorted(root.glob("artifacts/*/.*.work-*"))]
    return state


def _step(work: Path) -> Step:
    key = work.name[1:].partition(".work-")[0]
    step = Step(work.parent.name, key)
    last = _last_line(work / "metrics.jsonl")
    step.tokens, step.loss = int(last.get("tokens", 0)), last.get("loss")
    signs = [path.stat().st_mtime for path in (work.with_name(f".{key}.claim"), work / "metrics.jsonl") if path.exists()]
    age = time.time() - max(signs, default=0)
    step.alive = round(age) if age < STALE else None
    return step


def _last_line(log: Path) -> dict[str, Any]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        return value if isinstance(value, dict) else {}
    return {}
