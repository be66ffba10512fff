"""Generated continuations, scored: likelihoods of given text hide what shows when a model goes on by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hm.evaluate import mean_of, token_losses

PROMPT = 32


@torch.no_grad()
def score_generation(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    token_batches: Sequence[Tensor],
    *,
    new_tokens: int = 128,
    seed: int = 0,
    precision: str = "fp32",
) -> dict[str, dict[str, Any]]:
    """Continuations of the first PROMPT tokens of held-out sequences (b, L), greedy and sampled at temperature 1.

    Returns:
        {"greedy", "sampled", "text": {"distinct_1", "distinct_2", "distinct_3", "repetition", "teacher_nll"}}, each
        {"value", "stderr"} over sequences, beside the same of the real continuation: the share of n-grams that are
        different ones, the share of tokens whose 4-gram (it and the three before) was there before, both in percent,
        and the teacher's loss on the continuation in nats per token.
    """
    scored: dict[str, dict[str, list[float]]] = {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in token_batches:
            text = batch[:, : PROMPT + new_tokens].to(model.device)
            prompt = text[:, :PROMPT]
            for way in ("greedy", "sampled", "text"):
                tokens = text if way == "text" else go_on(model, prompt, text.shape[1] - PROMPT, way == "sampled", precision)
                losses = token_losses(teacher, [tokens], precision=precision)[0][:, PROMPT - 1 :]
                for row, loss in zip(tokens[:, PROMPT:].tolist(), losses, strict=True):
                    for name, value in {**repetition(row), "teacher_nll": loss.mean().item()}.items():
                        scored.setdefault(way, {}).setdefault(name, []).append(value)
    return {way: {name: mean_of(values) for name, values in names.items()} for way, names in scored.items()}


def go_on(model: PreTrainedModel, prompt: Tensor, count: int, sample: bool, precision: str) -> Tensor:
    """prompt (b, n) -> (b, n + count), greedy or sampled at temperature 1, whatever the model's generation_config.json says;
    no token ends a continuation."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    try:
        with torch.autocast(prompt.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
                do_sample=sample, eos_token_id=None, pad_token_id=0, **sampling,
            )  # fmt: skip
    finally:
        model.generation_config = own


def repetition(tokens: Sequence[int]) -> dict[str, float]:
    """distinct_1 to distinct_3 and repetition of one continuation, in percent, as in `score_generation`."""

    def grams(n: int) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    found = {f"distinct_{n}": 100 * len(set(grams(n))) / max(1, len(grams(n))) for n in (1, 2, 3)}
    again = sum(count - 1 for count in Counter(grams(4)).values())
    return found | {"repetition": 100 * again / max(1, len(grams(4)))}
