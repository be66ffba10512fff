"""A plan on this machine: a process per step, as many at a time as there are devices."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from hm.errors import UserError
from hm.store import Store
from slurm.job import REQUEUE, STOPPED, StopRequest, Task, one_line, read_failure, run, to_task
from slurm.plan import KINDS, Plan, Step

MOST_JOBS = 4
"""Steps at a time on a CPU, unless told otherwise: each takes about 1 GB at the tiny scale."""
ROOT = Path(__file__).parent.parent


class Outcome:
    """What became of the steps: `failed` and `blocked` map a step's id to the reason."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.blocked: dict[str, str] = {}

    def of(self, step: Step) -> str | None:
        return self.failed.get(step.id) or self.blocked.get(step.id)


def run_here(plan: Plan, store: Store, command: str) -> Outcome:
    """All steps one after the other in this process, as for a debugger."""
    outcome = Outcome()
    for step in plan.to_do():
        if step.parent and (outcome.failed.get(step.parent) or outcome.blocked.get(step.parent)):
            outcome.blocked[step.id] = step.parent
            continue
        try:
            run(to_task(step, store.root, command), lambda: False)
        except UserError as error:
            outcome.failed[step.id] = str(error)
        except Exception as error:
            traceback.print_exc()
            outcome.failed[step.id] = one_line(error)
    return outcome


def run_in_processes(plan: Plan, store: Store, command: str, jobs: int | None) -> Outcome:
    """Each step in a process of its own, once what it needs is there; `jobs` at a time (None: one per GPU, or one per
    core up to 4). A fork server has the libraries loaded, so that a process starts in a moment.

    At TERM, HUP or Ctrl-C all steps are asked to save their state, and KeyboardInterrupt is raised once they have.
    """
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    todo = plan.to_do()
    slots = min(jobs or gpus or min(cores, MOST_JOBS), len(todo))
    threads = min(max(1, cores // slots), int(os.environ.get("OMP_NUM_THREADS") or cores))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the fork server when it loads PyTorch
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hm.cell", "hm.record", "slurm.local", "__main__"])

    outcome, waiting = Outcome(), {s.id: s for s in todo}
    free = list(range(slots))
    running: dict[Any, tuple[Any, Step, int]] = {}  # by what tells that the process has ended
    previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or running:
            for step in list(waiting.values()):
                if step.parent in outcome.failed or step.parent in outcome.blocked:
                    outcome.blocked[step.id] = step.parent
                    del waiting[step.id]
            ready = [s for s in waiting.values() if s.parent not in waiting and all(s.parent != r.id for _, r, _ in running.values())]
            ready.sort(key=lambda s: KINDS.index(s.kind), reverse=True)  # what completes a cell comes first
            for step in ready[: len(free)]:
                slot = free.pop(0)
                task = to_task(step, store.root, command)
                process = context.Process(target=work, args=(task, slot, threads, gpus))
                process.start()
                running[process.sentinel] = (process, waiting.pop(step.id), slot)
            for sentinel in wait(list(running)) if running else []:
                process, step, slot = running.pop(sentinel)
                process.join()
                free.append(slot)
                if process.exitcode == REQUEUE:
                    waiting[step.id] = step
                elif process.exitcode != 0:
                    outcome.failed[step.id] = why(store, step, process.exitcode)
    except KeyboardInterrupt:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return outcome


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def why(store: Store, step: Step, exitcode: int) -> str:
    """Why a step's process ended without its artifact."""
    if exitcode == STOPPED:
        return "it was asked to stop and saved its state"
    if exitcode < 0:
        return f"its process died (killed by signal {-exitcode}: out of memory, or by hand)"
    note = read_failure(store.root, step.kind, step.key)
    return note["error"] if note else f"its process ended with status {exitcode}"


def work(task: Task, slot: int, threads: int, gpus: int) -> None:
    """The process of one step: its share of the machine, its line for a progress bar, its end with the sweep."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep asks for a stop itself
    os.environ |= {"HM_BAR": str(slot), "HM_COMMAND": task.command}
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    import torch

    from hm.train import Interrupted

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    with StopRequest(task.grace, os._exit) as stop:
        try:
            run(task, stop)
        except Interrupted:
            sys.exit(stop.status)
        except UserError:
            sys.exit(1)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def _end_with_sweep() -> None:
    """End this process when the sweep that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
