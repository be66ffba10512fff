"""The sequence mixers: what replaces attention in a layer.

`Mixer` is linear attention with up to three parts of a selective state space model. Per head, at token t:

    u_t = conv(x)_t                      conv: causal, depthwise, width 4, on the layer input      (off: u = x)
    q, k, v = rotary(norm(W_qkv u_t))    copied from the teacher, like the norms of q and k where it has them
    delta_t = softplus(W_up W_down u_t + b)   Lambda_t = exp(-delta_t A)      ssm                  (off: 1 and 1)
    h_t = Lambda_t h_{t-1} + delta_t phi(k_t) v_t^T        z_t = Lambda_t z_{t-1} + delta_t phi(k_t)
          decay=head: one delta_t and A per head; decay=channel: one delta_t per channel, one A per channel and state
    y_t = (phi(q_t) . h_t) / (phi(q_t) . z_t)
    y_t <- y_t * silu(W_g x_t + b_g)     gate                                                      (off: y)
    out = W_o y_t                        copied from the teacher

Every part starts as the identity, so whatever is switched on, the converted student computes what the Hedgehog
student computes (METHOD, section 2). `MambaMixer` is the one-step baseline: Mamba-2's block with its own start.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hm.adapters import AttentionShape, apply_rotary
from hm.config import MIXERS, Settings
from hm.errors import UserError
from hm.feature_maps import HedgehogFeatureMap
from hm.ops import linear_recurrence

SILU_ONE = 1.2784645427610738
"""silu(SILU_ONE) = 1: the gate's bias at the start."""
CONV_WIDTH = 4
DELTA_MIN, DELTA_MAX = 1e-3, 1e-1


@dataclass
class MixerSpec:
    """What a mixer is made of; plain data, kept in the student's config."""

    kind: str = "hedgemamba"
    ssm: bool = True
    conv: bool = True
    gate: bool = True
    per_head: bool = False
    softmax: str = "joint"
    copy_projections: bool = True
    decay: str = "head"
    ssm_init: str = "exact"
    scan: str = "auto"
    chunk_size: int = 64
    shape: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, s: Settings, shape: AttentionShape) -> MixerSpec:
        """What resolved settings ask for, in a layer of this shape."""
        return cls(s.mixer, bool(s.ssm), bool(s.conv), bool(s.gate), s.feature_map.per_head, s.feature_map.softmax, s.mamba.copy_projections,
                   s.decay, s.ssm_init, s.scan, shape=asdict(shape))


@dataclass
class LayerState:
    """What one layer remembers between tokens; its size does not depend on how many there were.

    conv: (B, CONV_WIDTH - 1, channels) last inputs of the convolution, or None; ssm: the recurrence's state as
    `hm.ops.linear_recurrence` returns it, or None.
    """

    conv: Tensor | None = None
    ssm: Tensor | None = None
    seen: int = 0


class Decay(torch.autograd.Function):
    """max(a, 0), with the gradient of the identity.

    A decay rate A = max(a, 0) may so start at exactly 0 (Lambda = 1, the identity) and still learn: gradient descent
    is projected at the boundary (`SelectiveDecay.project_gradient`). exp(A_log) can't do this: where it is close to 0,
    so is its gradient.
    """

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        return a.clamp_min(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def step_size(proj: nn.Linear, x: Tensor) -> Tensor:
    """delta = softplus(W x + b) in float32, and b added there: at softplus^-1(0.001) = -6.9 a bfloat16 is so coarse
    that delta would come in steps of 3%."""
    return F.softplus(F.linear(x, proj.weight).float() + proj.bias.float())


class CausalConv(nn.Module):
    """Depthwise causal convolution over time. x: (B, L, C) -> (B, L, C), and the last width - 1 inputs."""

    def __init__(self, channels: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, CONV_WIDTH))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Identity: the tap of the present is 1, the others 0."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, -1] = 1
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if past is None:
            past = x.new_zeros(x.shape[0], CONV_WIDTH - 1, x.shape[2])
        full = torch.cat([past.to(x.dtype), x], dim=1)
        length, weight = x.shape[1], self.weight.to(x.dtype)
        y = sum(full[:, i : i + length] * weight[:, i] for i in range(CONV_WIDTH))
        assert isinstance(y, Tensor)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y, full[:, length:]


