"""A student's config. It imports nothing that Transformers' AutoConfig has not loaded, so that hm.auto can register it there."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class StudentConfig(PreTrainedConfig):
    """teacher_config: the teacher's config as a dict; mixer: a `MixerSpec` as a dict; keep_attention: layer indices;
    recipe: how the student was made (settings, tokens, teacher), for people."""

    model_type = "hedgemamba"

    def __init__(self, teacher_config: dict | None = None, mixer: dict | None = None,
                 keep_attention: list[int] | None = None, recipe: dict | None = None, **kwargs: Any):  # fmt: skip
        self.teacher_config = teacher_config or {}
        self.mixer = mixer or {}
        self.keep_attention = keep_attention or []
        self.recipe = recipe or {}
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                     "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):  # fmt: skip
            if name in self.teacher_config:
                kwargs.setdefault(name, self.teacher_config[name])
        super().__init__(**kwargs)

    def backbone_config(self) -> PreTrainedConfig:
        values = dict(self.teacher_config)
        return AutoConfig.for_model(values.pop("model_type"), **values)


AutoConfig.register(StudentConfig.model_type, StudentConfig)
