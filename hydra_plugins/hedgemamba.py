"""The launcher of `python sweep.py -m ...`: every cell is checked before the first one runs, and the table comes last.

It lies here because Hydra looks for launchers in the package `hydra_plugins` and nowhere else.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from hm.errors import UserError


class LocalLauncher(BasicLauncher):
    """Runs the cells one after the other in this process."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Check all cells, run them, name those that failed, print the table. Leaves with status 2 on a wrong
        setting and 1 if a cell failed."""
        from hm.cell import check
        from sweep import quiet, settings_of

        quiet()
        assert self.hydra_context is not None
        assert self.config is not None
        studies: dict[str, None] = {}
        for overrides in job_overrides:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            OmegaConf.set_readonly(config.hydra, False)
            try:
                studies[check(settings_of(config, list(overrides))).study] = None
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
        returns: list[JobReturn] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            returns += super().launch([overrides], number)
            if returns[-1].status is JobStatus.FAILED:
                show_failure(returns[-1])
        self.print_tables(list(studies))
        failed = [" ".join(r.overrides or []) for r in returns if r.status is JobStatus.FAILED]
        if failed:
            print(f"{len(failed)} of {len(returns)} cells failed: {'; '.join(failed)}", file=sys.stderr)
            sys.exit(1)
        return returns

    def print_tables(self, studies: list[str]) -> None:
        from analysis.make_tables import print_table
        from sweep import store_folder

        assert self.config is not None
        runs = store_folder(self.config.runs)
        for study in studies:
            if any((Path(runs) / study).glob("*/record.json")):
                print()
                print_table(runs, study)


def show_failure(job: JobReturn) -> None:
    """The exception of a failed cell: one sentence for a wrong input, the traceback for all else."""
    error = job._return_value
    print(f"\nfailed: {' '.join(job.overrides or [])}", file=sys.stderr)
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