class SelectiveDecay(nn.Module):
    """delta_t and A of the SSM: one of each per head (Mamba-2's form), or with `per_channel` = (P, N) a delta for each
    of a head's P channels and an A for each of their N states (Mamba-1's form, the paper's).

    u: (B, L, D) -> delta > 0, (B, L, H) or (B, L, H, P), and A >= 0, (H,) or (H, P, N). The low-rank projection of
    delta has rank D / 16, as in Mamba. The start is exact: A = 0 and so Lambda = 1; delta is constant (the
    up-projection is 0), spaced evenly in its logarithm from 0.001 to 0.1 over the heads, or over the channels of each
    head, which cancels in the normalised output. A learns from the first step (see `Decay`), at a pace that delta
    sets: where it is small, forgetting is slow. ssm_init="decay" gives the exactness up: A = 1, so that memories reach back
    1 / delta = 1000 to 10 tokens from the first to the last head.
    """

    def __init__(self, hidden_size: int, num_heads: int, per_channel: tuple[int, int] | None = None, ssm_init: str = "exact"):
        super().__init__()
        self.start = {"exact": 0.0, "decay": 1.0}[ssm_init]
        channels, states = per_channel or (None, None)
        self.steps_shape = (num_heads,) if channels is None else (num_heads, channels)
        self.down = nn.Linear(hidden_size, max(1, math.ceil(hidden_size / 16)), bias=False)
        self.up = nn.Linear(self.down.out_features, math.prod(self.steps_shape))
        self.A = nn.Parameter(torch.empty(self.steps_shape if states is None else (*self.steps_shape, states)))

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        with torch.no_grad():
            self.up.weight.zero_()
            spread = torch.linspace(0, 1, self.steps_shape[-1], device=self.A.device)
            delta = torch.exp(math.log(DELTA_MIN) + spread * math.log(DELTA_MAX / DELTA_MIN))
            self.up.bias.copy_(inverse_softplus(delta).expand(self.steps_shape).flatten())
            self.A.fill_(self.start)

    def project_gradient(self) -> None:
        """Between the backward passes of a whole batch and the optimiser's step: where A is 0, drop a gradient that
        would lower it. Not in the backward pass, which may see a part of the batch only."""
        if self.A.grad is not None:
            self.A.grad.masked_fill_((self.A <= 0) & (self.A.grad > 0), 0)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return step_size(self.up, self.down(u)).unflatten(-1, self.steps_shape), Decay.apply(self.A)


class HeadNorm(nn.RMSNorm):
    """RMS norm over each head, in float32. x: (..., d) -> (..., d)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), tuple(self.normalized_shape), self.weight.float(), self.eps).to(x.dtype)


class Gate(nn.Module):
    """silu(W_g x + b_g), which is 1 at the start. x: (B, L, D) -> (B, L, H * d)."""

    def __init__(self, hidden_size: int, out_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, out_size)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.proj.weight.zero_()
            self.proj.bias.fill_(SILU_ONE)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.proj(x))


class BaseMixer(nn.Module):
    """What all mixers share: projections, the call of a Transformers attention module, the state, the scan.

    A mixer says in PARTS which of its attributes are new (not from the teacher) and what part a report counts them as.
    """

    PARTS: ClassVar[dict[str, str]] = {}

    def __init__(self, spec: MixerSpec, layer_idx: int):
        super().__init__()
        self.spec, self.layer_idx, self.shape = spec, layer_idx, AttentionShape(**spec.shape)
        s = self.shape
        self.q_size, self.kv_size = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        self.qkv_proj = nn.Linear(s.hidden_size, self.q_size + 2 * self.kv_size, bias=s.qkv_bias)
        self.o_proj = nn.Linear(self.q_size, s.hidden_size, bias=s.out_bias)

    def reset_parameters(self) -> None:
        """The start of every new part."""
        raise NotImplementedError

    @torch.no_grad()
    def copy_attention(self, weights: dict[str, Tensor | None]) -> None:
        """Take q, k, v and o from the teacher's attention (`Adapter.split`)."""

        def given(names: str, kind: str) -> list[Tensor]:
            return [w for n in names if (w := weights[f"{n}_{kind}"]) is not None]

        for layer, names in ((self.qkv_proj, "qkv"), (self.o_proj, "o")):
            layer.weight.copy_(torch.cat(given(names, "weight")))
            biases = given(names, "bias")
            assert bool(biases) == (layer.bias is not None), f"the adapter's shape and its parts differ on biases of {names}"
            if biases:
                layer.bias.copy_(torch.cat(biases))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values=None,
        layer_past=None,
        padding_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """hidden_states: (B, L, D) -> ((B, L, D), None), as a Transformers attention module returns it.

        padding_mask: (B, >= L), 1 for tokens and 0 for padding; its last L columns belong to hidden_states. Padding
        adds nothing to the recurrent state and decays nothing; to the convolution it is zeros, as before a sequence,
        so sequences that go on are padded on the left. `attention_mask` is that of attention and is not used here.
        """
        cache = past_key_values if past_key_values is not None else layer_past
        state = cache.state(self.layer_idx) if cache is not None else None
        keep = None
        if padding_mask is not None:
            keep = padding_mask[:, -hidden_states.shape[1] :, None].to(hidden_states.dtype)
            hidden_states = hidden_states * keep
        y = self.mix(hidden_states, position_embeddings, state, keep)
        if state is not None:
            state.seen += hidden_states.shape[1]
        return y, None

    def mix(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, state: LayerState | None, keep: Tensor | None) -> Tensor:
        raise NotImplementedError

    def recur(self, q, k, v, delta, A, state: LayerState | None, normalize: bool) -> Tensor:
        result = linear_recurrence(
            q, k, v, delta, A, scan="recurrent" if state is not None and q.shape[1] == 1 else self.spec.scan,
            chunk_size=self.spec.chunk_size, normalize=normalize,
            initial_state=state.ssm if state is not None else None, return_state=state is not None,
        )  # fmt: skip
        if state is None:
            assert isinstance(result, Tensor)
            return result
        y, state.ssm = result
        return y


