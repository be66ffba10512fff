"""The launchers of `python sweep.py -m ...`: every cell is checked and planned before the first step runs, then the plan
is carried out, and the tables are printed.

They lie here because Hydra looks for launchers and sweepers in the package `hydra_plugins` and nowhere else.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from hm.errors import UserError

if TYPE_CHECKING:
    import torch

    from hm.cell import Cell
    from hm.config import Settings
    from hm.inputs import Inputs
    from slurm.local import Outcome
    from slurm.plan import Plan

MOST_LINES = 40
"""Of the plan, where the sweep is then run."""


class CellSweeper(BasicSweeper):
    """Hydra's own sweeper, but for composing every cell once only to see whether that works: the launchers look closer."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass


class Composer:
    """The settings of many cells. Hydra composes once for each choice of files (scale, study), not for each cell."""

    def __init__(self, loader: Any, config: DictConfig):
        self.loader, self.config = loader, config
        self.composed: dict[tuple[str, ...], dict] = {}
        self.parsed: dict[str, tuple[str, Any] | None] = {}

    def parse(self, override: str) -> tuple[str, Any] | None:
        """(name, value) of a plain setting; None for what changes which files are composed."""
        if override not in self.parsed:
            one = OverridesParser.create(config_loader=self.loader).parse_override(override)
            plain = one.type.name == "CHANGE" and not self.loader.repository.group_exists(one.key_or_group)
            plain = plain and not one.key_or_group.startswith("hydra.")
            self.parsed[override] = (one.key_or_group, one.value()) if plain else None
        return self.parsed[override]

    def plain(self, overrides: Sequence[str]) -> dict[str, Any]:
        """What one cell's settings say, as nested plain data."""
        from sweep import plain_of

        structural = tuple(o for o in overrides if self.parse(o) is None)
        if structural not in self.composed:
            config = self.loader.load_sweep_config(self.config, list(structural))
            OmegaConf.set_readonly(config.hydra, False)
            self.composed[structural] = plain_of(config, resolve=False)
        values = json.loads(json.dumps(self.composed[structural]))
        for found in map(self.parse, overrides):
            if found is not None:
                *groups, leaf = found[0].split(".")
                inside = values
                for group in groups:
                    inside = inside.setdefault(group, {})
                inside[leaf] = found[1]
        if "${" in str(values):
            values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)  # type: ignore[assignment]
        return values


class PlanLauncher(Launcher):
    """What all launchers of plans share; a subclass says where cells run and carries out a plan."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def placed(self, settings: Settings, resources: dict) -> tuple[Settings, torch.device | None]:
        """The settings as they hold where the cell will run, and its device if that is another machine."""
        return settings, None

    def check(self, plan: Plan, cells: dict[str, Cell]) -> None:
        """Refuse what could not be carried out; nothing is kept of a plan that was refused."""

    def carry_out(self, plan: Plan, cells: dict[str, Cell], command: str) -> Outcome:
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Plan all cells, carry the plan out, print the tables, name the cells that failed. Leaves with status 2 on a
        wrong setting, 1 if a cell failed, 130 if it was interrupted."""
        from hm.progress import quiet

        quiet()
        from hm.inputs import Inputs
        from hm.provenance import command_line
        from hm.tasks import ask_hub
        from slurm.offline import OfflineInputs
        from slurm.plan import describe, make_plan
        from sweep import leave

        try:
            only_plan = bool(self.config.plan)
            planned = list(self.cells(job_overrides, OfflineInputs() if only_plan else Inputs()))
            own_exports(planned)
            cells = {name: cell for name, cell, _ in planned}
            plan = make_plan(planned)
            print(describe(plan, None if only_plan else MOST_LINES), file=sys.stdout if only_plan else sys.stderr)
            if only_plan:
                return completed(job_overrides)
            for cell in cells.values():
                if cell.s.force:
                    cell.forget()
            if any(cell.s.force for cell in cells.values()):
                plan = make_plan(planned)
            outcome = None
            if plan.to_do():
                for cell in (cells[step.cells[0]] for step in plan.to_do() if step.kind == "eval"):
                    ask_hub(cell.s.eval)
                self.check(plan, cells)
                plan.save(next(iter(cells.values())).store, command_line())
                outcome = self.carry_out(plan, cells, command_line())
            finish(cells, plan, outcome)
        except UserError as error:
            leave(error)
        for study in dict.fromkeys(cell.s.study for cell in cells.values()):
            print_tables(str(self.store_root), study)
        if outcome is not None and report(plan, outcome):
            sys.exit(1)
        return completed(job_overrides)

    def cells(self, job_overrides: Sequence[Sequence[str]], inputs: Inputs) -> Iterator[tuple[str, Cell, dict]]:
        """(full name, cell, resources of its scale) of every cell, checked."""
        from hm.cache import use_cache
        from hm.cell import Cell
        from hm.store import Store
        from sweep import config_folders, settings_of, store_folder

        composer = Composer(self.hydra_context.config_loader, self.config)
        store = Store(store_folder(self.config.runs))
        self.store_root = store.root
        if not self.config.plan:
            use_cache(store.root)
        folders = config_folders(self.config.hydra)
        counts = Counter(o for overrides in job_overrides for o in overrides)
        for overrides in job_overrides:
            values = composer.plain(overrides)
            resources = values["resources"]
            settings, device = self.placed(settings_of(values, list(overrides), folders), resources)
            cell = Cell(settings, store, device=device, inputs=inputs)
            varied = [o for o in overrides if counts[o] < len(job_overrides) and not o.startswith("row=")]
            yield f"{cell.s.study}/{cell.name}{f' ({chr(32).join(varied)})' if varied else ''}", cell, resources


