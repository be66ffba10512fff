"""lm-eval's tasks on own-written items: scores equal those of lm-eval's own model, and bad items are named."""

import json
import lzma
import os
import subprocess
import sys

import pytest

from hm import tasks
from hm.config import TASKS as NAMES
from hm.config import Evaluate
from hm.errors import UserError
from hm.tasks import TASKS, score_tasks
from hm.teacher import TINY, load_teacher, load_tokenizer

CHOICES = {"text": ["in the sea", "on a hill", "under ice", "in a city"], "label": ["A", "B", "C", "D"]}
ITEMS = {
    "arc_easy": [{"question": f"Where does the {a} live?", "choices": CHOICES, "answerKey": k} for a, k in (("whale", "A"), ("goat", "B"), ("clerk", "D"))],
    "social_iqa": [{"context": f"{n} lost the keys.", "question": "What comes next?", "answerA": "look for them",
                    "answerB": "sing a song", "answerC": "paint the door", "label": label} for n, label in (("Ada", "1"), ("Ben", "1"), ("Cy", "3"))],
    "piqa": [{"goal": f"keep {t} warm", "sol1": "wrap it in wool", "sol2": "put it on ice", "label": n} for t, n in (("soup", 0), ("tea", 0), ("milk", 1))],
    "lambada_openai": [{"text": f"The {a} saw the {b} and the {b} saw the {a}"} for a, b in (("man", "dog"), ("city", "river"), ("king", "war"))],
    "boolq": [{"question": "is it blue", "passage": f"{t} -- The {t} is {c}.", "label": n} for t, c, n in (("sky", "blue", 1), ("sun", "red", 0), ("sea", "blue", 1))],
    "race": [{"article": f"{n} went out. It rained.", "problems": str([
        {"question": "Who went out?", "answer": "A", "options": [n, "Max", "Tom", "Lea"]},
        {"question": "It  _  .", "answer": "C", "options": ["snowed", "froze", "rained", "burned"]},
        {"question": "What fell?", "answer": "B", "options": ["sand", "rain", "stones", "leaves"]}])} for n in ("Ida", "Rolf", "Vera")],
    "logiqa": [{"label": k, "context": "All owls fly.", "question": "What flies?", "options": ["stones", "owls", "moles", "cups"]} for k in "bbc"],
    "winogrande": [{"sentence": f"The {a} did not fit in the {b} because the _ was too big.", "option1": a, "option2": b, "answer": k}
                   for a, b, k in (("ball", "box", "1"), ("boat", "barn", "2"), ("hat", "bag", "1"))],
    "hellaswag": [{"activity_label": "Cooking", "ctx_a": f"A {w} cuts an onion.", "ctx_b": "then they",
                   "endings": ["fry it [title] slowly.", "fly away.", "read a wall.", "melt."], "label": k} for w, k in (("cook", "0"), ("boy", "0"), ("girl", "2"))],
}  # fmt: skip
ITEMS["arc_challenge"] = ITEMS["arc_easy"][::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The items of each task, some compressed."""
    path = tmp_path_factory.mktemp("tasks")
    for i, (name, items) in enumerate(ITEMS.items()):
        text = "".join(json.dumps(item) + "\n" for item in items)
        if i % 2:
            (path / f"{name}.jsonl").write_text(text)
        else:
            (path / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    return path


def test_every_task_of_the_paper_is_known_with_its_metric():
    assert tuple(TASKS) == NAMES
    assert {n for n, t in TASKS.items() if t.metric == "acc_norm"} == {"arc_challenge", "hellaswag"}


def test_a_teachers_scores_are_those_of_lm_evals_own_model_on_the_same_items(folder):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    ours = score_tasks(load_teacher("tiny"), load_tokenizer("tiny"), NAMES, data=str(folder), batch_size=8)
    own_model = HFLM(str(TINY), dtype="float32", device="cpu", batch_size=8)
    theirs = evaluate(own_model, tasks.load_tasks(NAMES, str(folder)), log_samples=False)["results"]
    for name, score in ours.items():
        metric = TASKS[name].metric
        assert score["value"] == 100 * theirs[name][f"{metric},none"]
        assert score["stderr"] == 100 * theirs[name][f"{metric}_stderr,none"]
        assert (score["n"], score["shots"], score["limit"], score["cut"]) == (3, 0, None, 0)
        assert score["harness"] == tasks.installed()
    assert len({score["value"] for score in ours.values()}) > 1
    assert ours["boolq"]["version"] == 2.0


def test_of_long_prompts_only_the_logits_of_the_answers_are_made():
    from lm_eval.models.huggingface import HFLM

    from hm.scorer import AnswerScorer

    model, kept = load_teacher("tiny"), []
    args = {"pretrained": model, "backend": "causal", "tokenizer": load_tokenizer("tiny"), "batch_size": 4, "max_length": 64}
    answers = ([5], [3, 0], [0], [0, 0])  # zeros are also what rows are padded with
    requests = [(("", ""), [7 + n] * 40, answers[n % 4]) for n in range(8)]
    expected = HFLM(**args)._loglikelihood_tokens(requests, disable_tqdm=True)
    model.register_forward_pre_hook(lambda m, args, kwargs: kept.append(kwargs["logits_to_keep"]), with_kwargs=True)
    found = AnswerScorer(**args)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert found == [(pytest.approx(value, rel=1e-6), greedy) for value, greedy in expected]
    assert len(kept) == 2
    assert max(kept) == 2


def test_a_limit_takes_the_first_items_and_a_prompt_that_does_not_fit_is_cut_and_counted(folder, make_student, tmp_path):
    student, tokenizer = make_student(load_teacher("tiny")), load_tokenizer("tiny")
    found = score_tasks(student, tokenizer, ["arc_easy"], data=str(folder), limit=2)["arc_easy"]
    assert (found["n"], found["limit"]) == (2, 2)
    long = [dict(item, passage="The sky is blue. " * n) for item, n in zip(ITEMS["boolq"], (2, 900, 2), strict=True)]
    (tmp_path / "boolq.jsonl").write_text("\n".join(map(json.dumps, long)))
    assert score_tasks(student, tokenizer, ["boolq"], data=str(tmp_path))["boolq"]["cut"] == 1


def bad(tmp_path, name, **changes):
    """The task's items, with fields of the second one changed (None: left out)."""
    items = [dict(item) for item in ITEMS[name]]
    items[1] = {k: v for k, v in (items[1] | changes).items() if v is not None}
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return Evaluate(tasks=[name], data=str(tmp_path))


def test_a_missing_file_field_or_folder_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"piqa.jsonl:2 has no 'sol2'"):
        tasks.check_data(bad(tmp_path, "piqa", sol2=None))
    with pytest.raises(UserError, match=r"boolq.jsonl:2 has no 'label'"):
        tasks.check_data(bad(tmp_path, "boolq", label="1"))
    with pytest.raises(UserError, match=rf"{tmp_path} has no race.jsonl \(plain or with .xz, .gz, .zst\), .* with article, problems; name a folder"):
        tasks.check_data(Evaluate(tasks=["race"], data=str(tmp_path)))
    (tmp_path / "race.jsonl").write_text("")
    with pytest.raises(UserError, match=r"race.jsonl has 0 items"):
        tasks.check_data(Evaluate(tasks=["race"], data=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lambada_openai", {"text": "word"}, "item 2 of the task lambada_openai has an empty prompt"),
        ("arc_easy", {"answerKey": "E"}, "item 2 of the task arc_easy can't be read"),
        ("winogrande", {"sentence": "no gap here"}, "item 2 of the task winogrande can't be read"),
        ("piqa", {"sol1": ""}, "item 2 of the task piqa .*(empty answer|can't be read)"),
        ("piqa", {"sol1": "wool " * 1100}, "item 2 of the task piqa has an answer of .* tokens, and the model takes 1024"),
    ],
)
def test_an_item_that_can_not_be_scored_is_named(tmp_path, name, changes, message):
    bad(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message):
        score_tasks(load_teacher("tiny"), load_tokenizer("tiny"), [name], data=str(tmp_path))


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, make_teacher):
    with pytest.raises(UserError, match="ids up to 4095 and the model 61 embeddings"):
        score_tasks(make_teacher("neox"), load_tokenizer("tiny"), ["arc_easy"], data=str(folder))


