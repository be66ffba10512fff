"""What became of each step of a plan: read from the store and the scheduler, at any time, from any shell.

Nothing here imports PyTorch, and each kind of artifact is listed once, so that a thousand cells are looked up in a moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hm.claim import holder
from slurm.job import read_failure
from slurm.scheduler import Job, job_of

PROGRESS = "progress.json"
STALE = 90.0
"""Seconds without a sign of life after which the holder of a claim is not called running."""
ENDED = ("failed", "blocked", "cancelled", "lost")
LATE = "the job that it waited for was ended as it had finished its step"
"""Why SLURM never started a job although what it needs is there."""
SETTLE = 20.0
"""Seconds that a shared file system may take to show what a job that ended has left."""


class Described(Protocol):
    """A step as far as its state goes: of a plan in memory or in a file."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def steps(self) -> int: ...


@dataclass
class State:
    """name: done, running, queued, waiting (for another step), to do; or failed, blocked, cancelled, lost."""

    name: str
    why: str = ""
    progress: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    node: str = ""
    requeues: int = 0
    job: str = ""
    log: str = ""


class Store:
    """One look at the artifacts of a store: what is there, what is claimed, what is being worked on."""

    def __init__(self, root: Path):
        self.root = root
        self.names: dict[str, set[str]] = {}

    def listed(self, kind: str) -> set[str]:
        if kind not in self.names:
            folder = self.root / "artifacts" / kind
            self.names[kind] = set(os.listdir(folder)) if folder.is_dir() else set()
        return self.names[kind]

    def done(self, step: Described) -> bool:
        return step.key in self.listed(step.kind)

    def failure(self, step: Described) -> dict[str, Any] | None:
        return read_failure(self.root, step.kind, step.key) if f".{step.key}.failed" in self.listed(step.kind) else None

    def claim(self, step: Described) -> dict[str, Any] | None:
        """Who holds the step now, if it shows life."""
        name = f".{step.key}.claim"
        return holder(self.root / "artifacts" / step.kind / name, STALE) if name in self.listed(step.kind) else None

    def progress(self, step: Described) -> dict[str, Any]:
        """The progress.json of the step's work folder; empty if there is none."""
        for name in sorted(n for n in self.listed(step.kind) if n.startswith(f".{step.key}.work-")):
            try:
                return json.loads((self.root / "artifacts" / step.kind / name / PROGRESS).read_text())
            except (OSError, ValueError):
                continue
        return {}


def look(steps: Mapping[str, Described], root: Path, jobs: Mapping[str, dict], queue: Mapping[str, Job] | None) -> dict[str, State]:
    """The state of each step, in the plan's order (each after the one that it needs).

    Args:
        jobs: jobs.json. queue: the scheduler's jobs; None where there is no scheduler, or it doesn't answer.
    """
    store, found = Store(root), {}  # type: Store, dict[str, State]
    for name, step in steps.items():
        found[name] = _state(step, store, jobs.get(name), queue, found.get(step.parent or ""))
    return found


def _state(step: Described, store: Store, entry: dict | None, queue: Mapping[str, Job] | None, parent: State | None) -> State:
    if store.done(step):
        return State("done")
    job = job_of(entry, queue)
    where = {"job": entry["job"], "log": entry["log"]} if entry else {}
    if job and job.alive:
        where |= {"node": job.node, "requeues": job.requeues}
        if "held" in job.reason.lower() and job.reason != "JobHeldUser":  # such as launch failed requeued held
            why = f"SLURM holds its job {job.id} ({job.reason}); `scontrol release {job.id}` starts it, or scancel it and run this again"
            return State("failed", why, **where)
        if job.state == "PENDING":
            return State("waiting" if job.reason == "Dependency" else "queued", f"{job.reason}" if job.reason != "None" else "", **where)
        return running(step, store, where)
    claim = store.claim(step)
    if claim and not (job and claim.get("job") == job.id):  # held by another than this job, which has ended
        return running(step, store, where | {"node": claim.get("host", "")})
    if note := store.failure(step):
        return State("failed", note["error"], **where | {"log": note.get("log") or where.get("log", ""), "node": note.get("host", "")})
    if parent and parent.name in ENDED:
        return State("blocked", "by a step that it needs", **where)
    if entry is None:
        return State("to do")
    if queue is None:
        return State("queued", "the scheduler does not answer", **where)
    if parent and parent.name == "done" and job and job.reason == "DependencyNeverSatisfied":
        return State("cancelled", f"{LATE}; the same command queues this one again", **where)
    silent = "" if Path(entry["log"]).exists() else f" and left no log: can its node write to {store.root}?"
    if job is None:
        return State("lost", f"its job left the queue without the result{silent}", **where)
    named = {"CANCELLED": "cancelled", "COMPLETED": "lost", "NODE_FAIL": "lost"}
    reason = "" if job.reason == "None" else f" ({job.reason})"
    why = f"its job ended as {job.state}{reason} on {job.node or 'no node'}{silent}"
    return State(named.get(job.state, "failed"), why, **where)


def running(step: Described, store: Store, where: dict[str, Any]) -> State:
    """Running, with how far it is."""
    p = store.progress(step)
    if not p:
        return State("running", **where)
    rate, left = p["tokens_per_second"], None
    if rate > 0 and step.steps and p["step"]:
        left = (p["steps"] - p["step"]) * p.get("tokens_per_step", 0) / rate or None
    return State("running", progress=p["step"] / max(1, p["steps"]), tokens_per_second=rate, seconds_left=left, **where)
