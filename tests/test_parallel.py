"""Several processes train as one does: the same curve and weights, and each other's checkpoints are gone on from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hm.cell import Cell
from hm.config import from_dict
from hm.parallel import from_srun
from hm.store import Store

ROOT = Path(__file__).parent.parent
STEPS, STOP = 6, 4
CURVE = ("step", "tokens", "lr", "grad_norm", "loss")


def launch(*command):
    """The command as two processes of one group."""
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
                "--num_processes=2", "--main_process_port=0", "--num_cpu_threads_per_process=1"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *launcher, *map(str, command)], capture_output=True, text=True, env=environment)


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in CURVE] for line in lines]


KINDS = {
    "stage1 auto fp32": 1e-6,
    "stage2 ddp fp32": 1e-5,
    "stage2 fsdp fp32": 1e-5,
    "stage2 fsdp bf16": 2e-2,
    "adapted ddp fp32": 1e-5,
}
"""Runs, each with the relative tolerance of its losses."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders 1 and 2: each run by so many processes; 2-1 and 1-2: stopped by so many, gone on by so many."""
    folder = tmp_path_factory.mktemp("parallel")
    done = launch(__file__, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["2", "1-2", "2-1"])
def test_the_curve_and_the_weights_do_not_depend_on_the_number_of_processes(kind, how, trained):
    expected, found = trained / "1" / kind, trained / how / kind
    assert len(curve(found)) == STEPS
    for line, wanted in zip(curve(found), curve(expected), strict=True):
        assert line == pytest.approx(wanted, rel=10 * KINDS[kind])
        assert line[-1] == pytest.approx(wanted[-1], rel=KINDS[kind])
    own, other = load_file(expected / "weights.safetensors"), load_file(found / "weights.safetensors")
    start = load_file(trained / "1" / kind / "start.safetensors")
    assert own.keys() == other.keys()
    moved = torch.cat([(own[n] - start[n]).flatten() for n in own])
    apart = torch.cat([(own[n] - other[n]).flatten() for n in own])
    assert moved.norm() > 0
    assert apart.norm() < (0.2 if "bf16" in kind else 1e-2) * moved.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_holds_whole_tensors_like_that_of_one(kind, trained):
    saved = [load_file(trained / how / kind / f"checkpoints/step-{STOP:06d}/tensors.safetensors") for how in ("1", "2")]
    assert {n: t.shape for n, t in saved[0].items()} == {n: t.shape for n, t in saved[1].items()}


def test_a_batch_that_cannot_be_cut_over_the_processes_is_refused(trained):
    answer = (trained / "refused").read_text()
    assert answer == "stage2.batch_size=5 can't be cut over 2 processes; make it a multiple of 2."


def test_a_cell_of_two_processes_is_one_record_with_the_perplexity_of_one_process(
    tmp_path, corpus_file, make_teacher, byte_tokenizer
):
    make_teacher("neox", vocab_size=257).save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    typed = {"teacher": f"{tmp_path}/teacher", "data": str(corpus_file), "seq_len": 32, "budget": 1536, "stage1_tokens": 512,
             "device": "cpu", "stage1.batch_size": 4, "stage2.batch_size": 4, "checkpoint_every": 3, "eval.sequences": 4}  # fmt: skip
    done = launch(ROOT / "sweep.py", f"runs={tmp_path}/2", *(f"{k}={v}" for k, v in typed.items()))
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = Store(tmp_path / "2").records()
    expected = Cell(from_dict(found["settings"]), Store(tmp_path / "1")).run()
    assert found["key"] == expected["key"]
    for name in ("ppl", "ppl_start"):
        assert found["metrics"][name]["value"] == pytest.approx(expected["metrics"][name]["value"], rel=1e-4)
    assert found["tokens"] == expected["tokens"] == {"stage1": 512, "stage2": 1024}
    assert (found["provenance"]["processes"], expected["provenance"]["processes"]) == ({"stage1": 2, "student": 2}, {"stage1": 1, "student": 1})
    assert done.stdout.count("validation perplexity") == 1
    assert not list((tmp_path / "2").rglob("*.claim")) + list((tmp_path / "2").rglob("*.work-*"))


