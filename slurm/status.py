"""`python -m slurm.status [study]`: how far each step is, where, and what went wrong; from any shell, while it runs or later.

    python -m slurm.status                   all studies of the store (runs=, HM_RUNS or ./runs)
    python -m slurm.status mixer --watch     one study, again every few seconds
    python -m slurm.status mixer --all       also what is done and what has not begun
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hm.errors import UserError
from slurm import scheduler
from slurm.states import ENDED, Described, State, look

PLANS = "plans"
JOBS = "jobs.json"
ORDER = ("running", "queued", "waiting", "to do", "done", *ENDED)
MOST_ROWS = 30


@dataclass(frozen=True)
class Planned:
    """A step as a kept plan describes it."""

    kind: str
    key: str
    parent: str | None
    steps: int
    tokens: int
    label: str
    cells: list[str]

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.key}"


def read_plans(root: Path, study: str | None) -> tuple[dict[str, Planned], set[str]]:
    """The steps of all kept plans of a study (None: of all), the newest plan's last, and the ids of each study's newest plan.

    Raises:
        UserError: there is none.
    """
    newest: dict[str, tuple[float, set[str]]] = {}
    steps: dict[str, Planned] = {}
    files = sorted(root.glob(f"{study or '*'}/{PLANS}/*.json"), key=lambda p: p.stat().st_mtime)
    for file in files:
        about = json.loads(file.read_text())
        found = {p.id: p for p in (Planned(**step) for step in about["steps"])}
        steps |= found
        newest[about["study"]] = (about["time"], set(found))
    if not files:
        known = sorted({p.parent.parent.name for p in root.glob(f"*/{PLANS}/*.json")})
        raise UserError(f"no sweep of {study or 'any study'} was started in {root} (known: {', '.join(known) or 'none'}); "
                        "name the study, or its store with --runs.")  # fmt: skip
    return steps, set().union(*(ids for _, ids in newest.values()))


def read_queue() -> tuple[dict[str, scheduler.Job] | None, str]:
    """The scheduler's jobs, or None and the reason."""
    if not scheduler.installed():
        return None, ""
    try:
        return scheduler.jobs(), ""
    except scheduler.Unreachable as error:
        return None, f"the scheduler does not answer ({error}); what follows is what the store shows"


def read_states(root: Path, steps: Mapping[str, Described]) -> tuple[dict[str, State], str]:
    """The state of each step, and what keeps it from being complete."""
    jobs_file = root / JOBS
    jobs = json.loads(jobs_file.read_text()) if jobs_file.is_file() else {}
    queue, trouble = read_queue() if jobs else (None, "")
    return look(steps, root, jobs, queue), trouble


def rows(steps: Mapping[str, Any], states: Mapping[str, State], wanted: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A table's rows for the steps in the wanted states."""
    shown: list[tuple[str, ...]] = [("step", "what", "state", "done", "tokens/s", "left", "node", "job", "requeues")]
    for name, state in states.items():
        if state.name in wanted:
            step = steps[name]
            shown.append((
                step.kind, step.label, state.name, f"{100 * state.progress:.0f}%" if state.progress is not None else "",
                f"{state.tokens_per_second:,.0f}" if state.tokens_per_second else "", left(state.seconds_left), state.node, state.job,
                str(state.requeues or ""),
            ))  # fmt: skip
    return shown


def left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def text(steps: Mapping[str, Any], states: Mapping[str, State], everything: bool = False) -> str:
    """All that is going on as a table, what went wrong, and a line of counts."""
    wanted = ORDER if everything else ("running", "queued", "waiting", "to do")
    shown = rows(steps, states, wanted)
    cut = len(shown) - 1 - MOST_ROWS if not everything else 0
    if cut > 0:
        order = {name: i for i, name in enumerate(ORDER)}
        shown = [shown[0], *sorted(shown[1:], key=lambda row: order[row[2]])[:MOST_ROWS]]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in shown] if len(shown) > 1 else []
    lines += [f"... and {cut} more (--all shows them)"] if cut > 0 else []
    for name, state in states.items():
        if state.name in ENDED and state.name != "blocked":
            lines.append(f"{state.name}: {name} of {steps[name].label}: {state.why}" + (f"; log: {state.log}" if state.log else ""))
    counts = Counter(state.name for state in states.values())
    return "\n".join([*lines, f"{len(states)} steps: " + ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description="How far each step of a sweep is.")
    parser.add_argument("study", nargs="?", help="only this study")
    parser.add_argument("--runs", default=os.environ.get("HM_RUNS") or "runs", help="the store (HM_RUNS, or ./runs)")
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds, until nothing is left to do")
    parser.add_argument("--all", action="store_true", help="also what is done and what has not begun")
    given = parser.parse_args(arguments)
    root = Path(given.runs).expanduser().absolute()
    while True:
        steps, current = read_plans(root, given.study)
        states, trouble = read_states(root, steps)
        active = {n: s for n, s in states.items() if n in current or s.name in ("running", "queued", "waiting")}
        if given.watch and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print("\n".join(filter(None, [trouble, text(steps, active, given.all)])), flush=True)
        if not given.watch or not any(s.name in ("running", "queued", "waiting", "to do") for s in active.values()):
            return
        time.sleep(5)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
