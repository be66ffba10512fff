"""What a step minimises: its value and its gradients against plain autograd, and what it leaves alone."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hm.adapters import adapter_for
from hm.convert import convert, is_new
from hm.losses import cosine_loss, relative_error
from hm.objectives import Align, FineTune


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def clear(model):
    for p in model.parameters():
        p.grad = None


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name],
            expected[name],
            **({"rtol": 1e-3, "atol": 1e-6} | tolerance),
            msg=lambda m, n=name: f"{n}: {m}",
        )


# --- alignment


def watch(modules):
    """Hooks that keep each module's (inputs, keyword arguments, output)."""
    seen = []
    return seen, [
        m.register_forward_hook(lambda mod, a, kw, out: seen.append((a, kw, out[0])), with_kwargs=True)
        for m in modules
    ]


def mean_cosine_loss(teacher, student, tokens, feed):
    """1 - cos of every converted layer's output and the teacher's, by hand, with its graph."""
    adapter = adapter_for(teacher.config)
    attentions = [adapter.attention(adapter.layers(teacher)[m.layer_idx]) for m in student.mixers]
    seen, handles = watch(attentions)
    with torch.no_grad():
        teacher(input_ids=tokens[:, :-1])
    [h.remove() for h in handles]
    if feed == "teacher":
        outputs = []
        for mixer, (args, kwargs, _) in zip(student.mixers, seen, strict=True):
            hidden = args[0] if args else kwargs["hidden_states"]
            outputs.append(mixer(hidden, position_embeddings=kwargs["position_embeddings"])[0])
    else:
        own, handles = watch(student.mixers)
        student(input_ids=tokens[:, :-1])
        [h.remove() for h in handles]
        outputs = [y for *_, y in own]
    losses = []
    for y, (*_, target) in zip(outputs, seen, strict=True):
        cosine = (y * target).sum(-1) / (y.norm(dim=-1) * target.norm(dim=-1))
        losses.append((1 - cosine).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("feed", ["teacher", "student"])
@pytest.mark.parametrize("kept", [None, [1]], ids=["attention_free", "hybrid"])
def test_alignment_is_the_mean_cosine_loss_over_layers_with_its_gradients(
    kind, feed, kept, make_teacher, randomize, ids
):
    teacher = make_teacher(kind, num_hidden_layers=3)
    student = randomize(convert(teacher, "hedgehog", keep_attention=kept))
    tokens, objective = ids(2, 21), Align(teacher, student, feed)
    losses = mean_cosine_loss(teacher, student, tokens, feed)
    losses.mean().backward()
    expected = gradients(student)
    clear(student)
    found = objective.backward(tokens, 1.0)
    assert found["loss"].item() == pytest.approx(losses.mean().item(), rel=1e-4)
    by_layer = {f"layer.{m.layer_idx}": loss.item() for m, loss in zip(student.mixers, losses, strict=True)}
    assert {k: v.item() for k, v in found.items() if k != "loss"} == pytest.approx(by_layer, rel=1e-4)
    close(gradients(student), expected)
    assert (
        set(expected)
        == {n for n, _, _ in objective.parameters}
        == {n for n, _ in student.named_parameters() if ".phi_" in n}
    )
    assert all(g.abs().max() > 0 for g in expected.values())


@pytest.mark.parametrize("feed", ["teacher", "student"])
def test_alignment_adds_scaled_gradients_to_those_that_are_there(make_teacher, feed, ids):
    teacher = make_teacher("llama")
    student, tokens = convert(teacher, "hedgehog"), ids(2, 21)
    objective = Align(teacher, student, feed)
    objective.backward(tokens, 1.0)
    whole = gradients(student)
    clear(student)
    for _ in range(4):
        objective.backward(tokens, 0.25)
    close(gradients(student), whole, rtol=1e-5)


def test_teacher_fed_layers_learn_independently_and_student_fed_ones_do_not(make_teacher, randomize, ids):
    teacher, tokens = make_teacher("neox"), ids(2, 21)
    for feed, independent in (("teacher", True), ("student", False)):
        found = []
        for move in (0.0, 0.5):
            student = randomize(convert(teacher, "hedgehog"))
            with torch.no_grad():
                student.mixers[0].phi_q.weight += move
            Align(teacher, student, feed).backward(tokens, 1.0)
            found.append(student.mixers[1].phi_q.weight.grad)
        assert torch.equal(*found) == independent


def test_alignment_leaves_the_teacher_without_gradients(make_teacher, ids):
    teacher = make_teacher("neox").requires_grad_(True)
    Align(teacher, convert(teacher, "hedgehog")).backward(ids(2, 21), 1.0)
    assert all(p.grad is None for p in teacher.parameters())


class LargestTensors(TorchDispatchMode):
    """The shapes of all results of all operations, and the most elements in one."""

    def __init__(self):
        super().__init__()
        self.shapes, self.elements = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.shapes.add(tuple(t.shape))
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("objective", ["align_teacher", "align_student", "fine_tune"])
def test_memory_is_linear_in_the_length_forward_and_backward(objective, make_teacher, ids):
    teacher = make_teacher("llama", max_position_embeddings=2048)
    if objective == "fine_tune":
        step = FineTune(convert(teacher, "hedgemamba"))
    else:
        step = Align(teacher, convert(teacher, "hedgehog"), objective.removeprefix("align_"))
    sizes = {}
    for length in (600, 1200):
        with LargestTensors() as seen:
            step.backward(ids(1, length + 1), 1.0)
        assert [s for s in seen.shapes if sum(n >= length for n in s) > 1] == [], "an L x L matrix"
        sizes[length] = seen.elements
    assert sizes[1200] < 2.2 * sizes[600]


# --- fine-tuning


@pytest.mark.parametrize("mixer", ["hedgemamba", "mamba"])
def test_the_loss_and_gradients_of_fine_tuning_are_those_of_transformers_labels(
    teacher, mixer, make_student, ids
):
    student, tokens = make_student(teacher, mixer), ids(2, 33)
    objective = FineTune(student)
    reference = student(input_ids=tokens, labels=tokens).loss
    reference.backward()
    expected = gradients(student)
    clear(student)
    found = objective.backward(tokens, 1.0)
    assert found["loss"].item() == pytest.approx(reference.item(), rel=1e-5)
    assert set(expected) == {n for n, _, _ in objective.parameters}
    close(gradients(student), expected)
    clear(student)
    objective.backward(tokens, 0.25)
    close(gradients(student), {n: g / 4 for n, g in expected.items()})


class Lookup(nn.Module):
    """Predicts `shift` tokens after the one it sees, with certainty."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.head, self.base_model = shift, nn.Linear(10, 10, bias=False), self
        nn.init.eye_(self.head.weight)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **kwargs):
        return SimpleNamespace(last_hidden_state=30.0 * F.one_hot((input_ids + self.shift) % 10, 10))


@pytest.mark.parametrize(("shift", "right"), [(0, False), (1, True), (2, False)])
def test_the_label_of_a_token_is_the_next_one(shift, right):
    counting = (torch.arange(9) + torch.tensor([[0], [5]])) % 10
    model = Lookup(shift)
    loss = FineTune(model, pretraining=True).backward(counting, 1.0)["loss"]
    assert loss.item() == pytest.approx(0 if right else 30, abs=1e-3)


def test_kl_and_its_mixture_with_cross_entropy(make_teacher, make_student, ids):
    teacher, tokens = make_teacher("neox"), ids(2, 21)
    student = make_student(teacher)
    with torch.no_grad():
        p, q = (m(input_ids=tokens[:, :-1]).logits.log_softmax(-1) for m in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    ce = -q.gather(-1, tokens[:, 1:, None]).mean().item()
    for loss, weight, expected in (("ce", 0.3, ce), ("kl", 0.3, kl), ("ce+kl", 0.3, 0.7 * ce + 0.3 * kl)):
        found = FineTune(student, loss, teacher, weight).backward(tokens, 1.0)
        assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert found["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert found["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_is_its_teacher_has_no_kl_and_no_gradient(teacher, ids):
    student = convert(teacher, keep_attention=1)
    found = FineTune(student, "kl", teacher).backward(ids(2, 21), 1.0)
    assert found["loss"].item() == pytest.approx(0, abs=1e-6)
    assert all(g.abs().max() < 1e-4 for g in gradients(student).values())


def test_new_parameters_are_told_from_copied_ones(make_teacher):
    student = convert(make_teacher("neox"))
    told = {n: new for n, _, new in FineTune(student).parameters}
    assert told == {n: is_new(student, n) for n in told}
    assert {n.split("attention.")[1].split(".")[0] for n, new in told.items() if new} == {
        "phi_q",
        "phi_k",
        "ssm",
        "conv",
        "gate",
    }
    teacher = make_teacher("llama")
    assert not any(new for *_, new in FineTune(teacher).parameters)


def test_pre_training_trains_everything_the_embeddings_too(make_teacher):
    model = make_teacher("neox")
    assert [n for n, *_ in FineTune(model, pretraining=True).parameters] == [
        n for n, _ in model.named_parameters()
    ]


# --- naming the layer that broke


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_fine_tuning_names_the_first_layer_whose_output_is_not_finite(kind, layer, make_teacher, ids):
    student = convert(make_teacher(kind, num_hidden_layers=3))
    with torch.no_grad():
        student.mixers[layer].o_proj.weight[0, 0] = math.inf
    assert f"layer {layer} is the first" in FineTune(student).suspect([ids(1, 9)], {})


def test_alignment_names_the_first_layer_whose_loss_is_not_finite(make_teacher, ids):
    teacher = make_teacher("neox", num_hidden_layers=3)
    student = convert(teacher, "hedgehog")
    with torch.no_grad():
        student.mixers[1].phi_q.weight.fill_(math.nan)
        student.mixers[2].phi_q.weight.fill_(math.nan)
    objective, tokens = Align(teacher, student), ids(1, 9)
    losses = {n: v.item() for n, v in objective.backward(tokens, 1.0).items()}
    assert "layer 1 is the first" in objective.suspect([tokens], losses)


def test_a_finite_model_is_not_blamed(make_teacher, ids):
    student = convert(make_teacher("neox"))
    assert "every layer's output is finite" in FineTune(student).suspect([ids(1, 9)], {})


@pytest.mark.parametrize("feed", ["teacher", "student"])
@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_stage_1_of_the_whole_mixer_trains_every_part_of_it_and_nothing_else(kind, feed, loss, make_teacher, randomize, ids):
    teacher = make_teacher(kind, num_hidden_layers=3)
    student = randomize(convert(teacher, "hedgemamba", keep_attention=[1]))
    objective = Align(teacher, student, feed, "mixer", loss)
    named = {n for n, _, _ in objective.parameters}
    assert named == {n for n, _ in student.named_parameters() if any(f".layers.{i}." in n for i in (0, 2)) and ".mlp." not in n and "layernorm" not in n}
    assert {n for n, _, new in objective.parameters if not new} == {n for n in named if re.search(r"_proj|_norm", n) and ".gate." not in n}
    objective.backward(ids(2, 21), 1.0)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p, _ in objective.parameters)


def test_relative_error_sees_the_magnitude_that_the_cosine_does_not():
    torch.manual_seed(0)
    target, half = torch.randn(2, 3, 8), torch.tensor(0.5)
    assert cosine_loss(target * half, target).item() == pytest.approx(0.0, abs=1e-6)
    assert relative_error(target * half, target).item() == pytest.approx(0.25)
    assert relative_error(torch.zeros_like(target), target).item() == pytest.approx(1.0)
    y = torch.randn(2, 3, 8)
    by_token = [(a - b).square().sum() / b.square().sum() for a, b in zip(y.flatten(0, 1), target.flatten(0, 1), strict=True)]
    assert relative_error(y, target).item() == pytest.approx(torch.stack(by_token).mean().item())
