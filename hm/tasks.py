"""The paper's ten zero-shot tasks, scored by lm-eval's own model class on items from the hub or from local files.

lm-eval is an extra (`hedgemamba[eval]`) and is imported only where tasks are asked for. Requests are sorted by length
and one forward pass serves all one-token answers of a prompt: both are lm-eval's. So a score is what its `hf` model
gives for the same weights, dtype and batch size.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hm.adapters import max_seq_len
from hm.config import Evaluate
from hm.errors import UserError
from hm.store import content_key
from hm.text import open_text

SUFFIXES = ("", ".xz", ".gz", ".zst")
INSTALL = "pip install 'hedgemamba[eval]'"


@dataclass(frozen=True)
class Task:
    """metric: the one the paper reports; group: lm-eval's folder; fields: what an item must have, with its type."""

    metric: str
    group: str
    fields: Mapping[str, type | tuple[type, ...]]


_ARC: dict[str, type] = {"question": str, "choices": dict, "answerKey": str}
TASKS = {
    "arc_challenge": Task("acc_norm", "arc", _ARC),
    "arc_easy": Task("acc", "arc", _ARC),
    "social_iqa": Task("acc", "siqa", dict.fromkeys(("context", "question", "answerA", "answerB", "answerC"), str)
                       | {"label": (str, int)}),
    "piqa": Task("acc", "piqa", {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "lambada_openai": Task("acc", "lambada", {"text": str}),
    "boolq": Task("acc", "super_glue/boolq", {"question": str, "passage": str, "label": int}),
    "race": Task("acc", "race", {"article": str, "problems": str}),
    "logiqa": Task("acc", "logiqa", {"label": str, "context": str, "question": str, "options": list}),
    "winogrande": Task("acc", "winogrande", dict.fromkeys(("sentence", "option1", "option2", "answer"), str)),
    "hellaswag": Task("acc_norm", "hellaswag", {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list,
                                                "label": (str, int)}),
}  # fmt: skip
"""The paper's columns (METRICS of a record), in its order."""


def installed() -> str | None:
    """lm-eval's version, None where it isn't installed."""
    return metadata.version("lm_eval") if importlib.util.find_spec("lm_eval") else None


def check_data(e: Evaluate) -> None:
    """Refuse task items that can't be had, or are not whole, before anything is trained.

    Raises:
        UserError: the folder or a file is missing, or an item lacks a field; lm-eval is there without `datasets`, which it reads items with.
    """
    for name in e.tasks or [] if e.data != "hub" else []:
        read_items(task_file(e.data, name), name)
    if not e.tasks or installed() is None:
        return
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"eval.tasks={','.join(e.tasks)} needs the package datasets, which is not installed; run {INSTALL}.")


def ask_hub(e: Evaluate) -> None:
    """Refuse tasks that the hub does not give, before anything is trained. Without lm-eval none is asked for.

    Raises:
        UserError: the hub gives no items, which are not in the local cache either.
    """
    for name in e.tasks or [] if e.data == "hub" and installed() is not None else []:
        check_hub(name)


@cache
def check_hub(name: str) -> None:
    """Refuse a task whose items the hub does not describe: only that is fetched. In offline mode (HF_HUB_OFFLINE,
    HF_DATASETS_OFFLINE) the local cache is asked."""
    import datasets

    source = task_manager([name]).task_index[name].cfg or {}
    with hub_errors([name]):
        datasets.load_dataset_builder(source["dataset_path"], source.get("dataset_name"))


@contextmanager
def hub_errors(names: Sequence[str]) -> Iterator[None]:
    """Turns what `datasets` says of a hub that does not give a data set into a UserError."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
        raise UserError(f"eval.tasks={','.join(names)} can't be had from the hub ({first}); check the connection (and HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), or give eval.data=<folder>.") from error


def task_manager(names: Sequence[str]) -> Any:
    """lm-eval's index of the tasks, from their folders alone."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders = sorted({f"{Path(lm_eval.__file__).parent}/tasks/{TASKS[n].group}" for n in names})
    return TaskManager(include_defaults=False, include_path=folders)


def fingerprint(e: Evaluate) -> dict[str, Any]:
    """What the scores depend on beside the model: the harness, the items, how many of them."""
    files = {} if e.data == "hub" else {name: task_file(e.data, name) for name in e.tasks}
    items = {name: _read_items(path, name, path.stat().st_mtime_ns)[1] for name, path in files.items()} or "hub"
    return {"names": e.tasks, "items": items, "limit": e.limit, "harness": installed()}


def task_file(folder: str, name: str) -> Path:
    """<folder>/<task>.jsonl, perhaps compressed."""
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"eval.data={folder} is no folder; name one that holds {name}.jsonl, or hub.")
    for suffix in SUFFIXES:
        path = Path(folder).expanduser() / f"{name}.jsonl{suffix}"
        if path.is_file():
            return path
    fields, packed = ", ".join(TASKS[name].fields), ", ".join(SUFFIXES[1:])
    raise UserError(f"eval.data={folder} has no {name}.jsonl (plain or with {packed}), of one JSON object per line with {fields}; name a folder that has one, or hub.")


