"""Recall: what the sequences hold, and that a model that can only copy has a perfect score."""

from types import SimpleNamespace

import pytest
import torch

from hm.errors import UserError
from hm.recall import associative_recall, needle, recall_sequences
from hm.teacher import load_tokenizer


class Copier(torch.nn.Module):
    """Predicts what followed the longest earlier match of the last few tokens (an induction head)."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=4096)

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(1, len(row)):
                match = [next((n for n in range(8) if n > j or row[j - n] != row[t - n]), 8) for j in range(t)]
                best = max(range(t), key=lambda j, match=match: (match[j], j))
                if match[best]:
                    logits[b, t, row[best + 1]] = 9.0
        return SimpleNamespace(logits=logits)


def test_each_pair_is_shown_once_and_asked_for_once():
    tokens = recall_sequences(5, 40, 61, 3, torch.Generator().manual_seed(0))
    assert tokens.shape == (3, 40)
    for row in tokens.tolist():
        shown, filler, asked = row[:10], row[10:30], row[30:]
        pairs = set(zip(shown[::2], shown[1::2], strict=True))
        assert pairs == set(zip(asked[::2], asked[1::2], strict=True))
        assert len(set(shown)) == 10
        assert not set(filler) & set(shown)
    with pytest.raises(ValueError, match="do not fit"):
        recall_sequences(11, 40, 61, 1, torch.Generator())


def test_a_model_that_copies_recalls_everything_and_a_random_one_what_chance_gives(make_teacher):
    found = associative_recall(Copier(), 128, sequences=2)  # type: ignore[arg-type]
    assert [(r["pairs"], r["length"]) for r in found] == [(4, 32), (4, 64), (16, 64), (4, 128), (16, 128)]
    assert all(r["accuracy"] == r["exact"] == 100 for r in found)
    by_chance = associative_recall(make_teacher("neox", vocab_size=300), 64, sequences=32)[0]
    assert by_chance["accuracy"] < 45
    assert by_chance["stderr"] > 0


def test_a_needle_is_found_by_a_model_that_copies(token_dataset):
    tokenizer, held = load_tokenizer("tiny"), token_dataset("validation")
    found = needle(Copier(), tokenizer, held, [128], trials=2)  # type: ignore[arg-type]
    assert [r["depth"] for r in found] == [0.1, 0.5, 0.9]
    assert all(r["accuracy"] == 100 and r["gain"] > 1 for r in found)
    with pytest.raises(UserError, match=r"eval.needle=1000000"):
        needle(Copier(), tokenizer, held, [1000000])  # type: ignore[arg-type]