def own_exports(planned: Sequence[tuple[str, Cell, dict]]) -> None:
    """Refuse an export= that several cells would fill."""
    folders: dict[str, list[str]] = {}
    for name, cell, _ in planned:
        if cell.s.export:
            folders.setdefault(cell.s.export, []).append(name)
    for folder, names in folders.items():
        if len(names) > 1:
            raise UserError(f"export={folder} is one folder for {len(names)} cells ({names[0]}, {names[1]}{', ...' if len(names) > 2 else ''}); "
                            "leave it out, and export one of them by a command of its own once it is done.")


class LocalLauncher(PlanLauncher):
    """Runs steps on this machine, `jobs` at a time (null: one per GPU, or one per core up to 4; 0: in this process).

    Steps side by side, each with its share of the cores, use a CPU better than one step with all of them.
    """

    def __init__(self, jobs: int | None = None):
        self.jobs = jobs

    def placed(self, settings: Settings, resources: dict) -> tuple[Settings, torch.device | None]:
        import torch

        if self.config.plan and settings.device == "auto" and resources["gpus"] and not torch.cuda.is_available():
            return settings, torch.device("cuda")  # a plan made on a laptop is for the machine that the scale needs
        return settings, None

    def carry_out(self, plan: Plan, cells: dict[str, Cell], command: str) -> Outcome:
        from slurm.local import run_here, run_in_processes

        store = next(iter(cells.values())).store
        return run_here(plan, store, command) if self.jobs == 0 else run_in_processes(plan, store, command, self.jobs)


class SlurmLauncher(PlanLauncher):
    """Runs each step as a SLURM job, on GPUs where the scale says so; see sweeps/hydra/launcher/slurm.yaml."""

    def __init__(self, **settings: Any):
        from slurm.cluster import SlurmSettings

        self.slurm = SlurmSettings(**OmegaConf.to_container(OmegaConf.create(settings)))  # type: ignore[arg-type]

    def placed(self, settings: Settings, resources: dict) -> tuple[Settings, torch.device | None]:
        import torch

        if settings.device == "auto":
            settings = replace(settings, device="cuda" if self.slurm.gpus_of(resources) else "cpu")
        if settings.precision == "auto":  # said here, for the keys must not depend on which machine asks
            settings = replace(settings, precision="bf16" if settings.device == "cuda" else "fp32")
        return settings, torch.device(settings.device)

    def check(self, plan: Plan, cells: dict[str, Cell]) -> None:
        from slurm.cluster import check

        check(plan, self.slurm, next(iter(cells.values())).store)

    def carry_out(self, plan: Plan, cells: dict[str, Cell], command: str) -> Outcome:
        from slurm.cluster import say_left, say_waiting, submit
        from slurm.states import LATE
        from slurm.watch import wait

        store = next(iter(cells.values())).store
        jobs = submit(plan, self.slurm, store, command)
        say_waiting(len(jobs))
        if not self.slurm.wait:
            sys.exit(0)
        try:
            outcome = wait(plan, store, self.slurm.poll)
            if any(why.startswith(LATE) for why in outcome.failed.values()):
                jobs = submit(plan, self.slurm, store, command)
                outcome = wait(plan, store, self.slurm.poll)
            return outcome
        except KeyboardInterrupt:
            say_left(jobs)
            sys.exit(130)


def finish(cells: dict[str, Cell], plan: Plan, outcome: Outcome | None) -> None:
    """Write the records that nobody wrote of cells whose steps are all there, and say which were done before."""
    from hm.progress import say
    from hm.record import write_record
    from sweep import summary

    known = [name for name in cells if plan.steps[plan.cells[name]].done]
    for name, cell in cells.items():
        end = plan.steps[plan.cells[name]]
        if outcome is not None and outcome.of(end):
            continue
        folder = cell.store.run_path(cell.s.study, cell.name, cell.key)
        record = cell.store.read_record(folder)
        if record is None and cell.store.has(end.kind, end.key):
            record = write_record(cell)
        elif name in known and record and len(known) <= MOST_LINES:
            say(f"{cell.s.study}/{cell.name}: already done ({folder / 'record.json'}); force=true runs it again")
            continue
        if record and len(cells) <= MOST_LINES:
            print(summary(record))
    if len(known) > MOST_LINES:
        say(f"{len(known)} cells were done already; force=true runs them again")


def report(plan: Plan, outcome: Outcome) -> bool:
    """Name the steps that failed, each with the cells that it keeps from being complete; True if there are any."""
    for step in (plan.steps[i] for i in outcome.failed):
        first, *others = step.cells
        more = f" ({step.kind}, which {', '.join(others[:8])}{', ...' if len(others) > 8 else ''} need too)" if others else ""
        print(f"failed: {first}{more}: {outcome.failed[step.id]}", file=sys.stderr)
    bad = [name for name, end in plan.cells.items() if outcome.of(plan.steps[end])]
    if bad:
        print(f"{len(bad)} of {len(plan.cells)} cells failed; the same command runs what is missing", file=sys.stderr)
    return bool(bad)


def completed(job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    return [JobReturn(overrides=list(o), status=JobStatus.COMPLETED) for o in job_overrides]


def print_tables(runs: str, study: str) -> None:
    from analysis.make_tables import print_table

    if any((Path(runs) / study).glob("*/record.json")):
        print()
        print_table(runs, study)
