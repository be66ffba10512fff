"""mamba-ssm's kernel against the float64 reference. Each new shape is autotuned, which takes minutes."""

import pytest
import torch

from hm.ops import linear_recurrence, resolve_scan
from hm.ops.kernels import why_unavailable
from hm.ops.ssd import KERNEL

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if reason := why_unavailable(*KERNEL):
    pytest.skip(f"needs mamba-ssm's Triton operators: {reason}", allow_module_level=True)

# ||y - reference|| / ||reference||; matrix products of float32 run as TF32 (10 bits of mantissa).
BOUND = {torch.float32: 3e-3, torch.bfloat16: 2e-2}


def inputs(L, H, G, N, P, delta, decay, dtype):
    torch.manual_seed(L)
    q, k = (torch.randn(2, L, heads, N, device="cuda").softmax(-1).to(dtype) for heads in (H, G))
    v = torch.randn(2, L, G, P, device="cuda").to(dtype)
    delta = torch.exp(0.5 * torch.randn(2, L, H, device="cuda")) if delta else None
    return q, k, v, delta, torch.logspace(-3, -0.5, H, device="cuda") if decay else None


def error_ratio(y, reference):
    assert torch.isfinite(y).all()
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("delta", "decay"), [(False, False), (True, True)])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
def test_agrees_with_the_reference_at_every_length(length, delta, decay, dtype):
    args = inputs(length, 6, 2, 128, 64, delta, decay, dtype)
    y, state = linear_recurrence(*args, scan="ssd", return_state=True)
    y_ref, state_ref = linear_recurrence(*args, scan="naive", return_state=True)
    assert y.dtype == dtype
    assert error_ratio(y, y_ref) < BOUND[dtype]
    assert error_ratio(state, state_ref) < BOUND[dtype]


def test_a_head_of_256_with_512_features_runs_and_agrees():
    args = inputs(300, 2, 2, 512, 256, True, True, torch.bfloat16)
    y = linear_recurrence(*args, scan="ssd")
    assert error_ratio(y, linear_recurrence(*args, scan="naive")) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("dtype", list(BOUND))
def test_gradients_agree_with_the_reference(dtype):
    gradients = {}
    for scan in ("ssd", "naive"):
        given = [t.requires_grad_() for t in inputs(300, 6, 2, 128, 64, True, True, dtype)]
        y = linear_recurrence(*given, scan=scan).double()
        weights = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=torch.float64).view_as(y)
        (y * weights).sum().backward()
        gradients[scan] = [t.grad for t in given]
    for ours, expected in zip(gradients["ssd"], gradients["naive"], strict=True):
        assert error_ratio(ours, expected) < 3 * BOUND[dtype]


def test_two_parts_with_the_state_between_equal_the_whole():
    args = inputs(300, 6, 2, 128, 64, True, True, torch.float32)
    *sequences, A = args
    y = linear_recurrence(*args, scan="naive")
    first, rest = ([t[:, part] for t in sequences] for part in (slice(None, 100), slice(100, None)))
    y1, state = linear_recurrence(*first, A, scan="ssd", return_state=True)
    y2 = linear_recurrence(*rest, A, scan="ssd", initial_state=state)
    assert error_ratio(torch.cat([y1, y2], dim=1), y) < BOUND[torch.float32]


def test_auto_means_ssd_here():
    assert resolve_scan("auto", "cuda", 128) == "ssd"
