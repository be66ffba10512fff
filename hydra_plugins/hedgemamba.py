"""The launcher of `python sweep.py -m ...`: checks every cell before the first one runs, runs them, prints the table.

It lies here because Hydra looks for launchers in the package `hydra_plugins` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from hm.errors import UserError

MOST_JOBS = 4
"""Cells at a time on a CPU, unless hydra.launcher.jobs says otherwise: each takes about 1 GB at the tiny scale."""


class LocalLauncher(Launcher):
    """Runs cells on this machine, `jobs` at a time: by default one per GPU, or one per core up to 4.

    Cells side by side, each with its share of the cores, use a CPU better than one cell with all of them. What two
    cells share is computed by the one that claims it first; the other waits (hm/store.py).
    """

    def __init__(self, jobs: int | None = None):
        self.jobs = jobs

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Check all cells, run them, name those that failed, print the tables. Leaves with status 2 on a wrong
        setting and 1 if a cell failed."""
        from hm.cell import Cell
        from hm.store import Store
        from sweep import leave, quiet, settings_of, store_folder

        quiet()
        runs = store_folder(self.config.runs)
        cells: list[tuple[str, str, bool, dict]] = []
        for overrides in job_overrides:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            OmegaConf.set_readonly(config.hydra, False)
            try:
                settings = settings_of(config, list(overrides))
                cell = Cell(settings, Store(runs))
                done = cell.done() is not None
            except UserError as error:
                leave(error)
            cells.append((f"{cell.s.study}/{cell.name} ({' '.join(overrides)})", cell.s.study, done, dataclasses.asdict(settings)))
        missing = {name: values for name, _, done, values in cells if not done}
        failed = self.run(missing, runs) if missing else {}
        for study in dict.fromkeys(study for _, study, *_ in cells):
            print_tables(runs, study)
        for name, why in failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        if failed:
            print(f"{len(failed)} of {len(cells)} cells failed; the same command runs what is missing", file=sys.stderr)
            sys.exit(1)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED) for o in job_overrides]

    def run(self, cells: dict[str, dict], runs: str) -> dict[str, str]:
        """Run all cells; returns the names of those that failed, each with its error in one line."""
        import torch

        gpus = torch.cuda.device_count()
        cores = len(os.sched_getaffinity(0))
        jobs = min(self.jobs or gpus or min(cores, MOST_JOBS), len(cells))
        context = multiprocessing.get_context("spawn")
        slots = context.Queue()
        for slot in range(jobs):
            slots.put(slot)
        failed = {}
        threads = min(max(1, cores // jobs), int(os.environ.get("OMP_NUM_THREADS") or cores))
        with ProcessPoolExecutor(jobs, context, prepare, (slots, threads, gpus)) as pool:
            futures = {name: pool.submit(work, values, runs) for name, values in cells.items()}
            for name, future in futures.items():
                try:
                    error = future.result()
                except Exception as broken:  # the process itself died: out of memory, killed
                    error = f"its process died ({type(broken).__name__}: {broken})"
                if error is not None:
                    failed[name] = error
        return failed


def prepare(slots: Any, threads: int, gpus: int) -> None:
    """Give this worker process its share of the machine and its line for progress bars."""
    slot = slots.get()
    os.environ["HM_BAR"] = str(slot)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    import torch

    from sweep import quiet

    torch.set_num_threads(threads)
    quiet()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """End this worker when the sweep that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def work(values: dict, runs: str) -> str | None:
    """Run one cell; returns what went wrong in one line, or None. A traceback goes to standard error."""
    from hm.cell import Cell
    from hm.config import from_dict
    from hm.store import Store
    from sweep import summary

    try:
        tqdm.write(summary(Cell(from_dict(values), Store(runs)).run()))
    except UserError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def print_tables(runs: str, study: str) -> None:
    from analysis.make_tables import print_table

    if any((Path(runs) / study).glob("*/record.json")):
        print()
        print_table(runs, study)
