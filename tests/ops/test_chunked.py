import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hm.ops import chunked, linear_recurrence

CHUNK = 64
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 1000]
# Error ratio ||y - reference|| / ||reference|| against the float64 reference on the same (rounded) inputs.
# Both sum in float32, where a decay of some hundred steps multiplies the rounding of one; bfloat16's ratio is
# the rounding of the output.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-3}


def inputs(B, L, H, G, N, P, delta, decay, dtype=torch.float32):
    """Features as phi gives them: positive, with sum 1. Decays over some tokens to hundreds."""
    gen = torch.Generator().manual_seed(L + N)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q, k = (randn(B, L, heads, N).softmax(-1).to(dtype) for heads in (H, G))
    v = randn(B, L, G, P).to(dtype)
    delta = torch.exp(0.5 * randn(B, L, H)).to(dtype) if delta else None
    A = torch.logspace(-2.5, -0.5, H, dtype=torch.float64).to(dtype) if decay else None
    return q, k, v, delta, A


def error_ratio(y, reference):
    assert torch.isfinite(y).all()
    return ((y.double() - reference).norm() / reference.norm()).item()


def reference(*args, **kwargs):
    return linear_recurrence(*(a.double() if torch.is_tensor(a) else a for a in args), scan="naive", **kwargs)