def read_items(path: Path, name: str) -> list[dict[str, Any]]:
    """The items of a task file, each a JSON object with the task's fields."""
    return _read_items(path, name, path.stat().st_mtime_ns)[0]


@cache
def _read_items(path: Path, name: str, mtime_ns: int) -> tuple[list[dict[str, Any]], str]:
    """The items and a hash of them."""
    items = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON ({error}); mend that line of eval.data=.") from error
            for key, kind in TASKS[name].fields.items():
                if not isinstance(item, dict) or not isinstance(item.get(key), kind):
                    raise UserError(f"{path}:{number} has no {key!r} of the type that the task {name} reads; mend that line of eval.data=.")
            items.append(item)
    if len(items) < 2:
        raise UserError(f"{path} has {len(items)} items; a score and its standard error need 2 or more.")
    return items, content_key({"items": items})


def load_tasks(names: Sequence[str], data: str = "hub", limit: int | None = None) -> dict[str, Any]:
    """lm-eval's task objects (of local items the first `limit`) as `lm_eval.evaluator.evaluate` takes them: zero-shot, with the paper's metric alone.

    Raises:
        UserError: the items can't be had.
    """
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    specs: list[dict[str, Any]] = []
    for name in names:
        metric = {"metric": TASKS[name].metric, "aggregation": "mean", "higher_is_better": True}
        specs.append({"task": name, "num_fewshot": 0, "metric_list": [metric]})
        if data != "hub":
            items = datasets.Dataset.from_list(read_items(task_file(data, name), name)[:limit])
            whole = {"test": items, "validation": items}
            specs[-1] |= {"training_split": None, "custom_dataset": lambda whole=whole, **kwargs: whole}
    with hub_errors(names) if data == "hub" else nullcontext():
        return {"tasks": task_manager(names).load({"group": "paper", "task": specs})["tasks"]}


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    *,
    data: str = "hub",
    limit: int | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
) -> dict[str, dict[str, Any]]:
    """Each task's score: {"value" and "stderr" in percent, "metric", "version", "shots", "limit", "n", "cut", "harness"}.

    data: "hub", or a folder of <task>.jsonl files. limit: items of each task (None: all). cut: items whose prompt
    did not fit into the model's length and lost its beginning, as lm-eval does it.

    Raises:
        UserError: lm-eval is missing, the tokenizer isn't the model's, or an item can't be scored.
    """
    if installed() is None:
        raise UserError(f"eval.tasks={','.join(names)} needs lm-eval, which is not installed; run {INSTALL}.")
    from lm_eval.evaluator import evaluate

    from hm.scorer import AnswerScorer

    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise UserError(f"the tokenizer has ids up to {largest} and the model {model.config.vocab_size} embeddings; give the model's own tokenizer.")
    loaded = load_tasks(names, data, limit)
    cut = {name: check_items(task, name, tokenizer, max_seq_len(model.config), limit) for name, task in loaded["tasks"].items()}
    lm = AnswerScorer(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32",
                      mixed_precision_dtype="bfloat16" if precision == "bf16" else None, max_length=max_seq_len(model.config))  # fmt: skip
    lm.loglikelihood = partial(lm.loglikelihood, disable_tqdm=not sys.stderr.isatty())  # type: ignore[method-assign]
    found: Any = evaluate(lm, loaded, limit=limit, log_samples=False)
    scores = {}
    for name in names:
        metric, result = TASKS[name].metric, found["results"][name]
        scores[name] = {
            "value": 100 * result[f"{metric},none"], "stderr": 100 * result[f"{metric}_stderr,none"], "metric": metric,
            "version": found["versions"][name], "shots": found["n-shot"][name], "limit": limit,
            "n": found["n-samples"][name]["effective"], "cut": cut[name], "harness": installed(),
        }  # fmt: skip
    return scores


def check_items(task: Any, name: str, tokenizer: PreTrainedTokenizerFast, longest: int, limit: int | None) -> int:
    """How many of a task's items have a prompt that must be cut to fit into `longest` tokens.

    Raises:
        UserError: an item from which no prompt or answer can be made, that has an empty one, or an answer that
            alone is too long.
    """

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    cut = 0
    for number, doc in zip(range(limit or sys.maxsize), task.eval_docs, strict=False):
        where = f"item {number + 1} of the task {name}"
        try:
            prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
            answers = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else [target]
            if isinstance(target, int):
                answers[target]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError) as error:
            raise UserError(f"{where} can't be read ({error!r}); mend it in eval.data=.") from error
        prompts = answers if isinstance(prompt, int) else [prompt]
        answers = [target] if isinstance(prompt, int) else answers
        if not all(p.strip() for p in prompts):
            raise UserError(f"{where} has an empty prompt; mend it in eval.data=.")
        if not all(a.strip() for a in answers):
            raise UserError(f"{where} has an empty answer; mend it in eval.data=.")
        size = max(len(p.encode()) for p in prompts), max(len(a.encode()) for a in answers)
        if sum(size) > longest:  # there are no more tokens than bytes, so others surely fit
            size = max(map(tokens, prompts)), max(map(tokens, answers))
        if size[1] > longest:
            raise UserError(f"{where} has an answer of {size[1]} tokens, and the model takes {longest}; drop it from eval.data=.")
        cut += sum(size) > longest + 1
    return cut

