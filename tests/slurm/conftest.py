"""A throw-away SLURM cluster for the tests that need one, and a small study to run on it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TESTCLUSTER = ROOT / "slurm" / "testcluster"
ON_CPUS = ["hydra/launcher=slurm", "hydra.launcher.cpus=1", "hydra.launcher.time=5m", "hydra.launcher.poll=0.5", "hydra.launcher.save_before=60"]


def free_port():
    """A port below those that the kernel hands out, with room for the nodes' ports after it."""
    for port in range(16800 + os.getpid() % 500 * 10, 28000, 10):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM of two virtual nodes: its folder; SLURM_CONF is set while the tests run."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if not all(shutil.which(program, path=path) for program in ("slurmctld", "slurmd", "munged", "sbatch")):
        why = "SLURM is not installed (Debian: slurmctld slurmd slurm-client munge)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    folder = tmp_path_factory.mktemp("cluster")
    environment = os.environ | {"PORT": str(free_port()), "CPUS": "4"}
    subprocess.run([TESTCLUSTER / "up", folder], env=environment, check=True, timeout=60)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([TESTCLUSTER / "down", folder], check=True, timeout=120)
    os.environ.pop("SLURM_CONF")
    if before is not None:
        os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="session")
def small(tmp_path_factory, make_teacher, byte_tokenizer):
    """The arguments that make a step take a moment: a small teacher of bytes, small texts."""
    folder = tmp_path_factory.mktemp("small")
    make_teacher("neox", vocab_size=257).save_pretrained(folder / "teacher")
    byte_tokenizer.save_pretrained(folder / "teacher")
    for name, start, count in (("train", 0, 80), ("validation", 100, 10)):
        lines = [f"{n}: the {['cat', 'dog', 'owl', 'fox', 'hen'][n % 5]} sees {n * n} birds." for n in range(start, start + count)]
        (folder / f"{name}.txt").write_text("\n\n\n".join(lines))
    return [
        f"teacher={folder}/teacher", f"data={folder}/train.txt", f"validation={folder}/validation.txt", "seq_len=16",
        "stage1.batch_size=1", "stage2.batch_size=1", "eval.sequences=4", "eval.batch_size=4", "device=cpu", "log_every=1",
    ]  # fmt: skip


def ctrl_c_counts():
    """A shell has what it puts into the background ignore Ctrl-C, and the tests may have been put there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Sweep:
    """`python sweep.py -m ...` in a process of its own, as from a shell."""

    def __init__(self, runs, *arguments):
        command = [sys.executable, str(ROOT / "sweep.py"), "-m", *arguments, f"runs={runs}"]
        self.runs = runs
        self.log = runs.parent / f"{runs.name}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=runs.parent, env=environment, preexec_fn=ctrl_c_counts)

    def wait(self, seconds=300):
        """(status, all that it said)."""
        try:
            return self.process.wait(seconds), self.log.read_text()
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the sweep did not end within {seconds} s:\n{self.log.read_text()}")

    def ends_with(self, wanted):
        """What it said, once it has ended with the status `wanted`."""
        status, said = self.wait()
        assert status == wanted, said
        return said


@pytest.fixture
def start_sweep(tmp_path):
    """start_sweep("seed=0,1", runs="runs"): started, and ended with the test."""
    started = []

    def start(*arguments, runs="runs"):
        started.append(Sweep(tmp_path / runs, *arguments))
        return started[-1]

    yield start
    for sweep in started:
        if sweep.process.poll() is None:
            sweep.process.kill()
        sweep.process.wait()
        with contextlib.suppress(FileNotFoundError):
            jobs = json.loads((sweep.runs / "jobs.json").read_text())
            subprocess.run(["scancel", *(entry["job"] for entry in jobs.values())], capture_output=True, timeout=60)


def records(runs):
    """What cells gave, by name, apart from times and provenance."""
    found = {}
    for path in sorted(runs.glob("*/*/record.json")):
        record = json.loads(path.read_text())
        found[record["study"], record["cell"], record["key"]] = {
            k: v for k, v in record.items() if k not in ("timing", "provenance", "peak_memory")
        } | {"log": (path.parent / "metrics.jsonl").read_text(), "artifacts": record["provenance"]["artifacts"]}
    return found


def wait_until(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.1)
    return found
