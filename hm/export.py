"""A finished student as a folder that others can use: weights, config, tokenizer and a model card."""

from __future__ import annotations

import copy
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hm.errors import UserError
from hm.files import disk_errors, weight_errors

SHARD = "4GB"
CARD = """---
library_name: transformers
tags: [{tags}]
---
# {cell}

A {kind}, made from the Transformer `{teacher}` by hedgemamba, a harness for
[Attention to Mamba](https://arxiv.org/abs/2604.14191) (cell `{key}`).

{imports}    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("this folder")
    tokenizer = AutoTokenizer.from_pretrained("this folder")  # pads on the left, as generate() needs it

Parameters: {total:,}, of which {new:,} are not the teacher's. Training: {training}

| metric | value | standard error |
|---|---|---|
{numbers}

Perplexities are on the validation text of the recipe at its sequence length; accuracies are zero-shot, in percent.

Made with commit {commit}{changes} by `{command}`. Settings:

```yaml
{settings}```
"""


def model_card(record: dict[str, Any]) -> str:
    """The README.md of a student: what it was made from, how, and its numbers, all from the cell's record."""
    settings, origin = record["settings"], record["provenance"]
    single = {n: m for n, m in record["metrics"].items() if isinstance(m, dict) and "value" in m}
    numbers = [f"| {n} | {m['value']:.4g} | {m['stderr']:.2g} |" if "stderr" in m else f"| {n} | {m['value']:.4g} | |" for n, m in single.items()]
    kind = "fine-tuned Transformer" if settings["recipe"] == "adapted_teacher" else f"student with the mixer {settings['mixer']}"
    if settings["keep_attention"] and settings["recipe"] != "adapted_teacher":
        kind += f" (a hybrid: keep_attention={settings['keep_attention']})"
    plain, tokens = settings["recipe"] == "adapted_teacher", record["tokens"]
    return CARD.format(
        tags="" if plain else "hedgemamba, linear-attention, mamba",
        imports="" if plain else "    import hm  # hedgemamba's package, which makes the architecture known to Transformers\n",
        training=f"{tokens['stage2']:,} tokens." if plain else
        f"{tokens['stage1']:,} tokens of stage 1 and {tokens['stage2']:,} of stage 2. The recipe is also in `config.json`.",
        changes=" with changes" if origin.get("git_dirty") else "",
        cell=record["cell"], key=record["key"], kind=kind, teacher=settings["teacher"], numbers="\n".join(numbers),
        total=record["params"]["total"], new=record["params"]["new"],
        commit=origin["git_commit"] or "unknown", command=origin["command"], settings=yaml.safe_dump(settings, sort_keys=False),
    )  # fmt: skip


def exported(folder: str, key: str) -> bool:
    """Whether the folder already holds the export of the cell `key`.

    Raises:
        UserError: it holds something else, or is a file.
    """
    path = Path(folder).expanduser()
    card = path / "README.md"
    if card.is_file() and f"(cell `{key}`)" in card.read_text(errors="replace"):
        return True
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        why = "its README.md is of another" if card.is_file() else "it has no README.md that says so"
        raise UserError(f"export={folder} is not empty and not an export of this cell ({why}); name a new folder.")
    return False


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], folder: str) -> Path:
    """Write the model (safetensors of at most SHARD each), the tokenizer and the card; the folder is whole or absent.
    There the tokenizer pads on the left, with its end of text where it has no token for padding, as generation needs it.

    Raises:
        UserError: as `exported`, or the folder can't be written.
    """
    path = Path(folder).expanduser().absolute()
    if exported(folder, record["key"]):
        return path
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only the latter is saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path.parent):
        try:
            work.mkdir(parents=True)
            with weight_errors():
                model.save_pretrained(work, max_shard_size=SHARD)
            tokenizer.save_pretrained(work)
            (work / "README.md").write_text(model_card(record))
            os.replace(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path
