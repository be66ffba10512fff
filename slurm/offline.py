"""What plan=true says of a teacher that can't be had here: its sizes are known, its content is not."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from hm.data import DataSpec
from hm.errors import UserError
from hm.inputs import Inputs
from hm.store import content_key

TEACHERS = Path(__file__).parent / "teachers"
"""config.json of teachers by hub id ("/" as "--"), with what sizes follow from and nothing else."""


class OfflineInputs(Inputs):
    """Inputs that stand in for a known teacher that neither the disk nor a hub gives.

    `unresolved` says, by teacher, why it could not be had. Keys made with it are not those that a run would have, so
    what is already done is not recognised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unresolved: dict[str, str] = {}
        self._found_config, self.config = self.config, cache(self._config)
        self._found_teacher, self.teacher = self.teacher, cache(self._teacher)
        self._found_tokens_key, self.tokens_key = self.tokens_key, cache(self._assumed_tokens_key)

    def _config(self, name: str) -> PreTrainedConfig:
        known = TEACHERS / f"{name.replace('/', '--')}.json"
        try:
            return self._found_config(name)
        except UserError as error:
            if not known.is_file():
                raise
            self.unresolved[name] = str(error)
        values = json.loads(known.read_text())
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)

    def _teacher(self, name: str) -> str:
        self.config(name)
        return f"unresolved {name}" if name in self.unresolved else self._found_teacher(name)

    def _assumed_tokens_key(self, teacher: str, spec: DataSpec) -> str:
        self.config(teacher)
        if teacher not in self.unresolved:
            return self._found_tokens_key(teacher, spec)
        return content_key({"step": "tokens", "text": self.text(spec), "tokenizer": f"unresolved {teacher}"})
