"""The evaluations that a cell's settings ask for: off by default, each in the key where it is on, all of them in one cell."""

import json
import subprocess
import sys
import time

import pytest
import torch

from hm import tasks
from hm.cell import Cell
from hm.config import from_dict
from hm.data import TokenDataset, validation_batches
from hm.errors import UserError
from hm.evaluate import strided_losses, token_losses
from hm.measure import wanted
from hm.modeling import load_student
from hm.store import Store

EVERYTHING = {
    "eval.lengths": [64, 48], "eval.stride": 8, "eval.recall": True, "eval.needle": [128], "eval.generation": True,
    "eval.agreement": True, "eval.diagnostics": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def cell(corpus_file, tmp_path_factory):
    """cell(**settings): of one store, with the embedded teacher and 64 tokens of each stage."""
    store = Store(tmp_path_factory.mktemp("runs"), heartbeat=0.2, poll=0.05)

    def make(changes):
        base = {
            "data": str(corpus_file), "validation_fraction": 0.2, "seq_len": 32, "device": "cpu", "stage1_tokens": 64,
            "stage2_tokens": 64, "stage1.batch_size": 2, "stage2.batch_size": 2, "eval.sequences": 4, "eval.batch_size": 3,
        }  # fmt: skip
        return Cell(from_dict(base | changes), store)

    return make


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    lines = [{"goal": f"keep {t} warm", "sol1": "wrap it in wool", "sol2": "put it on ice", "label": n} for t, n in (("soup", 0), ("tea", 1))]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"eval.tasks": ["piqa"], "eval.data": str(folder)}


def test_by_default_nothing_more_is_measured_and_every_evaluation_that_is_on_is_in_the_key(cell, items):
    plain = cell({})
    assert wanted(plain.s) == {}
    one_by_one = [cell({name: value}).key for name, value in EVERYTHING.items()]
    keys = [plain.key, *one_by_one, cell(items).key, cell({"eval.lengths": [64]}).key, cell(items | {"eval.limit": 2}).key]
    assert len(set(keys)) == len(keys)
    assert cell(items | {"eval.task_batch": 2}).key == cell(items).key
    assert cell({"eval.lengths": []}).key == plain.key


def test_one_cell_measures_everything_and_can_be_exported_and_loaded(cell, items, tmp_path):
    folder = tmp_path / "student"
    made = cell(EVERYTHING | items | {"export": str(folder)})
    record = made.run()
    metrics = record["metrics"]
    assert {"ppl", "ppl_start", "ppl_strided", "ppl_at_length", "ppl_by_position", "recall", "needle", "generation",
            "agreement", "diagnostics", "piqa"} <= set(metrics)  # fmt: skip
    assert metrics["ppl_at_length"]["lengths"] == [48, 64]
    assert metrics["ppl_by_position"]["positions"] == [64]
    assert metrics["piqa"]["n"] == 2
    assert len(metrics["diagnostics"]["layers"]) == 6

    student = load_student(str(folder))
    held = TokenDataset(made.tokens(), "validation")
    losses = torch.cat(token_losses(student, validation_batches(held, 32, 3, 4)))
    kept = json.loads((made.store.run_path("default", made.name, made.key) / "losses.json").read_text())
    assert (kept["tokens"], kept["seq_len"]) == (made.tokens_key, 32)
    assert kept["loss"] == pytest.approx(losses.mean(1).tolist())
    strided = torch.cat(strided_losses(student, held, 32, 8, 4))
    assert strided.shape == losses.shape
    assert metrics["ppl_strided"]["value"] == pytest.approx(strided.mean().exp().item(), rel=1e-5)
    assert metrics["ppl_strided"]["value"] < metrics["ppl"]["value"], "the same tokens with more before them"

    card = (folder / "README.md").read_text()
    assert f"| ppl | {metrics['ppl']['value']:.4g} |" in card
    assert "stage1_tokens: 64" in card
    assert student.config.recipe["teacher"] == "tiny"
    code = (
        f"import hm, sys\nassert 'torch' not in sys.modules\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (c.from_pretrained({str(folder)!r}) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        f"def new(text): return model.generate(**tokenizer(text, padding=True, return_tensors='pt'), min_new_tokens=3, max_new_tokens=3, do_sample=False)[:, -3:]\n"
        f"both = new(['The city by the sea is', 'A'])\n"
        f"print(type(model).__name__, (both[0] == new(['The city by the sea is'])[0]).all().item(), (both[1] == new(['A'])[0]).all().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["StudentForCausalLM", "True", "True"], done.stdout + done.stderr[-2000:]

    assert cell(EVERYTHING | items | {"export": str(folder)}).run() == record
    with pytest.raises(UserError, match=r"export=.* is not empty and not an export of this cell"):
        cell({"export": str(folder)}).run()


def test_the_card_of_an_adapted_teacher_is_that_of_a_transformer(cell, tmp_path):
    folder = tmp_path / "adapted"
    record = cell({"recipe": "adapted_teacher", "export": str(folder)}).run()
    card = (folder / "README.md").read_text()
    assert "fine-tuned Transformer" in card
    assert f"Training: {record['tokens']['stage2']:,} tokens." in card
    assert not {word for word in ("import hm", "stage 1 and", "linear-attention", "config.json") if word in card}
    assert ("with changes" in card) == bool(record["provenance"]["git_dirty"])


def test_fifty_items_of_a_task_are_scored_for_the_tiny_student_in_under_a_minute(cell, tmp_path):
    choices = {"text": ["in the sea", "on a hill", "under the ice", "in a large city"], "label": ["A", "B", "C", "D"]}
    questions = [f"A ship with {n} sailors leaves the harbour in the morning. Where is it at noon, if the wind holds?" for n in range(60)]
    lines = [json.dumps({"question": q, "choices": choices, "answerKey": "ABCD"[i % 4]}) for i, q in enumerate(questions)]
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(lines))
    made = cell({"eval.tasks": ["arc_easy"], "eval.data": str(tmp_path), "eval.limit": 50})
    made.run_step("student")
    start = time.perf_counter()
    made.run_step("eval")
    assert time.perf_counter() - start < 60
    assert made.run()["metrics"]["arc_easy"]["n"] == 50


