"""How far a training run is, for those who watch it: progress.json in its work folder, and Accelerate's trackers.

Trackers are fed from metrics.jsonl, from its beginning, so that a run that goes on shows no step twice.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hm.files import atomic_write, to_json
from hm.progress import say

PROGRESS = "progress.json"
EVERY = 5.0
"""Seconds between updates."""


class Watch:
    """The `stop` of a `hm.train.Run`: called after each step with the number of steps done, within the context.

    It writes progress.json (step, steps, tokens_per_second, time, host) every few seconds, removes it when the run
    is complete, hands new lines of metrics.jsonl to the trackers, and passes on whether the run was asked to stop.
    """

    def __init__(self, work: Path, steps: int, tokens_per_step: int, trackers: Callable[[], list], stop: Callable[[], bool]):
        self.work, self.steps, self.tokens_per_step, self.stop = work, steps, tokens_per_step, stop
        self.make_trackers, self.trackers = trackers, []  # type: tuple[Callable[[], list], list[Any]]
        self.first: tuple[int, float] | None = None
        self.due, self.read = 0.0, 0

    def __call__(self, done: int) -> bool:
        now = time.monotonic()
        if self.first is None:
            self.first, self.trackers = (done, now), self.make_trackers()
        if now >= self.due:
            self.due = now + EVERY
            rate = (done - self.first[0]) * self.tokens_per_step / max(now - self.first[1], 1e-9)
            about = {"step": done, "steps": self.steps, "tokens_per_step": self.tokens_per_step,
                     "tokens_per_second": rate, "time": time.time(), "host": socket.gethostname()}  # fmt: skip
            atomic_write(self.work / PROGRESS, to_json(about))
            self.track()
        return self.stop()

    def track(self) -> None:
        """Hand the complete lines of metrics.jsonl that are new to the trackers."""
        for line in self.new_lines() if self.trackers else ():
            values = json.loads(line)
            step = values.pop("step")
            for tracker in self.trackers:
                tracker.log(values, step=step)

    def new_lines(self) -> Iterator[str]:
        with open(self.work / "metrics.jsonl", "rb") as file:
            file.seek(self.read)
            for line in file:
                if line.endswith(b"\n"):
                    self.read += len(line)
                    yield line.decode()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, failed: type | None, *exc: object) -> None:
        if failed is None:
            (self.work / PROGRESS).unlink(missing_ok=True)
            self.track()
        for tracker in self.trackers:
            tracker.finish()


def open_trackers(folder: Path, name: str, key: str, tracker: str) -> list:
    """TensorBoard's event files anew in `folder`/`name`, and with tracker="wandb" a run of that name, with `key` as its id."""
    found: list[Any] = []
    if find_spec("tensorboard") is None:
        say("tensorboard is not installed, so no event files are written")
    else:
        from accelerate.tracking import TensorBoardTracker

        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True, exist_ok=True)
        found.append(TensorBoardTracker(name, str(folder)))
    if tracker == "wandb":
        from accelerate.tracking import WandBTracker

        found.append(WandBTracker(os.environ.get("WANDB_PROJECT", "hedgemamba"), name=name, id=key, resume="allow"))
    for one in found:
        one.start()
    return found
