"""Decays per channel and state (Mamba-1's form): the definition, and the back ends against it."""

import math

import pytest
import torch

from hm.ops import linear_recurrence, step

BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-3}
SCANS = ["recurrent", "chunked"]


def inputs(B, L, H, G, N, P, dtype=torch.float32):
    """Features as phi gives them; decays over some tokens to hundreds, different for every channel and state."""
    gen = torch.Generator().manual_seed(L + N)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q, k = (randn(B, L, heads, N).softmax(-1).to(dtype) for heads in (H, G))
    delta, A = torch.exp(0.5 * randn(B, L, H, P)), torch.exp(1.5 * randn(H, P, N) - 3)
    return q, k, randn(B, L, G, P).to(dtype), delta.to(dtype), A.to(dtype)


def error_ratio(y, reference):
    assert torch.isfinite(y).all()
    return ((y.double() - reference).norm() / reference.norm()).item()


def reference(*args, **kwargs):
    return linear_recurrence(*(a.double() if torch.is_tensor(a) else a for a in args), scan="naive", **kwargs)


@pytest.mark.parametrize("scan", ["naive", *SCANS])
def test_two_tokens_worked_out_by_hand(scan):
    """One head, N = 2, P = 2; channel 0: delta = (2, 1/2), A = (2 ln 2, 0); channel 1: delta = (1, 1), A = (ln 4, ln 2).

    k_1 = (1, 2), k_2 = (3, 1), v_1 = (5, 6), v_2 = (-1, 2), q_2 = (1, 1)
    channel 0: h_2 = (10/2 - 3/2, 20 - 1/2) = (7/2, 39/2), z_2 = (2/2 + 3/2, 4 + 1/2) = (5/2, 9/2), y = 23/7
    channel 1: h_2 = (6/4 + 6, 12/2 + 2) = (15/2, 8), z_2 = (1/4 + 3, 2/2 + 1) = (13/4, 2), y = 62/21
    """
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[5.0, 6.0], [-1.0, 2.0]]).view(1, 2, 1, 2)
    delta = torch.tensor([[2.0, 1.0], [0.5, 1.0]]).view(1, 2, 1, 2)
    A = torch.tensor([[2 * math.log(2), 0.0], [math.log(4), math.log(2)]]).view(1, 2, 2)
    y, state = linear_recurrence(q, k, v, delta, A, scan=scan, return_state=True)
    assert y.flatten().tolist() == pytest.approx([5, 6, 23 / 7, 62 / 21])
    assert state[0, 0].flatten().tolist() == pytest.approx([3.5, 7.5, 2.5, 3.25, 19.5, 8, 4.5, 2])
    y = linear_recurrence(q, k, v, delta, A, scan=scan, normalize=False)
    assert y[0, 1].flatten().tolist() == pytest.approx([23, 15.5])


@pytest.mark.parametrize("scan", ["naive", *SCANS])
def test_decays_that_are_equal_within_a_head_are_the_form_per_head(scan):
    q, k, v, delta, A = inputs(2, 40, 4, 2, 6, 3)
    delta, A = delta[..., 0], A[:, 0, 0]
    y, state = linear_recurrence(q, k, v, delta, A, scan=scan, return_state=True)
    spread = (delta[..., None].expand(-1, -1, -1, 3), A[:, None, None].expand(-1, 3, 6))
    y_channel, state_channel = linear_recurrence(q, k, v, *spread, scan=scan, return_state=True)
    torch.testing.assert_close(y_channel, y)
    torch.testing.assert_close(state_channel, torch.cat([state, state[..., -1:].expand(-1, -1, -1, 2)], -1))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("length", [1, 15, 16, 17, 130])
