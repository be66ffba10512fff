"""What conversion must know about an architecture: one small adapter each, found by the config's model type.

A further architecture is one subclass of `Adapter` with `@register`; what is refused by its type below is refused only without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hm.errors import UserError

_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_ALIBI = {"bloom", "mpt"}
_LEARNED_POSITIONS = {"gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt", "bert", "roberta"}
_QK_NORM = {"qwen3_moe", "olmo2", "olmo3", "gemma3", "gemma3_text", "cohere2"}


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer: H `num_heads`, G `num_kv_heads`, d `head_dim`, D `hidden_size`.

    `rotary_dim` of a head's d dimensions are rotated; `qkv_bias`, `out_bias`: which projections add one. `qk_norm` is the
    epsilon of an RMS norm over d that every head's query and key pass before they are rotated, or None.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: float | None = None


class Adapter:
    """A family of architectures; `attention_name` is the attribute of a decoder layer for attention."""

    model_types: tuple[str, ...] = ()
    attention_name: str = "self_attn"

    def check(self, config: PreTrainedConfig) -> None:
        """Raise `UserError` for a config of this family that no mixer can stand in for."""

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        """The sizes of every attention layer (the same in all of them)."""
        raise NotImplementedError

    def split(self, attention: nn.Module, shape: AttentionShape) -> dict[str, Tensor | None]:
        """Copies of the projections by role.

        `q_weight` (H*d, D), `k_weight` and `v_weight` (G*d, D), `o_weight` (D, H*d), and `q_bias` (H*d,),
        `k_bias`, `v_bias` (G*d,), `o_bias` (D,) or None where there is none. Row h*d + i of a weight is
        dimension i of head h. With `shape.qk_norm` also `q_norm` and `k_norm` (d,), the norms' weights.
        """
        raise NotImplementedError

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a causal language model, first to last."""
        base: Any = model.base_model
        return base.layers

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention (or the mixer in its place) of one decoder layer."""
        return getattr(layer, self.attention_name)

    def set_attention(self, layer: nn.Module, module: nn.Module) -> None:
        """Put `module` in the place of a decoder layer's attention."""
        setattr(layer, self.attention_name, module)