@pytest.mark.parametrize("scan", ["chunked", "recurrent"])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("delta", "decay"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_the_reference_at_every_length(length, delta, decay, dtype, scan):
    args = inputs(2, length, 4, 2, 32, 16, delta, decay, dtype)
    y, state = linear_recurrence(*args, scan=scan, chunk_size=CHUNK, return_state=True)
    y_ref, state_ref = reference(*args, return_state=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert error_ratio(y, y_ref) < BOUND[dtype]
    assert error_ratio(state, state_ref) < BOUND[torch.float32]


@pytest.mark.parametrize("scan", ["chunked", "recurrent"])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_agrees_with_the_reference_at_every_head_size(head_dim, decay, dtype, scan):
    args = inputs(1, 130, 2, 1, 2 * head_dim, head_dim, decay, decay, dtype)
    y = linear_recurrence(*args, scan=scan, chunk_size=CHUNK)
    assert error_ratio(y, reference(*args)) < BOUND[dtype]


@pytest.mark.parametrize("scan", ["chunked", "recurrent"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("H", "G"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_query_heads_read_the_key_value_head_of_their_group(H, G, decay, scan):
    q, k, v, delta, A = inputs(2, 70, H, G, 8, 4, decay, decay)
    y = linear_recurrence(q, k, v, delta, A, scan=scan, chunk_size=16)
    for h in range(H):
        g = h // (H // G)
        one = (delta if delta is None else delta[:, :, h : h + 1], A if A is None else A[h : h + 1])
        alone = reference(q[:, :, h : h + 1], k[:, :, g : g + 1], v[:, :, g : g + 1], *one)
        assert error_ratio(y[:, :, h : h + 1], alone) < BOUND[torch.float32]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("names", ["qkv", "qkvd", "qkvA", "qkvdA", "qkvh", "qkvdAh"])
def test_gradients_of_the_chunked_scan_pass_gradcheck(names, normalize):
    """7 tokens in chunks of 3: whole chunks, a part of one, and two query heads on one key/value head."""
    q, k, v, delta, A = inputs(1, 7, 2, 1, 3, 2, True, True, torch.float64)
    given = {"q": q, "k": k, "v": v, "d": delta, "A": A, "h": torch.rand(1, 2, 3, 2 + normalize).double()}
    tensors = [given[name].requires_grad_() for name in names]

    def run(*tensors):
        t = dict(zip(names, tensors, strict=True))
        return linear_recurrence(
            *(t["q"], t["k"], t["v"], t.get("d"), t.get("A")),
            initial_state=t.get("h"),
            normalize=normalize,
            chunk_size=3,
            return_state=True,
        )

    torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("decay", [False, True])
def test_gradients_equal_the_references_in_float32_over_many_chunks(decay):
    def gradients(scan, dtype):
        given = [t.to(dtype).requires_grad_() for t in inputs(1, 200, 4, 2, 8, 4, True, True)]
        y = linear_recurrence(*given[: 5 if decay else 3], scan=scan, chunk_size=16)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        return [t.grad for t in given if t.grad is not None]

    for g, g_ref in zip(gradients("chunked", torch.float32), gradients("naive", torch.float64), strict=True):
        assert error_ratio(g, g_ref) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_the_chunk_size_does_not_change_the_result(chunk_size):
    args = inputs(1, 100, 2, 1, 8, 4, True, True)
    y = linear_recurrence(*args, chunk_size=chunk_size)
    assert error_ratio(y, reference(*args)) < BOUND[torch.float32]


@pytest.mark.parametrize("decay", [False, True])
def test_a_long_sequence_taken_in_segments_gives_the_same_in_both_directions(monkeypatch, decay):
    results = []
    for elements in (2**21, 1):  # all chunks at once, and one at a time
        monkeypatch.setattr(chunked, "SEGMENT_ELEMENTS", elements)
        given = [t.requires_grad_() for t in inputs(2, 100, 4, 2, 8, 4, True, True)[: 5 if decay else 3]]
        y, state = linear_recurrence(*given, chunk_size=16, return_state=True)
        loss = y.square().sum() + state.square().sum()
        results.append([y, state, *torch.autograd.grad(loss, given)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("constant", [1e-4, 1.0, 30.0])
def test_a_constant_delta_cancels_without_decay(constant):
    q, k, v, _, _ = inputs(2, 300, 2, 2, 16, 8, False, False)
    y = linear_recurrence(q, k, v, torch.full((2, 300, 2), constant))
    assert error_ratio(y, reference(q, k, v)) < BOUND[torch.float32]


@pytest.mark.parametrize("rate", [0.0, 1e-8, 1e4])
def test_extreme_decays_and_one_hot_features_give_no_nan_in_either_direction(rate):
    q, k, v, delta, _ = inputs(1, 100, 2, 2, 8, 4, True, True)
    q, k = (2000 * q).softmax(-1), (2000 * k).softmax(-1)
    given = [t.requires_grad_() for t in (q, k, v, delta, torch.full((2,), rate))]
    y = linear_recurrence(*given, chunk_size=32)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(t.grad).all() for t in given)


def test_autocast_does_not_lower_the_precision_inside():
    args = inputs(1, 130, 2, 1, 16, 8, True, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_recurrence(*args)
    assert torch.equal(inside, linear_recurrence(*args))


def test_later_tokens_change_nothing_before_them():
    q, k, v, delta, A = inputs(1, 100, 2, 2, 8, 4, True, True)
    y = linear_recurrence(q, k, v, delta, A, chunk_size=16)
    for t in (q, k, v, delta):
        t[:, 50:] = torch.rand_like(t[:, 50:])
    changed = linear_recurrence(q, k, v, delta, A, chunk_size=16)
    torch.testing.assert_close(changed[:, :50], y[:, :50])
    assert not torch.allclose(changed[:, 50:], y[:, 50:])


class Sizes(TorchDispatchMode):
    """The element counts of all tensors that operators return, in the forward and the backward pass."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.numels += [leaf.numel() for leaf in leaves if torch.is_tensor(leaf)]
        return out


@pytest.mark.parametrize("scan", ["chunked", "recurrent"])
@pytest.mark.parametrize("decay", [False, True])
def test_work_and_memory_are_linear_in_the_length(decay, scan):
    def measure(length):
        given = [t.requires_grad_() for t in inputs(1, length, 2, 1, 4, 3, True, True)]
        with Sizes() as sizes:
            linear_recurrence(*given[: 5 if decay else 3], scan=scan, chunk_size=16).sum().backward()
        return max(sizes.numels), sum(sizes.numels)

    (largest, total), (largest_4x, total_4x) = measure(128), measure(512)
    assert largest_4x <= 4.1 * largest
    assert total_4x <= 4.1 * total
    assert largest_4x < 512 * 512 / 8
