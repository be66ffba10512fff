"""What every mixer owes its users, for each that is registered: one that is added is tested by being there."""

import itertools

import pytest
import torch

from hm.convert import convert, is_new, report
from hm.mixer import KINDS
from hm.modeling import load_student
from hm.student_config import StudentConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.parametrize("mixer", sorted(KINDS))


@pytest.fixture
def student(mixer, make_teacher):
    """All that is new in it moved off its start."""
    student = convert(make_teacher("llama"), mixer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if is_new(student, name):
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return student


def logits(student, tokens, **options):
    with torch.no_grad():
        return student(input_ids=tokens, **options).logits


def test_no_output_depends_on_a_later_token(student, ids):
    tokens = ids(2, 40)
    other = torch.cat([tokens[:, :25], (tokens[:, 25:] + 1) % student.config.vocab_size], 1)
    torch.testing.assert_close(logits(student, other)[:, :25], logits(student, tokens)[:, :25], **CLOSE)
    assert not torch.allclose(logits(student, other)[:, 25], logits(student, tokens)[:, 25])


def test_pieces_that_go_on_from_a_state_give_the_logits_of_the_whole(student, ids):
    tokens, cache = ids(2, 70), student.new_cache()
    pieces = [logits(student, tokens[:, a:b], past_key_values=cache) for a, b in itertools.pairwise([0, 5, 40, 41, 42, 70])]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(student, tokens), **CLOSE)


def test_the_state_is_as_large_after_many_tokens_as_after_a_few(student, ids):
    sizes = []
    for length in (6, 60):
        cache = student.new_cache()
        logits(student, ids(2, length), past_key_values=cache)
        held = [(s.conv, s.ssm) for s in (cache.state(i) for i in range(student.config.num_hidden_layers))]
        sizes.append([None if t is None else t.shape for pair in held for t in pair])
    assert sizes[0] == sizes[1]


def test_padding_on_the_left_changes_nothing(student, ids):
    tokens = ids(2, 20)
    padded, mask = torch.cat([ids(2, 7), tokens], 1), torch.cat([torch.zeros(2, 7), torch.ones(2, 20)], 1).long()
    torch.testing.assert_close(logits(student, padded, attention_mask=mask)[:, 7:], logits(student, tokens), **CLOSE)


def test_a_saved_student_is_the_same_and_every_new_parameter_learns_and_is_counted(student, mixer, ids, tmp_path):
    tokens = ids(2, 30)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_student(tmp_path), tokens), logits(student, tokens))
    assert StudentConfig.from_pretrained(tmp_path).mixer["kind"] == mixer
    student.train().requires_grad_(True)(input_ids=tokens, labels=tokens).loss.backward()
    new = {name: p for name, p in student.named_parameters() if is_new(student, name)}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in new.values())
    assert report(student).counts["new"] == sum(p.numel() for p in new.values())
