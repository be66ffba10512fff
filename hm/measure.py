"""What is measured of a finished model beyond its perplexity: whatever the settings of the group eval ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hm import tasks
from hm.adapters import max_seq_len
from hm.config import Settings
from hm.data import TokenDataset, validation_batches
from hm.diagnostics import diagnose
from hm.errors import UserError
from hm.evaluate import agreement, by_position, strided_losses, summarise, token_losses
from hm.generation import score_generation
from hm.modeling import StudentForCausalLM
from hm.progress import say
from hm.recall import associative_recall, needle

SAMPLE = 16
"""Evenly spaced validation sequences that diagnostics look at and continuations begin with."""


def wanted(s: Settings) -> dict[str, Any]:
    """The evaluations that are on, with what their results depend on: a part of a cell's key, empty by default."""
    e = s.eval
    found = {n: getattr(e, n) for n in ("lengths", "stride", "recall", "needle", "generation", "agreement", "diagnostics")}
    found |= {n: SAMPLE for n in ("generation", "diagnostics") if found[n]}
    found["moved by"] = found.pop("stride")  # what "stride" was, the last tokens of each sequence, was something else
    return {n: v for n, v in found.items() if v} | ({"tasks": tasks.fingerprint(e)} if e.tasks else {})


def enough_text(s: Settings, held: TokenDataset) -> None:
    """Refuse a validation split that is too short for what is to be measured, before anything is trained.

    Raises:
        UserError: naming the setting that asks for a longer text.
    """
    next(validation_batches(held, s.seq_len, 1, 1))
    for name in ("lengths", "needle"):
        longest = max(getattr(s.eval, name) or [0])
        if longest >= len(held):
            raise UserError(f"eval.{name}={longest} is longer than the validation text of {len(held):,} tokens; lower it or use more validation text.")


def measure(
    model: PreTrainedModel,
    s: Settings,
    held: TokenDataset,
    *,
    tokenizer: PreTrainedTokenizerFast,
    teacher: Callable[[], PreTrainedModel],
    precision: str = "fp32",
) -> dict[str, Any]:
    """The metrics that `s.eval` asks for, by their names in a record; see the functions that they come from.

    held: the validation split; teacher: gives the teacher, on the device of `model`.

    Raises:
        UserError: held-out text that is too short, task items that can't be scored.
    """
    e = s.eval
    found: dict[str, Any] = {}
    beyond = [f"eval.{n}={max(v)}" for n, v in (("lengths", e.lengths), ("needle", e.needle)) if max(v or [0]) > max_seq_len(model.config)]
    if beyond:
        say(f"{', '.join(beyond)}: beyond the {max_seq_len(model.config)} positions that the teacher was made for, where it extrapolates")
    per_token = held.text_bytes / len(held)
    few = list(validation_batches(held, s.seq_len, e.batch_size, min(e.sequences or 64, 64)))
    fewer = list(validation_batches(held, s.seq_len, 4, min(e.sequences or SAMPLE, SAMPLE)))  # alike whatever eval.batch_size is
    if e.stride:
        strided = summarise(strided_losses(model, held, s.seq_len, e.stride, e.sequences, batch_size=e.batch_size,
                                           precision=precision, progress="evaluate strided"), per_token)  # fmt: skip
        found["ppl_strided"] = strided["ppl"] | {"stride": e.stride, "length": s.seq_len}
        found["bits_per_byte_strided"] = strided["bits_per_byte"]
    if e.lengths:
        found |= perplexity_beyond(model, s, held, precision)
    if e.agreement:
        found["agreement"] = agreement(model, teacher(), (x[:, :-1] for x in few), precision=precision)
    if e.diagnostics and isinstance(model, StudentForCausalLM):
        found["diagnostics"] = diagnose(model, fewer, precision=precision)
    if e.recall:
        found["recall"] = associative_recall(model, s.seq_len, precision=precision)
    if e.needle:
        found["needle"] = needle(model, tokenizer, held, e.needle, precision=precision)
    if e.generation:
        found["generation"] = score_generation(model, teacher(), fewer, precision=precision)
    if e.tasks and tasks.installed() is None:
        say(f"eval.tasks={','.join(e.tasks)} is left out: lm-eval is not installed; run {tasks.INSTALL} and this command again.")
    elif e.tasks:
        found |= tasks.score_tasks(model, tokenizer, e.tasks, data=e.data, limit=e.limit, batch_size=e.task_batch, precision=precision)
    return found


def perplexity_beyond(model: PreTrainedModel, s: Settings, held: TokenDataset, precision: str) -> dict[str, Any]:
    """Perplexity at each of eval.lengths, and by position at the longest. Each length sees about as many tokens as
    the perplexity at the training length does. `made_for`: the positions of the teacher; what is longer is extrapolation, of its rotary positions too."""
    budget = (s.eval.sequences or held.num_blocks(s.seq_len)) * s.seq_len
    at_length: dict[str, list] = {"lengths": sorted(s.eval.lengths), "ppl": [], "stderr": [], "bits_per_byte": []}
    made_for = max_seq_len(model.config)
    losses: list[torch.Tensor] = []
    for length in at_length["lengths"]:
        batches = validation_batches(held, length, 1, max(2, budget // length))
        losses = token_losses(model, batches, precision=precision, progress=f"evaluate {length}")
        total = summarise(losses, held.text_bytes / len(held))
        at_length["ppl"].append(total["ppl"]["value"])
        at_length["stderr"].append(total["ppl"].get("stderr"))
        at_length["bits_per_byte"].append(total["bits_per_byte"]["value"])
    return {"ppl_at_length": at_length | {"made_for": made_for}, "ppl_by_position": by_position(losses)}