class Mixer(BaseMixer):
    """Linear attention with SSM, convolution and gate each on or off; see the equations at the top of the file.

    Another kernel is a subclass with another FEATURE_MAP; by it a stage 1 that trains the maps alone knows what to train.
    """

    FEATURE_MAP: ClassVar[type[HedgehogFeatureMap]] = HedgehogFeatureMap
    PARTS = {"phi_q": "feature map", "phi_k": "feature map", "ssm": "ssm", "conv": "conv", "gate": "gate"}  # noqa: RUF012

    def __init__(self, spec: MixerSpec, layer_idx: int):
        super().__init__(spec, layer_idx)
        s = self.shape
        self.q_norm = None if s.qk_norm is None else HeadNorm(s.head_dim, s.qk_norm)
        self.k_norm = None if s.qk_norm is None else HeadNorm(s.head_dim, s.qk_norm)
        self.phi_q = self.FEATURE_MAP(s.num_heads, s.head_dim, spec.per_head, spec.softmax)
        self.phi_k = self.FEATURE_MAP(s.num_kv_heads, s.head_dim, spec.per_head, spec.softmax)
        per_channel = (s.head_dim, self.phi_q.out_dim) if spec.decay == "channel" else None
        self.ssm: nn.Module | None = SelectiveDecay(s.hidden_size, s.num_heads, per_channel, spec.ssm_init) if spec.ssm else None
        self.conv = CausalConv(s.hidden_size) if spec.conv else None
        self.gate = Gate(s.hidden_size, self.q_size) if spec.gate else None

    def reset_parameters(self) -> None:
        """The structured start: every new part is the identity (but for ssm_init="decay"). The projections are left to the caller."""
        for part in (self.phi_q, self.phi_k, self.ssm, self.conv, self.gate):
            if part is not None:
                part.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def copy_attention(self, weights: dict[str, Tensor | None]) -> None:
        super().copy_attention(weights)
        for norm, name in ((self.q_norm, "q_norm"), (self.k_norm, "k_norm")):
            weight = weights.get(name)
            assert (norm is None) == (weight is None), "the adapter's shape and its parts differ on norms of q and k"
            if norm is not None and weight is not None:
                norm.weight.copy_(weight)

    def qkv(self, u: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """u: (B, L, D) -> q (B, L, H, d), k and v (B, L, G, d), rotated."""
        b, length, _ = u.shape
        q, k, v = self.qkv_proj(u).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k, v = (t.view(b, length, -1, self.shape.head_dim) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def mix(self, x, rotary, state, keep):
        u = x
        if self.conv is not None:
            u, tail = self.conv(x, state.conv if state is not None else None)
            if state is not None:
                state.conv = tail
        q, k, v = self.qkv(u, rotary)
        k = self.phi_k(k)
        if keep is not None:
            k = k * keep[..., None]
        delta, A = self.ssm(u) if self.ssm is not None else (None, None)
        if keep is not None and delta is not None:
            delta = delta * keep.to(delta.dtype).view(*keep.shape, *[1] * (delta.dim() - keep.dim()))
        y = self.recur(self.phi_q(q), k, v, delta, A, state, normalize=True).flatten(2)
        if self.gate is not None:
            y = y * self.gate(x)
        return self.o_proj(y)


class MambaMixer(BaseMixer):
    """Mamba-2's block with Mamba-2's own initialisation: the one-step baseline (arXiv 2405.21060, figure 6).

    x -> [z, C, B, v, dt]; causal convolution and SiLU on (C, B, v); h_t = exp(-delta_t A) h_{t-1} + delta_t B_t v_t,
    y_t = C_t . h_t + D v_t; RMSNorm(y * silu(z)); output projection. Heads, head width and state are the teacher's
    heads, head width and head width, so that C, B, v and the output can also be copied from q, k, v and o.
    """

    PARTS = {  # noqa: RUF012
        "z_proj": "gate", "dt_proj": "ssm", "conv": "conv", "A_log": "ssm", "D": "ssm", "norm": "norm"
    }  # fmt: skip

    def __init__(self, spec: MixerSpec, layer_idx: int):
        super().__init__(spec, layer_idx)
        s = self.shape
        self.z_proj = nn.Linear(s.hidden_size, self.q_size, bias=False)
        self.dt_proj = nn.Linear(s.hidden_size, s.num_heads)
        self.conv = CausalConv(self.qkv_proj.out_features, bias=True)
        self.A_log = nn.Parameter(torch.empty(s.num_heads))
        self.D = nn.Parameter(torch.empty(s.num_heads))
        self.norm = nn.RMSNorm(self.q_size, eps=1e-5)

    def reset_parameters(self) -> None:
        """Mamba-2's start: A in [1, 16], delta log-uniform in [0.001, 0.1], D = 1, PyTorch's linear and conv starts."""
        for layer in (self.qkv_proj, self.z_proj, self.dt_proj, self.o_proj):
            layer.reset_parameters()
        with torch.no_grad():
            bound = CONV_WIDTH**-0.5
            self.conv.weight.uniform_(-bound, bound)
            self.conv.bias.uniform_(-bound, bound)  # type: ignore[union-attr]
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
            delta = torch.empty_like(self.D).uniform_(math.log(DELTA_MIN), math.log(DELTA_MAX)).exp()
            self.dt_proj.bias.copy_(inverse_softplus(delta))
            self.D.fill_(1)
            self.norm.weight.fill_(1)

    def mix(self, x, rotary, state, keep):
        b, length, _ = x.shape
        u = self.qkv_proj(x)
        if keep is not None:
            u = u * keep
        u, tail = self.conv(u, state.conv if state is not None else None)
        if state is not None:
            state.conv = tail
        q, k, v = F.silu(u).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k, v = (t.reshape(b, length, -1, self.shape.head_dim) for t in (q, k, v))
        delta = step_size(self.dt_proj, x)
        if keep is not None:
            k, v, delta = k * keep[..., None], v * keep[..., None], delta * keep.to(delta.dtype)
        y = self.recur(q, k, v, delta, self.A_log.float().exp(), state, normalize=False)
        skip = v.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, dim=2)
        y = (y + skip * self.D.to(v.dtype)[:, None]).flatten(2)
        return self.o_proj(self.norm((y * F.silu(self.z_proj(x))).to(self.norm.weight.dtype)))


KINDS: dict[str, type[BaseMixer]] = {name: Mixer for name in MIXERS} | {"mamba": MambaMixer}


def own_feature_map(name: str) -> bool:
    """Whether stage 1 of a mixer's feature maps alone is another one than Hedgehog's."""
    kind = KINDS[name]
    return issubclass(kind, Mixer) and kind.FEATURE_MAP is not HedgehogFeatureMap


def register_mixer(name: str, kind: type[BaseMixer], **parts: bool) -> None:
    """Make `mixer=name` build `kind`; ssm=, conv= and gate= say which parts are on by default (default: all off)."""
    KINDS[name] = kind
    MIXERS[name] = {"ssm": False, "conv": False, "gate": False} | parts


def build_mixer(spec: MixerSpec, layer_idx: int) -> BaseMixer:
    """The mixer of one layer. Raises UserError for a kind that nothing has registered."""
    if spec.kind not in KINDS:
        raise UserError(f"mixer={spec.kind} is not registered here; import the file that registers it first (known: {', '.join(KINDS)}).")
    mixer = KINDS[spec.kind](spec, layer_idx)
    if isinstance(mixer, Mixer) and not type(mixer.phi_q) is type(mixer.phi_k) is mixer.FEATURE_MAP:
        raise TypeError(f"{type(mixer).__name__} has feature maps of its own: name their class in FEATURE_MAP, not in __init__")
    return mixer


from hm import bypass as bypass  # noqa: E402