def test_the_scores_key_holds_the_items_and_not_where_they_lie(folder, tmp_path):
    e = Evaluate(tasks=["piqa"], data=str(folder))
    before = tasks.fingerprint(e)
    copy = bad(tmp_path, "piqa")
    assert tasks.fingerprint(copy) == before
    assert tasks.fingerprint(bad(tmp_path, "piqa", goal="keep ice cold")) != before


CHECK = "from hm.config import Evaluate; from hm.tasks import ask_hub; ask_hub(Evaluate(tasks=['arc_easy']))"


@pytest.mark.parametrize(("switch", "other"), [("HF_HUB_OFFLINE", None), ("HF_DATASETS_OFFLINE", "ARC-Challenge")])
def test_offline_items_of_the_hub_are_had_from_the_cache_or_refused_before_anything_is_trained(tmp_path, switch, other):
    def check():
        env = os.environ | {switch: "1", "HF_HOME": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, check=False)

    def cache(config):
        place = tmp_path / "datasets" / "allenai___ai2_arc" / config / "0.0.0" / "0"
        place.mkdir(parents=True)
        (place / "dataset_info.json").write_text(json.dumps({"config_name": config, "dataset_name": "ai2_arc", "version": "0.0.0"}))

    if other:
        cache(other)
    assert "UserError: eval.tasks=arc_easy can't be had from the hub" in check().stderr
    cache("ARC-Easy")
    found = check()
    assert found.returncode == 0, found.stderr[-2000:]


def test_tasks_need_the_package_datasets_only_where_lm_eval_is_there_to_score_them(folder, monkeypatch):
    e = Evaluate(tasks=["piqa"], data=str(folder))
    found = tasks.importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    with pytest.raises(UserError, match=r"eval.tasks=piqa needs the package datasets, .* pip install 'hedgemamba\[eval\]'"):
        tasks.check_data(e)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    tasks.check_data(e)


def test_output_that_is_no_terminal_holds_no_bars_of_other_libraries(folder):
    code = (
        "from hm.progress import quiet; quiet()\n"
        "from hm.tasks import score_tasks; from hm.teacher import load_teacher, load_tokenizer\n"
        f"print(score_tasks(load_teacher('tiny'), load_tokenizer('tiny'), ['arc_easy'], data={str(folder)!r})['arc_easy']['n'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    assert "it/s" not in done.stderr
