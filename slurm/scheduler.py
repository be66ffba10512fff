"""The cluster's side: what squeue, sbatch, scontrol and scancel say, in a form that the rest can use.

sacct is not needed: what became of a step is told by its artifact, its note of failure, and whether its job is still
in the queue.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hm.errors import UserError

TIMEOUT = 60
"""Seconds that a command may take: squeue gives up by itself after about 10 while the controller is away."""
_COLUMNS = {"JobArrayID": 40, "Name": 80, "State": 20, "RestartCnt": 8, "TimeLeft": 20, "NodeList": 80, "Reason": 80}
ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
         "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip


class Unreachable(Exception):
    """The controller does not answer now; jobs go on without it."""


@dataclass(frozen=True)
class Job:
    """One job or array element as the queue shows it."""

    id: str
    name: str
    state: str
    requeues: int
    time_left: str
    node: str
    reason: str

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def job_of(entry: dict | None, queue: Mapping[str, Job] | None) -> Job | None:
    """The job of an entry of jobs.json; one of another name that got the same id (of another cluster, say) is not it."""
    found = queue.get(entry["job"]) if entry and queue is not None else None
    return found if found and entry and found.name == entry["name"] else None


def installed() -> bool:
    return all(shutil.which(program) for program in ("sbatch", "squeue", "scancel", "scontrol"))


def jobs() -> dict[str, Job]:
    """The user's jobs by id (`123`, `123_4`), with those that ended within the last minutes (MinJobAge).

    Raises Unreachable if the controller doesn't answer.
    """
    form = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    found = {}
    for line in _run(["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", f"--Format={form}"]).splitlines():
        cells, start = [], 0
        for width in _COLUMNS.values():
            cells.append(line[start : start + width].strip())
            start += width
        found[cells[0]] = Job(cells[0], cells[1], cells[2], int(cells[3] or 0), *cells[4:])
    return found


def cancel(ids: Iterable[str]) -> None:
    wanted = sorted(set(ids))
    if wanted:
        _run(["scancel", *wanted])


def refusal(options: Sequence[str]) -> str | None:
    """Why sbatch would refuse a job with these options; None if it would take it. Nothing is queued.

    Raises Unreachable if the controller doesn't answer.
    """
    done = _call(["sbatch", "--test-only", *options, "--wrap=true"])
    if done.returncode == 0 or "Requested nodes are busy" in done.stderr:  # a job would wait for them
        return None
    lines = [re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", line) for line in done.stderr.splitlines() if line.strip()]
    if silent := [line for line in lines if re.search(r"[Uu]nable to contact|timed out|Connection refused|Zero Bytes|configuration source", line)]:
        raise Unreachable(silent[0])
    return "; ".join(dict.fromkeys(lines)) or f"sbatch --test-only ended with status {done.returncode}"


def node_hosts(partition: str | None) -> set[str]:
    """The host names of a partition's nodes, short."""
    chosen = [f"--partition={partition}"] if partition else []
    return {name.split(".")[0] for name in _run(["sinfo", "--noheader", "--Node", "--format=%n", *chosen]).split()}


def max_array_size() -> int:
    """How many elements an array may have."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]), re.M)
    return int(match[1]) if match else 1001


def _run(command: list[str]) -> str:
    done = _call(command)
    if done.returncode:
        raise Unreachable(next(iter(done.stderr.strip().splitlines()), "") or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise UserError(f"hydra/launcher=slurm needs {command[0]}, which is not on this machine's PATH; start the sweep on a login node "
                        "of the cluster, or leave hydra/launcher out.") from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} did not answer within {TIMEOUT} s") from None
