"""CONTRIBUTING.md's three examples, carried out exactly as they are printed there."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, OlmoConfig

from hm.adapters import _ADAPTERS, adapter_for, apply_rotary, capture_attention, check_config
from hm.config import MIXERS, Stage, Stage2
from hm.convert import convert, report
from hm.errors import UserError
from hm.mixer import KINDS
from hm.modeling import load_student
from hm.objectives import Align, FineTune
from hm.train import Run, train

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^<!-- (save|append|run)(?:: (\S+))? -->\n```\w+\n(.*?)^```$", GUIDE, re.M | re.S)
PARTS = ("ssm", "conv", "gate")
COMBINATIONS = [dict(zip(PARTS, on, strict=True)) for on in itertools.product([False, True], repeat=3)]


def carry_out(path, folder):
    """Save the block for `path` in `folder` and import it."""
    (text,) = (text for action, name, text in BLOCKS if (action, name) == ("save", path))
    file = folder / Path(path).name
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"guide_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registries():
    """What an example registers is forgotten after the test."""
    tables = (KINDS, MIXERS, _ADAPTERS)
    before = [dict(table) for table in tables]
    yield
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)


@pytest.fixture
def skip(registries, tmp_path):
    return carry_out("hm/skip.py", tmp_path)


@pytest.fixture
def olmo(registries, tmp_path):
    return carry_out("hm/olmo.py", tmp_path)


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def test_the_map_of_the_house_names_what_is_there():
    layout = re.search(r"## The house\n\n((?:    .*\n)+)", GUIDE)[1]
    named = re.findall(r"(?<!\S)[a-z]\w*(?:/\w*)*(?:\.py|/)(?!\S)", layout)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


# --- a mixer


def test_the_mixer_starts_as_the_hedgehog_student_and_its_path_is_seen_once_it_moves(skip, teacher, randomize, ids):
    hedgehog, student = (randomize(convert(teacher, mixer), parts=False) for mixer in ("hedgehog", "skip"))
    tokens = ids(2, 70)
    torch.testing.assert_close(logits(student, tokens), logits(hedgehog, tokens), rtol=0, atol=1e-4)
    nn.init.normal_(student.mixers[-1].skip.weight)
    assert (logits(student, tokens) - logits(hedgehog, tokens)).abs().max() > 1e-2


def test_the_report_counts_the_mixers_part_as_new_and_trainable(skip, teacher):
    found = report(convert(teacher, "skip"))
    layers, width = teacher.config.num_hidden_layers, teacher.config.hidden_size
    assert ("skip", "new", layers * width**2, layers * width**2) in found.rows
    assert found.counts["new"] == report(convert(teacher, "hedgemamba")).counts["new"] + layers * width**2


def trained(student, tokens, folder, steps=4):
    stage = Stage2(lr=1e-2, batch_size=len(tokens))
    return train(FineTune(student), lambda step: tokens, steps, stage,
                 Run("guide", folder, "key", torch.device("cpu")))  # fmt: skip


def test_the_mixer_learns_and_comes_back_from_a_folder(skip, teacher, ids, tmp_path):
    student, tokens = convert(teacher, "skip"), ids(4, 33)
    start = F.cross_entropy(logits(student, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert trained(student, tokens, tmp_path / "run")["final_loss"] < start
    assert all(mixer.skip.weight.abs().max() > 1e-3 for mixer in student.mixers)
    student.save_pretrained(tmp_path / "student")
    again = load_student(str(tmp_path / "student"))
    assert type(again.mixers[0]) is skip.SkipMixer
    assert torch.equal(logits(again, tokens), logits(student, tokens))


def test_the_mixer_generates_what_it_computes_for_the_whole_sequence(skip, teacher, ids, tmp_path):
    student, tokens = convert(teacher, "skip"), ids(2, 33)
    trained(student, tokens, tmp_path)
    written = student.generate(tokens[:, :9], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(logits(student, written)[:, 8:-1].argmax(-1), written[:, 9:])


def test_a_student_whose_mixer_was_not_registered_is_refused_with_what_to_import(skip, teacher, tmp_path):
    convert(teacher, "skip").save_pretrained(tmp_path / "student")
    del KINDS["skip"]
    with pytest.raises(UserError, match="mixer=skip is not registered here; import the file"):
        load_student(str(tmp_path / "student"))


# --- a teacher


def olmo_config(**changes):
    return OlmoConfig(
        **dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=0) | changes
    )  # fmt: skip


def random_olmo(**changes):
    """All weights and biases random, so that no error hides behind a zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(olmo_config(**changes), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_softmax_attention_rebuilt_from_the_adapters_parts_equals_olmos(olmo, bias, ids):
    teacher = random_olmo(attention_bias=bias)
    check_config(teacher.config)
    adapter = adapter_for(teacher.config)
    assert type(adapter) is olmo.Olmo
    shape = adapter.shape(teacher.config)
    assert (shape.qkv_bias, shape.out_bias) == (bias, bias)
    with torch.no_grad(), capture_attention(teacher) as records:
        teacher(input_ids=ids(2, 13, vocab=257))
    for layer, seen in zip(adapter.layers(teacher), records, strict=True):
        parts = adapter.split(adapter.attention(layer), shape)
        assert [parts[f"{name}_bias"] is not None for name in "qkvo"] == [bias] * 4
        q, k, v = (
            F.linear(seen.hidden, parts[f"{n}_weight"], parts[f"{n}_bias"]).unflatten(-1, (-1, shape.head_dim)) for n in "qkv"
        )
        q, k = (apply_rotary(t, *seen.position_embeddings) for t in (q, k))
        k, v = (t.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("blhd,bshd->bhls", q, k) / shape.head_dim**0.5
        scores.masked_fill_(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf)
        y = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2)
        rebuilt = F.linear(y, parts["o_weight"], parts["o_bias"])
        torch.testing.assert_close(rebuilt, seen.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_every_combination_of_parts_of_an_olmo_starts_as_its_hedgehog_student(olmo, bias, randomize, ids):
    teacher, tokens = random_olmo(attention_bias=bias), ids(2, 70, vocab=257)
    students = [randomize(convert(teacher, "hedgehog", **parts), parts=False) for parts in COMBINATIONS]
    hedgehog = logits(students[0], tokens)
    for parts, student in zip(COMBINATIONS, students, strict=True):
        assert [getattr(student.mixers[0], p) is not None for p in PARTS] == list(parts.values())
        torch.testing.assert_close(logits(student, tokens), hedgehog, rtol=0, atol=1e-4, msg=f"{parts}")


def test_stage_1_aligns_the_student_of_an_olmo(olmo, ids, tmp_path):
    teacher = random_olmo()
    student, tokens = convert(teacher, "hedgehog"), ids(4, 33, vocab=257)
    objective = Align(teacher, student)
    start = float(objective.backward(tokens, 1.0)["loss"])
    student.zero_grad()
    run = Run("guide", tmp_path / "run", "key", torch.device("cpu"))
    assert train(objective, lambda step: tokens, 8, Stage(lr=1e-2, batch_size=4), run)["final_loss"] < start


def test_an_olmo_that_clips_its_queries_keys_and_values_is_refused(olmo):
    with pytest.raises(UserError, match=r"clip_qkv=8\.0, which no mixer can stand in for; choose"):
        check_config(olmo_config(clip_qkv=8.0))


# --- a study, in a house with the mixer and the teacher


@pytest.fixture
def house(tmp_path):
    """A copy of the repository's code with every block of the guide in its place."""
    folder = tmp_path / "house"
    for name in ("analysis", "hm", "hydra_plugins", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "sweep.py", folder)
    (folder / "hm" / "assets").symlink_to(ROOT / "hm" / "assets")
    for action, name, text in BLOCKS:
        if action == "save":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        elif action == "append":
            with open(folder / name, "a") as file:
                file.write(f"\n{text}")
    return folder


def test_the_study_runs_with_the_new_mixer_on_the_new_teacher_and_prints_its_rows(house, byte_tokenizer, corpus_file, tmp_path):
    random_olmo().save_pretrained(tmp_path / "olmo")
    byte_tokenizer.save_pretrained(tmp_path / "olmo")
    small = [f"teacher={tmp_path / 'olmo'}", f"data={corpus_file}", "seq_len=16", "budget=640", "stage1.batch_size=2",
             "stage2.batch_size=2", "eval.sequences=8", "device=cpu", "hydra.launcher.jobs=1"]  # fmt: skip
    runs = tmp_path / "runs"
    environment = os.environ | {"HM_RUNS": str(runs), "OMP_THREAD_LIMIT": "1"}
    (commands,) = (text for action, _, text in BLOCKS if action == "run")
    printed = []
    for command in commands.splitlines():
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        words += small if "sweep.py" in words else []
        done = subprocess.run(words, cwd=house, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    written = (house / "results" / "skip" / "tables" / "skip.md").read_text()
    for table in [*printed, written]:
        rows: dict = {}
        for cells in (line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")):
            rows.setdefault(cells[0].strip(), cells)  # the first block has the perplexities
        assert list(rows)[2:] == ["teacher", "hedgemamba", "with a skip"]
        assert all("±" in rows[name][1] for name in ("hedgemamba", "with a skip"))
    records = [json.loads(path.read_text()) for path in runs.glob("skip/*/record.json")]
    assert {r["row"]: r["params"]["by_part"].get("skip", 0) for r in records} == {
        "teacher": 0, "hedgemamba": 0, "with a skip": 2 * 32**2
    }  # fmt: skip
    stage1 = [r["provenance"]["artifacts"]["stage1"] for r in records if r["row"] != "teacher"]
    assert (len(stage1), len(set(stage1))) == (4, 2)
