"""A study whose processes are killed at twenty random moments ends with the records of one that was left alone."""

import os
import random
import signal
import time

from tests.slurm.conftest import records

STUDY = ["stage1_tokens=0,320", "budget=1280", "mixer=hedgehog,ssm,hedgemamba", "checkpoint_every=10", "hydra.launcher.jobs=2"]
KILLS = 20


def family(pid):
    """The process and all below it, from /proc."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def test_a_study_killed_at_twenty_random_moments_ends_with_the_same_records(start_sweep, small, tmp_path):
    left_alone = start_sweep(*STUDY, *small, runs="left_alone")
    status, said = left_alone.wait(300)
    assert status == 0, said

    chance, kills, rounds = random.Random(20261125), 0, 0
    sweep = start_sweep(*STUDY, *small, runs="killed")
    while kills < KILLS:
        deadline = time.monotonic() + chance.uniform(0.3, 2.5)
        while time.monotonic() < deadline and sweep.process.poll() is None:
            time.sleep(0.02)
        if sweep.process.poll() is not None:
            rounds += 1
            sweep = start_sweep(*STUDY, *small, runs="killed")
            continue
        victim = chance.choice(family(sweep.process.pid))
        try:
            os.kill(victim, signal.SIGKILL)
            kills += 1
        except ProcessLookupError:
            continue
    status, said = sweep.wait(300)
    if status != 0:
        status, said = start_sweep(*STUDY, *small, runs="killed").wait(300)
    assert status == 0, said
    expected, found = records(tmp_path / "left_alone"), records(tmp_path / "killed")
    assert len(expected) == 6
    assert rounds > 2, "the sweep itself was ended by kills"
    assert found == expected
    assert not list((tmp_path / "killed").glob("artifacts/*/.*")), "no claim, work folder or note of failure is left"
