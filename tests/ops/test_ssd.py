"""What surrounds the Triton kernel, with a plain twin in its place. `test_ssd_gpu` runs the kernel itself."""

import pytest
import torch

from hm.ops import ssd
from hm.ops.naive import naive_scan


def twin(x, dt, A, B, C, chunk_size, *, initial_states, return_final_states):
    """`mamba_chunk_scan_combined` by its documentation, token by token, with its conditions on the shapes."""
    batch, length, heads, channels = x.shape
    assert length % chunk_size == 0
    assert channels % 8 == 0
    assert B.shape == C.shape == (batch, length, heads, B.shape[-1])
    assert dt.shape == (batch, length, heads)
    assert dt.dtype == A.dtype == torch.float32
    assert x.dtype == B.dtype == C.dtype
    assert return_final_states
    h = x.new_zeros(batch, heads, channels, B.shape[-1]).float() if initial_states is None else initial_states
    y = []
    for t in range(length):
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].float(), B[:, t].float())
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + update
        y.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t].float()))
    return torch.stack(y, dim=1).to(x.dtype), h


@pytest.fixture
def twin_for_the_kernel(monkeypatch):
    monkeypatch.setattr(ssd, "load_kernel", lambda *_: twin)
    monkeypatch.setattr(ssd, "CHUNK", 16)


@pytest.mark.usefixtures("twin_for_the_kernel")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("delta", "decay"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_what_is_given_to_the_kernel_computes_the_recurrence(length, delta, decay, normalize):
    torch.manual_seed(0)
    B, H, G, N, P = 2, 4, 2, 6, 5
    q, k, v = torch.rand(B, length, H, N), torch.rand(B, length, G, N), torch.randn(B, length, G, P)
    delta, A = torch.rand(B, length, H) if delta else None, torch.rand(H) if decay else None
    for state in (None, torch.rand(B, H, N, P + normalize)):
        given = [t.requires_grad_() for t in (q, k, v, delta, A, state) if t is not None]
        gradients = []
        for scan in (ssd.ssd_scan, naive_scan):
            y, after = scan(q, k, v, delta, A, state, normalize=normalize)
            loss = y.double().square().sum() + after.double().square().sum()
            gradients.append([y, after, *torch.autograd.grad(loss, given)])
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("twin_for_the_kernel")
def test_bfloat16_inputs_reach_the_kernel_as_bfloat16_with_a_float32_state():
    q, k, v = (torch.rand(1, 5, 2, 4).bfloat16() for _ in "qkv")
    delta, A = torch.rand(1, 5, 2).bfloat16(), torch.rand(2)
    y, state = ssd.ssd_scan(q, k, v, delta, A)
    assert state.dtype == torch.float32
    expected, _ = naive_scan(q, k, v, delta, A)
    assert (y - expected).norm() / expected.norm() < 1e-2
