"""The fused kernels on a GPU against the float64 reference, at the shapes and dtypes of real teachers."""

import pytest
import torch

from hm.ops import linear_recurrence, resolve_scan
from hm.ops.fused import fused_scan, refusal

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if reason := refusal(torch.device("cuda"), 128, "head", torch.bfloat16):
    pytest.skip(f"scan=fused {reason}", allow_module_level=True)

# ||ours - reference|| / ||reference||, of values and of gradients
BOUND = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
SHAPES = [(6, 2, 128, 64), (4, 4, 160, 80), (2, 1, 256, 128), (2, 2, 512, 256)]  # H, G, N, P


def inputs(L, H, G, N, P, dtype, growing=False):
    """growing: values that grow along the sequence, so that forgetting has an effect: else A's gradient is a sum that
    cancels, and with them q's is one."""
    torch.manual_seed(L)
    q, k = (torch.randn(2, L, heads, N, device="cuda").softmax(-1).to(dtype) for heads in (H, G))
    v = torch.randn(2, L, G, P, device="cuda")
    v = (v + torch.linspace(0, 9, L, device="cuda")[:, None, None] if growing else v).to(dtype)
    return q, k, v, 0.1 * torch.exp(0.5 * torch.randn(2, L, H, device="cuda")), torch.logspace(-2, 0, H, device="cuda")


def run(scan, args, start):
    """[y, gradients of q, k, v, delta, A] for a weight on y that goes from `start` to 1."""
    given = [x.clone().requires_grad_() for x in args]
    y = linear_recurrence(*given, scan=scan)
    y.double().mul(torch.linspace(start, 1, y.numel(), device="cuda", dtype=torch.float64).view_as(y)).sum().backward()
    return [y, *(x.grad for x in given)]


def error_ratio(ours, expected):
    assert torch.isfinite(ours).all()
    return ((ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference_forward_and_backward(shape, dtype):
    for growing, start, kept in ((False, -1, slice(0, 5)), (True, 0.5, slice(5, 6))):
        args = inputs(1000, *shape, dtype, growing)
        expected = run("naive", args, start)[kept]
        for _ in range(3):  # a race shows now and then
            found = run("fused", args, start)[kept]
            assert max(error_ratio(a, b) for a, b in zip(found, expected, strict=True)) < BOUND[dtype]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129])
def test_every_length_is_served(length):
    args = inputs(length, 6, 2, 128, 64, torch.bfloat16)
    y, state = fused_scan(*args)
    y_ref, state_ref = linear_recurrence(*args, scan="naive", return_state=True)
    assert error_ratio(y, y_ref) < BOUND[torch.bfloat16]
    assert error_ratio(state, state_ref) < BOUND[torch.bfloat16]


def test_two_parts_with_the_state_between_equal_the_whole():
    *sequences, A = inputs(300, 6, 2, 128, 64, torch.float32)
    first, rest = ([t[:, part] for t in sequences] for part in (slice(None, 100), slice(100, None)))
    y1, state = fused_scan(*first, A)
    y2, _ = fused_scan(*rest, A, state)
    assert error_ratio(torch.cat([y1, y2], dim=1), linear_recurrence(*sequences, A, scan="naive")) < BOUND[torch.float32]


def test_auto_means_fused_here():
    assert resolve_scan("auto", "cuda", 128) == "fused"
