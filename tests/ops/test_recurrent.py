import pytest
import torch

from hm.ops import linear_recurrence, step

SCANS = ["naive", "recurrent", "chunked"]


def inputs(L, delta, decay, B=2, H=4, G=2, N=8, P=4):
    torch.manual_seed(L)
    q, k = torch.randn(B, L, H, N).softmax(-1), torch.randn(B, L, G, N).softmax(-1)
    v = torch.randn(B, L, G, P)
    return q, k, v, torch.rand(B, L, H) if delta else None, torch.rand(H) if decay else None


def part(args, tokens):
    *sequences, A = args
    return (*(t if t is None else t[:, tokens] for t in sequences), A)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("delta", "decay"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_two_parts_with_the_state_between_equal_the_whole(cut, delta, decay, normalize, scan):
    args = inputs(50, delta, decay)
    options = {"scan": scan, "normalize": normalize, "chunk_size": 16, "return_state": True}
    y, state = linear_recurrence(*args, **options)
    y1, between = linear_recurrence(*part(args, slice(None, cut)), **options)
    y2, after = linear_recurrence(*part(args, slice(cut, None)), **options, initial_state=between)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, state, rtol=1e-4, atol=1e-5)
    assert state.shape == (2, 4, 8, 4 + normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("delta", "decay"), [(False, False), (True, False), (False, True), (True, True)])
def test_steps_go_on_from_the_state_of_a_chunked_prefill(delta, decay, normalize):
    args = inputs(40, delta, decay)
    whole = linear_recurrence(*args, scan="naive", normalize=normalize)
    prefill = part(args, slice(None, 33))
    _, state = linear_recurrence(*prefill, normalize=normalize, chunk_size=16, return_state=True)
    for t in range(33, 40):
        *one, A = part(args, t)
        y, state = step(state, *one, A, normalize)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)


def test_a_step_keeps_a_float32_state_for_bfloat16_tokens_and_leaves_the_old_one_alone():
    q, k, v, delta, A = (t.bfloat16() for t in inputs(2, True, True))
    _, state = step(None, q[:, 0], k[:, 0], v[:, 0], delta[:, 0], A)
    before = state.clone()
    y, after = step(state, q[:, 1], k[:, 1], v[:, 1], delta[:, 1], A)
    assert y.dtype == torch.bfloat16
    assert after.dtype == torch.float32
    assert torch.equal(state, before)
    assert not torch.equal(after, before)


def test_the_first_token_alone_gives_its_own_value():
    q, k, v, delta, A = inputs(1, True, True)
    y, _ = step(None, q[:, 0], k[:, 0], v[:, 0], delta[:, 0], A)
    torch.testing.assert_close(y, v[:, 0].repeat_interleave(2, 1))
