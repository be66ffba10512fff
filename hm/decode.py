"""Decoding at constant shapes: one token per call as one CUDA graph, for a student and for a Transformer.

A student's recurrent state is the traffic that decoding adds to reading the weights: per layer and sequence
H * N * (P + 1) numbers in float32, read once and written once. So it lives in one buffer, its rows filled up to whole
memory sectors, that a Triton kernel updates in place and reads out in the same pass. `hm.ops.step` is the definition, and what runs where there is no GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hm.mixer import CONV_WIDTH, BaseMixer, MambaMixer
from hm.modeling import RecurrentLayer, StudentCache, StudentForCausalLM
from hm.ops import step
from hm.ops.recurrent import divide

SECTOR = 8  # float32 numbers in the 32 bytes that a GPU's memory moves at once


class Launch(NamedTuple):
    """How the kernel is launched. states, channels: that a program holds at a time. programs: at least about so many, where
    a small batch would leave most of a GPU's 100 to 150 processors without work. The default is the best of 23 on an H100
    (results/bench/README.md)."""

    states: int = 32
    channels: int = 256
    warps: int = 4
    programs: int = 2048


LAUNCH = Launch()


class StaticState:
    """A layer's state (`hm.mixer.LayerState`) in buffers that stay where they are: to assign is to copy into them."""

    seen = property(lambda self: 0, lambda self, value: None)
    """Positions are given to the model, so nothing that changes with the tokens is a number of Python's."""

    def __init__(self, conv: Tensor | None, ssm: Tensor):
        self._conv, self._ssm = conv, ssm

    @property
    def conv(self) -> Tensor | None:
        return self._conv

    @conv.setter
    def conv(self, value: Tensor) -> None:
        assert self._conv is not None
        self._conv.copy_(value)

    @property
    def ssm(self) -> Tensor:
        return self._ssm

    @ssm.setter
    def ssm(self, value: Tensor) -> None:
        self._ssm.copy_(value)


class FixedLayer(CacheLayerMixin):
    """Keys and values (B, G, context, d) of a Transformer's layer; each new token takes the last place. So attention
    sees `context` tokens at every step, none of them masked, and needs no mask: the best case of a static cache."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before Transformers 5.18


def made_up_cache(model: PreTrainedModel, batch: int, context: int) -> Cache:
    """A cache as after `context` tokens, with random content (what decoding costs does not depend on it)."""
    new: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    if not isinstance(model, StudentForCausalLM):
        c = model.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        size = (batch, getattr(c, "num_key_value_heads", None) or c.num_attention_heads, context, head_dim)
        return Cache(layers=[FixedLayer(torch.randn(size, **new), torch.randn(size, **new)) for _ in range(c.num_hidden_layers)])
    cache = StudentCache(model.config.num_hidden_layers, model.config.keep_attention)
    for mixer in model.mixers:
        s, block = mixer.shape, isinstance(mixer, MambaMixer)
        width = mixer.qkv_proj.out_features if block else s.hidden_size
        conv = torch.zeros(batch, CONV_WIDTH - 1, width, **new) if getattr(mixer, "conv", None) is not None else None
        decay = getattr(getattr(mixer, "ssm", None), "A", None)
        denominators = s.head_dim if decay is not None and decay.dim() == 3 else 1  # one per channel, or one per head
        states, channels = (s.head_dim, s.head_dim) if block else (2 * s.head_dim, s.head_dim + denominators)
        ssm = torch.rand(batch, s.num_heads, states, -(-channels // SECTOR) * SECTOR, device=model.device)[..., :channels]
        layer = cache.layers[mixer.layer_idx]
        assert isinstance(layer, RecurrentLayer)
        layer.state = StaticState(conv, ssm)  # type: ignore[assignment]
    return cache


def cache_bytes(cache: Cache) -> int:
    """What a cache of `made_up_cache` holds, the filling of rows included."""
    held: list[Any] = [layer.state if isinstance(layer, RecurrentLayer) else layer for layer in cache.layers]
    tensors = [getattr(x, name, None) for x in held for name in ("conv", "ssm", "keys", "values")]
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


class Decoder:
    """Greedy decoding of `batch` sequences after `context` tokens of made-up content. `step()` takes one token."""

    def __init__(self, model: PreTrainedModel, batch: int, context: int):
        self.model, self.cache = model, made_up_cache(model, batch, context)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1, 1), context - 1, device=model.device)
        for mixer in model.mixers if isinstance(model, StudentForCausalLM) else []:
            mixer.recur = functools.partial(recur_in_place, mixer)  # type: ignore[method-assign]
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        out = self.model(input_ids=self.ids, position_ids=self.position, past_key_values=self.cache, use_cache=True)
        self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1

    def capture(self) -> None:
        """Make of a step one CUDA graph. Nothing on a CPU."""
        for _ in range(3):
            self.step()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.graph = graph

    def close(self) -> None:
        """Give the model back as it was."""
        for mixer in self.model.mixers if isinstance(self.model, StudentForCausalLM) else []:
            del mixer.recur


def recur_in_place(mixer: BaseMixer, q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None,
                   state: StaticState, normalize: bool) -> Tensor:  # fmt: skip
    """`BaseMixer.recur` for one token, q: (B, 1, H, N), that updates the buffer of `state`."""
    now = (q[:, 0], k[:, 0], v[:, 0], None if delta is None else delta[:, 0])
    per_head = A is None or A.dim() == 1
    if state.ssm.is_cuda and per_head:
        return step_in_place(state.ssm, *now, A, normalize)[:, None]
    y, state.ssm = step(state.ssm, *now, A, normalize)
    return y[:, None]


def step_in_place(state: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None,
                  normalize: bool) -> Tensor:  # fmt: skip
    """`hm.ops.step` with one decay per head, by Triton. state (B, H, N, C) float32, C = P + 1 if `normalize` else P, is
    updated; its rows may be a part of longer ones, whose rest is overwritten. Returns y (B, H, P) in the dtype of v."""
    from hm.decode_kernel import kernel  # Triton need not be installed where there is no GPU

    B, H, N, C = state.shape
    delta = state.new_ones(B, H) if delta is None else delta.float()
    decay = torch.ones_like(delta) if A is None else torch.exp(-delta * A.float())
    row, (block_n, block_c, warps, programs) = state.stride(2), LAUNCH
    assert state.stride() == (H * N * row, N * row, row, 1)
    block_n, block_c = (min(block, 1 << (size - 1).bit_length()) for block, size in ((block_n, N), (block_c, C)))
    blocks = -(-C // block_c)
    parts = max(1, min(-(-N // block_n), programs // (B * H * blocks)))
    y = torch.empty(B, H, parts, C, device=state.device)
    kernel[(B * H, blocks, parts)](
        state, q.contiguous(), k.contiguous(), v.contiguous(), delta.contiguous(), decay.contiguous(), y, H, H // k.shape[1],
        N, v.shape[-1], C, ROW=row, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip
    y = y.sum(2)
    return (divide(y) if normalize else y).to(v.dtype)
