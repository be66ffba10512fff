"""The student as a Transformers model.

A student is the teacher's own Transformers model with the attention of some layers replaced by a mixer, under a
config that holds the teacher's config and the mixers' spec. So embeddings, norms, MLPs and residuals are the
teacher's code, and `save_pretrained`, `from_pretrained` and `generate` are Transformers' own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from hm.adapters import adapter_for
from hm.errors import UserError
from hm.mixer import BaseMixer, LayerState, MixerSpec, build_mixer
from hm.student_config import StudentConfig as StudentConfig


class RecurrentLayer(CacheLayerMixin):
    """A converted layer's place in the cache: a state of constant size instead of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.state = LayerState()

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        raise RuntimeError("a converted layer keeps a state, not keys and values")

    def get_seq_length(self) -> int:
        return self.state.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before Transformers 5.18

    def reset(self) -> None:
        self.state = LayerState()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        s = self.state
        s.conv = None if s.conv is None else s.conv.index_select(0, beam_idx.to(s.conv.device))
        s.ssm = None if s.ssm is None else s.ssm.index_select(0, beam_idx.to(s.ssm.device))


class StudentCache(Cache):
    """Per layer a recurrent state, or keys and values where attention was kept."""

    def __init__(self, num_layers: int, keep_attention: list[int]):
        kept = set(keep_attention)
        super().__init__(layers=[DynamicLayer() if i in kept else RecurrentLayer() for i in range(num_layers)])

    def state(self, layer_idx: int) -> LayerState:
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentLayer)
        return layer.state


class StudentForCausalLM(PreTrainedModel, GenerationMixin):
    """input_ids: (B, L) -> logits (B, L, vocab).

    attention_mask: (B, tokens so far), 1 for tokens and 0 for padding. Linear attention is not blind to a shift of all
    positions, so where no position_ids are given a sequence's first token that is no padding is at position 0.
    """

    config_class = StudentConfig
    config: StudentConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: StudentConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if backbone is None:
            plan = config.backbone_config()
            plan.dtype = torch.get_default_dtype()  # what from_pretrained(dtype=...) asks for; the config says what was saved
            backbone = AutoModelForCausalLM.from_config(plan, attn_implementation="sdpa")
        else:
            for module in backbone.modules():
                # or post_init draws anew what it doesn't know to be initialised
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.backbone = backbone
        self.adapter = adapter_for(backbone.config)
        spec = MixerSpec(**config.mixer)
        for i, layer in enumerate(self.adapter.layers(backbone)):
            if i not in config.keep_attention:
                self.adapter.set_attention(layer, build_mixer(spec, i))
        if backbone.config.tie_word_embeddings:
            self._tied_weights_keys = {
                f"backbone.{k}": f"backbone.{v}" for k, v in type(backbone)._tied_weights_keys.items()
            }
        self.post_init()
        for mixer in self.mixers:
            mixer.reset_parameters()

    @property
    def mixers(self) -> list[BaseMixer]:
        return [m for m in self.modules() if isinstance(m, BaseMixer)]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    def new_cache(self) -> StudentCache:
        return StudentCache(self.config.num_hidden_layers, self.config.keep_attention)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if not isinstance(past_key_values, StudentCache):
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("a student goes on from its own StudentCache, not from keys and values")
            past_key_values = self.new_cache() if use_cache or past_key_values is not None else None
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        if inputs.shape[1] == 0:
            raise UserError("the prompt is empty; give at least one token, such as the tokenizer's end-of-text token.")
        padding_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if position_ids is None and padding_mask is not None:
            position_ids = (padding_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
        if len(self.config.keep_attention) == 0:
            # no layer reads a causal mask: a 4-D placeholder keeps Transformers from building one
            attention_mask = torch.empty(0, 0, 0, 0, device=inputs.device)
        return self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values, labels=labels, use_cache=past_key_values is not None,
            logits_to_keep=logits_to_keep, padding_mask=padding_mask, **kwargs,
        )  # fmt: skip


AutoModelForCausalLM.register(StudentConfig, StudentForCausalLM)


def load_student(path: str, dtype: torch.dtype = torch.float32) -> StudentForCausalLM:
    """A student from a folder that `save_pretrained` wrote.

    Raises:
        UserError: the folder is not there, holds no student, or lacks some of its weights.
    """
    try:
        kind = json.loads((Path(path) / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"student={path} has no config.json that can be read ({error}); name a folder with a saved student.") from error
    if kind != StudentConfig.model_type:
        raise UserError(f"student={path} holds a model of type {kind}, not a student; convert it first.")
    loaded: Any = StudentForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    student, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"student={path} lacks {len(missing)} weights, such as {missing[0]}; copy or train it again.")
    return student.eval()
