"""The reference against numbers worked out by hand, so that it does not only agree with itself."""

import math

import pytest
import torch

from hm.ops import linear_recurrence

SCANS = ["naive", "recurrent", "chunked"]


def two_tokens():
    """One head, N = 2, P = 1, delta = (2, 1/2), A = 2 ln 2, so that exp(-delta_2 A) = 1/2:

    h_1 = 2 (5, 10) = (10, 20), z_1 = 2 (1, 2) = (2, 4), y_1 = 10/2
    h_2 = (10, 20)/2 - (3, 1)/2 = (7/2, 19/2), z_2 = (2, 4)/2 + (3, 1)/2 = (5/2, 5/2), y_2 = 13/5
    """
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).view(1, 2, 1, 2)
    v = torch.tensor([5.0, -1.0]).view(1, 2, 1, 1)
    return q, k, v, torch.tensor([2.0, 0.5]).view(1, 2, 1), torch.tensor([2 * math.log(2)])


@pytest.mark.parametrize("scan", SCANS)
def test_two_tokens_with_decay_worked_out_by_hand(scan):
    y, state = linear_recurrence(*two_tokens(), scan=scan, return_state=True)
    assert y.flatten().tolist() == pytest.approx([5, 2.6])
    assert state[0, 0].flatten().tolist() == pytest.approx([3.5, 2.5, 9.5, 2.5])


@pytest.mark.parametrize("scan", SCANS)
def test_two_tokens_without_the_denominator(scan):
    y, state = linear_recurrence(*two_tokens(), scan=scan, normalize=False, return_state=True)
    assert y.flatten().tolist() == pytest.approx([10, 13])
    assert state[0, 0].flatten().tolist() == pytest.approx([3.5, 9.5])


@pytest.mark.parametrize("scan", SCANS)
def test_two_tokens_of_linear_attention(scan):
    """Scores of the second token: 3 and 4, so (3 * 5 - 4) / 7."""
    q, k, v, _, _ = two_tokens()
    y = linear_recurrence(q, k, v, scan=scan)
    assert y.flatten().tolist() == pytest.approx([5, 11 / 7])
    y = linear_recurrence(q, k, 2 * v, torch.full((1, 2, 1), 3.0), scan=scan)
    assert y.flatten().tolist() == pytest.approx([10, 22 / 7])


@pytest.mark.parametrize("scan", SCANS)
def test_a_decay_that_forgets_everything_leaves_the_current_value(scan):
    torch.manual_seed(0)
    q, k, v = torch.rand(1, 70, 2, 4), torch.rand(1, 70, 2, 4), torch.randn(1, 70, 2, 3)
    y = linear_recurrence(q, k, v, A=torch.full((2,), 200.0), scan=scan)
    torch.testing.assert_close(y, v, rtol=1e-4, atol=1e-4)
