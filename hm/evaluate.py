"""Perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hm.progress import progress_bar


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_batches: Iterable[Tensor],
    *,
    precision: str = "fp32",
    bytes_per_token: float | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, float]]:
    """Token-weighted perplexity of `model` over batches of tokens (b, L + 1), each token predicted from those before.

    Returns:
        {"ppl": {"value", "stderr"}, "bits_per_byte": {...} if bytes_per_token is given}. The standard error is over
        sequences: that of the mean loss per sequence, carried through the exponential.

    Raises:
        ValueError: if there are no batches, or the loss is not finite.
    """
    device, was_training = model.device, model.training
    model.eval()
    per_sequence: list[Tensor] = []
    lengths: list[Tensor] = []
    for tokens in progress_bar(token_batches, desc=progress, unit="batch") if progress else token_batches:
        tokens = tokens.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        per_sequence.append(loss.view(len(tokens), -1).double().mean(1).cpu())
        lengths.append(torch.full((len(tokens),), tokens.shape[1] - 1, dtype=torch.float64))
    model.train(was_training)
    if not per_sequence:
        raise ValueError("perplexity needs at least one batch of tokens")
    losses, share = torch.cat(per_sequence), torch.cat(lengths) / sum(n.sum() for n in lengths)
    mean = (share * losses).sum().item()
    if not math.isfinite(mean):
        raise ValueError(f"the loss on the validation text is {mean}")
    n = len(losses)
    stderr = math.sqrt(n / (n - 1) * (share * (losses - mean)).square().sum()) if n > 1 else math.nan
    found = {"ppl": measured(math.exp(mean), math.exp(mean) * stderr)}
    if bytes_per_token:
        bits = 1 / (math.log(2) * bytes_per_token)
        found["bits_per_byte"] = measured(mean * bits, stderr * bits)
    return found


def measured(value: float, stderr: float) -> dict[str, float]:
    """A metric of a record; an error that can't be known (a single sequence) is left out."""
    return {"value": value} if math.isnan(stderr) else {"value": value, "stderr": stderr}
