"""lm-eval's own model of Transformers, asked for the logits of the answers alone. Imports lm-eval.

It takes the logits of every token of a batch and their logarithm in float32: for 64 prompts of 1024 tokens and a vocabulary of
49,152 these are 19 GB. Only those that predict an answer are used, some ten of each prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor


class AnswerScorer(HFLM):
    """HFLM with the same batches and the same scores, whose logits are those of the last tokens that are needed."""

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        """Remember where the answer begins in each row that the model will be given."""
        self.starts: dict[tuple, int] = {}
        for _, prompt, answer in requests:
            row = tuple((prompt + answer)[-(self.max_length + 1) :][:-1])
            self.starts[row] = min(self.starts.get(row, len(row)), len(row) - len(answer))
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """inps: (B, L), padded with zeros on the right -> logits (B, the last positions that are needed, V)."""
        needed = max(len(row) - self.start(row) for row in inps.tolist())
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(inps, logits_to_keep=needed).logits

    def start(self, row: list[int]) -> int:
        """The first position of a padded row whose logits are used. Zeros at its end may be padding or tokens, so all
        rows that it may be are looked up."""
        first = end = len(row)
        while end > 0:
            first = min(first, self.starts.get(tuple(row[:end]), first))
            if row[end - 1] != 0:
                break
            end -= 1
        return first
