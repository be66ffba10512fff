"""The training loop: what a step changes, and that a run which stopped goes on as if it never had."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import hm.train
from hm.config import FeatureMap, Stage
from hm.convert import convert
from hm.data import Batches
from hm.errors import UserError
from hm.objectives import Align, FineTune, Objective
from hm.train import Diverged, Interrupted, Run, learning_rate, make_optimizer, train

STAGE = Stage(lr=3e-3, lr_new=1e-2, warmup=0.2, batch_size=4)


@pytest.fixture
def run_in(tmp_path):
    """run_in(name, **changes): a Run with a folder of its own."""

    def make(name="run", key="key", **changes):
        options = {"checkpoint_every": 4, "log_every": 1} | changes
        return Run("stage 2", tmp_path / name, key, torch.device("cpu"), **options)

    return make


@pytest.fixture
def batches(ids):
    return lambda step: ids(4, 18, seed=step)


@pytest.fixture
def objectives(make_teacher):
    """Every kind of run, from its start."""
    return {
        "stage1": lambda: Align(make_teacher("neox"), convert(make_teacher("neox"), "hedgehog")),
        "stage2": lambda: FineTune(convert(make_teacher("llama")), "ce+kl", make_teacher("llama")),
        "one_step": lambda: FineTune(convert(make_teacher("llama"), "mamba")),
        "adapted_teacher": lambda: FineTune(make_teacher("neox")),
    }


def lines(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


class Quadratic(Objective):
    """One matrix and one vector, copied or new, with a loss of any gradient."""

    def __init__(self, loss, new=False):
        self.model = nn.Module()
        self.model.matrix, self.model.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.parameters = [(n, p, new) for n, p in self.model.named_parameters()]
        self.loss = loss

    def backward(self, tokens, scale):
        loss = self.loss(self.model, tokens)
        (loss * scale).backward()
        return {"loss": loss.detach()}

    def suspect(self, chunks, losses):
        return "the only layer"


NOTHING = Quadratic(lambda m, t: 0 * (m.matrix.sum() + m.vector.sum()))


# --- going on after a stop


class Stopped(Exception):
    pass


def stopping_at(step, batch):
    def give(asked):
        if asked == step:
            raise Stopped
        return batch(asked)

    return give


@pytest.mark.parametrize("name", ["stage1", "stage2", "one_step", "adapted_teacher"])
def test_a_run_that_was_stopped_twice_equals_one_that_never_was_bit_for_bit(
    name, objectives, run_in, batches
):
    whole, pieces = run_in("whole"), run_in("pieces")
    unbroken = objectives[name]()
    expected = train(unbroken, batches, 14, STAGE, whole)
    for stop in (7, 11):
        with pytest.raises(Stopped):
            train(objectives[name](), stopping_at(stop, batches), 14, STAGE, pieces)
    log = pieces.workdir / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 11, "lo')  # killed while it wrote a line
    resumed, asked = objectives[name](), []
    found = train(resumed, lambda step: asked.append(step) or batches(step), 14, STAGE, pieces)

    own, other = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(own[n], other[n]) for n in own)
    assert (pieces.workdir / "metrics.jsonl").read_text() == (whole.workdir / "metrics.jsonl").read_text()
    assert [line["step"] for line in lines(pieces)] == list(range(14))
    assert asked == list(range(8, 14)), "only what came after the last checkpoint is run again"
    for step in (8, 12):
        saved = [
            load_file(run.workdir / "checkpoints" / f"step-{step:06d}" / "tensors.safetensors")
            for run in (whole, pieces)
        ]
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])
        assert {n.rpartition(".")[2] for n in saved[0] if n.startswith("optimizer.")} == {
            "exp_avg",
            "exp_avg_sq",
            "step",
        }
    same = ("steps", "tokens", "final_loss")
    assert {k: found[k] for k in same} == {k: expected[k] for k in same}
    assert found["tokens"] == 14 * 4 * 17


def test_a_run_that_is_asked_to_stop_saves_that_very_step_and_goes_on_from_it(objectives, run_in, batches):
    whole, pieces = run_in("whole"), run_in("pieces")
    unbroken, resumed, asked = objectives["stage2"](), objectives["stage2"](), []
    train(unbroken, batches, 6, STAGE, whole)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        train(objectives["stage2"](), batches, 6, STAGE, replace(pieces, stop=lambda done: done == 3))
    asked_late = replace(pieces, stop=lambda done: done == 6)  # nothing is left to be saved: it ends as it would
    train(resumed, lambda step: asked.append(step) or batches(step), 6, STAGE, asked_late)
    assert asked == [3, 4, 5]
    assert [line["step"] for line in lines(pieces)] == list(range(6))
    own, other = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(own[n], other[n]) for n in own)


def test_a_run_that_stopped_before_its_first_checkpoint_starts_anew(objectives, run_in, batches):
    whole, pieces = run_in("whole"), run_in("pieces")
    train(objectives["stage2"](), batches, 6, STAGE, whole)
    with pytest.raises(Stopped):
        train(objectives["stage2"](), stopping_at(3, batches), 6, STAGE, pieces)
    train(objectives["stage2"](), batches, 6, STAGE, pieces)
    assert lines(pieces) == lines(whole)


def test_the_seconds_of_all_pieces_are_counted(objectives, run_in, batches):
    run = run_in()
    with pytest.raises(Stopped):
        train(objectives["stage2"](), stopping_at(5, batches), 6, STAGE, run)
    about = json.loads((run.workdir / "checkpoints" / "step-000004" / "checkpoint.json").read_text())
    found = train(objectives["stage2"](), batches, 6, STAGE, run)
    assert found["seconds"] > about["state"]["seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])


def test_a_checkpoint_of_other_settings_is_refused(objectives, run_in, batches):
    with pytest.raises(Stopped):
        train(objectives["stage2"](), stopping_at(5, batches), 6, STAGE, run_in(key="one"))
    with pytest.raises(UserError, match=r"made with other settings \(key one.*now two"):
        train(objectives["stage2"](), batches, 6, STAGE, run_in(key="two"))


def test_a_decay_at_zero_never_gets_a_gradient_that_would_lower_it(objectives, run_in, batches):
    objective, seen = objectives["stage2"](), []

    def look(optimizer, *_):
        for mixer in objective.model.mixers:
            seen.append((mixer.ssm.A.detach().clone(), mixer.ssm.A.grad.clone()))

    handle = register_optimizer_step_pre_hook(look)
    train(objective, batches, 6, Stage(lr=1e-2, batch_size=4, micro_batch=1), run_in())
    handle.remove()
    A, gradient = (torch.stack(x) for x in zip(*seen, strict=True))
    assert gradient[A <= 0].max() == 0
    assert gradient[A <= 0].min() < 0
    assert gradient[A > 0].max() > 0


def test_two_runs_of_the_same_settings_are_the_same_also_from_a_teacher_with_dropout(
    make_teacher, run_in, batches
):
    found = []
    for name in ("first", "second"):
        teacher = make_teacher("neox", hidden_dropout=0.5, attention_dropout=0.5)
        train(FineTune(convert(teacher, keep_attention=[1])), batches, 3, STAGE, run_in(name))
        found.append(lines(run_in(name)))
    assert found[0] == found[1]


# --- what a step changes


@pytest.mark.parametrize("name", ["stage1", "stage2", "one_step", "adapted_teacher"])
def test_only_what_is_trained_changes(name, objectives, run_in, batches):
    objective = objectives[name]()
    before = {n: p.clone() for n, p in objective.model.named_parameters()}
    train(objective, batches, 3, STAGE, run_in())
    trained = {n for n, *_ in objective.parameters}
    changed = {n for n, p in objective.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    assert 0 < len(trained) < len(before)
    if name == "stage1":
        assert all(".phi_" in n for n in changed)
    else:
        embeddings = {
            id(m.weight)
            for m in (objective.model.get_input_embeddings(), objective.model.get_output_embeddings())
        }
        assert {n for n, p in objective.model.named_parameters() if id(p) in embeddings} == set(
            before
        ) - changed


def test_the_kl_teacher_and_the_stage_1_teacher_do_not_change(make_teacher, run_in, batches):
    teacher = make_teacher("llama")
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    student = convert(teacher)
    train(Align(teacher, student), batches, 2, STAGE, run_in("one"))
    train(FineTune(student, "kl", teacher), batches, 2, STAGE, run_in("two"))
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())


@pytest.mark.parametrize("kind_of_run", ["stage1", "stage2"])
def test_accumulated_gradients_are_those_of_the_whole_batch(kind_of_run, objectives, batches):
    found = []
    for parts in (1, 4):
        objective = objectives[kind_of_run]()
        for chunk in batches(0).split(4 // parts):
            objective.backward(chunk, 1 / parts)
        found.append({n: p.grad for n, p, _ in objective.parameters})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_a_run_in_micro_batches_follows_the_run_in_whole_batches(objectives, run_in, batches):
    logs = []
    for micro in (None, 2, 1):
        stage = Stage(lr=1e-3, batch_size=4, micro_batch=micro)
        train(objectives["stage2"](), batches, 4, stage, run_in(f"micro-{micro}"))
        logs.append(
            [
                [line[k] for k in ("step", "tokens", "lr", "grad_norm", "loss", "ce", "kl")]
                for line in lines(run_in(f"micro-{micro}"))
            ]
        )
    for log in logs[1:]:
        for line, expected in zip(log, logs[0], strict=True):
            assert line == pytest.approx(expected, rel=1e-3)


def test_the_rate_warms_up_then_falls_on_a_cosine_to_its_share_of_the_peak():
    stage = Stage(warmup=0.1, min_lr=0.1)
    rates = [learning_rate(step, 100, stage) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.55)  # half way down the cosine
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 < rates[-1] < 0.102
    assert learning_rate(0, 1, stage) == 1


def test_each_group_follows_the_schedule_from_its_own_peak(objectives, run_in, batches):
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append({g["peak"]: g["lr"] for g in optimizer.param_groups})
    )
    train(objectives["stage2"](), batches, 5, STAGE, run_in())
    handle.remove()
    factors = [learning_rate(step, 5, STAGE) for step in range(5)]
    assert seen == [{0.003: pytest.approx(0.003 * f), 0.01: pytest.approx(0.01 * f)} for f in factors]


@pytest.mark.parametrize(("lr_new", "expected"), [(None, 1e-3), (5e-2, 5e-2)])
def test_new_parameters_have_a_rate_of_their_own(lr_new, expected, run_in):
    # Adam's first step is of the size of the rate, whatever the gradient
    for new, rate in ((False, 1e-3), (True, expected)):
        objective = Quadratic(lambda m, t: m.matrix.sum() + m.vector.sum(), new)
        stage = Stage(lr=1e-3, lr_new=lr_new, weight_decay=0, batch_size=4)
        train(objective, lambda step: torch.zeros(4, 3, dtype=torch.long), 1, stage, run_in(f"{new}"))
        assert (1 - objective.model.matrix).tolist() == [pytest.approx([rate, rate], rel=1e-3)] * 2


def test_weight_decay_shrinks_matrices_and_leaves_vectors(run_in):
    objective = Quadratic(NOTHING.loss)
    stage = Stage(lr=0.1, weight_decay=0.5, warmup=0, batch_size=4)
    train(objective, lambda step: torch.zeros(4, 3, dtype=torch.long), 1, stage, run_in())
    assert objective.model.matrix.flatten().tolist() == pytest.approx([1 - 0.1 * 0.5] * 4)
    assert objective.model.vector.tolist() == [1, 1]


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_weight_decay_is_for_matrices_and_never_for_biases_norms_or_decay_rates(teacher, decay):
    objective = FineTune(convert(teacher, feature_map=FeatureMap(per_head=True), decay=decay))
    names = {id(p): n for n, p, _ in objective.parameters}
    optimizer = make_optimizer(objective, STAGE)
    assert (optimizer.defaults["betas"], optimizer.defaults["amsgrad"]) == ((0.9, 0.95), False)
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    kept = set(names.values()) - decayed
    assert decayed | kept == {n for n, *_ in objective.parameters}
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert all("norm" in n or n.endswith(("bias", "ssm.A")) for n in kept)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}


@pytest.mark.parametrize(("clip", "expected"), [(0.5, 0.5), (0, 100.0), (1e4, 100.0)])
def test_the_gradient_is_clipped_to_its_norm_and_logged_before(clip, expected, run_in):
    objective = Quadratic(lambda m, t: 50 * m.matrix.sum())  # of norm 50 * sqrt(4)
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(objective.model.matrix.grad.norm().item())
    )
    train(
        objective,
        lambda step: torch.zeros(4, 3, dtype=torch.long),
        1,
        Stage(clip=clip, batch_size=4),
        run_in(),
    )
    handle.remove()
    assert seen == [pytest.approx(expected, rel=1e-4)]
    assert lines(run_in())[0]["grad_norm"] == pytest.approx(100)


# --- a loss that is not finite


def spoiling(objective, step, layer, batch):
    """Batches that spoil a layer of the student when `step` begins."""

    def give(asked):
        if asked == step and spoiled:
            with torch.no_grad():
                objective.model.mixers[layer].phi_q.bias.fill_(math.nan)
        spoiled.append(asked)
        return batch(asked)

    spoiled: list[int] = []
    return give


@pytest.mark.parametrize(("name", "group"), [("stage1", "stage1"), ("stage2", "stage2")])
def test_a_loss_that_is_not_finite_stops_the_run_with_step_layer_and_remedy(
    name, group, objectives, run_in, batches
):
    objective, run = objectives[name](), run_in(log_every=100, precision="bf16")
    with pytest.raises(Diverged) as caught:
        train(objective, spoiling(objective, 2, 1, batches), 5, STAGE, run)
    text = str(caught.value)
    for part in (
        "not finite at step 2 ",
        "layer 1",
        f"lower {group}.lr (now 0.003)",
        f"{group}.lr_new",
        f"{group}.clip (now 1)",
        "precision=fp32",
    ):
        assert part in text
    assert isinstance(caught.value, UserError)
    assert "\n" not in text


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(run_in):
    objective = Quadratic(
        lambda m, t: (m.vector - 1).abs().sqrt().sum() + m.matrix.sum()
    )  # loss 4, gradient infinite
    with pytest.raises(Diverged, match=r"gradient is not finite at step 0 \(loss 4\.0; the only layer\)"):
        train(objective, lambda step: torch.zeros(4, 3, dtype=torch.long), 3, Stage(batch_size=4), run_in())
    assert torch.equal(objective.model.matrix, torch.ones(2, 2))


def test_a_device_that_runs_ahead_keeps_the_weights_of_the_broken_step_and_the_error_names_it(run_in, monkeypatch):
    # as on CUDA, where nobody looks at a loss between two lines of the log; the fused AdamW is there on a CPU too
    monkeypatch.setattr(hm.train, "runs_ahead", lambda device: True)
    objective, run = Quadratic(lambda m, t: (m.matrix / (t.max() != 5)).sum()), run_in(log_every=9, checkpoint_every=5)
    with pytest.raises(Diverged, match=r"not finite at step 5 \(loss inf"):
        train(objective, lambda step: torch.full((4, 3), step), 20, Stage(batch_size=4), run)
    saved = load_file(run.workdir / "checkpoints" / "step-000005" / "tensors.safetensors")
    assert torch.equal(objective.model.matrix, saved["model.matrix"])
    assert not torch.equal(objective.model.matrix, torch.ones(2, 2))
    assert [line["step"] for line in lines(run)] == [0]


# --- it learns


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mixer", ["hedgehog", "hedgemamba", "mamba"])
def test_a_student_learns_a_simple_text(mixer, precision, make_teacher, token_dataset, run_in):
    data, run = token_dataset("train"), run_in(log_every=1, precision=precision)
    student = convert(make_teacher("llama", vocab_size=257), mixer)
    found = train(
        FineTune(student), Batches(data, 32, 8, seed=0).batch, 40, Stage(lr=1e-2, batch_size=8), run
    )
    first = lines(run)[0]["loss"]
    assert found["final_loss"] < 0.55 * first
    assert not student.training


@pytest.mark.parametrize("feed", ["teacher", "student"])
def test_alignment_brings_the_embedded_teachers_layers_closer(feed, tiny_teacher, run_in, ids):
    student, run = convert(tiny_teacher, "hedgehog"), run_in()
    train(
        Align(tiny_teacher, student, feed),
        lambda step: ids(4, 33, vocab=4096, seed=step),
        15,
        Stage(lr=1e-2, batch_size=4),
        run,
    )
    first, last = lines(run)[0], lines(run)[-1]
    assert last["loss"] < 0.9 * first["loss"]
    assert {k for k in first if k.startswith("layer.")} == {f"layer.{i}" for i in range(6)}
    assert sum(last[f"layer.{i}"] < first[f"layer.{i}"] for i in range(6)) >= 5


def test_the_log_has_every_nth_step_and_the_last(objectives, run_in, batches):
    run = run_in(log_every=3)
    found = train(objectives["stage2"](), batches, 8, STAGE, run)
    assert [line["step"] for line in lines(run)] == [0, 3, 6, 7]
    assert [line["tokens"] for line in lines(run)] == [68, 272, 476, 544]
    assert found["final_loss"] == lines(run)[-1]["loss"]
    assert found["peak_memory"] > 10**7  # this process, on a CPU
