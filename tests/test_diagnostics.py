"""Diagnostics by layer against the parts' own definitions, and scores of generated text."""

import pytest
import torch
from transformers import GenerationConfig

from hm.convert import convert
from hm.diagnostics import diagnose
from hm.evaluate import perplexity
from hm.generation import PROMPT, repetition, score_generation
from hm.mixer import Mixer


def test_parts_at_their_start_are_worth_nothing(teacher, ids):
    found = diagnose(convert(teacher), [ids(2, 40)])
    for row in found["layers"]:
        assert row["without"] == {part: pytest.approx(0, abs=1e-2) for part in ("ssm", "conv", "gate")}
        assert row["decay_rate"] == [0] * 11
        assert row["memory_tokens"] is None
        assert row["gate"] == {"mean": pytest.approx(1), "std": pytest.approx(0, abs=1e-6), "closed": 0}
        assert (row["conv_past"], row["delta_spread"]) == (0, pytest.approx(0, abs=1e-6))


def test_a_part_is_worth_what_the_perplexity_loses_without_it(teacher, make_student, ids):
    student, batches = make_student(teacher), [ids(2, 40)]
    before = perplexity(student, batches)["ppl"]["value"]
    found = diagnose(student, batches)
    assert perplexity(student, batches)["ppl"]["value"] == before
    second = student.mixers[1]
    assert isinstance(second, Mixer)
    second.gate = None
    assert found["layers"][1]["without"]["gate"] == pytest.approx(perplexity(student, batches)["ppl"]["value"] - before)
    rates = found["layers"][0]["decay_rate"]
    assert rates == sorted(rates)
    assert found["layers"][0]["memory_tokens"] == pytest.approx(1 / rates[5])


def test_the_decay_of_a_layer_is_delta_times_A(make_teacher, make_student, ids):
    student, tokens = make_student(make_teacher("neox")), ids(1, 40)
    mixer, seen = student.mixers[0], []
    handle = mixer.ssm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        student(input_ids=tokens[:, :-1])
    handle.remove()
    ((delta, A),) = seen
    by_hand = (delta.mean((0, 1)) * A).sort().values
    found = diagnose(student, [tokens])["layers"][0]["decay_rate"]
    assert (found[0], found[-1]) == (pytest.approx(by_hand[0].item()), pytest.approx(by_hand[-1].item()))


def test_of_a_mamba_block_decay_and_gate_are_described_and_no_part_is_taken_out(teacher, make_student, ids):
    found = diagnose(make_student(teacher, "mamba"), [ids(2, 40)])
    assert found["without"] == {}
    for row in found["layers"]:
        assert row["memory_tokens"] > 0
        assert {"gate", "conv_past", "delta_spread"} <= set(row)


def test_repetition_counts_what_was_there_before():
    assert repetition([1, 2, 3, 4, 5]) == {"distinct_1": 100, "distinct_2": 100, "distinct_3": 100, "repetition": 0}
    found = repetition([1, 2] * 5)
    assert (found["distinct_1"], found["distinct_2"]) == (20, pytest.approx(200 / 9))
    assert found["repetition"] == pytest.approx(500 / 7)


def test_continuations_are_scored_beside_the_real_one_and_come_out_the_same_again(make_student, tiny_teacher, ids):
    student, batches = make_student(tiny_teacher), [ids(2, PROMPT + 12, vocab=4096)]
    state = torch.get_rng_state()
    found = score_generation(student, tiny_teacher, batches, new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == score_generation(student, tiny_teacher, batches, new_tokens=8)
    assert set(found) == {"greedy", "sampled", "text"}
    given = student.generation_config
    student.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2, max_time=0.0)
    assert found == score_generation(student, tiny_teacher, batches, new_tokens=8), "whatever its generation_config.json says"
    assert student.generation_config.num_beams == 2
    student.generation_config = given
    own = score_generation(tiny_teacher, tiny_teacher, batches, new_tokens=8)
    assert own["text"] == found["text"]
    assert own["greedy"]["teacher_nll"]["value"] < found["greedy"]["teacher_nll"]["value"]
