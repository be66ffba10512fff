"""Teachers of known shapes with random weights, so that a benchmark needs no download."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "pythia1b": lambda: GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192,
        max_position_embeddings=2048, rope_parameters=ROPE | {"partial_rotary_factor": 0.25},
    ),
    "smollm2": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, rope_parameters=ROPE | {"rope_theta": 100000.0}, tie_word_embeddings=True,
    ),
    "tiny": lambda: GPTNeoXConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=256, rope_parameters=ROPE | {"partial_rotary_factor": 0.25},
    ),
}  # fmt: skip
"""Pythia-1B, SmolLM2-135M, and one for rehearsals on a CPU."""


def build_teacher(shape: str, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """A Transformer of that shape, random, frozen, in evaluation mode, with PyTorch's scaled-dot-product attention."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), attn_implementation="sdpa", dtype=dtype)
    return model.eval().requires_grad_(False)
