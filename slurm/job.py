"""One step in one process, wherever it runs: what is computed, and what is left behind when it can't be.

A step that is asked to stop saves its state and ends with `REQUEUE` or `STOPPED`; one that fails leaves a note beside
its artifact's place, `.<key>.failed`, which the next attempt removes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from hm.errors import UserError
from hm.files import atomic_write, to_json

if TYPE_CHECKING:
    from hm.config import Settings
    from hm.store import Store

REQUEUE = 75
"""Exit status: stopped by USR1 or USR2 (preemption, time limit) and to be started again."""
STOPPED = 76
"""Exit status: stopped by TERM (cancelled, or the cluster requeues by itself)."""
INTERRUPTED = 130
"""Exit status: stopped by Ctrl-C, as a shell has it."""


@dataclass
class Task:
    """A step with all that another process needs to carry it out; plain data."""

    kind: str
    key: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    store: str
    command: str
    grace: float = field(default=30.0)
    """Seconds that a step has to save its state once it was asked to stop."""


class StopRequest:
    """Within the context, TERM, USR1 and USR2 are remembered, and `after(status)` is called if `grace` seconds later
    the process is still there: what it does can't be saved, and is done again.

    keyboard: the same for Ctrl-C, and at once for a second one.
    """

    def __init__(self, grace: float, after: Callable[[int], None], keyboard: bool = False):
        self.grace, self.after = grace, after
        self.signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2] + [signal.SIGINT] * keyboard
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        ends: dict[int | None, int] = {signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
        return ends.get(self.signal, REQUEUE)

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signum
            print(f"asked to stop by {signal.Signals(signum).name}; saving", file=sys.stderr, flush=True)
            timer = threading.Timer(self.grace, self._late)
            timer.daemon = True
            timer.start()
        elif signum == signal.SIGINT:
            self.after(self.status)

    def _late(self) -> None:
        print(f"still busy after {self.grace:g} s; what was not saved will be computed again", file=sys.stderr, flush=True)
        self.after(self.status)

    def __enter__(self) -> StopRequest:
        self.before = {s: signal.signal(s, self._asked) for s in self.signals}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.before)  # slurm/shield.py held them back until here
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def run(task: Task, stop: Callable[[], bool]) -> None:
    """Carry out a step, and write the records of the cells that are complete with it.

    Raises:
        UserError: what the step itself raises; or this machine's inputs give another key than the plan's.
        Interrupted: `stop` said True, and the state was saved.
    """
    from hm.progress import quiet

    quiet()
    from hm import parallel
    from hm.cache import use_cache
    from hm.check import pick_device
    from hm.config import from_dict
    from hm.errors import Interrupted
    from hm.store import Store

    values = task.settings | ({"device": "cpu", "scan": "auto"} if task.kind == "tokens" else {})  # made where no GPU is
    store, settings = Store(task.store), from_dict(values)
    use_cache(store.root)
    note = failure_path(store.root, task.kind, task.key)
    if parallel.rank() == 0:
        note.unlink(missing_ok=True)
    try:
        with parallel.group(pick_device(settings.device)):
            run_step(task, settings, store, stop)
    except Interrupted:
        raise
    except Exception as error:
        if parallel.rank() == 0:
            about = {"error": one_line(error), "host": socket.gethostname(), "time": time.time(), "log": os.environ.get("HM_LOG"),
                     "traceback": "" if isinstance(error, UserError) else traceback.format_exc()}  # fmt: skip
            note.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(note, to_json(about, indent=1))
        raise


def run_step(task: Task, settings: Settings, store: Store, stop: Callable[[], bool]) -> None:
    """`run`, without what is left behind when it fails."""
    from hm import parallel
    from hm.cell import Cell
    from hm.config import from_dict
    from hm.inputs import Inputs
    from hm.record import write_record

    inputs = Inputs()
    cell = Cell(settings, store, inputs=inputs, stop=stop)
    found = cell.step_keys().get(task.kind)
    if found != task.key:
        raise UserError(
            f"{cell.name}: on {socket.gethostname()} the key of {task.kind} is {found}, and it was planned as {task.key}; "
            "teacher, text, package versions and code must be the same there as where the sweep was started."
        )
    cell.run_step(task.kind)

    def record() -> None:
        for values in task.records:
            other = Cell(from_dict(values), store, inputs=inputs, stop=stop)
            if other.done() is None:
                write_record(other)

    parallel.on_main(record)


def failure_path(root: Path, kind: str, key: str) -> Path:
    return root / "artifacts" / kind / f".{key}.failed"


def read_failure(root: Path, kind: str, key: str) -> dict[str, Any] | None:
    """The note that the last attempt at a step left if it failed: error, host, time, log, traceback."""
    try:
        return json.loads(failure_path(root, kind, key).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def one_line(error: BaseException) -> str:
    """A UserError as it is; any other with its type and its first line."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# --- as a SLURM job


def run_in_job(values: dict[str, Any]) -> None:
    """What submitit starts: the step, and `scontrol requeue` where it was asked to stop for a while.

    With several tasks all of them run the step (PyTorch's distributed environment is set up), and the first requeues.
    """
    import submitit

    env = submitit.JobEnvironment()
    task = Task(**values)
    if env.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        if env.num_nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # a node's name need not be that of its host
    os.environ |= {"HM_LOG": str(env.paths.stdout), "HM_COMMAND": task.command}

    from hm.errors import Interrupted

    with StopRequest(task.grace, leave) as stop:
        try:
            run(task, stop)
        except Interrupted as saved:
            print(saved, file=sys.stderr, flush=True)
            leave(stop.status)


def leave(status: int) -> NoReturn:
    """End this process at once (past submitit, which would record a result); in a SLURM job, `REQUEUE` starts it again."""
    if status == REQUEUE and "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_PROCID", "0") == "0":
        requeue()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def requeue() -> None:
    """Ask SLURM to start this job again. It may be about to do so by itself (preemption), and then refuses."""
    from hm.claim import slurm_job

    job = slurm_job()
    assert job is not None
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    print(f"requeue of job {job}: {done.stderr.strip() or 'accepted'}", file=sys.stderr, flush=True)


def to_task(step: Any, store: Path, command: str, grace: float = 30.0) -> Task:
    return Task(step.kind, step.key, step.settings, step.records, str(store), command, grace)