def test_without_lm_eval_a_cell_gives_its_perplexity_and_says_what_is_missing(cell, items, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "installed", lambda: None)
    made = cell(items)
    metrics = made.run()["metrics"]
    assert "ppl" in metrics
    assert "piqa" not in metrics
    assert "hedgemamba[eval]" in capsys.readouterr().err
    monkeypatch.undo()
    assert cell(items).key != made.key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.tasks": ["arc_eazy"]}, "eval.tasks=arc_eazy is not known; did you mean eval.tasks=arc_easy"),
        ({"eval.lengths": [0]}, "eval.lengths="),
        ({"eval.limit": 1}, "eval.limit=1 must be at least 2"),
        ({"eval.tasks": "all", "eval.data": "/nowhere"}, "eval.data=/nowhere is no folder; name one that holds arc_challenge.jsonl"),
        ({"eval.lengths": [1024], "validation_fraction": 0.02}, "eval.lengths=1024 is longer than the validation text"),
        ({"recipe": "teacher", "export": "x"}, "export=x does not go with recipe=teacher"),
    ],
)
def test_a_wrong_evaluation_is_refused_in_one_sentence(cell, changes, message):
    with pytest.raises(UserError, match=message):
        cell(changes).run()


def test_a_generation_that_has_nothing_to_continue_is_refused_where_the_command_is_typed(cell):
    with pytest.raises(UserError, match=r"seq_len=31 leaves eval\.generation=true nothing to continue"):
        cell({"eval.generation": True, "seq_len": 31})
    cell({"eval.generation": True})


@pytest.mark.parametrize("recipe", ["teacher", "two_stage"])
def test_lengths_beyond_the_teacher_are_measured_and_marked_as_such(cell, recipe, capsys):
    metrics = cell({"recipe": recipe, "eval.lengths": [64, 1100], "eval.needle": [1100]}).run()["metrics"]
    assert metrics["ppl_at_length"]["made_for"] == 1024
    assert metrics["ppl_by_position"]["positions"][-1] == 1100
    assert "1100" in str(metrics["needle"])
    said = "eval.lengths=1100, eval.needle=1100: beyond the 1024 positions that the teacher was made for"
    assert said in "".join(capsys.readouterr())
