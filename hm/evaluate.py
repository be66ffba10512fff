"""Perplexity on held-out text, by sequence and by position, and agreement with another model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hm.data import validation_blocks
from hm.progress import progress_bar
from hm.shards import TokenDataset

SEGMENT = 4096
"""Tokens of a forward; a longer sequence goes on from the cache, so that its logits need not be held at once."""


@torch.no_grad()
def segments(model: PreTrainedModel, tokens: Tensor, precision: str = "fp32") -> Iterator[Tensor]:
    """The logits (b, <= SEGMENT, V) of tokens (b, L), one segment after the other."""
    cache = None
    for piece in tokens.split(SEGMENT, dim=1):
        whole = piece.shape == tokens.shape
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            given = {"use_cache": False} if whole else {"use_cache": True, "past_key_values": cache}
            out = model(input_ids=piece, **given)  # type: ignore[operator]
        cache = None if whole else out.past_key_values
        yield out.logits


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    token_batches: Iterable[Tensor],
    *,
    precision: str = "fp32",
    progress: str | None = None,
) -> list[Tensor]:
    """Batches of tokens (b, L + 1) -> cross-entropy of each token given those before: float32 (b, L), in nats.

    Raises:
        ValueError: if there are no batches, or a loss is not finite.
    """
    device, was_training = model.device, model.training
    model.eval()
    found = []
    for tokens in progress_bar(token_batches, desc=progress, unit="batch") if progress else token_batches:
        tokens = tokens.to(device)
        labels = tokens[:, 1:].split(SEGMENT, dim=1)
        losses = [
            F.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), reduction="none").view(label.shape)
            for logits, label in zip(segments(model, tokens[:, :-1], precision), labels, strict=True)
        ]
        found.append(torch.cat(losses, dim=1).cpu())
    model.train(was_training)
    if not found:
        raise ValueError("perplexity needs at least one batch of tokens")
    for loss in found:
        if not torch.isfinite(loss).all():
            raise ValueError(f"the loss on the validation text is {loss[~torch.isfinite(loss)][0]:g}")
    return found


def summarise(losses: Sequence[Tensor], bytes_per_token: float | None = None) -> dict[str, dict[str, float]]:
    """Losses of tokens (b, L) -> {"ppl": {"value", "stderr"}, "bits_per_byte": {...} if bytes_per_token is given}.

    Every token weighs the same. The standard error is over sequences: that of the mean loss per sequence, carried
    through the exponential.
    """
    per_sequence = torch.cat([loss.double().mean(1) for loss in losses])
    lengths = torch.cat([torch.full((len(loss),), loss.shape[1], dtype=torch.float64) for loss in losses])
    share, n = lengths / lengths.sum(), len(per_sequence)
    mean = (share * per_sequence).sum().item()
    stderr = math.sqrt(n / (n - 1) * (share * (per_sequence - mean)).square().sum()) if n > 1 else math.nan
    found = {"ppl": measured(math.exp(mean), math.exp(mean) * stderr)}
    if bytes_per_token:
        bits = 1 / (math.log(2) * bytes_per_token)
        found["bits_per_byte"] = measured(mean * bits, stderr * bits)
    return found


def strided_losses(
    model: PreTrainedModel, held: TokenDataset, seq_len: int, stride: int, sequences: int | None, *, batch_size: int = 8,
    precision: str = "fp32", progress: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """The losses (1, L) of the tokens of each of the `validation_blocks`, like `token_losses`, from a window of L = seq_len
    tokens that is moved by `stride`, of which the last `stride` count: each has at least L - stride tokens before it, but
    at the beginning of the text. It costs L / stride times as much."""
    windows, counted = [], []
    for block in validation_blocks(held, seq_len, sequences):
        for first in range(0, seq_len, stride):
            counted.append(min(stride, seq_len - first))
            end = block * seq_len + first + counted[-1]
            windows.append(torch.from_numpy(held.tokens(max(0, end - seq_len), end + 1)))
    alike = [list(group) for _, group in itertools.groupby(windows, len)]  # those at the beginning of the text are shorter
    batches = [torch.stack(group[i : i + batch_size]) for group in alike for i in range(0, len(group), batch_size)]
    rows = itertools.chain.from_iterable(token_losses(model, batches, precision=precision, progress=progress))
    return list(torch.cat([row[-n:] for row, n in zip(rows, counted, strict=True)]).view(-1, 1, seq_len))


def perplexity(
    model: PreTrainedModel,
    token_batches: Iterable[Tensor],
    *,
    precision: str = "fp32",
    bytes_per_token: float | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, float]]:
    """`summarise` of `token_losses`: the perplexity of `model` over batches of tokens (b, L + 1)."""
    return summarise(token_losses(model, token_batches, precision=precision, progress=progress), bytes_per_token)


def by_position(losses: Sequence[Tensor], first: int = 256) -> dict[str, list]:
    """Losses of tokens (b, L), L the same in all -> perplexity of the tokens up to each position.

    Returns:
        {"positions": [first, 2 * first, ..., L], "ppl": [...], "stderr": [...]}: entry i is over the tokens after
        positions[i - 1] up to positions[i]; stderr is null for a single sequence.
    """
    length = losses[0].shape[1]
    ends = [first << i for i in range(length.bit_length()) if first << i < length] + [length]
    pieces = [summarise([x[:, a:b] for x in losses])["ppl"] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return {"positions": ends, "ppl": [p["value"] for p in pieces], "stderr": [p.get("stderr") for p in pieces]}


@torch.no_grad()
def agreement(
    model: PreTrainedModel, teacher: PreTrainedModel, token_batches: Iterable[Tensor], *, precision: str = "fp32"
) -> dict[str, Any]:
    """How close two models' next-token distributions are on batches of tokens (b, L).

    Returns:
        {"top1": share of positions with the same most likely token, in percent; "kl": KL(teacher || model) per
        token in nats}, each {"value", "stderr"} over sequences.
    """
    top1, kl = [], []
    for tokens in token_batches:
        for row in tokens.to(model.device).split(1):
            sums = torch.zeros(2, dtype=torch.float64)
            for own, theirs in zip(segments(model, row, precision), segments(teacher, row, precision), strict=True):
                same = (own.argmax(-1) == theirs.argmax(-1)).sum()
                log_p, log_q = (x.float().log_softmax(-1) for x in (own, theirs))
                sums += torch.tensor([same.item(), F.kl_div(log_p, log_q, log_target=True, reduction="sum").item()])
            top1.append(100 * sums[0].item() / row.shape[1])
            kl.append(sums[1].item() / row.shape[1])
    return {"top1": mean_of(top1), "kl": mean_of(kl)}


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """The mean of independent values, with its standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    return measured(x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.nan)


def measured(value: float, stderr: float) -> dict[str, float]:
    """A metric of a record; an error that can't be known (a single sequence) is left out."""
    return {"value": value} if math.isnan(stderr) else {"value": value, "stderr": stderr}
