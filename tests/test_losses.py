"""The losses, against numbers worked out by hand."""

import math

import pytest
import torch

from hm.losses import cosine_loss, cross_entropy, kl_divergence


def test_cosine_loss_by_hand():
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[4.0, 3.0], [5.0, 0.0]], [[3.0, 0.0], [-2.0, -2.0]]])
    # cosines 24/25, 1, 0 and -1
    assert cosine_loss(student, teacher).item() == pytest.approx(1 - (24 / 25 + 1 + 0 - 1) / 4)


def test_cosine_loss_does_not_see_the_size():
    y = torch.randn(2, 5, 8)
    assert cosine_loss(1e3 * y, 1e-3 * y).item() == pytest.approx(0, abs=1e-6)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0]]])  # probabilities 1/4, 3/4 and 3/4, 1/4
    labels = torch.tensor([[1, 1]])
    assert cross_entropy(logits, labels).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


def test_kl_is_from_the_teacher_to_the_student_by_hand():
    student, teacher = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[[0.0, 0.0]]])
    # teacher (1/2, 1/2), student (1/4, 3/4)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(student, teacher).item() == pytest.approx(expected)
    backwards = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(teacher, student).item() == pytest.approx(backwards)


def test_kl_is_zero_for_equal_distributions_whatever_is_added_to_the_logits():
    logits = torch.randn(2, 5, 7)
    assert kl_divergence(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [cosine_loss, kl_divergence], ids=lambda f: f.__name__)
def test_no_loss_grows_with_the_length_or_the_batch(loss):
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    short = loss(student, teacher)
    torch.testing.assert_close(loss(student.repeat(1, 8, 1), teacher.repeat(1, 8, 1)), short)
    torch.testing.assert_close(loss(student.repeat(8, 1, 1), teacher.repeat(8, 1, 1)), short)


def test_cross_entropy_does_not_grow_with_the_length_or_the_batch():
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    short = cross_entropy(logits, labels)
    torch.testing.assert_close(cross_entropy(logits.repeat(1, 8, 1), labels.repeat(1, 8)), short)
    torch.testing.assert_close(cross_entropy(logits.repeat(8, 1, 1), labels.repeat(8, 1)), short)


def test_every_loss_is_computed_in_float32_from_bfloat16():
    a, b = torch.randn(2, 5, 7).bfloat16(), torch.randn(2, 5, 7).bfloat16()
    labels = torch.randint(7, (2, 5))
    assert torch.equal(cosine_loss(a, b), cosine_loss(a.float(), b.float()))
    assert torch.equal(kl_divergence(a, b), kl_divergence(a.float(), b.float()))
    assert torch.equal(cross_entropy(a, labels), cross_entropy(a.float(), labels))
