"""Recall from the context: multi-query associative recall on random tokens, and a needle in a long text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hm.data import TokenDataset
from hm.errors import UserError
from hm.evaluate import mean_of, segments

PAIRS = (4, 16, 64)
DEPTHS = (0.1, 0.5, 0.9)
NEEDLE = " The secret number of the city is"


def recall_sequences(pairs: int, length: int, vocab_size: int, sequences: int, generator: torch.Generator) -> Tensor:
    """Multi-query associative recall (zoology, arXiv 2312.04927): (sequences, length) tokens, all drawn at random.

    The first 2 * pairs tokens are pairs of a key and its value, the last 2 * pairs the same pairs in another order;
    between them lies filler. No token of a sequence's keys, values and filler is in two of these.
    """
    if 4 * pairs > length:
        raise ValueError(f"{pairs} pairs, shown and asked for, do not fit into {length} tokens")
    rows = []
    for _ in range(sequences):
        ids = torch.randperm(vocab_size, generator=generator)
        shown = ids[: 2 * pairs].view(2, pairs).T
        filler = ids[2 * pairs :][torch.randint(vocab_size - 2 * pairs, (length - 4 * pairs,), generator=generator)]
        asked = shown[torch.randperm(pairs, generator=generator)]
        rows.append(torch.cat([shown.flatten(), filler, asked.flatten()]))
    return torch.stack(rows)


@torch.no_grad()
def associative_recall(
    model: PreTrainedModel, seq_len: int, *, sequences: int = 32, seed: int = 0, precision: str = "fp32"
) -> list[dict[str, Any]]:
    """Share of values that are recalled, in percent, for PAIRS and for a quarter, a half and all of seq_len tokens.

    Returns:
        Per number of pairs and length that fit, {"pairs", "length", "n", "accuracy", "stderr", "exact"}: `exact`
        asks for the most likely of all tokens, `accuracy` only for that of the sequence's values (a model that knows which
        were named already and no pairs has (1 + 1/2 + ... + 1 / pairs) / pairs: 52, 21 and 7.4 percent; by chance:
        1 / pairs); the standard error is over sequences.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for length in (seq_len // 4, seq_len // 2, seq_len):
        for pairs in (p for p in PAIRS if 4 * p <= length and 4 * p <= model.config.vocab_size):
            tokens = recall_sequences(pairs, length, model.config.vocab_size, sequences, generator).to(model.device)
            accuracy, exact = [], []
            for row in tokens.split(1):
                logits = torch.cat(list(segments(model, row[:, :-1], precision)), dim=1)[0, -(2 * pairs - 1) :: 2]
                values, answers = row[0, 1 : 2 * pairs : 2], row[0, -(2 * pairs - 1) :: 2]
                accuracy.append(100 * (values[logits[:, values].argmax(-1)] == answers).double().mean().item())
                exact.append(100 * (logits.argmax(-1) == answers).double().mean().item())
            mean = mean_of(accuracy)
            found.append({"pairs": pairs, "length": length, "n": sequences, "accuracy": mean["value"], "stderr": mean["stderr"],
                          "exact": mean_of(exact)["value"]})  # fmt: skip
    return found


@torch.no_grad()
def needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held: TokenDataset,
    lengths: Sequence[int],
    *,
    trials: int = 4,
    seed: int = 0,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """A sentence with a random number is hidden in held-out text and begun again at its end.

    Returns:
        Per length and depth (0 is the beginning), {"length", "depth", "n", "accuracy", "gain", "stderr"}: the share
        of numbers whose every token is the most likely one, in percent, and by how many nats the number is likelier
        than one that the text does not hold (`stderr` is that of the gain).

    Raises:
        UserError: a length that the held-out text or the sentence does not fit.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    begin = tokenizer.encode(NEEDLE, add_special_tokens=False)
    for length in lengths:
        for depth in DEPTHS:
            hits, gains = [], []
            for _ in range(trials):
                true, other = (
                    tokenizer.encode(f" {int(n)}", add_special_tokens=False)
                    for n in torch.randint(10_000, 100_000, (2,), generator=generator)
                )
                room = length - 2 * len(begin) - 2 * max(len(true), len(other)) - 1
                if room < 2 or room > len(held):
                    raise UserError(f"eval.needle={length} does not fit the validation text of {len(held)} tokens or the hidden sentence of {len(begin)}; choose another length.")
                start = int(torch.randint(len(held) - room + 1, (), generator=generator))
                text = held.tokens(start, start + room).tolist()
                at = int(depth * room)
                context = [*text[:at], *begin, *true, *text[at:], *begin]
                loss, likeliest = number_loss(model, context, true, precision)
                hits.append(100.0 * likeliest)
                gains.append(number_loss(model, context, other, precision)[0] - loss)
            gain = mean_of(gains)
            found.append({"length": length, "depth": depth, "n": trials, "accuracy": mean_of(hits)["value"],
                          "gain": gain["value"], "stderr": gain["stderr"]})  # fmt: skip
    return found


def number_loss(model: PreTrainedModel, context: list[int], number: list[int], precision: str) -> tuple[float, bool]:
    """Nats of the number's tokens after the context, and whether each of them is the most likely one."""
    tokens = torch.tensor([context + number], device=model.device)
    last = deque(segments(model, tokens[:, :-1], precision), maxlen=2)  # the number may lie across two
    own = torch.cat(list(last), dim=1)[0, -len(number) :].float()
    answer = tokens[0, -len(number) :]
    nats = -own.log_softmax(-1).gather(1, answer[:, None]).sum().item()
    return nats, bool((own.argmax(-1) == answer).all())
