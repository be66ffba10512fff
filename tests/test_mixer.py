"""The mixers against their equations, one token and one head at a time, and how the decay learns."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hm.mixer import (
    CONV_WIDTH,
    DELTA_MAX,
    DELTA_MIN,
    SILU_ONE,
    CausalConv,
    Decay,
    LayerState,
    MambaMixer,
    Mixer,
    MixerSpec,
    SelectiveDecay,
    build_mixer,
)
from hm.ops import linear_recurrence

B, L, D, H, G, d, ROTARY = 2, 11, 12, 4, 2, 6, 4
SHAPE = {
    "hidden_size": D,
    "num_heads": H,
    "num_kv_heads": G,
    "head_dim": d,
    "rotary_dim": ROTARY,
    "qkv_bias": True,
    "out_bias": True,
}


def rotary(length=L, first=0):
    angle = (first + torch.arange(length, dtype=torch.float64))[:, None] * torch.tensor([0.7, 0.1], dtype=torch.float64)
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def turn(x, t):
    """x: (d,), rotated for position t: dimensions i and i + 2 turn by t times 0.7 and 0.1; 4 and 5 stay."""
    out = x.clone()
    for i, speed in enumerate((0.7, 0.1)):
        c, s = math.cos(t * speed), math.sin(t * speed)
        out[i], out[i + 2] = x[i] * c - x[i + 2] * s, x[i + 2] * c + x[i] * s
    return out


def random_mixer(kind="hedgemamba", **changes):
    """In float64 with every parameter random, so that no part hides behind its start."""
    torch.manual_seed(0)
    mixer = build_mixer(MixerSpec(kind=kind, shape=SHAPE, chunk_size=4, **changes), 0).double()
    mixer.reset_parameters()
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.add_(0.4 * torch.randn_like(p))
            if name == "ssm.A":
                p.copy_(torch.rand_like(p) * 3)
            if name.endswith("ssm.up.bias"):
                p.fill_(-0.5).add_(torch.randn_like(p))
    return mixer


def inputs(length=L, seed=1):
    return torch.randn(B, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(mixer, x):
    with torch.no_grad():
        return mixer(x, position_embeddings=rotary(x.shape[1]))[0]


def conv_by_hand(weight, bias, x):
    """Output t of channel c is sum over j of weight[c, 3 - j] * x[t - j, c]."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(min(t + 1, CONV_WIDTH)):
            y[:, t] += weight[:, CONV_WIDTH - 1 - j] * x[:, t - j]
    return y if bias is None else y + bias


def phi_by_hand(phi, x):
    u = phi.weight @ x + phi.bias
    return torch.cat([u, -u]).softmax(0)


def forgetting_by_hand(m, u, head):
    """delta: (d,) and Lambda: (2d, d) for one token and head; every channel and state has its own with decay=channel."""
    if m.ssm is None:
        return torch.ones(d, dtype=u.dtype), torch.ones(2 * d, d, dtype=u.dtype)
    delta = F.softplus(m.ssm.up.weight @ (m.ssm.down.weight @ u) + m.ssm.up.bias).view(H, -1)[head].expand(d)
    A = m.ssm.A.view(H, -1)[head].expand(d * 2 * d) if m.spec.decay == "head" else m.ssm.A[head]
    return delta, torch.exp(-delta[:, None] * A.reshape(d, 2 * d)).T


@torch.no_grad()
def mixer_by_hand(m, x):
    """The equations at the top of hm/mixer.py."""
    out = torch.empty(B, x.shape[1], D, dtype=x.dtype)
    u = x if m.conv is None else conv_by_hand(m.conv.weight, None, x)
    for b in range(B):
        projected = u[b] @ m.qkv_proj.weight.T + m.qkv_proj.bias
        h = [torch.zeros(2 * d, d, dtype=x.dtype) for _ in range(H)]
        z = [torch.zeros(2 * d, d, dtype=x.dtype) for _ in range(H)]
        for t in range(x.shape[1]):
            q, k, v = projected[t].split([H * d, G * d, G * d])
            q, k, v = q.view(H, d), k.view(G, d), v.view(G, d)
            y = torch.empty(H, d, dtype=x.dtype)
            for head in range(H):
                kv_head = head // (H // G)
                phi_k, phi_q = (
                    phi_by_hand(m.phi_k, turn(k[kv_head], t)),
                    phi_by_hand(m.phi_q, turn(q[head], t)),
                )
                delta, decay = forgetting_by_hand(m, u[b, t], head)
                h[head] = decay * h[head] + delta * torch.outer(phi_k, v[kv_head])
                z[head] = decay * z[head] + delta * phi_k[:, None]
                y[head] = (phi_q @ h[head]) / (phi_q @ z[head])
            y = y.flatten()
            if m.gate is not None:
                y = y * F.silu(m.gate.proj.weight @ x[b, t] + m.gate.proj.bias)
            out[b, t] = m.o_proj.weight @ y + m.o_proj.bias
    return out