def test_agrees_with_the_reference_at_every_length(length, dtype, scan):
    args = inputs(2, length, 4, 2, 12, 5, dtype)
    y, state = linear_recurrence(*args, scan=scan, chunk_size=16, return_state=True)
    y_ref, state_ref = reference(*args, return_state=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert error_ratio(y, y_ref) < BOUND[dtype]
    assert error_ratio(state, state_ref) < BOUND[torch.float32]


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_the_chunked_form_agrees_with_the_recurrence_at_every_head_size(head_dim):
    args = inputs(1, 20, 2, 1, 2 * head_dim, head_dim)
    y = linear_recurrence(*args, scan="chunked", chunk_size=8)
    expected = linear_recurrence(*(t.double() for t in args), scan="recurrent")
    assert error_ratio(y, expected) < BOUND[torch.float32]


@pytest.mark.parametrize("names", ["qkvd", "qkvA", "qkvdA", "qkvdAh"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scan", SCANS)
def test_gradients_pass_gradcheck(scan, normalize, names):
    """7 tokens in blocks of 3, two query heads on one key/value head."""
    q, k, v, delta, A = inputs(1, 7, 2, 1, 3, 2, torch.float64)
    given = {"q": q, "k": k, "v": v, "d": delta, "A": A, "h": torch.rand(1, 2, 3, 2 * (1 + normalize)).double()}

    def run(*tensors):
        t = dict(zip(names, tensors, strict=True))
        return linear_recurrence(
            *(t["q"], t["k"], t["v"], t.get("d"), t.get("A")), initial_state=t.get("h"), normalize=normalize,
            chunk_size=3, return_state=True, scan=scan,
        )  # fmt: skip

    torch.autograd.gradcheck(run, [given[name].requires_grad_() for name in names], fast_mode=True)


@pytest.mark.parametrize("scan", ["naive", *SCANS])
@pytest.mark.parametrize("normalize", [True, False])
def test_two_parts_with_the_state_between_equal_the_whole(scan, normalize):
    args = inputs(2, 50, 4, 2, 8, 4)
    *sequences, A = args
    options = {"scan": scan, "normalize": normalize, "chunk_size": 16, "return_state": True}
    y, state = linear_recurrence(*args, **options)
    y1, between = linear_recurrence(*(t[:, :37] for t in sequences), A, **options)
    y2, after = linear_recurrence(*(t[:, 37:] for t in sequences), A, **options, initial_state=between)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, state, rtol=1e-4, atol=1e-5)
    assert state.shape == (2, 4, 8, 8 if normalize else 4)
    y, after = step(between, *(t[:, 37] for t in sequences), A, normalize)
    torch.testing.assert_close(y, y2[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("rate", [0.0, 1e-8, 1e4])
def test_extreme_decays_give_no_nan_in_either_direction(rate, scan):
    q, k, v, delta, A = inputs(1, 100, 2, 2, 8, 4)
    given = [t.requires_grad_() for t in (q, k, v, delta, torch.full_like(A, rate))]
    y = linear_recurrence(*given, chunk_size=32, scan=scan)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(t.grad).all() for t in given)


def test_the_chunked_form_keeps_little_for_the_backward_pass():
    def kept(scan):
        numels = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numels.append(t.numel()) or t, lambda t: t):
            linear_recurrence(*(t.requires_grad_() for t in inputs(1, 64, 2, 2, 16, 8)), scan=scan, chunk_size=16)
        return sum(numels)

    states_between_blocks = 64 // 16 * (2 * 16 * 2 * 8)  # a checkpoint's inputs are not counted by the hooks
    assert kept("chunked") + states_between_blocks < kept("recurrent") / 10


@pytest.mark.parametrize("constant", [1e-4, 30.0])
def test_a_constant_delta_of_each_channel_cancels_without_decay(constant):
    q, k, v, _, _ = inputs(2, 300, 2, 2, 16, 8)
    delta = torch.full((2, 300, 2, 8), constant) * torch.logspace(-2, 0, 8)
    assert error_ratio(linear_recurrence(q, k, v, delta), reference(q, k, v)) < BOUND[torch.float32]
