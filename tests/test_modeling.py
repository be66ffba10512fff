"""The student as a Transformers model: in steps or all at once, padded, generated, saved and loaded."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hm.convert import convert
from hm.errors import UserError
from hm.mixer import CONV_WIDTH
from hm.modeling import StudentCache, StudentConfig, StudentForCausalLM, load_student

KINDS = {
    "hedgehog": {"mixer": "hedgehog"},
    "hedgemamba": {},
    "channel": {"decay": "channel"},
    "hybrid": {"keep_attention": [1]},
    "hybrid_first": {"keep_attention": [0]},
    "mamba": {"mixer": "mamba"},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=KINDS)
def student(request, teacher, make_student):
    return make_student(teacher, **KINDS[request.param])


def logits(student, tokens, **kwargs):
    with torch.no_grad():
        return student(input_ids=tokens, **kwargs).logits


def cache_bytes(cache):
    states = [layer.state for layer in cache.layers]
    return sum(t.numel() * t.element_size() for s in states for t in (s.conv, s.ssm) if t is not None)


@pytest.mark.parametrize(
    "cuts",
    [range(1, 72), [70], [1], [64, 65], [3, 9, 40]],
    ids=["steps", "prefill+2", "1+rest", "chunk", "mixed"],
)
def test_logits_are_the_same_in_parallel_in_steps_and_in_any_mixture(student, cuts, ids):
    tokens, length = ids(2, 72), 72
    cache, outputs, bounds = student.new_cache(), [], [0, *cuts, length]
    for a, b in itertools.pairwise(bounds):
        outputs.append(logits(student, tokens[:, a:b], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(outputs, 1), logits(student, tokens), **CLOSE)
    assert cache.get_seq_length() == length


def test_a_prefill_with_a_cache_and_a_forward_without_agree(student, ids):
    tokens = ids(2, 40)
    torch.testing.assert_close(
        logits(student, tokens, use_cache=True), logits(student, tokens, use_cache=False), **CLOSE
    )
    with torch.no_grad():
        assert student(input_ids=tokens, use_cache=False).past_key_values is None
        assert isinstance(student(input_ids=tokens, use_cache=True).past_key_values, StudentCache)


def test_no_logit_depends_on_a_later_token(student, ids):
    tokens = ids(1, 70)
    other = torch.cat([tokens[:, :65], (tokens[:, 65:] + 1) % 61], 1)
    before, after = logits(student, tokens), logits(student, other)
    torch.testing.assert_close(before[:, :65], after[:, :65], **CLOSE)
    assert not torch.allclose(before[:, 65:], after[:, 65:], atol=1e-2)


def padded(tokens, pad, left=True):
    """(2, L) -> two rows, the second three tokens shorter, padded to L + pad, and the mask."""
    length = tokens.shape[1]
    ids = torch.full((2, length + pad), 7)
    mask = torch.zeros_like(ids)
    for row, own in enumerate((length, length - 3)):
        place = slice(pad + length - own, None) if left else slice(0, own)
        ids[row, place], mask[row, place] = tokens[row, :own], 1
    return ids, mask


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("length", [9, 66])
def test_padding_does_not_change_the_logits_of_the_tokens(student, ids, left, length):
    tokens = ids(2, length)
    batch, mask = padded(tokens, 5, left)
    y = logits(student, batch, attention_mask=mask)
    for row, own in enumerate((length, length - 3)):
        torch.testing.assert_close(
            y[row, mask[row] == 1], logits(student, tokens[row : row + 1, :own])[0], **CLOSE
        )


def test_padding_is_left_out_also_when_a_batch_goes_on_from_its_cache(student, ids):
    tokens, more = ids(2, 9), ids(2, 4, seed=1)
    batch, mask = padded(tokens, 5)
    cache = student.new_cache()
    logits(student, batch, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    y = logits(student, more, attention_mask=mask, past_key_values=cache)
    for row, own in enumerate((9, 6)):
        alone = torch.cat([tokens[row : row + 1, :own], more[row : row + 1]], 1)
        torch.testing.assert_close(y[row], logits(student, alone)[0, own:], **CLOSE)


# --- generate


def by_argmax(student, tokens, steps):
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(student, tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def generate(student, tokens, **options):
    student.generation_config.eos_token_id = None
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    return student.generate(
        tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=7, **options
    )


def test_greedy_generation_is_the_argmax_step_by_step_and_repeats_itself(student, ids):
    tokens = ids(2, 9)
    first = generate(student, tokens)
    assert torch.equal(first, by_argmax(student, tokens, 12))
    assert torch.equal(first, generate(student, tokens))
    assert torch.equal(first, generate(student, tokens, use_cache=False))


def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(student, ids):
    tokens = ids(2, 9)
    batch, mask = padded(tokens, 3)
    together = generate(student, batch, attention_mask=mask)[:, -12:]
    for row, own in enumerate((9, 6)):
        assert torch.equal(together[row], generate(student, tokens[row : row + 1, :own])[0, -12:])


def test_beam_search_keeps_the_states_of_its_beams(student, ids):
    tokens = ids(2, 9)
    with_state = generate(student, tokens, num_beams=3)
    assert torch.equal(with_state, generate(student, tokens, num_beams=3, use_cache=False))


@pytest.mark.parametrize("mixer", ["hedgehog", "hedgemamba", "mamba"])
def test_the_state_is_as_large_after_a_long_prompt_as_after_a_short_one(teacher, make_student, mixer, ids):
    student, sizes = make_student(teacher, mixer), set()
    for length in (1, CONV_WIDTH, 64, 200):
        cache = student.new_cache()
        logits(student, ids(1, length), past_key_values=cache)
        logits(student, ids(1, 1), past_key_values=cache)
        sizes.add(cache_bytes(cache))
        assert cache.get_seq_length() == length + 1
    s = student.mixers[0].shape
    state = s.num_heads * (s.head_dim**2 if mixer == "mamba" else 2 * s.head_dim * (s.head_dim + 1))
    conv = {
        "hedgehog": 0,
        "hedgemamba": s.hidden_size,
        "mamba": (s.num_heads + 2 * s.num_kv_heads) * s.head_dim,
    }[mixer]
    assert sizes == {2 * 4 * (state + (CONV_WIDTH - 1) * conv)}


def test_a_cache_of_keys_and_values_is_refused(make_teacher, make_student, ids):
    teacher = make_teacher("neox")
    past = teacher(input_ids=ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="StudentCache"):
        make_student(teacher)(input_ids=ids(1, 1), past_key_values=past)


# --- the other habits of a Transformers model


def test_labels_give_transformers_own_loss_and_logits_to_keep_the_last_logits(student, ids):
    tokens = ids(2, 20)
    with torch.no_grad():
        out = student(input_ids=tokens, labels=tokens)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    torch.testing.assert_close(logits(student, tokens, logits_to_keep=1), out.logits[:, -1:], **CLOSE)


def test_embeddings_can_be_given_in_place_of_ids(student, ids):
    tokens = ids(2, 20)
    with torch.no_grad():
        out = student(inputs_embeds=student.get_input_embeddings()(tokens)).logits
    torch.testing.assert_close(out, logits(student, tokens))


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable:FutureWarning"
)  # its new name is younger than 5.17
def test_gradient_checkpointing_gives_the_same_gradients(student, ids):
    def gradients():
        student.zero_grad()
        student.train()(input_ids=ids(2, 20), labels=ids(2, 20), use_cache=False).loss.backward()
        return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    student.gradient_checkpointing_enable()
    again = gradients()
    assert len(plain) == len(again) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


# --- save and load


def test_saving_and_loading_gives_the_same_student_bit_for_bit(student, tmp_path, ids):
    student.config.recipe = {"teacher": "small", "stage2_tokens": 5}
    student.save_pretrained(tmp_path)
    for loaded in (load_student(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is StudentForCausalLM
        assert not loaded.training
        own, other = student.state_dict(), loaded.state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[n], other[n]) for n in own)
        assert loaded.config.mixer == student.config.mixer
        assert loaded.config.keep_attention == student.config.keep_attention
        assert loaded.config.recipe == student.config.recipe
        assert loaded.generation_config.eos_token_id == student.generation_config.eos_token_id
        assert torch.equal(logits(loaded, ids(2, 70)), logits(student, ids(2, 70)))


def test_a_student_saved_before_decays_had_two_forms_has_one_per_head(make_teacher, make_student, tmp_path, ids):
    student = make_student(make_teacher("neox"))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mixer"]["decay"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_student(str(tmp_path)), ids(2, 70)), logits(student, ids(2, 70)))


def test_only_safetensors_and_json_are_written(make_teacher, make_student, tmp_path):
    make_student(make_teacher("neox")).save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mixer", ["hedgemamba", "mamba"])
def test_embeddings_are_tied_after_loading_as_they_were_in_the_teacher(
    kind, mixer, tied, make_teacher, make_student, tmp_path
):
    make_student(make_teacher(kind, tie_word_embeddings=tied), mixer).save_pretrained(tmp_path)
    loaded = load_student(str(tmp_path))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_a_student_of_the_embedded_teacher_survives_saving(tiny_teacher, make_student, tmp_path, ids):
    student = make_student(tiny_teacher)
    student.save_pretrained(tmp_path)
    tokens = ids(1, 70, vocab=4096)
    assert torch.equal(logits(load_student(str(tmp_path)), tokens), logits(student, tokens))


def test_the_config_carries_the_teachers_sizes_and_survives_its_json(teacher, tmp_path):
    config = convert(teacher, keep_attention=[1]).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is StudentConfig
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "tie_word_embeddings",
        "eos_token_id",
    ):
        assert getattr(loaded, name) == getattr(config, name) == getattr(teacher.config, name)
    own, teachers = loaded.backbone_config().to_dict(), teacher.config.to_dict()
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in own.items() if k not in ignored} == {
        k: v for k, v in teachers.items() if k not in ignored
    }


@pytest.mark.parametrize("mixer", ["hedgemamba", "mamba"])
def test_a_student_built_from_its_config_alone_has_the_mixers_start_and_finite_logits(teacher, mixer, ids):
    student = StudentForCausalLM(convert(teacher, mixer).config).eval()
    for module in student.mixers:
        if mixer == "mamba":
            assert ((module.A_log.exp() >= 1) & (module.A_log.exp() <= 16)).all()
            assert torch.equal(module.D, torch.ones_like(module.D))
        else:
            assert torch.equal(module.gate.proj.weight, torch.zeros_like(module.gate.proj.weight))
    assert torch.isfinite(logits(student, ids(1, 20))).all()


def test_a_folder_that_holds_no_student_is_refused_by_name(tmp_path, make_teacher):
    with pytest.raises(UserError, match="nowhere"):
        load_student(str(tmp_path / "nowhere"))
    make_teacher("neox").save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="gpt_neox"):
        load_student(str(tmp_path / "teacher"))


def test_a_student_whose_weights_are_not_all_there_is_refused(make_teacher, make_student, tmp_path):
    make_student(make_teacher("neox")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.gpt_neox.layers.1.attention.ssm.A"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, such as .*ssm\.A"):
        load_student(str(tmp_path))


@pytest.mark.parametrize(
    ("first", "name"),
    [
        ("import hm", "AutoConfig"),
        ("import transformers, hm", "AutoConfig"),
        ("from transformers import AutoConfig\nimport hm", "AutoConfig"),
        ("import hm", "AutoModelForCausalLM"),
        ("from transformers import AutoConfig\nimport hm", "AutoModelForCausalLM"),
        ("import hm.modeling", "AutoModelForCausalLM"),
    ],
)
def test_an_auto_class_knows_a_student_once_hm_is_imported(first, name, student_folder):
    code = (
        f"{first}\n"
        f"from transformers import {name}\n"
        f"print(type({name}.from_pretrained({student_folder!r})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = {"AutoConfig": "StudentConfig", "AutoModelForCausalLM": "StudentForCausalLM"}[name]
    assert done.stdout.split() == [expected], done.stderr[-2000:]


@pytest.fixture(scope="module")
def student_folder(make_teacher, make_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_student(make_teacher("neox")).save_pretrained(folder)
    return str(folder)
