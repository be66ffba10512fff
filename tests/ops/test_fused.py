"""The fused kernels in Triton's interpreter, on a CPU at small shapes, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/ops/test_fused_gpu.py runs them on the GPU", allow_module_level=True)
from hm.errors import UserError
from hm.ops import linear_recurrence
from hm.ops.fused import fused_scan

C = 32  # tokens in a chunk of float32


def inputs(L, H=2, G=1, N=32, P=16, delta=True, decay=True, initial=False, normalize=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(L)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = (normal(1, L, heads, N).softmax(-1).to(dtype) for heads in (H, G))
    return [
        q, k, normal(1, L, G, P).to(dtype), torch.exp(0.5 * normal(1, L, H)) if delta else None,
        torch.logspace(-3, -0.5, H) if decay else None, normal(1, H, N, P + normalize).abs() if initial else None,
    ]  # fmt: skip


def both(args, normalize=True, state_gradient=False):
    """[y, state, gradients of every input] of the fused kernels and of the reference."""
    found = {}
    for name in ("fused", "naive"):
        given = [None if x is None else x.clone().requires_grad_() for x in args]
        if name == "fused":
            y, state = fused_scan(*given, normalize=normalize)
        else:
            y, state = linear_recurrence(
                *given[:5], scan="naive", normalize=normalize, initial_state=given[5], return_state=True
            )
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        loss = (y.double() * weights).sum()
        if state_gradient:
            loss = loss + (state.double() * torch.linspace(0, 1, state.numel(), dtype=torch.float64).view_as(state)).sum()
        loss.backward()
        found[name] = [y, state, *(x.grad for x in given if x is not None)]
    return found["fused"], found["naive"]


def assert_same(fused, naive, bound):
    for ours, expected in zip(fused, naive, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.double() - expected.double()).norm() <= bound * (expected.double().norm() + 1)


@pytest.mark.parametrize("length", [1, C - 1, C, C + 1])
def test_agrees_with_the_reference_forward_and_backward_at_every_length(length):
    assert_same(*both(inputs(length)), 1e-5)


@pytest.mark.parametrize(("delta", "decay"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_part_may_be_missing(delta, decay, normalize):
    assert_same(*both(inputs(C + 5, delta=delta, decay=decay, normalize=normalize), normalize), 1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_goes_on_from_a_state_and_gradients_flow_through_both_states(normalize):
    args = inputs(2 * C + 1, initial=True, normalize=normalize)
    assert_same(*both(args, normalize, state_gradient=True), 1e-5)


@pytest.mark.parametrize(("H", "G", "N", "P"), [(2, 2, 48, 24), (3, 1, 32, 16), (1, 1, 16, 20)])
def test_heads_that_are_no_power_of_two_and_groups(H, G, N, P):
    assert_same(*both(inputs(C + 7, H, G, N, P)), 1e-5)


def test_low_precision_inputs_keep_float32_sums():
    args = inputs(C + 5, N=64, P=32, dtype=torch.float16)  # the interpreter can't multiply bfloat16
    (y, state, *gradients), naive = both(args)
    assert (y.dtype, state.dtype, gradients[0].dtype) == (torch.float16, torch.float32, torch.float16)
    assert_same([y, state, *gradients], naive, 3e-3)


def test_inputs_may_be_views_into_larger_tensors():
    q, k, v, delta, A, _ = inputs(C + 5, G=2)
    packed = torch.cat([v, v, v], dim=-1)
    y, _ = fused_scan(q, k, packed[..., 16:32], delta, A)
    y_packed, _ = fused_scan(q, k, v, delta, A)
    assert torch.equal(y, y_packed)


def test_padding_of_zero_keys_and_delta_adds_nothing_and_gives_no_nan():
    q, k, v, delta, A, _ = inputs(C + 5)
    k[:, :7], delta[:, :7] = 0, 0
    y, state = fused_scan(q, k, v, delta, A)
    y_short, state_short = fused_scan(*(x[:, 7:].contiguous() for x in (q, k, v, delta)), A)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, 7:], y_short)
    torch.testing.assert_close(state, state_short)


def test_a_cpu_a_decay_per_channel_and_float64_are_refused_with_what_to_use_instead():
    from hm.ops import resolve_scan

    with pytest.raises(UserError, match=r"scan=fused needs a CUDA device, not cpu: use scan=chunked"):
        resolve_scan("fused", "cpu", 64)
    with pytest.raises(UserError, match=r"one decay per head, not decay=channel"):
        resolve_scan("fused", "cpu", 64, "channel")
