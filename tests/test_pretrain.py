"""Pre-training makes a folder that is a teacher."""

import json
import math

import pytest
import torch

from hm import pretrain
from hm.convert import convert
from hm.data import DataSpec
from hm.errors import UserError
from hm.evaluate import perplexity
from hm.teacher import fingerprint, load_teacher, load_tokenizer

STEPS = 2
SIZES = {"vocab": 320, "hidden-size": 32, "layers": 2, "heads": 2, "seq-len": 32, "batch-size": 4}
SMALL = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]
SMALL += ["--tokens", str(STEPS * 4 * 32), "--device", "cpu"]


@pytest.fixture(scope="module")
def made(corpus_file, tmp_path_factory):
    """(the command line, the folder) after a run."""
    out = tmp_path_factory.mktemp("pretrain") / "teacher"
    held = out.parent / "held.txt"
    held.write_text("the owl hears the hen and the hen hears the owl and the fox hears them all.\n" * 20)
    arguments = ["--data", str(corpus_file), "--validation", str(held), "--out", str(out), *SMALL]
    pretrain.main(arguments)
    return arguments, out


def test_the_folder_is_a_teacher_that_can_be_loaded_and_converted(made, ids):
    _, out = made
    teacher, tokenizer = load_teacher(str(out)), load_tokenizer(str(out))
    assert teacher.config.model_type == "gpt_neox"
    assert teacher.config.vocab_size == len(tokenizer) == 320
    tokens = ids(2, 17, vocab=320)
    with torch.no_grad():
        assert torch.isfinite(convert(teacher)(input_ids=tokens).logits).all()
    assert perplexity(teacher, [tokens])["ppl"]["value"] < 3 * 320
    text = "the cat sees the dog. café №9\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == teacher.config.eos_token_id == 0
    assert {p.suffix for p in out.iterdir()} == {".json", ".jsonl", ".safetensors"}


def test_weights_are_kept_in_bfloat16_and_all_of_them_were_trained(made, corpus_file):
    arguments, out = made
    teacher = load_teacher(str(out))
    assert all(torch.equal(p, p.bfloat16().float()) for p in teacher.parameters())
    start = dict(pretrain.new_model(pretrain.parse(arguments), 320).named_parameters())
    changed = {n for n, p in teacher.named_parameters() if not torch.equal(p, start[n].bfloat16().float())}
    assert {n for n in start if n.endswith("weight") and "norm" not in n} <= changed


def test_the_folder_says_how_the_teacher_was_made(made):
    _, out = made
    about = json.loads((out / "training.json").read_text())
    assert about["training"]["steps"] == STEPS
    assert about["training"]["tokens"] == STEPS * 4 * 32
    assert about["parameters"] == sum(p.numel() for p in load_teacher(str(out)).parameters())
    assert set(about["validation"]) == {"ppl", "bits_per_byte"}
    bits = math.log2(about["validation"]["ppl"]["value"]) / about["validation_bytes_per_token"]
    assert about["validation"]["bits_per_byte"]["value"] == pytest.approx(bits)
    assert about["data"]["sources"] == ["corpus.jsonl"]
    assert str(out.parent) not in json.dumps({k: v for k, v in about.items() if k != "provenance"}), (
        "no path of the machine"
    )
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, STEPS - 1]


def test_the_same_command_again_makes_the_same_weights(made):
    arguments, out = made
    before = fingerprint(str(out))
    pretrain.main(arguments)
    assert fingerprint(str(out)) == before


def test_the_tokenizer_is_learnt_from_every_source(corpus_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("zyzzyva zyzzyva zyzzyva\n" * 200)
    one = pretrain.train_tokenizer(DataSpec(str(corpus_file)), 320)
    both = pretrain.train_tokenizer(DataSpec(f"{corpus_file} + {other}"), 320)
    assert len(one) == len(both) == 320
    assert len(both("zyzzyva").input_ids) < len(one("zyzzyva").input_ids) == 7


def test_fewer_tokens_than_one_step_are_refused(made, tmp_path):
    arguments, _ = made
    with pytest.raises(UserError, match=r"--tokens=50 is less than one step of 128 tokens"):
        pretrain.main([*arguments, "--out", str(tmp_path / "none"), "--tokens", "50"])
    assert not (tmp_path / "none").exists()