_ADAPTERS: dict[str, Adapter] = {}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: make the adapter known under each of its model types."""
    for model_type in cls.model_types:
        _ADAPTERS[model_type] = cls()
    return cls


def supported() -> list[str]:
    """The model types that have an adapter, sorted."""
    return sorted(_ADAPTERS)


def adapter_for(config: PreTrainedConfig) -> Adapter:
    """The adapter of a config's `model_type`.

    Raises:
        UserError: there is none.
    """
    try:
        return _ADAPTERS[config.model_type]
    except KeyError:
        raise _refusal(config, "has no adapter") from None


def check_config(config: PreTrainedConfig) -> None:
    """Refuse, by name, what conversion can't reproduce.

    Raises:
        UserError: the architecture is an encoder-decoder, uses cross attention, ALiBi, learned absolute
            positions, sliding windows, query/key norms or soft-capped logits, its rotary embedding depends on
            the running length, or it has no adapter.
    """
    if reason := next(_features_refused(config), None):
        raise _refusal(config, reason)
    adapter = adapter_for(config)
    adapter.check(config)
    shape = adapter.shape(config)
    if shape.rotary_dim % 2 or not 0 < shape.rotary_dim <= shape.head_dim:
        raise _refusal(config, f"rotates {shape.rotary_dim} of {shape.head_dim} dimensions per head, where an"
                               " even number of at least 2 is needed")
    if shape.num_heads % shape.num_kv_heads:
        raise _refusal(config, f"has {shape.num_heads} query heads that don't divide evenly over"
                               f" {shape.num_kv_heads} key/value heads")


def max_seq_len(config: PreTrainedConfig) -> int:
    """The longest sequence, in tokens, that the teacher was made for."""
    return int(config.max_position_embeddings)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` dimensions of each head and leave the rest (RoPE, arXiv 2104.09864).

    The pairs are dimension i and i + rotary_dim/2 ("rotate half"), as in GPT-NeoX and Llama.

    Args:
        x: (B, L, heads, d).
        cos, sin: (B or 1, L, rotary_dim), the `position_embeddings` that Transformers hands to attention.

    Returns:
        (B, L, heads, d), in x's dtype.
    """
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos.unsqueeze(2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


@dataclass(frozen=True)
class AttentionRecord:
    """What one layer's attention was given and gave; detached.

    `hidden` (B, L, D) is its input (after the layer norm), `output` (B, L, D) its output before the residual,
    `position_embeddings` the (cos, sin) pair, each (B or 1, L, rotary_dim).
    """

    hidden: Tensor
    output: Tensor
    position_embeddings: tuple[Tensor, Tensor]


@contextmanager
def capture_attention(model: PreTrainedModel,
                      adapter: Adapter | None = None) -> Iterator[list[AttentionRecord]]:
    """Within the context, a forward of `model` (or its base model) leaves one record per layer in the list.

    The list is emptied when a forward starts: it describes the latest one, first layer first.
    `adapter` defaults to the one of the model's config.
    """
    adapter = adapter or adapter_for(model.config)
    records: list[AttentionRecord] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        cos, sin = kwargs["position_embeddings"]
        records.append(AttentionRecord(hidden.detach(), result.detach(), (cos.detach(), sin.detach())))

    handles = [model.base_model.register_forward_pre_hook(lambda module, args: records.clear())]
    handles += [adapter.attention(layer).register_forward_hook(record, with_kwargs=True)
                for layer in adapter.layers(model)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@register
class GPTNeoX(Adapter):
    """GPT-NeoX and Pythia: one fused projection, partial rotary, as many key/value heads as query heads."""

    model_types = ("gpt_neox",)
    attention_name = "attention"

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        heads = config.num_attention_heads
        head_dim = config.hidden_size // heads
        rotary_dim = int(head_dim * _rope(config).get("partial_rotary_factor", 1.0))
        bias = bool(config.attention_bias)
        return AttentionShape(config.hidden_size, heads, heads, head_dim, rotary_dim, bias, bias)

    def split(self, attention: nn.Module, shape: AttentionShape) -> dict[str, Tensor | None]:
        fused: Any = attention.query_key_value  # rows are (H, 3, d)
        rows = (shape.num_heads, 3, shape.head_dim)
        out: dict[str, Tensor | None] = {}
        for name, part in zip("qkv", fused.weight.detach().unflatten(0, rows).unbind(1), strict=True):
            out[f"{name}_weight"] = part.flatten(0, 1).clone()
        biases = (None,) * 3 if fused.bias is None else fused.bias.detach().unflatten(0, rows).unbind(1)
        for name, bias in zip("qkv", biases, strict=True):
            out[f"{name}_bias"] = None if bias is None else bias.flatten().clone()
        return out | _projection("o", attention.dense)


@register
class LlamaLike(Adapter):
    """Llama and what shares its attention: separate projections, full rotary, grouped key/value heads."""

    model_types: tuple[str, ...] = ("llama", "mistral", "qwen2")

    def check(self, config: PreTrainedConfig) -> None:
        if _rope(config).get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise _refusal(config, "sets partial_rotary_factor, which Transformers ignores in this family")

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        out_bias = config.model_type == "llama" and bool(config.attention_bias)
        qkv_bias = out_bias or config.model_type == "qwen2"
        kv_heads = config.num_key_value_heads or heads
        return AttentionShape(config.hidden_size, heads, kv_heads, head_dim, head_dim, qkv_bias, out_bias)

    def split(self, attention: nn.Module, shape: AttentionShape) -> dict[str, Tensor | None]:
        out: dict[str, Tensor | None] = {}
        for name in "qkvo":
            out |= _projection(name, getattr(attention, f"{name}_proj"))
        return out


@register
class Qwen3(LlamaLike):
    """Qwen3: Llama's attention with an RMS norm on every head's queries and keys, and biases on all projections or none."""

    model_types = ("qwen3",)

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        bias = bool(config.attention_bias)
        return replace(super().shape(config), qkv_bias=bias, out_bias=bias, qk_norm=config.rms_norm_eps)

    def split(self, attention: Any, shape: AttentionShape) -> dict[str, Tensor | None]:
        norms = {f"{n}_norm": getattr(attention, f"{n}_norm").weight.detach().clone() for n in "qk"}
        return super().split(attention, shape) | norms


def _projection(name: str, linear: Any) -> dict[str, Tensor | None]:
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return {f"{name}_weight": linear.weight.detach().clone(), f"{name}_bias": bias}


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _features_refused(config: PreTrainedConfig) -> Iterator[str]:
    """Why the config can't be converted, as predicates of "the architecture"; nothing if it can."""
    kind = "" if config.model_type in _ADAPTERS else config.model_type  # what has an adapter is not refused by its name

    def has(*names: str) -> bool:
        return any(getattr(config, name, None) for name in names)

    if has("is_encoder_decoder"):
        yield "is an encoder-decoder"
    if has("add_cross_attention"):
        yield "uses cross attention"
    attn_config = getattr(config, "attn_config", None)
    if kind in _ALIBI or has("alibi", "use_alibi") or getattr(attn_config, "alibi", False):
        yield "uses ALiBi position biases"
    if kind in _LEARNED_POSITIONS or getattr(config, "position_embedding_type", None) == "absolute":
        yield "uses learned absolute position embeddings"
    if has("attn_logit_softcapping", "final_logit_softcapping"):
        yield "soft-caps its logits"
    if kind in _QK_NORM or has("use_qk_norm", "qk_layernorm", "qk_norm"):
        yield "normalises queries and keys (qk-norm)"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layer_types or (not layer_types and has("sliding_window")):
        yield f"uses sliding window attention (sliding_window={config.sliding_window})"
    if others := layer_types - {"full_attention", "sliding_attention"}:
        yield f"mixes layer types ({', '.join(sorted(others))})"
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        yield f"uses the rotary embedding '{rope_type}', which depends on the running sequence length"
    elif not kind and rope_type not in _ROPE_TYPES:
        yield f"uses the unknown rotary embedding '{rope_type}'"


def _refusal(config: PreTrainedConfig, reason: str) -> UserError:
    if config.model_type == "hedgemamba":
        return UserError("teacher: this is a converted student ('hedgemamba'); name the Transformer that it was made from.")
    return UserError(f"teacher: the architecture '{config.model_type}' {reason}; choose another teacher"
                     f" (model types with an adapter: {', '.join(supported())}).")
