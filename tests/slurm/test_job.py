"""One step in one process, and many: asked to stop, killed, failing; and what is said of it from another shell."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from hm.cell import Cell
from hm.claim import Claimant
from hm.config import from_dict
from hm.errors import UserError
from hm.store import Store
from hm.train import Interrupted
from slurm import status
from slurm.job import REQUEUE, STOPPED, StopRequest, Task, read_failure, run
from slurm.local import run_here
from slurm.plan import make_plan
from slurm.scheduler import Job
from slurm.states import LATE, look
from slurm.status import read_plans, text
from tests.slurm.conftest import ROOT, records, wait_until


@pytest.fixture
def planned(small, tmp_path):
    """planned(**settings): (the plan of one small cell, its store)."""

    def make(**changes):
        values = dict(a.split("=", 1) for a in small) | {"budget": "64", "stage1_tokens": "32"} | changes
        store = Store(tmp_path / "runs", poll=0.05)
        one = Cell(from_dict(values), store)
        return make_plan([(f"default/{one.name}", one, {"gpus": 0})]), store

    return make


def task_of(plan, store, kind):
    (step,) = (s for s in plan.steps.values() if s.kind == kind)
    return Task(step.kind, step.key, step.settings, step.records, str(store.root), "python sweep.py")


def plan_key(plan, kind):
    return next(s.key for s in plan.steps.values() if s.kind == kind)


def test_a_step_that_is_asked_to_stop_leaves_a_checkpoint_and_the_next_attempt_ends_it(planned):
    plan, store = planned()
    with pytest.raises(Interrupted, match="saved its state after step 1 of 2"):
        run(task_of(plan, store, "stage1"), lambda: store.has("tokens", plan_key(plan, "tokens")))
    run(task_of(plan, store, "stage1"), lambda: False)
    with pytest.raises(Interrupted, match="saved its state after step 1 of 2"):
        run(task_of(plan, store, "student"), lambda: True)
    assert list(store.root.glob("artifacts/student/.*/checkpoints/step-000001"))
    assert not list(store.root.glob("artifacts/student/.*.claim"))
    run(task_of(plan, store, "eval"), lambda: False)
    assert len(records(store.root)) == 1


def test_a_step_that_fails_leaves_a_note_and_the_next_attempt_removes_it(planned):
    plan, store = planned(**{"stage2.lr": "1e30", "stage2.clip": "0"})
    step = task_of(plan, store, "student")
    with pytest.raises(UserError, match="not finite"):
        run(step, lambda: False)
    note = read_failure(store.root, "student", step.key)
    assert "lower stage2.lr" in note["error"]
    assert note["traceback"] == ""
    with pytest.raises(Interrupted):
        run(step, lambda: True)
    assert read_failure(store.root, "student", step.key) is None


def test_a_machine_whose_inputs_give_another_key_is_told_so_and_computes_nothing(planned):
    plan, store = planned()
    step = task_of(plan, store, "student")
    step.key = "0123456789abcdef"
    with pytest.raises(UserError, match="it was planned as 0123456789abcdef; teacher, text, package versions and code must be the same"):
        run(step, lambda: False)
    assert not list(store.root.glob("artifacts/*/[!.]*"))


@pytest.mark.parametrize(("signum", "ends"), [(signal.SIGUSR1, REQUEUE), (signal.SIGUSR2, REQUEUE), (signal.SIGTERM, STOPPED)])
def test_a_signal_asks_to_stop_and_one_who_can_not_is_ended_after_the_grace(signum, ends):
    late = []
    with StopRequest(0.05, late.append) as stop:
        assert not stop()
        os.kill(os.getpid(), signum)
        assert stop()
        assert stop.status == ends
        wait_until(lambda: late, "the end of the grace", 5)
    assert late == [ends]
    assert signal.getsignal(signum) == signal.SIG_DFL


def test_ctrl_c_asks_to_stop_and_a_second_one_ends_it():
    ended = []
    with StopRequest(9, ended.append, keyboard=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), ended) == (True, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]


def test_ctrl_c_in_a_cell_saves_it_and_the_same_command_goes_on(small, tmp_path):
    command = [sys.executable, "sweep.py", *small, f"runs={tmp_path}/runs", "budget=400k", "stage1_tokens=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: list(tmp_path.glob("runs/artifacts/student/.*/progress.json")), "training", 60)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=40)[0]
    assert process.returncode == 130, said
    assert "asked to stop by SIGINT; saving" in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("runs/artifacts/student/.*/checkpoints/step-*"))


def test_signals_that_came_before_a_job_was_ready_are_delivered_when_it_is():
    code = "import time; print(1, flush=True); time.sleep(1); from slurm.job import StopRequest\nwith StopRequest(9, print) as stop: print(stop(), stop.status)"
    process = subprocess.Popen([sys.executable, "-IS", ROOT / "slurm" / "shield.py", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    process.stdout.readline()
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=20)[0].split() == ["True", str(REQUEUE)]


# --- many steps on this machine


def test_a_failed_step_blocks_what_needs_it_and_nothing_else(planned):
    plan, store = planned(**{"stage2.lr": "1e30", "stage2.clip": "0"})
    outcome = run_here(plan, store, "python sweep.py")
    assert [i.partition("/")[0] for i in outcome.failed] == ["student"]
    assert [i.partition("/")[0] for i in outcome.blocked] == ["eval"]
    states = look(plan.steps, store.root, {}, None)
    assert [s.name for s in states.values()] == ["done", "done", "failed", "blocked"]
    assert "failed: student/" in text(plan.steps, states)


def test_usr1_restarts_a_step_where_it_was_and_term_ends_the_sweep_with_all_saved(start_sweep, small, tmp_path):
    long = [*small, "stage1_tokens=0", "budget=320k", "checkpoint_every=1000000", "hydra.launcher.jobs=1"]
    sweep = start_sweep(*long)
    claims = lambda: list((tmp_path / "runs").glob("artifacts/student/.*.claim"))  # noqa: E731
    steps = lambda: sorted(p.name for p in (tmp_path / "runs").glob("artifacts/student/.*/checkpoints/step-*"))  # noqa: E731
    wait_until(lambda: list((tmp_path / "runs").glob("artifacts/student/.*/progress.json")), "training")
    first = json.loads(claims()[0].read_text())
    os.kill(first["pid"], signal.SIGUSR1)
    saved = wait_until(steps, "a checkpoint")
    second = wait_until(lambda: claims() and (c := json.loads(claims()[0].read_text()))["pid"] != first["pid"] and c, "a new process")
    assert second["token"] != first["token"]
    shown = subprocess.run([sys.executable, "-m", "slurm.status", "--runs", tmp_path / "runs"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(r"student +hedgemamba-0-100-s0 +running", shown)
    wait_until(lambda: json.loads(next((tmp_path / "runs").glob("artifacts/student/.*/progress.json")).read_text())["step"] > int(saved[-1][5:]),
               "the step that goes on")  # fmt: skip
    sweep.process.terminate()
    ended, said = sweep.wait()
    assert ended == 130
    assert said.splitlines()[-1] == "interrupted; the same command goes on from what was saved"
    assert steps()[-1] > saved[-1]
    assert claims() == []


# --- seen from another shell


def test_each_state_is_told_apart_by_what_store_and_queue_show(planned):
    plan, store = planned()
    tokens, stage1, student, last = plan.steps.values()
    run(task_of(plan, store, "tokens"), lambda: False)
    jobs = {s.id: {"job": f"7_{i}", "name": "mine", "log": str(store.root / "none")} for i, s in enumerate(plan.steps.values())}

    def queue(name="mine", **states):
        return {f"7_{i}": Job(f"7_{i}", name, state, 2, "1:00", "n1", reason) for i, (state, reason) in
                ((int(n[1:]), s) for n, s in states.items())}  # fmt: skip

    def names(queued, known=jobs):
        return [s.name for s in look(plan.steps, store.root, known, queued).values()]

    assert names({}, {}) == ["done", "to do", "to do", "to do"]
    assert names(queue(j1=("RUNNING", "None"), j2=("PENDING", "Dependency"), j3=("PENDING", "Dependency"))) == ["done", "running", "waiting", "waiting"]
    assert names(queue(j1=("PENDING", "Priority"))) == ["done", "queued", "lost", "blocked"]
    assert names(queue(j1=("CANCELLED", "None"))) == ["done", "cancelled", "blocked", "blocked"]
    assert names(queue(j1=("OUT_OF_MEMORY", "OutOfMemory"), j2=("COMPLETED", "None"))) == ["done", "failed", "blocked", "blocked"]
    (late,) = (s for s in look(plan.steps, store.root, jobs, queue(j1=("CANCELLED", "DependencyNeverSatisfied"))).values() if s.name == "cancelled")
    assert late.why == f"{LATE}; the same command queues this one again"
    assert names(queue("another's", j1=("RUNNING", "None"))) == ["done", "lost", "blocked", "blocked"]
    assert names(None) == ["done", "queued", "queued", "queued"]
    claimant = Claimant(store.path("stage1", stage1.key).with_name(f".{stage1.key}.claim"), 1, 9)
    (store.root / "artifacts/stage1").mkdir()
    with claimant.attempt():
        found = look(plan.steps, store.root, {}, None)[stage1.id]
        assert (found.name, found.node) == ("running", os.uname().nodename)
    assert student.id in jobs
    assert last.parent == student.id
    assert tokens.parent is None


def test_the_status_of_a_thousand_cells_comes_at_once_and_without_pytorch(small, tmp_path):
    base = dict(a.split("=", 1) for a in small) | {"budget": "64", "stage1_tokens": "0"}
    store = Store(tmp_path / "runs")
    one = Cell(from_dict(base), store)
    cells = []
    for seed in range(1000):
        cells.append(Cell(from_dict(base | {"seed": seed}), store, inputs=one.inputs))
    plan = make_plan((f"default/{c.name}", c, {"gpus": 0}) for c in cells)
    plan.save(store, "python sweep.py")
    code = "import sys; from slurm.status import main; main(['default', '--runs', sys.argv[1]]); assert 'torch' not in sys.modules"
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-c", code, store.root], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime < 1, "seconds of a processor"
    *rows, last = found.stdout.splitlines()
    assert last == "2001 steps: 2001 to do"
    assert len(rows) == status.MOST_ROWS + 2
    with pytest.raises(UserError, match=r"no sweep of other was started .* \(known: default\)"):
        read_plans(store.root, "other")
