"""mamba-ssm's compiled kernel against the float64 recurrence."""

import pytest
import torch

from hm.ops import linear_recurrence, resolve_scan
from hm.ops.kernels import why_unavailable
from hm.ops.selective_scan import KERNEL

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if reason := why_unavailable(*KERNEL):
    pytest.skip(f"needs mamba-ssm with its compiled extension: {reason}", allow_module_level=True)

# ||y - reference|| / ||reference||; in bfloat16 numerator, denominator and delta are each rounded.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SHAPES = {"heads of 64, grouped": (6, 2, 128, 64), "heads of 80": (2, 2, 160, 80), "512 states": (2, 2, 512, 256)}


def inputs(L, H, G, N, P, decay, dtype):
    torch.manual_seed(L)

    def randn(*shape):
        return torch.randn(*shape, device="cuda")

    q, k = (randn(2, L, heads, N).softmax(-1).to(dtype) for heads in (H, G))
    v = randn(2, L, G, P).to(dtype)
    if decay == "head":
        return q, k, v, torch.exp(0.5 * randn(2, L, H)), torch.logspace(-3, -0.5, H, device="cuda")
    return q, k, v, torch.exp(0.5 * randn(2, L, H, P)), torch.exp(1.5 * randn(H, P, N) - 3)


def error_ratio(y, reference):
    assert torch.isfinite(y).all()
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


def exact(*args, **options):
    return linear_recurrence(*(t.double() for t in args), scan="recurrent", **options)


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("length", [1, 127, 300, 2100])
def test_agrees_with_the_reference_at_every_length(length, decay, dtype):
    args = inputs(length, *SHAPES["heads of 64, grouped"], decay, dtype)
    y, state = linear_recurrence(*args, scan="selective_scan", return_state=True)
    y_ref, state_ref = exact(*args, return_state=True)
    assert y.dtype == dtype
    assert error_ratio(y, y_ref) < BOUND[dtype]
    assert error_ratio(state, state_ref) < BOUND[dtype]


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_gradients_agree_with_the_reference(shape, decay, dtype):
    gradients = []
    for run in (lambda *args: linear_recurrence(*args, scan="selective_scan"), exact):
        given = [t.requires_grad_() for t in inputs(130, *SHAPES[shape], decay, dtype)]
        y = run(*given).double()
        weights = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=torch.float64).view_as(y)
        gradients.append([y, *torch.autograd.grad((y * weights).sum(), given)])
    for ours, expected in zip(*gradients, strict=True):
        assert error_ratio(ours, expected) < 3 * BOUND[dtype]


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_two_parts_with_the_state_between_equal_the_whole(decay):
    *sequences, A = inputs(300, *SHAPES["heads of 64, grouped"], decay, torch.float32)
    first, rest = ([t[:, part] for t in sequences] for part in (slice(None, 100), slice(100, None)))
    y1, state = linear_recurrence(*first, A, scan="selective_scan", return_state=True)
    y2 = linear_recurrence(*rest, A, scan="selective_scan", initial_state=state)
    assert error_ratio(torch.cat([y1, y2], dim=1), exact(*sequences, A)) < BOUND[torch.float32]


def test_auto_means_selective_scan_for_a_decay_per_channel():
    assert resolve_scan("auto", "cuda", 512, "channel") == "selective_scan"
