"""Conversion: the start is the Hedgehog student, the teacher stays as it was, counts add up."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

from hm.adapters import capture_attention
from hm.config import FeatureMap
from hm.convert import convert, is_new, kept_layers, part_of, report, teacher_counts, trainable
from hm.errors import UserError
from hm.mixer import Mixer

PARTS = ("ssm", "conv", "gate")
COMBINATIONS = [dict(zip(PARTS, on, strict=True)) for on in itertools.product([False, True], repeat=3)]
LONGER_THAN_TWO_CHUNKS = 150


def name_of(parts):
    return "+".join(p for p in PARTS if parts[p]) or "hedgehog"


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def hedgehog_and(teacher, parts, randomize, **options):
    """The Hedgehog student and one with `parts`, both with the same feature maps, far from the identity."""
    hedgehog = randomize(convert(teacher, "hedgehog", **options), parts=False)
    student = convert(teacher, **parts, **options)
    maps = {n: p for n, p in hedgehog.named_parameters() if part_of(hedgehog, n) == "feature map"}
    assert student.load_state_dict(maps, strict=False).unexpected_keys == []
    return hedgehog, student


@pytest.mark.parametrize(
    ("parts", "decay"),
    [(parts, decay) for parts in COMBINATIONS for decay in ("head", "channel") if parts["ssm"] or decay == "head"],
    ids=lambda value: name_of(value) if isinstance(value, dict) else value,
)
def test_every_combination_of_parts_starts_as_the_hedgehog_student(teacher, parts, decay, randomize, ids):
    hedgehog, student = hedgehog_and(teacher, parts, randomize, decay=decay)
    assert [bool(getattr(student.mixers[0], p)) for p in PARTS] == list(parts.values())
    tokens = ids(2, LONGER_THAN_TWO_CHUNKS)
    torch.testing.assert_close(logits(student, tokens), logits(hedgehog, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"feature_map": FeatureMap(per_head=True)}, {"keep_attention": [1]}],
    ids=["per_head", "hybrid"],
)
def test_the_start_is_the_same_with_maps_per_head_and_in_a_hybrid(teacher, options, randomize, ids):
    hedgehog, student = hedgehog_and(teacher, dict.fromkeys(PARTS, True), randomize, **options)
    tokens = ids(2, LONGER_THAN_TWO_CHUNKS)
    torch.testing.assert_close(logits(student, tokens), logits(hedgehog, tokens), rtol=0, atol=1e-4)


def test_the_start_is_the_same_on_the_embedded_teacher(tiny_teacher, randomize, ids):
    hedgehog, student = hedgehog_and(tiny_teacher, dict.fromkeys(PARTS, True), randomize)
    tokens = ids(1, LONGER_THAN_TWO_CHUNKS, vocab=tiny_teacher.config.vocab_size)
    torch.testing.assert_close(logits(student, tokens), logits(hedgehog, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "off",
    {
        "decay of A = 0.5 at a constant delta of 1": lambda m: (
            m.ssm.A.fill_(0.5),
            m.ssm.up.bias.fill_(0.5413),
        ),
        "delta that varies": lambda m: m.ssm.up.weight.normal_(std=0.5),
        "one channel's decay of one state": lambda m: (m.ssm.A[0, 0, 0].fill_(30), m.ssm.up.bias[0].fill_(5)),
        "conv that also reads the token before": lambda m: m.conv.weight[:, -2].fill_(0.1),
        "conv scaled": lambda m: m.conv.weight.mul_(1.1),
        "gate of bias 0": lambda m: m.gate.proj.bias.zero_(),
        "gate that reads its input": lambda m: m.gate.proj.weight.normal_(std=0.02),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_part_off_its_start_is_seen_in_the_logits(teacher, off, ids):
    decay = "channel" if "channel" in off[0] else "head"
    hedgehog, student = convert(teacher, "hedgehog"), convert(teacher, "hedgemamba", decay=decay)
    torch.manual_seed(0)
    with torch.no_grad():
        off[1](student.mixers[0])
    tokens = ids(2, 70)
    assert (logits(student, tokens) - logits(hedgehog, tokens)).abs().max() > 1e-3


def test_the_size_of_a_constant_delta_does_not_matter_at_the_start(teacher, ids):
    student, tokens = convert(teacher, "ssm"), ids(2, 70)
    before = logits(student, tokens)
    for mixer in student.mixers:
        torch.nn.init.uniform_(mixer.ssm.up.bias, -6, 3)
    torch.testing.assert_close(logits(student, tokens), before, rtol=0, atol=1e-4)


def test_with_all_attention_kept_the_student_is_the_teacher(teacher, ids):
    student = convert(teacher, keep_attention=1)
    assert student.mixers == []
    assert torch.equal(logits(student, ids(2, 20)), logits(teacher, ids(2, 20)))


def test_a_converted_layer_changes_the_logits_and_a_kept_one_does_not(make_teacher, ids):
    teacher = make_teacher("neox", num_hidden_layers=4)
    for kept in [[], [0], [3], [1, 2], [0, 1, 3]]:
        student = convert(teacher, "hedgehog", keep_attention=kept)
        assert [m.layer_idx for m in student.mixers] == [i for i in range(4) if i not in kept]
        layers = student.adapter.layers(student.backbone)
        assert [isinstance(student.adapter.attention(layer), Mixer) for layer in layers] == [
            i not in kept for i in range(4)
        ]
        assert not torch.allclose(logits(student, ids(1, 20)), logits(teacher, ids(1, 20)), atol=1e-3)


@pytest.mark.parametrize("mixer", ["hedgemamba", "mamba"])
@pytest.mark.parametrize("kept", [None, [1]], ids=["attention_free", "hybrid"])
def test_the_teacher_is_not_modified_by_converting_it_or_by_training_the_student(teacher, mixer, kept, ids):
    def seen(model):
        return [(n, type(m), m.training) for n, m in model.named_modules()], [
            (n, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()
        ]

    weights = {n: t.clone() for n, t in teacher.state_dict().items()}
    config, structure = teacher.config.to_dict(), seen(teacher)
    student = convert(teacher, mixer, keep_attention=kept)
    optimizer = torch.optim.SGD(student.train().parameters(), lr=1.0)
    student(input_ids=ids(2, 12), labels=ids(2, 12)).loss.backward()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    optimizer.step()
    assert seen(teacher) == structure
    assert teacher.config.to_dict() == config
    assert all(torch.equal(t, weights[n]) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_converting_leaves_the_random_state_alone_and_depends_on_its_seed_alone(make_teacher):
    teacher = make_teacher("llama")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = convert(teacher, "mamba", seed=5).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, other = (
        convert(teacher, "mamba", seed=5).state_dict(),
        convert(teacher, "mamba", seed=6).state_dict(),
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    drawn = "backbone.model.layers.0.self_attn.z_proj.weight"
    assert not torch.equal(first[drawn], other[drawn])


def test_everything_outside_the_mixers_is_the_teachers_and_so_are_q_k_v_and_o(teacher):
    student = convert(teacher)
    own = student.state_dict()
    attention = f".{student.adapter.attention_name}."
    for name, tensor in teacher.state_dict().items():
        if attention not in name:
            assert torch.equal(own["backbone." + name], tensor), name
    shape = student.mixers[0].shape
    for mixer, layer in zip(student.mixers, student.adapter.layers(teacher), strict=True):
        parts = student.adapter.split(student.adapter.attention(layer), shape)
        assert torch.equal(mixer.qkv_proj.weight, torch.cat([parts[f"{n}_weight"] for n in "qkv"]))
        assert torch.equal(mixer.o_proj.weight, parts["o_weight"])


def test_modules_that_transformers_has_not_initialised_are_not_drawn_anew(make_teacher):
    teacher = make_teacher("neox")
    teacher.gpt_neox.layers[0].mlp.dense_h_to_4h = torch.nn.Linear(32, 48)
    student = convert(teacher)
    assert torch.equal(
        student.backbone.gpt_neox.layers[0].mlp.dense_h_to_4h.weight,
        teacher.gpt_neox.layers[0].mlp.dense_h_to_4h.weight,
    )


def test_the_one_step_baseline_starts_at_random_unless_told_to_copy_the_projections(teacher):
    shape = convert(teacher).mixers[0].shape
    student = convert(teacher, "mamba")
    first = student.adapter.attention(student.adapter.layers(teacher)[0])
    q = student.adapter.split(first, shape)["q_weight"]
    copied = convert(teacher, "mamba", copy_projections=True)
    assert torch.equal(copied.mixers[0].qkv_proj.weight[: len(q)], q)
    assert not torch.equal(student.mixers[0].qkv_proj.weight[: len(q)], q)
    name = next(n for n, _ in student.named_parameters() if n.endswith("qkv_proj.weight"))
    assert is_new(student, name)
    assert not is_new(copied, name)


def test_tied_embeddings_stay_one_parameter(make_teacher):
    teacher = make_teacher("llama", tie_word_embeddings=True)
    student = convert(teacher)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student.get_input_embeddings().weight is not teacher.get_input_embeddings().weight
    untied = convert(make_teacher("llama", tie_word_embeddings=False))
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def test_what_nothing_decays_with_has_no_decay_in_its_config(teacher):
    student = convert(teacher, "hedgehog", decay="channel", ssm_init="decay")
    assert (student.config.mixer["decay"], student.config.mixer["ssm_init"]) == ("head", "exact")


# --- what is trained


@pytest.mark.parametrize("mixer", ["hedgehog", "hedgemamba", "mamba"])
@pytest.mark.parametrize("kept", [None, [0]], ids=["attention_free", "hybrid"])
def test_stage_2_trains_all_but_the_embeddings(teacher, mixer, kept):
    student = convert(teacher, mixer, keep_attention=kept)
    frozen = {id(student.get_input_embeddings().weight), id(student.get_output_embeddings().weight)}
    chosen = {n for n, _ in trainable(student, "stage2")}
    assert chosen == {n for n, p in student.named_parameters() if id(p) not in frozen}
    assert chosen == {n for n, p in student.named_parameters() if p.requires_grad}


def test_stage_1_trains_the_feature_maps_alone(teacher):
    student = convert(teacher)
    chosen = {n for n, _ in trainable(student, "stage1")}
    assert chosen == {n for n, _ in student.named_parameters() if ".phi_q." in n or ".phi_k." in n}
    assert len(chosen) == 2 * 2 * 2
    assert chosen == {n for n, p in student.named_parameters() if p.requires_grad}


def test_the_adapted_teacher_trains_all_but_its_embeddings(teacher):
    frozen = {id(teacher.get_input_embeddings().weight), id(teacher.get_output_embeddings().weight)}
    assert [n for n, _ in trainable(teacher, "stage2")] == [
        n for n, p in teacher.named_parameters() if id(p) not in frozen
    ]
    assert trainable(teacher, "stage1") == []


@pytest.mark.parametrize("mixer", ["hedgehog", "ssm", "hedgemamba", "mamba"])
@pytest.mark.parametrize("kept", [None, [0]], ids=["attention_free", "hybrid"])
def test_the_reports_counts_add_up_to_the_models_parameters(teacher, mixer, kept):
    student = convert(teacher, mixer, keep_attention=kept)
    counts = report(student).counts
    assert counts["total"] == sum(p.numel() for p in student.parameters())
    assert counts["trainable"] == sum(p.numel() for _, p in trainable(student, "stage2"))
    assert counts["new"] == sum(p.numel() for n, p in student.named_parameters() if is_new(student, n))
    assert sum(counts["by_part"].values()) == counts["total"]
    embedded = {
        id(m.weight): m.weight.numel()
        for m in (student.get_input_embeddings(), student.get_output_embeddings())
    }
    assert counts["by_part"]["embeddings"] == sum(embedded.values())
    assert ("attention" in counts["by_part"]) == (kept is not None)
    assert report(student, "stage1").counts["trainable"] == counts["by_part"].get("feature map", 0)


def test_asking_for_a_report_does_not_change_what_is_trained(make_teacher):
    student = convert(make_teacher("neox"))
    trainable(student, "stage1")
    before = [p.requires_grad for p in student.parameters()]
    report(student, "stage2")
    assert [p.requires_grad for p in student.parameters()] == before


def test_the_report_reads_as_a_table_that_names_a_hybrid(make_teacher):
    text = str(report(convert(make_teacher("neox"), "ssm_conv", keep_attention=[1])))
    assert "+ssm+conv: 1 of 2 layers converted (hybrid: attention kept in layers 1)" in text
    for part in ("embeddings", "backbone", "attention", "projections", "feature map", "ssm", "conv", "total"):
        assert f"\n  {part}" in text
    assert "gate" not in text


def test_teacher_counts_are_those_of_the_teacher(teacher):
    counts = teacher_counts(teacher)
    assert counts["total"] == sum(p.numel() for p in teacher.parameters())
    assert sum(counts["by_part"].values()) == counts["total"]


# --- Pythia-1B, built empty


@pytest.fixture(scope="module")
def pythia_1b():
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        intermediate_size=8192,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        return GPTNeoXForCausalLM(config)


LAYERS, D, HEADS, HEAD_DIM, RANK = 16, 2048, 8, 256, 128
PYTHIA = 1_011_781_632
MAPS = LAYERS * 2 * (HEAD_DIM**2 + HEAD_DIM)
SSM = LAYERS * (D * RANK + RANK * HEADS + HEADS + HEADS)  # W_down, W_up and its bias, A
CONV = LAYERS * 4 * D
GATE = LAYERS * (D * D + D)


PER_CHANNEL = LAYERS * (D * RANK + RANK * D + D + D * 2 * HEAD_DIM)  # the same with a delta per channel, A per state


@pytest.mark.parametrize(
    ("mixer", "decay", "expected", "millions"),
    [
        ("hedgehog", "head", PYTHIA + MAPS, 1014),  # the paper: 1,014M
        # The paper has 1,020M and 1,087M with an SSM and with all parts. Its 6M for the SSM are more than a delta and
        # A per head, and less than a delta per channel at rank D / 16 (8.4M) with an A per channel and state (16.8M).
        ("ssm", "head", PYTHIA + MAPS + SSM, 1018),
        ("ssm_conv", "head", PYTHIA + MAPS + SSM + CONV, 1018),
        ("hedgemamba", "head", PYTHIA + MAPS + SSM + CONV + GATE, 1085),
        ("ssm", "channel", PYTHIA + MAPS + PER_CHANNEL, 1039),
        ("hedgemamba", "channel", PYTHIA + MAPS + PER_CHANNEL + CONV + GATE, 1106),
    ],
)
def test_pythia_1b_on_the_meta_device_has_the_parameters_that_the_formula_gives(
    pythia_1b, mixer, decay, expected, millions
):
    assert sum(p.numel() for p in pythia_1b.parameters()) == PYTHIA
    student = convert(pythia_1b, mixer, decay=decay)
    assert {p.device.type for p in student.parameters()} == {"meta"}
    total = report(student).counts["total"]
    assert total == sum(p.numel() for p in student.parameters()) == expected
    assert round(total / 1e6) == millions


# --- what is refused


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (None, []),
        (0, []),
        ([], []),
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [1, 3, 5]),
        (4, [3]),
        (6, [5]),
        ("4", [3]),
        ([5, 0, 0], [0, 5]),
        ("[0,5]", [0, 5]),
        ("1,2", [1, 2]),
        ((3,), [3]),
    ],
)
def test_keep_attention_is_every_nth_layer_or_a_list(value, layers):
    assert kept_layers(value, 6) == layers


@pytest.mark.parametrize("value", [7, -1, [6], [0, -1], "six", "[1,x]", [1.5], 2.5, "2.5"], ids=str)
def test_layers_that_the_teacher_does_not_have_are_refused_with_their_range(value):
    with pytest.raises(UserError, match=r"keep_attention=.*(0 to 5|write 4 or \[3,7,11\])"):
        kept_layers(value, 6)


def test_an_unknown_mixer_is_answered_with_the_nearest(make_teacher):
    with pytest.raises(UserError, match="mixer=hedgemamb is not known; did you mean mixer=hedgemamba"):
        convert(make_teacher("neox"), "hedgemamb")


def test_an_unknown_decay_and_one_that_mamba_2_can_not_have_are_refused(make_teacher):
    with pytest.raises(UserError, match="decay=chanel is not known; did you mean decay=channel"):
        convert(make_teacher("neox"), decay="chanel")
    with pytest.raises(UserError, match="decay=channel can't be had with mixer=mamba"):
        convert(make_teacher("neox"), "mamba", decay="channel")


def test_a_teacher_that_can_not_be_converted_is_refused_also_when_it_was_not_loaded_by_name():
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    with pytest.raises(UserError, match="sliding window"):
        convert(MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)))


def test_a_student_is_no_teacher(make_teacher):
    with pytest.raises(UserError, match="converted student"):
        convert(convert(make_teacher("neox")))


def test_a_mixers_queries_keys_and_values_are_those_of_the_teachers_attention(teacher, ids):
    student = convert(teacher, "hedgehog")
    with torch.no_grad(), capture_attention(teacher) as records:
        teacher(input_ids=ids(2, 13))
        for mixer, seen in zip(student.mixers, records, strict=True):
            q, k, v = (t.transpose(1, 2) for t in mixer.qkv(seen.hidden, seen.position_embeddings))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            rebuilt = mixer.o_proj(y.transpose(1, 2).flatten(2))
            torch.testing.assert_close(rebuilt, seen.output, rtol=1e-5, atol=1e-5)
