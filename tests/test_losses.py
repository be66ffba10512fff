"""The losses, against numbers worked out by hand and against plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hm.losses
from hm.losses import cosine_loss, next_token_loss


def test_cosine_loss_by_hand():
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[4.0, 3.0], [5.0, 0.0]], [[3.0, 0.0], [-2.0, -2.0]]])
    # cosines 24/25, 1, 0 and -1
    assert cosine_loss(student, teacher).item() == pytest.approx(1 - (24 / 25 + 1 + 0 - 1) / 4)


def test_cosine_loss_does_not_see_the_size():
    y = torch.randn(2, 5, 8)
    assert cosine_loss(1e3 * y, 1e-3 * y).item() == pytest.approx(0, abs=1e-6)


def test_cosine_loss_does_not_grow_with_the_length_or_the_batch_and_is_float32_from_bfloat16():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    short = cosine_loss(student, teacher)
    torch.testing.assert_close(cosine_loss(student.repeat(1, 8, 1), teacher.repeat(1, 8, 1)), short)
    torch.testing.assert_close(cosine_loss(student.repeat(8, 1, 1), teacher.repeat(8, 1, 1)), short)
    a, b = student.bfloat16(), teacher.bfloat16()
    assert torch.equal(cosine_loss(a, b), cosine_loss(a.float(), b.float()))


# --- on the next token


@pytest.fixture
def identity():
    """An output embedding that hands hidden states through as logits."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    return head


def test_cross_entropy_by_hand(identity):
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0]]])  # probabilities 1/4, 3/4 and 3/4, 1/4
    found = next_token_loss(logits, identity, torch.tensor([[1, 1]]))
    assert found.loss.item() == found.ce.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    assert found.kl.item() == 0


def test_kl_is_from_the_teacher_to_the_student_by_hand(identity):
    student, teacher = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[[5.0, 5.0]]])
    # teacher (1/2, 1/2), student (1/4, 3/4)
    labels, kl = torch.tensor([[0]]), 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = next_token_loss(student, identity, labels, kl_weight=1, teacher=(teacher, identity))
    assert (found.loss.item(), found.kl.item()) == pytest.approx((kl, kl))
    backwards = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    found = next_token_loss(teacher, identity, labels, kl_weight=1, teacher=(student, identity))
    assert found.kl.item() == pytest.approx(backwards)


def problem(dtype=torch.float64, bias=True, length=5):
    """Random hidden states, output embeddings of student and teacher (of another width), labels."""
    torch.manual_seed(0)
    hidden = torch.randn(2, length, 8, dtype=dtype, requires_grad=True)
    head = nn.Linear(8, 11, bias=bias, dtype=dtype)
    teacher = torch.randn(2, length, 6, dtype=dtype), nn.Linear(6, 11, bias=False, dtype=dtype)
    return hidden, head, torch.randint(11, (2, length)), teacher


def plain(hidden, head, labels, teacher, kl_weight):
    """The same from whole logits, by autograd."""
    logits = head(hidden).flatten(0, 1)
    ce = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels.flatten())
    if kl_weight == 0:
        return ce
    wanted = teacher[1](teacher[0]).flatten(0, 1).log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    return (1 - kl_weight) * ce + kl_weight * kl


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [3, 10, 4096])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_and_all_gradients_are_those_of_whole_logits(kl_weight, rows, frozen, monkeypatch):
    monkeypatch.setattr(hm.losses, "ROWS", rows)
    hidden, head, labels, teacher = problem(bias=not frozen)
    head.requires_grad_(not frozen)
    wanted = [hidden, *([] if frozen else head.parameters())]
    loss = plain(hidden, head, labels, teacher, kl_weight)
    expected = torch.autograd.grad(3 * loss, wanted)
    found = next_token_loss(hidden, head, labels, kl_weight=kl_weight, teacher=teacher if kl_weight else None).loss
    torch.testing.assert_close(found, loss)
    for gradient, other in zip(torch.autograd.grad(3 * found, wanted), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_under_autocast_products_are_bfloat16_and_the_loss_and_gradients_float32():
    hidden, head, labels, teacher = problem(torch.float32, length=200)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(hidden, head, labels, teacher, 0.0)
        found = next_token_loss(hidden, head, labels).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(
        torch.autograd.grad(found, [hidden, head.weight]), torch.autograd.grad(expected, [hidden, head.weight]), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.01 * other.norm()


class Largest(TorchDispatchMode):
    """The most elements of a floating-point result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_logits_of_more_than_a_chunk_of_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(hm.losses, "ROWS", 16)
    hidden, head, labels, teacher = problem(torch.float32, length=64)
    with Largest() as seen:
        next_token_loss(hidden, head, labels, kl_weight=0.5, teacher=teacher).loss.backward()
    assert seen.elements == hidden.numel() < labels.numel() * 11


def test_no_loss_on_tokens_grows_with_the_length_or_the_batch():
    hidden, head, labels, (other, teacher_head) = problem()
    losses = [
        next_token_loss(
            hidden.repeat(b, n, 1), head, labels.repeat(b, n), kl_weight=0.5, teacher=(other.repeat(b, n, 1), teacher_head)
        )
        for b, n in ((1, 1), (8, 1), (1, 8))
    ]
    for found in losses[1:]:
        torch.testing.assert_close(tuple(found), tuple(losses[0]))
