"""What must hold in float32 over a very long sequence, whose sums grow and whose decays underflow."""

import pytest
import torch

from hm.ops import linear_recurrence

LONG = 131072


def inputs(length, heads=1, N=8, P=4):
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, heads, N, generator=gen).softmax(-1) for _ in "qk")
    v = 1 + torch.randn(1, length, heads, P, generator=gen)  # with a mean, so that y does not vanish
    return q, k, v, torch.exp(torch.randn(1, length, heads, generator=gen) - 4)


def error_ratio(y, reference):
    assert torch.isfinite(y).all()
    return ((y.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_the_sums_of_128k_tokens_without_decay_stay_as_exact_as_those_of_a_few(dtype, bound):
    q, k, v, delta = inputs(LONG)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    A = torch.zeros(1)
    y, state = linear_recurrence(q, k, v, delta, A, return_state=True)
    exact = (t.double() for t in (q, k, v, delta, A))
    y_ref, state_ref = linear_recurrence(*exact, return_state=True)
    assert error_ratio(y[:, -1000:], y_ref[:, -1000:]) < bound
    assert error_ratio(state, state_ref) < 1e-6


def test_generation_adds_to_a_state_of_128k_tokens_what_a_token_is_worth():
    """In bfloat16 a sum of 256 equal terms would stop growing."""
    q, k, v = (t.bfloat16() for t in inputs(1)[:3])
    state = torch.full((1, 1, 8, 5), float(LONG))
    _, after = linear_recurrence(q, k, v, scan="recurrent", initial_state=state, return_state=True)
    added = k[0, :, 0, :, None] * torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    torch.testing.assert_close((after - state)[0, 0], added[0, 0].float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("scan", ["chunked", "recurrent"])
@pytest.mark.parametrize("form", ["head", "channel"])
@pytest.mark.parametrize("rate", [1.0, 100.0, 1e4])
def test_decays_that_underflow_forget_all_before_them_and_leave_the_gradients_finite(rate, form, scan):
    q, k, v, delta = inputs(700)
    delta[:, 300:400] = 2.0  # exp(-200 rate) is 0 in float32
    A = torch.full((1,), rate)
    if form == "channel":
        delta, A = delta[..., None].repeat(1, 1, 1, 4), A[:, None, None].repeat(1, 4, 8)
    given = [t.requires_grad_() for t in (q, k, v, delta, A)]
    y = linear_recurrence(*given, scan=scan)
    gradients = torch.autograd.grad(y.square().sum(), given)
    assert all(torch.isfinite(g).all() for g in gradients)
    without = linear_recurrence(*(t[:, 300:].detach() for t in (q, k, v, delta)), A.detach(), scan=scan)
    # in a chunk, decays are differences of sums that reach 64 * 200 * rate, and so exact to 1e-7 of that
    torch.testing.assert_close(y[:, 400:].detach(), without[:, 100:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1e4])
def test_no_decay_can_make_the_denominator_vanish_since_a_token_does_not_decay_its_own_key(rate):
    q, k, _, delta = inputs(2000)
    ones = torch.ones(1, 2000, 1, 1)
    denominator = linear_recurrence(q, k, ones, delta, torch.full((1,), rate), normalize=False)
    assert (denominator[..., 0] >= 0.99 * delta * (q * k).sum(-1)).all()
