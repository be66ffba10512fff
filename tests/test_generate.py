"""Parallel, recurrent and mixed passes of a student agree under every scan and in bfloat16; sampling keeps its state."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from hm.convert import convert
from hm.errors import UserError
from hm.modeling import load_student


def passes(student, tokens, cuts):
    """The logits of tokens (B, L) all at once, and of the pieces between the cuts, each going on from the cache."""
    cache, bounds = student.new_cache(), [0, *cuts, tokens.shape[1]]
    with torch.no_grad():
        whole = student(input_ids=tokens).logits
        pieces = [student(input_ids=tokens[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
    return whole, torch.cat(pieces, 1)


@pytest.mark.parametrize("mixer", ["hedgehog", "hedgemamba", "mamba"])
@pytest.mark.parametrize("scan", ["naive", "recurrent", "chunked"])
def test_under_every_scan_a_mixed_pass_gives_the_logits_of_the_whole_one(kind, mixer, scan, make_teacher, make_student, ids):
    teacher, tokens = make_teacher(kind), ids(2, 70)
    whole, mixed = passes(make_student(teacher, mixer, scan=scan), tokens, [5, 40, 41, 42])
    torch.testing.assert_close(mixed, whole, rtol=1e-4, atol=1e-4)
    reference, _ = passes(make_student(teacher, mixer), tokens, [])
    torch.testing.assert_close(whole, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ["hedgehog", "hedgemamba", "mamba"])
def test_in_bfloat16_a_mixed_pass_is_no_further_from_float32_than_a_whole_one(kind, mixer, make_teacher, make_student, ids):
    student, tokens = make_student(make_teacher(kind), mixer), ids(2, 70)
    exact, _ = passes(student, tokens, [])
    whole, mixed = passes(student.bfloat16(), tokens, [5, 40, *range(41, 70)])
    noise = (whole.float() - exact).square().mean().sqrt()
    assert 0 < (mixed.float() - exact).square().mean().sqrt() < 1.5 * noise
    assert noise < 0.1 * exact.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_is_loaded_in_the_dtype_that_is_asked_for_and_generates_in_it(kind, dtype, make_teacher, make_student, ids, tmp_path):
    student, tokens = make_student(make_teacher(kind)), ids(2, 9)
    student.save_pretrained(tmp_path)
    exact, _ = passes(student, tokens, [])
    for loaded in (load_student(str(tmp_path), dtype=dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        noise = (passes(loaded, tokens, [])[0].float() - exact).square().mean().sqrt()
        assert 0 < noise < 0.1 * exact.std()
        assert loaded.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, eos_token_id=None, pad_token_id=7).shape == (2, 12)


def test_sampling_with_the_state_draws_what_sampling_over_the_whole_text_draws(teacher, make_student, ids):
    student, tokens = make_student(teacher), ids(3, 9)
    student.generation_config.eos_token_id = None

    def sample(**options):
        torch.manual_seed(3)
        return student.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=True, top_k=0, pad_token_id=7, **options
        )

    drawn = sample()
    assert torch.equal(drawn, sample(use_cache=False))
    assert len({tuple(row) for row in drawn[:, 9:].tolist()}) == 3


def test_an_empty_prompt_is_refused(make_teacher, ids):
    student = convert(make_teacher("neox"))
    with pytest.raises(UserError, match="the prompt is empty"):
        student(input_ids=ids(1, 0))
