"""Sweeps on a real SLURM: arrays, dependencies, failure, overlap, preemption, the time limit, kills, cancelling, a restart."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from hm.cell import Cell
from hm.config import from_dict
from hm.errors import UserError
from hm.store import Store
from slurm import cluster as launcher
from slurm import scheduler
from slurm.cluster import SlurmSettings, check, submit
from slurm.plan import make_plan
from slurm.states import LATE
from tests.slurm.conftest import ON_CPUS, records, wait_until

pytestmark = pytest.mark.usefixtures("cluster")
LONG = ["stage1_tokens=0", "budget=32k", "checkpoint_every=250", *ON_CPUS]  # 2,000 steps


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def submitted(runs):
    """How many jobs or array elements were ever queued, by kind of step."""
    scripts = [path.read_text() for path in runs.glob("jobs/*/*_submission.sh")]
    count = Counter()
    for text in scripts:
        kind = re.search(r"--job-name=\S+-(\w+)", text)[1]
        array = re.search(r"--array=0-(\d+)", text)
        count[kind] += int(array[1]) + 1 if array else 1
    return count


def running(runs, kind="student"):
    """(job, claim) of the step of that kind which runs and has got somewhere; None if there is none."""
    for path in runs.glob(f"artifacts/{kind}/.*.claim"):
        claim, key = json.loads(path.read_text()), path.name.split(".")[1]
        work = path.with_name(f".{key}.work-{claim['token'][:12]}")
        if Path(f"/proc/{claim['pid']}").exists() and (work / "progress.json").exists():
            return json.loads((runs / "jobs.json").read_text())[f"{kind}/{key}"], claim
    return None


def test_two_sweeps_that_overlap_compute_each_step_once_and_a_failure_stops_only_what_needs_it(start_sweep, small, tmp_path):
    both = ["stage1_tokens=32", "budget=64", "stage2.clip=0", *small, *ON_CPUS]
    first = start_sweep("mixer=hedgehog,ssm", "stage2.lr=1e-3,1e30", *both)
    second = start_sweep("mixer=ssm,hedgemamba", "stage2.lr=1e-3", *both)
    said = first.ends_with(1)
    second.ends_with(0)

    made = records(tmp_path / "runs")
    assert sorted(r["settings"]["mixer"] for r in made.values()) == ["hedgehog", "hedgemamba", "ssm"]
    # two cells of the first sweep fail in stage 2; hedgehog, ssm (in both sweeps) and hedgemamba don't
    assert submitted(tmp_path / "runs") == {"tokens": 1, "stage1": 1, "student": 5, "eval": 5}
    scripts = "".join(path.read_text() for path in (tmp_path / "runs/jobs").glob("*/*_submission.sh"))
    assert re.search(r"--array=0-\d%", scripts)
    assert "--dependency=aftercorr:" in scripts

    failed = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    for line in failed:
        assert re.search(r"failed: default/\S+ .*stage2.lr=1e\+?30.*not finite at step .*lower stage2.lr \(now 1e\+30\)", line)
        assert "Diverged" in Path(re.search(r"\(log: (\S+)\)", line)[1]).read_text()
    assert said.splitlines()[-1] == "2 of 4 cells failed; the same command runs what is missing"
    queue = scheduler.jobs()
    assert not any(job.alive for job in queue.values()), "what can never start is not left in the queue"

    before = submitted(tmp_path / "runs")
    start_sweep("mixer=ssm,hedgemamba", "stage2.lr=1e-3", *both).ends_with(0)
    assert submitted(tmp_path / "runs") == before, "a finished sweep queues nothing"


def test_preempted_timed_out_killed_and_cancelled_steps_go_on_to_the_same_result(start_sweep, small, cluster, tmp_path):
    killed = start_sweep(*small, *LONG, *on("n1"), runs="killed")
    preempted = start_sweep(*small, *LONG, *on("n2"), runs="preempted")

    entry, _ = wait_until(lambda: running(tmp_path / "preempted"), "the step to be preempted")
    run("sbatch", "--partition=urgent", "--nodelist=n2", "--exclusive", "--mem=100", "--time=1", "--output=/dev/null", "--wrap=sleep 1")
    _, claim = wait_until(lambda: running(tmp_path / "killed"), "the step to be killed")
    wait_until(lambda: list((tmp_path / "killed").glob("artifacts/student/.*/checkpoints/step-*/checkpoint.json")), "its checkpoint")
    os.kill(claim["pid"], signal.SIGKILL)

    def again_on_its_node():
        found = scheduler.jobs()[entry["job"]]
        return found.requeues and found.state == "RUNNING"

    wait_until(again_on_its_node, "the preempted step to run again")
    time.sleep(6)  # a controller that is killed forgets what happened in the last 5 s
    os.kill(int((cluster / "run/slurmctld.pid").read_text()), signal.SIGKILL)
    with pytest.raises(scheduler.Unreachable):
        scheduler.jobs()
    with pytest.raises(scheduler.Unreachable):
        scheduler.refusal(["--time=1"])
    run("/usr/sbin/slurmctld")
    wait_until(answers, "the restarted controller")
    endless = ["stage1_tokens=0", "budget=10M", "checkpoint_every=5000", "hydra.launcher.time=1m", "hydra.launcher.save_before=58"]
    timed_out = start_sweep(*small, *ON_CPUS[:2], *endless, runs="timed_out")

    said = killed.ends_with(1)
    assert re.search(r"failed: default/hedgemamba-0-100-s0: its job ended as FAILED .*\(log: \S+\)", said)
    assert records(tmp_path / "killed") == {}
    again = start_sweep(*small, *LONG, runs="killed")
    entry, _ = wait_until(lambda: running(tmp_path / "killed"), "the step that goes on")
    run("scancel", entry["job"])
    said = again.ends_with(1)
    assert "its job ended as CANCELLED" in said
    start_sweep(*small, *LONG, runs="killed").ends_with(0)

    preempted.ends_with(0)
    assert re.search(r"asked to stop by SIGUSR2; saving.* saved its state after step \d+ of 2000.*requeue of job", logs(tmp_path / "preempted"), re.S)
    assert records(tmp_path / "preempted") == records(tmp_path / "killed"), "bit for bit"
    (record,) = records(tmp_path / "killed").values()
    assert [json.loads(line)["step"] for line in record["log"].splitlines()] == list(range(2000)), "each step is logged once"

    saved = wait_until(lambda: re.search(r"saved its state after step (\d+) of 625000", logs(tmp_path / "timed_out")), "the time limit")
    wait_until(lambda: progress(tmp_path / "timed_out") > int(saved[1]), "the step that goes on after it")
    run("scancel", *(job for job, state in scheduler.jobs().items() if state.alive))
    timed_out.ends_with(1)


def test_leaving_a_sweep_leaves_its_jobs_and_says_how_to_end_them_and_one_that_is_refused_leaves_nothing(start_sweep, small, tmp_path):
    sweep = start_sweep(*small, *LONG)
    entry, _ = wait_until(lambda: running(tmp_path / "runs"), "the step")
    sweep.process.send_signal(signal.SIGINT)
    said = sweep.ends_with(130).splitlines()
    assert said[-2].startswith("2 jobs go on; the same command waits for them again")
    assert said[-1].startswith("scancel ")
    assert scheduler.jobs()[entry["job"]].alive
    plans = sorted((tmp_path / "runs/default/plans").iterdir())
    assert "invalid partition" in start_sweep(*small, *LONG, "seed=7", "hydra.launcher.partition=nope").ends_with(2)
    assert sorted((tmp_path / "runs/default/plans").iterdir()) == plans
    run(*said[-1].split())
    wait_until(lambda: not scheduler.jobs()[entry["job"]].alive, "the end of the jobs")


def test_a_step_whose_job_was_never_started_although_what_it_needs_is_there_is_queued_again(start_sweep, small, tmp_path):
    small = [*small, "stage1_tokens=0", "budget=64", *ON_CPUS]
    start_sweep(*small).ends_with(0)
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "runs").glob("default/*/record.json"))
    ended = run("sbatch", "--parsable", "--mem=50", "--output=/dev/null", "--wrap=sleep 15; false").strip()
    student = run("sbatch", "--parsable", "--mem=50", "--job-name=default-student", "--output=/dev/null", f"--dependency=afterok:{ended}",
                  "--kill-on-invalid-dep=yes", "--wrap=true").strip()  # fmt: skip
    key = record["provenance"]["artifacts"]["student"]
    shutil.rmtree(tmp_path / "runs/artifacts/student" / key)
    shutil.rmtree(tmp_path / "runs/artifacts/eval")
    jobs = tmp_path / "runs/jobs.json"
    jobs.write_text(json.dumps(json.loads(jobs.read_text()) | {f"student/{key}": {"job": student, "name": "default-student", "log": "/none", "time": 0}}))
    said = start_sweep(*small).ends_with(0)
    assert LATE in said


def test_hydras_own_launcher_runs_a_cell_a_job(start_sweep, small, tmp_path):
    sweep = start_sweep("stage1_tokens=0", "budget=64", "mixer=hedgehog,ssm", *small, "hydra/launcher=submitit_slurm",
                        "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1")  # fmt: skip
    sweep.ends_with(0)
    assert sorted(r["settings"]["mixer"] for r in records(tmp_path / "runs").values()) == ["hedgehog", "ssm"]
    assert list((tmp_path / "runs/default/.submitit").glob("*_1"))


def answers():
    try:
        return scheduler.jobs()
    except scheduler.Unreachable:
        return None


def on(node):
    return [f"+hydra.launcher.extra.nodelist={node}"]


def logs(runs):
    return "".join(p.read_text() for p in runs.glob("jobs/*/*_log.out"))


def progress(runs):
    return max((json.loads(p.read_text())["step"] for p in runs.glob("artifacts/student/.*/progress.json")), default=0)


# --- what is refused before, or at, submission


@pytest.fixture
def planned(small, tmp_path):
    """planned(**settings): (a plan of one small cell, its store)."""

    def make(**changes):
        store = Store(tmp_path / "runs", poll=0.05)
        values = dict(a.split("=", 1) for a in small) | {"budget": "64", "stage1_tokens": "32"} | changes
        cell = Cell(from_dict(values), store)
        return make_plan([("default/one", cell, {"gpus": 0, "nodes": 1, "time": "10m"})]), store

    return make


@pytest.mark.parametrize(("settings", "parts"), [
    ({"partition": "nope"}, ["SLURM refuses a job for tokens", "invalid partition specified: nope", "--partition=nope"]),
    ({"partition": "closed", "account": "mine"}, ["Invalid account", "--account=mine"]),
    ({"cpu": {"partition": "nope"}}, ["--partition=nope"]),
    ({"mem": 900}, ["Requested node configuration is not available", "--mem=921600M"]),
    ({"time": "3d"}, ["Requested time limit is invalid", "--time=4320"]),
    ({"extra": {"reservation": "none"}}, ["reservation"]),
    ({"time": "soon"}, ["hydra.launcher.time=soon is no time limit"]),
    ({"time": "2m", "save_before": 120}, ["hydra.launcher.time=2m is not longer than hydra.launcher.save_before=120 s"]),
])  # fmt: skip
def test_what_the_cluster_would_refuse_is_said_in_one_sentence_and_nothing_is_queued(planned, settings, parts):
    plan, store = planned()
    before = set(scheduler.jobs())
    with pytest.raises(UserError) as refused:
        check(plan, SlurmSettings(**{"cpus": 1, "save_before": 60} | settings), store)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    assert set(scheduler.jobs()) == before


def test_a_time_limit_below_the_checkpoint_interval_is_refused(planned):
    plan, store = planned(stage1_tokens="0", checkpoint_every="3")
    (student,) = (step for step in plan.steps.values() if step.kind == "student")
    student.hours = 2.0  # as at a scale where it matters: 4 steps of half an hour
    with pytest.raises(UserError, match=r"time=1h is shorter than the 1.5 h or so .* or lower checkpoint_every=3"):
        check(plan, SlurmSettings(cpus=1, time="1h"), store)
    check(plan, SlurmSettings(cpus=1, time="2h"), store)


def test_a_machine_without_sbatch_is_told_so(planned, monkeypatch, tmp_path):
    plan, store = planned()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine's PATH"):
        check(plan, SlurmSettings(), store)


def test_a_store_on_this_machine_alone_is_refused_where_nodes_are_others(planned, monkeypatch):
    _, store = planned()
    monkeypatch.setattr(launcher, "file_system", lambda path: "ext4")
    launcher.why_unseen(store.root, {os.uname().nodename.split(".")[0]})
    with pytest.raises(UserError, match=r"runs=\S+ lies on a file system of this machine \(ext4\), which .* far1 can't see"):
        launcher.why_unseen(store.root, {"far2", "far1"})


def test_when_one_of_the_jobs_is_refused_those_before_it_are_cancelled(planned):
    plan, store = planned()
    settings = SlurmSettings(partition="closed", cpus=1, cpu={"partition": "debug"}, save_before=60)
    settings.of = lambda step: launcher.Resources("debug" if step.kind == "tokens" else "closed", "5m", cpus=1)
    before = {i for i, job in scheduler.jobs().items() if job.alive}
    with pytest.raises(UserError, match=r"sbatch refused the jobs for stage1 .*Invalid account.*nothing was left in the queue"):
        submit(plan, settings, store, "python sweep.py")
    assert list(store.root.glob("jobs/*/*_submitted.pkl")), "the tokens had been queued"
    wait_until(lambda: {i for i, job in scheduler.jobs().items() if job.alive} <= before, "an empty queue")
    assert launcher.read_jobs(store.root) == {}


def test_a_job_whose_node_can_not_write_its_log_ends_the_sweep_with_the_store_named(start_sweep, small, tmp_path):
    sweep = start_sweep("budget=64", "stage1_tokens=0", *small, *ON_CPUS, "+hydra.launcher.extra.output=/nowhere/log")
    said = sweep.ends_with(1)
    assert re.search(r"failed: default/\S+: its job ended as FAILED .*left no log: can its node write to \S+runs\?", said)
    assert not any(job.alive for job in scheduler.jobs().values())
