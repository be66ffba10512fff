"""The training and operator benchmarks at tiny sizes: what they count, what they write, what they refuse."""

import json

import pytest
import torch

from hm.bench import operator, training
from hm.bench.shapes import attention_shape, build_teacher
from hm.convert import convert
from hm.errors import UserError
from hm.objectives import Align, FineTune
from hm.train import Diverged

TRAINING = ["--shapes", "tiny", "--lengths", "32", "--batch", "2", "--steps", "2", "--warmup", "0", "--device", "cpu"]
D, FF, V, LAYERS, HEADS, d = 64, 128, 512, 2, 4, 16  # of the shape "tiny"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "made" / "training.json"
    training.main([*TRAINING, "--out", str(out)])
    assert out.with_suffix(".png").stat().st_size > 1000
    found = json.loads(out.read_text())
    assert (found["schema"], found["kind"]) == (1, "training")
    assert found["matrix_flops_per_second"] > 0
    assert found["command"]
    return {row["what"]: row for row in found["rows"]}


def test_teacher_and_both_stages_are_measured_in_one_run(rows):
    assert list(rows) == ["teacher", "stage2", "stage1"]
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["seconds_per_step"])
        assert row["status"] == "ok"
    assert rows["stage2"]["scan"] == "chunked"
    assert rows["stage2"]["ratio_to_teacher"] == pytest.approx(
        rows["stage2"]["tokens_per_second"] / rows["teacher"]["tokens_per_second"]
    )


def test_the_flops_are_those_of_the_formula():
    layer = D * 3 * D + D * D + 2 * D * FF  # q, k, v; o; the MLP
    teacher = build_teacher("tiny", 64)
    attention, recurrence = 2 * 32 * D, 8 * D * (d + 1)
    trained = LAYERS * layer
    assert training.model_flops(FineTune(teacher), "teacher", 32) == 4 * (trained + V * D) + 2 * trained + 3 * LAYERS * attention
    hedgehog = trained + LAYERS * 2 * d * d
    student = FineTune(convert(build_teacher("tiny", 64), "hedgehog"))
    assert training.model_flops(student, "stage2", 32) == 4 * (hedgehog + V * D) + 2 * hedgehog + 3 * LAYERS * recurrence
    stage1 = Align(teacher, convert(teacher, "hedgehog"))
    mixer = 4 * D * D + 2 * d * d
    expected = 2 * hedgehog + LAYERS * (attention + 3 * (2 * mixer + recurrence))
    assert training.model_flops(stage1, "stage1", 32) == expected


def test_a_run_whose_loss_is_not_finite_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Stage", lambda **given: _Stage(**given | {"lr": 1e30, "clip": 0.0}))
    out = tmp_path / "training.json"
    with pytest.raises(Diverged, match="not finite"):
        training.main([*TRAINING, "--what", "teacher", "--out", str(out)])
    assert not out.exists()


_Stage = training.Stage


def test_the_operator_is_timed_by_back_end_and_length_and_a_refusal_is_a_row(tmp_path):
    out = tmp_path / "operator.json"
    operator.main(
        ["--shapes", "tiny", "--scans", "chunked,ssd,attention", "--lengths", "16,32", "--tokens", "32", "--repeat", "1",
         "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [(r["scan"], r["seq_len"], r["batch"]) for r in rows] == [
        (scan, length, 32 // length) for scan in ("chunked", "ssd", "attention") for length in (16, 32)
    ]
    for row in rows:
        if row["scan"] == "ssd":
            assert "needs a CUDA device" in row["status"]
            assert "ns_per_token" not in row
        else:
            total = row["forward_ms"] + row["backward_ms"]
            assert row["ns_per_token"] == pytest.approx(1e6 * total / 32)
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize("scan", ["chunked", "attention"])
def test_a_whole_layer_runs_forward_and_backward(scan):
    forward, leaves = operator.layer("tiny", scan, 2, 16, torch.device("cpu"), torch.float32)
    forward().sum().backward()
    assert forward().shape == (2, 16, D)
    assert all(x.grad is not None for x in leaves)
    assert leaves[0].grad.abs().sum() > 0
    assert (len(leaves) > 5) == (scan == "chunked")


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"--scans=chunke is not known; did you mean --scans=chunked"):
        operator.main(["--scans", "chunke", "--out", str(tmp_path / "o.json")])
    with pytest.raises(UserError, match="shape=pythia1 is not known; did you mean shape=pythia1b"):
        attention_shape("pythia1")
