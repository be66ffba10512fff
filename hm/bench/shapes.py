"""The teachers' shapes that are measured, built from their configs with random weights: a speed needs no hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hm.adapters import AttentionShape, adapter_for
from hm.config import check_choice

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "tiny": (GPTNeoXConfig, dict(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, rotary_pct=0.25)),
    "smollm2": (LlamaConfig, dict(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, tie_word_embeddings=True)),
    "pythia160m": (GPTNeoXConfig, dict(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, rotary_pct=0.25)),
    "pythia410m": (GPTNeoXConfig, dict(
        vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, rotary_pct=0.25)),
    "pythia1b": (GPTNeoXConfig, dict(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192, rotary_pct=0.25)),
}  # fmt: skip


def shape_config(shape: str, max_length: int = 131072) -> PreTrainedConfig:
    """The config of a shape for sequences of up to `max_length` tokens. Raises UserError for an unknown name."""
    check_choice("shape", shape, SHAPES)
    kind, sizes = SHAPES[shape]
    return kind(**sizes | {"max_position_embeddings": max_length, "bos_token_id": 0, "eos_token_id": 0})


def attention_shape(shape: str) -> AttentionShape:
    config = shape_config(shape)
    return adapter_for(config).shape(config)


def build_teacher(
    shape: str,
    max_length: int = 131072,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> PreTrainedModel:
    """A model of that shape (or its first `layers` layers) with random weights and PyTorch's own attention (SDPA)."""
    torch.manual_seed(0)
    config = shape_config(shape, max_length)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()
