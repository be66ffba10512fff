"""A plan as SLURM jobs, submitted with submitit: a job per step, arrays where steps are alike, each after what it needs.

Which job computes which step stands in `<runs>/jobs.json`, and submissions come one after the other, so a step that
another sweep has queued is waited for and not queued again. Claims (hm.claim) see to the rest.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hm.claim import Claimant
from hm.errors import UserError
from hm.files import atomic_write, to_json
from hm.store import Store
from slurm import scheduler
from slurm.job import failure_path, run_in_job, to_task
from slurm.plan import Plan, Step, span

ROOT = Path(__file__).parent.parent
JOBS = "jobs.json"
_LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs"}


@dataclass
class Resources:
    """What a job of one kind of step asks for."""

    partition: str | None = None
    time: str | int | None = None
    gpus: int = 0
    nodes: int = 1
    cpus: int = 4
    mem: float | None = None


@dataclass
class SlurmSettings:
    """sweeps/hydra/launcher/slurm.yaml says what each means; the scale's `resources` stand in for what is null."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | int | None = None
    nodes: int | None = None
    gpus: int | None = None
    gpu_type: str | None = None
    cpus: int = 8
    mem: float | None = None
    cpu: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    save_before: int = 120
    array_parallelism: int = 64
    poll: float = 5.0
    wait: bool = True
    check_store: bool = True

    def __post_init__(self) -> None:
        if unknown := set(self.cpu) - {"partition", "time", "cpus", "mem"}:
            raise UserError(f"hydra.launcher.cpu.{sorted(unknown)[0]} is not known; it takes partition, time, cpus and mem.")

    def gpus_of(self, resources: dict[str, Any]) -> int:
        """GPUs per node of a training step at a scale."""
        return int(resources.get("gpus", 0) if self.gpus is None else self.gpus)

    def of(self, step: Step) -> Resources:
        """What a step's job asks for: tokens take no GPU, an evaluation one, training what the scale says."""
        gpus, scale = (self.gpus_of(step.resources) if step.device == "cuda" else 0), step.resources
        if step.kind == "tokens" or gpus == 0:
            plain = Resources(self.partition, self.time or scale.get("time"), cpus=self.cpus, mem=self.mem)
            return replace(plain, **{k: v for k, v in self.cpu.items() if v is not None})
        nodes = int(scale.get("nodes", 1) if self.nodes is None else self.nodes)
        if step.kind == "eval":
            gpus, nodes = 1, 1
        return Resources(self.partition, self.time or scale.get("time"), gpus, nodes, self.cpus, self.mem)

    def parameters(self, r: Resources) -> dict[str, Any]:
        """For submitit's SlurmExecutor: a task per GPU."""
        tasks = max(1, r.gpus)
        shown: dict[str, Any] = {
            "partition": r.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint,
            "time": minutes(r.time), "nodes": r.nodes, "ntasks_per_node": tasks, "cpus_per_task": r.cpus,
            "mem": f"{int(r.mem * 1024)}M" if r.mem else None,
        }  # fmt: skip
        if r.gpus:
            shown["gres" if self.gpu_type else "gpus_per_node"] = f"gpu:{self.gpu_type}:{r.gpus}" if self.gpu_type else r.gpus
        return {k: v for k, v in shown.items() if v is not None}


def minutes(value: str | int | None) -> int:
    """24h, 90m, 90 (minutes), 1-12:00:00, 2:30:00 as whole minutes, at least 1.

    Raises:
        UserError: it is none of these.
    """
    text = str(value).strip().lower()
    if match := re.fullmatch(r"(\d+)\s*([dhm]?)", text):
        found = int(match[1]) * {"d": 1440, "h": 60, "m": 1, "": 1}[match[2]]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text):
        days, hours, mins, seconds = (int(v or 0) for v in match.groups())
        found = 1440 * days + 60 * hours + mins + (seconds > 0)
    else:
        found = 0
    if found < 1:
        raise UserError(f"hydra.launcher.time={value} is no time limit; write it like 24h, 90m or 1-12:00:00.")
    return found


# --- before anything is queued


