"""What surrounds the compiled kernel, with a plain twin in its place. `test_selective_scan_gpu` runs the kernel itself."""

import pytest
import torch

from hm.ops import selective_scan as module
from hm.ops.naive import naive_scan
from hm.ops.selective_scan import selective_scan


def twin(u, delta, A, B, C, return_last_state):
    """`selective_scan_fn` by its documentation, token by token, with the compiled code's conditions.

    u, delta: (batch, dim, L); A: (dim, N) < 0; B, C: (batch, groups, N, L), a group for dim / groups channels in turn.
    """
    (batch, dim, length), states, groups = u.shape, A.shape[1], B.shape[1]
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert u.dtype in (torch.float32, torch.bfloat16)
    assert A.dtype == torch.float32
    assert states <= 256
    assert delta.shape == u.shape
    assert A.shape == (dim, states)
    assert B.shape == C.shape == (batch, groups, states, length)
    assert dim % groups == 0
    assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, B, C))
    B, C = (t.float().repeat_interleave(dim // groups, 1) for t in (B, C))
    h, y = torch.zeros(batch, dim, states), []
    for t in range(length):
        d = delta[:, :, t, None].float()
        h = torch.exp(d * A) * h + d * B[..., t] * u[:, :, t, None].float()
        y.append((h * C[..., t]).sum(-1))
    return torch.stack(y, dim=-1).to(u.dtype), h.detach()


@pytest.fixture(autouse=True)
def twin_for_the_kernel(monkeypatch):
    monkeypatch.setattr(module, "load_kernel", lambda *_: twin)


def inputs(decay, B=2, L=9, H=4, G=2, N=6, P=5):
    torch.manual_seed(0)
    q, k, v = torch.rand(B, L, H, N), torch.rand(B, L, G, N), torch.randn(B, L, G, P)
    if decay == "none":
        return q, k, v, None, None
    shapes = {"head": ((B, L, H), (H,)), "channel": ((B, L, H, P), (H, P, N))}[decay]
    return q, k, v, *(torch.rand(shape) for shape in shapes)


@pytest.mark.parametrize("max_state", [256, 4], ids=["one_pass", "two_passes"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_what_is_given_to_the_kernel_computes_the_recurrence(monkeypatch, decay, normalize, max_state):
    monkeypatch.setattr(module, "MAX_STATE", max_state)
    args = inputs(decay)
    channels = 5 if not normalize else 10 if decay == "channel" else 6
    for state in (None, torch.rand(2, 4, 6, channels)):
        given = [t.requires_grad_() for t in (*args, state) if t is not None]
        results = []
        for scan in (selective_scan, naive_scan):
            y, after = scan(*args, state, normalize=normalize)
            results.append([y, after.detach(), *torch.autograd.grad(y.double().square().sum(), given)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-3, atol=1e-4)


def test_512_states_run_in_two_passes():
    args = inputs("channel", B=1, L=3, H=2, G=1, N=512, P=2)
    y, state = selective_scan(*args)
    y_ref, state_ref = naive_scan(*args)
    torch.testing.assert_close(y.double(), y_ref, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), state_ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_bfloat16_inputs_reach_the_kernel_as_bfloat16_with_a_float32_state(decay):
    q, k, v, delta, A = inputs(decay)
    args = (q.bfloat16(), k.bfloat16(), v.bfloat16(), delta, A)
    y, state = selective_scan(*args)
    expected, _ = naive_scan(*args)
    assert y.dtype == state.dtype == torch.float32
    assert (y - expected).norm() / expected.norm() < 1e-2


def test_the_denominator_takes_one_channel_of_a_head_or_as_many_as_the_values(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "load_kernel", lambda *_: lambda u, *rest, **options: seen.append(u) or twin(u, *rest, **options))
    for decay in ("head", "channel"):
        selective_scan(*inputs(decay))
    assert [u.shape for u in seen] == [(2, 4 * (5 + 1), 9), (2, 4 * (5 + 5), 9)]


@pytest.mark.parametrize(("decay", "state"), [("head", None), ("head", torch.rand(2, 4, 6, 6)), ("channel", None)])
def test_the_kernels_state_is_returned_without_a_gradient_since_it_has_none(decay, state):
    *args, A = inputs(decay)
    y, after = selective_scan(*args, A.requires_grad_(), state)
    assert y.requires_grad
    assert not after.requires_grad
