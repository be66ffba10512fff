"""What the keys and steps of many cells depend on, looked up once: teachers and texts."""

from __future__ import annotations

from functools import cache

from hm.data import DataSpec, spec_fingerprint
from hm.store import content_key
from hm.teacher import fingerprint, load_config, load_tokenizer


class Inputs:
    """Lookups of a teacher's config, tokenizer and content and of a text's content, each made once.

    A thousand cells of one sweep share one `Inputs`; what changes on disk after the first look goes unseen by them.
    Each raises UserError as the function that it stands for.
    """

    def __init__(self) -> None:
        self.config = cache(load_config)
        self.tokenizer = cache(load_tokenizer)
        self.teacher = cache(fingerprint)
        self.text = cache(spec_fingerprint)
        self.tokens_key = cache(self._tokens_key)
        self.built: set[str] = set()  # mixers that can be had

    def _tokens_key(self, teacher: str, spec: DataSpec) -> str:
        """The key of the token shards of a text under a teacher's tokenizer."""
        tokenizer = self.tokenizer(teacher)
        return content_key({"step": "tokens", "text": self.text(spec), "tokenizer": tokenizer.backend_tokenizer.to_str(),
                            "eos": tokenizer.eos_token_id, "vocab": self.config(teacher).vocab_size})  # fmt: skip