def check(plan: Plan, settings: SlurmSettings, store: Store) -> None:
    """Refuse what the cluster would refuse, a store that its nodes can't see, and a time limit that lets no step progress.

    Raises:
        UserError: one sentence; nothing was queued.
    """
    if not scheduler.installed():
        raise UserError("hydra/launcher=slurm, but sbatch is not on this machine's PATH; start the sweep on a login node of the cluster, "
                        "or leave hydra/launcher out to run it here.")  # fmt: skip
    todo = plan.to_do()
    for step in todo:
        limit, every = 60 * minutes(settings.of(step).time), checkpoint_seconds(step, settings)
        if settings.save_before >= limit:
            raise UserError(f"hydra.launcher.time={settings.of(step).time} is not longer than hydra.launcher.save_before="
                            f"{settings.save_before} s, when a step is asked to save; raise the one or lower the other.")  # fmt: skip
        if every > limit - settings.save_before:
            raise UserError(f"hydra.launcher.time={settings.of(step).time} is shorter than the {span(every / 3600)} or so between two "
                            f"checkpoints of {step.label}; raise it, or lower checkpoint_every="
                            f"{step.settings['checkpoint_every']}.")  # fmt: skip
    try:
        shapes: dict[str, Step] = {}
        for step in todo:
            shapes.setdefault(json.dumps(settings.parameters(settings.of(step)), sort_keys=True), step)
        for step in shapes.values():
            options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.parameters(settings.of(step)).items()]
            options += [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in settings.extra.items()]
            if why := scheduler.refusal(options):
                raise UserError(f"SLURM refuses a job for {step.kind} ({why}); it was asked for with {' '.join(options)}: change "
                                "hydra.launcher. (slurm/README.md).")  # fmt: skip
        if settings.check_store:
            for partition in dict.fromkeys(settings.of(step).partition for step in todo):
                why_unseen(store.root, scheduler.node_hosts(partition))
    except scheduler.Unreachable as error:
        raise UserError(f"SLURM's controller does not answer ({error}); nothing was queued, so run it again when it does.") from error


def checkpoint_seconds(step: Step, settings: SlurmSettings) -> float:
    """About how long a step trains between two checkpoints."""
    r = settings.of(step)
    if not step.steps:
        return 0.0
    return 3600 * step.hours / step.steps * min(step.settings["checkpoint_every"], step.steps) / max(1, r.gpus * r.nodes)


