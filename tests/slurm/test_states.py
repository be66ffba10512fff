"""What a step's job in the queue says of it, where the queue says something unusual."""

from types import SimpleNamespace

import pytest

from slurm.scheduler import Job
from slurm.states import look

ENTRY = {"job": "12", "name": "hm-student", "log": "/nowhere/12_log.out"}


def state(root, job_state, reason):
    step = SimpleNamespace(kind="student", key="k1", parent=None, steps=4)
    queue = {"12": Job("12", "hm-student", job_state, 1, "1:00", "n1", reason)}
    (found,) = look({"student/k1": step}, root, {"student/k1": ENTRY}, queue).values()
    return found


@pytest.mark.parametrize("reason", ["launch failed requeued held", "JobHeldAdmin"])
def test_a_job_that_slurm_holds_is_no_reason_to_wait_for_ever(tmp_path, reason):
    found = state(tmp_path, "PENDING", reason)
    assert found.name == "failed"
    assert f"SLURM holds its job 12 ({reason}); `scontrol release 12`" in found.why


@pytest.mark.parametrize(("reason", "name"), [("JobHeldUser", "queued"), ("Resources", "queued"), ("Dependency", "waiting")])
def test_a_job_that_waits_is_waited_for(tmp_path, reason, name):
    assert state(tmp_path, "PENDING", reason).name == name


def test_a_job_that_ended_without_a_result_names_its_state(tmp_path):
    found = state(tmp_path, "TIMEOUT", "TimeLimit")
    assert (found.name, "its job ended as TIMEOUT (TimeLimit) on n1" in found.why) == ("failed", True)