def test_an_error_of_one_process_is_met_by_all_wherever_they_wait(trained):
    for where in ("alone", "in a build"):
        assert [(trained / f"{where} {rank}").read_text() for rank in "01"] == [f"{where} of 0", f"{where} of 0"]
    assert [(trained / f"elsewhere {rank}").read_text() for rank in "01"] == ["elsewhere of 1", "elsewhere of 1"]


def test_tasks_of_srun_find_each_other_on_the_machine_of_the_first(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\n[ $3 = 'n[7-8]' ] && echo n7 && echo n8\n")
    (tmp_path / "scontrol").chmod(0o755)
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41234"}
    for name, value in {**step, "SLURM_STEP_NODELIST": "n[7-8]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    wanted = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n7", "MASTER_PORT": "21234"}
    for name in wanted:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    from_srun()
    assert {name: os.environ[name] for name in wanted} == wanted


# --- what the processes do


def one_run(folder, words, stop=False, size=8):
    """`words`, such as "stage2 fsdp bf16", gone on from what is in the folder, and perhaps stopped by the last process."""
    from conftest import build_teacher

    from hm.config import Stage
    from hm.convert import convert
    from hm.errors import Interrupted
    from hm.objectives import Align, FineTune
    from hm.parallel import processes, rank
    from hm.train import Run, train

    kind, how, precision = words.split()
    folder = folder / words
    teacher = build_teacher("neox" if kind == "stage1" else "llama")
    objective = {
        "stage1": lambda: Align(teacher, convert(build_teacher("neox"), "hedgehog")),
        "stage2": lambda: FineTune(convert(teacher, keep_attention=[1]), "ce+kl", teacher),
        "adapted": lambda: FineTune(build_teacher("neox")),
    }[kind]()
    stage = Stage(lr=1e-3, batch_size=size, micro_batch=2 if kind == "stage2" else None)
    folder.mkdir(parents=True, exist_ok=True)
    if processes() == 1 and not (folder / "start.safetensors").exists():
        save_file({n: p.detach().clone() for n, p, _ in objective.parameters}, folder / "start.safetensors")
    run = Run(kind, folder, "key", torch.device("cpu"), precision, checkpoint_every=STOP, log_every=1, parallel=how,
              stop=lambda done: stop and done == STOP - 1 and rank() == processes() - 1)  # fmt: skip

    def batch(step):
        return torch.randint(61, (size, 18), generator=torch.Generator().manual_seed(step))

    try:
        train(objective, batch, STEPS, stage, run)
    except Interrupted:
        return
    if rank() == 0:
        save_file({n: p.detach().contiguous() for n, p, _ in objective.parameters}, folder / "weights.safetensors")


def failing(root, where, who):
    """One process fails where the others wait for its word; each writes down what it met."""
    from hm.errors import UserError
    from hm.parallel import artifact, exchange, on_main, rank

    def fail(*_):
        if rank() == who:
            raise UserError(f"{where} of {who}")
        exchange(None)

    try:
        on_main(fail) if where == "alone" else artifact(Store(root / where), "student", "key", fail, None)
    except UserError as error:
        (root / f"{where} {rank()}").write_text(str(error))


def all_runs(root):
    from hm.errors import UserError
    from hm.parallel import on_main

    for where, who in (("alone", 0), ("in a build", 0), ("elsewhere", 1)):
        failing(root, where, who)

    for words in KINDS:
        on_main(lambda words=words: one_run(root / "1", words))
        one_run(root / "2", words)
        one_run(root / "2-1", words, stop=True)
        on_main(lambda words=words: one_run(root / "2-1", words))
        on_main(lambda words=words: one_run(root / "1-2", words, stop=True))
        one_run(root / "1-2", words)
    try:
        one_run(root / "5", "stage2 ddp fp32", size=5)
    except UserError as error:
        (root / "refused").write_text(str(error))


if __name__ == "__main__":
    from hm.parallel import group

    torch.set_num_threads(1)
    with group(torch.device("cpu")):
        all_runs(Path(sys.argv[1]))