def why_unseen(root: Path, hosts: set[str]) -> None:
    """Refuse a store on a file system of this machine alone if the cluster has nodes on others."""
    others = sorted(hosts - {socket.gethostname().split(".")[0]})
    kind = file_system(root)
    if others and kind in _LOCAL_FILE_SYSTEMS:
        raise UserError(f"runs={root} lies on a file system of this machine ({kind}), which the cluster's nodes such as {others[0]} can't "
                        "see; choose a folder that all of them share, or set hydra.launcher.check_store=false if they do.")  # fmt: skip


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`."""
    best, found = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4]
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, found = mount, after.split()[0]
    return found


# --- submission


@dataclass(frozen=True)
class Queued:
    """Where a step waits or runs: its job (an element `index` of the array `job`, or a job of its own)."""

    job: str
    index: int | None = None

    @property
    def id(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def read_jobs(root: Path) -> dict[str, dict[str, Any]]:
    """jobs.json: the last job of each step, as {"<kind>/<key>": {"job", "name", "log", "time"}}."""
    try:
        return json.loads((root / JOBS).read_text())
    except FileNotFoundError:
        return {}


def submit(plan: Plan, settings: SlurmSettings, store: Store, command: str) -> dict[str, str]:
    """Queue what is neither done nor queued; the ids of the jobs by step. If one is refused, those before it are cancelled.

    Raises:
        UserError: SLURM refuses a job or does not answer; nothing of this call is left in the queue.
    """
    mine: list[Queued] = []
    with one_at_a_time(store):
        known = read_jobs(store.root)
        before = dict(known)
        try:
            queue = scheduler.jobs()
            placed = {i: Queued(found.id) for i in plan.steps if (found := scheduler.job_of(known.get(i), queue)) and found.alive}
            todo = [s for s in plan.to_do() if s.id not in placed and not store.has(s.kind, s.key)]
            most = scheduler.max_array_size()
            folder = store.root / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            for kind in dict.fromkeys(s.kind for s in todo):
                for steps, dependency in groups([s for s in todo if s.kind == kind], placed, settings, most):
                    name = f"{steps[0].cells[0].partition('/')[0]}-{kind}"
                    queued, log = sbatch(name, steps, dependency, settings, folder, store, command)
                    mine += queued
                    for step, job in zip(steps, queued, strict=True):
                        placed[step.id] = job
                        known[step.id] = {"job": job.id, "name": name, "log": log.format(job.id), "time": time.time()}
                        failure_path(store.root, step.kind, step.key).unlink(missing_ok=True)
                    atomic_write(store.root / JOBS, to_json(known))
        except (UserError, scheduler.Unreachable, KeyboardInterrupt) as error:
            scheduler.cancel(q.job for q in mine)
            if mine:
                atomic_write(store.root / JOBS, to_json(before))
            if isinstance(error, scheduler.Unreachable):
                raise UserError(f"SLURM does not answer ({error}); nothing was left in the queue, so run it again when it does.") from error
            raise
    return {i: q.id for i, q in placed.items()}


@contextmanager
def one_at_a_time(store: Store) -> Iterator[None]:
    """Sweeps that share a store submit one after the other."""
    claimant = Claimant(store.root / ".submission.claim", store.heartbeat, store.stale_after)
    while (claim := claimant.attempt()) is None:
        time.sleep(store.poll)
    with claim:
        yield


def groups(steps: list[Step], placed: dict[str, Queued], settings: SlurmSettings, most: int) -> Iterator[tuple[list[Step], str | None]]:
    """Steps of one kind as (those of one job or array, its dependency).

    Alike are steps with the same resources that wait for the same job, or each for the element of one array with its
    own index (`aftercorr`), so that one that fails stops only what needs it.
    """
    alike: dict[tuple, list[Step]] = {}
    ranks: dict[str | None, int] = {}
    for step in steps:
        parent = placed.get(step.parent or "")
        rank = 0
        if parent and parent.index is not None:  # the n-th of those that wait for the same element
            rank = ranks[step.parent] = ranks.get(step.parent, -1) + 1
        shape = json.dumps(settings.parameters(settings.of(step)), sort_keys=True)
        alike.setdefault((shape, parent.job if parent else None, parent and parent.index is not None, rank), []).append(step)
    for (_, job, paired, _), members in alike.items():
        if not paired:
            for start in range(0, len(members), most):
                yield members[start : start + most], f"afterok:{job}" if job else None
            continue
        by_index = {placed[s.parent or ""].index: s for s in members}
        size = sum(q.job == job for q in placed.values())
        if len(members) > 1 and set(by_index) == set(range(size)):
            yield [by_index[i] for i in range(size)], f"aftercorr:{job}"
        else:
            for index, step in by_index.items():
                yield [step], f"afterok:{job}_{index}"


def sbatch(name: str, steps: list[Step], dependency: str | None, settings: SlurmSettings, folder: Path, store: Store,
           command: str) -> tuple[list[Queued], str]:  # fmt: skip
    """Queue steps as one job or one array; (their places, the path of their logs with {} for the job's id)."""
    import submitit

    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    executor = submitit.SlurmExecutor(folder=folder, python=shlex.join([sys.executable, "-IS", str(ROOT / "slurm" / "shield.py")]))
    extra = {"requeue": True, **{k.replace("-", "_"): v for k, v in settings.extra.items()}}
    extra |= {"kill_on_invalid_dep": "yes"} if dependency else {}
    executor.update_parameters(
        **settings.parameters(settings.of(steps[0])), job_name=name, dependency=dependency, wckey=None,
        signal_delay_s=settings.save_before, stderr_to_stdout=True, array_parallelism=settings.array_parallelism,
        setup=[f"export PYTHONPATH={paths!r}", *settings.setup], additional_parameters=extra,
    )  # fmt: skip
    grace = max(5.0, settings.save_before - 15.0)
    values = [asdict(to_task(step, store.root, command, grace)) for step in steps]
    try:
        if len(values) == 1:
            job = executor.submit(run_in_job, values[0])
            queued = [Queued(job.job_id)]
        else:
            queued = [Queued(*_split(job.job_id)) for job in executor.map_array(run_in_job, values)]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"sbatch refused the jobs for {steps[0].kind} ({said[-300:]}); nothing was left in the queue.") from error
    return queued, str(folder / "{}_0_log.out")


def _split(job_id: str) -> tuple[str, int]:
    array, _, index = job_id.partition("_")
    return array, int(index)


def say_left(jobs: dict[str, str]) -> None:
    """What goes on where the command that queued it was left, and how to end that."""
    try:
        queue = scheduler.jobs()
    except scheduler.Unreachable:
        queue = {}
    alive = sorted({i for i in jobs.values() if i in queue and queue[i].alive})
    if alive:
        print(f"{len(alive)} jobs go on; the same command waits for them again, `python -m slurm.status` shows them, and this ends them:\n"
              f"scancel {' '.join(alive)}", file=sys.stderr, flush=True)  # fmt: skip


def say_waiting(jobs: int) -> None:
    print(f"{jobs} jobs are queued or running; `python -m slurm.status` shows them, and leaving this command ends none of them",
          file=sys.stderr, flush=True)  # fmt: skip