@torch.no_grad()
def mamba_by_hand(m, x):
    """Mamba-2's block: convolution and SiLU on (C, B, v), no denominator, skip D, norm after the gate."""
    out = torch.empty(B, x.shape[1], D, dtype=x.dtype)
    cbv = F.silu(conv_by_hand(m.conv.weight, m.conv.bias, x @ m.qkv_proj.weight.T + m.qkv_proj.bias))
    for b in range(B):
        h = [torch.zeros(d, d, dtype=x.dtype) for _ in range(H)]
        for t in range(x.shape[1]):
            c, k, v = cbv[b, t].split([H * d, G * d, G * d])
            c, k, v = c.view(H, d), k.view(G, d), v.view(G, d)
            delta = F.softplus(m.dt_proj.weight @ x[b, t] + m.dt_proj.bias)
            y = torch.empty(H, d, dtype=x.dtype)
            for head in range(H):
                g = head // (H // G)
                h[head] = torch.exp(-delta[head] * m.A_log[head].exp()) * h[head] + delta[head] * torch.outer(
                    k[g], v[g]
                )
                y[head] = c[head] @ h[head] + m.D[head] * v[g]
            y = y.flatten() * F.silu(m.z_proj.weight @ x[b, t])
            y = y / (y.square().mean() + 1e-5).sqrt() * m.norm.weight
            out[b, t] = m.o_proj.weight @ y + m.o_proj.bias
    return out


@pytest.mark.parametrize("conv", [False, True], ids=["no_conv", "conv"])
@pytest.mark.parametrize("gate", [False, True], ids=["no_gate", "gate"])
@pytest.mark.parametrize("ssm", [None, "head", "channel"])
def test_the_mixer_computes_its_equations(ssm, conv, gate):
    mixer, x = random_mixer(ssm=ssm is not None, decay=ssm or "head", conv=conv, gate=gate), inputs()
    # delta passes through float32, hence not 1e-12
    torch.testing.assert_close(run(mixer, x), mixer_by_hand(mixer, x), rtol=1e-5, atol=1e-6)


def test_the_one_step_baseline_computes_mamba_2s_equations():
    mixer, x = random_mixer("mamba"), inputs()
    assert isinstance(mixer, MambaMixer)
    torch.testing.assert_close(run(mixer, x), mamba_by_hand(mixer, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["hedgemamba", "mamba"])
def test_no_output_depends_on_a_later_token(kind):
    mixer, x = random_mixer(kind), inputs()
    for t in range(1, L):
        other = x.clone()
        other[:, t:] = inputs(seed=2)[:, t:]
        assert torch.equal(run(mixer, x)[:, :t], run(mixer, other)[:, :t])
        assert not torch.allclose(run(mixer, x)[:, t], run(mixer, other)[:, t])


def test_without_parts_there_is_no_parameter_of_theirs():
    names = {n.split(".")[0] for n, _ in random_mixer(ssm=False, conv=False, gate=False).named_parameters()}
    assert names == {"qkv_proj", "o_proj", "phi_q", "phi_k"}


def test_the_gates_start_is_silus_one():
    assert F.silu(torch.tensor(SILU_ONE, dtype=torch.float64)).item() == pytest.approx(1, abs=1e-15)


def test_the_convolution_starts_as_the_identity_and_hands_on_its_last_inputs():
    conv, x = CausalConv(D), torch.randn(B, L, D)
    conv.reset_parameters()
    y, tail = conv(x)
    assert torch.equal(y, x)
    assert torch.equal(tail, x[:, -(CONV_WIDTH - 1) :])


def test_the_convolution_goes_on_from_its_last_inputs_at_any_cut():
    conv, x = CausalConv(D, bias=True), torch.randn(B, L, D)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    whole = conv(x)[0]
    for cut in range(1, L):
        first, tail = conv(x[:, :cut])
        second, _ = conv(x[:, cut:], tail)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)


# --- the SSM's start, and how it leaves it


def test_the_ssm_starts_with_no_decay_and_a_constant_delta_per_head_spread_over_mambas_range():
    ssm = SelectiveDecay(D, H)
    ssm.reset_parameters()
    delta, A = ssm(torch.randn(B, L, D))
    assert torch.equal(A, torch.zeros(H))
    assert torch.equal(delta, delta[:1, :1].expand_as(delta))
    expected = torch.logspace(math.log10(DELTA_MIN), math.log10(DELTA_MAX), H)
    torch.testing.assert_close(delta[0, 0], expected, rtol=1e-4, atol=0)


def test_ssm_init_decay_lets_heads_remember_a_thousand_to_ten_tokens():
    ssm = SelectiveDecay(D, H, ssm_init="decay")
    ssm.reset_parameters()
    delta, A = ssm(torch.randn(B, L, D))
    torch.testing.assert_close(1 / (delta * A)[0, 0], torch.logspace(3, 1, H), rtol=1e-4, atol=0)


def test_per_channel_the_decay_starts_at_zero_too_and_every_heads_deltas_are_spread_over_mambas_range():
    ssm = SelectiveDecay(D, H, (d, 2 * d))
    ssm.reset_parameters()
    delta, A = ssm(torch.randn(B, L, D))
    assert torch.equal(A, torch.zeros(H, d, 2 * d))
    expected = torch.logspace(math.log10(DELTA_MIN), math.log10(DELTA_MAX), d)
    torch.testing.assert_close(delta, expected.expand(B, L, H, d), rtol=1e-4, atol=0)


def test_delta_keeps_float32s_precision_under_bfloat16_autocast():
    ssm = SelectiveDecay(D, H, (50, 2))
    ssm.reset_parameters()
    expected, _ = ssm(torch.randn(1, 2, D))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta, _ = ssm(torch.randn(1, 2, D))
    torch.testing.assert_close(delta, expected, rtol=1e-6, atol=0)


def test_a_decay_at_zero_lets_through_a_gradient_that_would_raise_it_and_no_other():
    ssm = SelectiveDecay(D, 6)
    ssm.reset_parameters()
    ssm.project_gradient()  # nothing to do yet
    with torch.no_grad():
        ssm.A.copy_(torch.tensor([0.0, 0.0, -0.3, -0.3, 0.7, 0.7]))
    _, A = ssm(torch.randn(1, 3, D))
    assert torch.equal(A, torch.tensor([0, 0, 0, 0, 0.7, 0.7]))
    A.backward(torch.tensor([-2.0, 3.0, -2.0, 3.0, -2.0, 3.0]))  # gradient descent raises A where this is negative
    ssm.project_gradient()
    assert torch.equal(ssm.A.grad, torch.tensor([-2.0, 0.0, -2.0, 0.0, -2.0, 3.0]))


def test_the_gradient_of_a_decay_at_zero_is_projected_for_the_whole_batch_and_not_for_its_parts():
    a = torch.zeros(2, requires_grad=True)
    for part in ([-2.0, 2.0], [3.0, -3.0]):
        Decay.apply(a).backward(torch.tensor(part))
    assert torch.equal(a.grad, torch.tensor([1.0, -1.0]))


def learn(target_decay, steps=12, lr=0.5, decay="head"):
    """A freshly started mixer learns the output of a recurrence whose heads have `target_decay`."""
    torch.manual_seed(0)
    mixer = Mixer(MixerSpec(conv=False, gate=False, decay=decay, shape=SHAPE), 0)
    torch.nn.init.normal_(mixer.qkv_proj.weight, std=0.3)
    mixer.o_proj = torch.nn.Identity()  # so that no head makes up for another
    mixer.reset_parameters()
    cos, sin = (t.float() for t in rotary(32))
    x = torch.randn(8, 32, D)
    with torch.no_grad():
        q, k, v = mixer.qkv(x, (cos, sin))
        delta, _ = mixer.ssm(x)
        y = linear_recurrence(mixer.phi_q(q), mixer.phi_k(k), v, delta, torch.full_like(mixer.ssm.A, target_decay), scan="naive")
        target = y.flatten(2)
    mixer.requires_grad_(False)
    mixer.ssm.requires_grad_(True)
    optimizer = torch.optim.AdamW(mixer.ssm.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses, first = [], {}
    for _ in range(steps):
        loss = F.mse_loss(mixer(x, position_embeddings=(cos, sin))[0], target)
        optimizer.zero_grad()
        loss.backward()
        mixer.ssm.project_gradient()
        first = first or {n: p.grad.clone() for n, p in mixer.ssm.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return mixer.ssm, losses, first


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_the_decay_learns_from_exactly_zero_where_the_task_needs_forgetting(decay):
    ssm, losses, first = learn(target_decay=20.0, decay=decay)
    raised = first["A"] < 0  # per channel, a state may gain from being kept while its neighbours forget
    assert raised.all() if decay == "head" else raised.float().mean() > 0.8
    assert (ssm.A[raised] > 0.5).float().mean() > 0.9
    assert losses[-1] < 0.7 * losses[0]


def test_the_decay_stays_at_zero_where_the_task_needs_the_opposite_of_forgetting():
    ssm, _, first = learn(target_decay=-5.0)
    assert torch.equal(first["A"], torch.zeros(H))
    with torch.no_grad():
        assert torch.equal(ssm(torch.randn(1, 3, D))[1], torch.zeros(H))


def test_the_projection_of_delta_gets_gradient_from_the_start():
    ssm, _, first = learn(target_decay=20.0, steps=3)
    assert first["up.weight"].abs().max() > 0
    assert not torch.equal(ssm.up.weight, torch.zeros_like(ssm.up.weight))


# --- state and padding


class OneLayerCache:
    def __init__(self):
        self.only = LayerState()

    def state(self, layer_idx):
        return self.only


KINDS = pytest.mark.parametrize(
    ("kind", "options"), [("hedgemamba", {}), ("hedgemamba", {"decay": "channel"}), ("mamba", {})], ids=str
)


@KINDS
@pytest.mark.parametrize("cuts", [[], [1], [L - 1], [3, 4, 5, 9], list(range(1, L))], ids=str)
def test_a_sequence_in_pieces_gives_what_it_gives_in_one(kind, options, cuts):
    mixer, x, cache = random_mixer(kind, **options), inputs(), OneLayerCache()
    bounds, outputs = [0, *cuts, L], []
    with torch.no_grad():
        for a, b in itertools.pairwise(bounds):
            outputs.append(mixer(x[:, a:b], position_embeddings=rotary(b - a, a), past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(outputs, 1), run(mixer, x), rtol=1e-4, atol=1e-6)
    assert cache.only.seen == L


@KINDS
def test_padding_before_the_tokens_changes_nothing_and_is_finite(kind, options):
    mixer, x, pad = random_mixer(kind, **options), inputs(), 5
    padded = torch.cat([torch.randn(B, pad, D, dtype=x.dtype), x], 1)
    mask = torch.cat([torch.zeros(B, pad), torch.ones(B, L)], 1)
    cos, sin = rotary()
    shifted = tuple(torch.cat([t[:, :1].expand(-1, pad, -1), t], 1) for t in (cos, sin))
    with torch.no_grad():
        y = mixer(padded, position_embeddings=shifted, padding_mask=mask)[0]
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, pad:], run(mixer, x), rtol=1e-4, atol=1e-6)


@KINDS
def test_padding_neither_adds_to_the_state_nor_decays_it(kind, options):
    mixer, x, states = random_mixer(kind, conv=False, **options), inputs(), []
    for pad in (0, 5):
        cache, mask = OneLayerCache(), torch.cat([torch.ones(B, L), torch.zeros(B, pad)], 1)
        padded = torch.cat([x, torch.randn(B, pad, D, dtype=x.dtype)], 1)
        with torch.no_grad():
            mixer(padded, position_embeddings=rotary(L + pad), padding_mask=mask, past_key_values=cache)
        states.append(cache.only.ssm)
    torch.testing.assert_close(*states)
