"""Perplexity against a computation by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hm.evaluate import agreement, by_position, measured, perplexity, strided_losses, token_losses


class Fixed(torch.nn.Module):
    """Logits that depend on the input token alone."""

    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, **kwargs):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("vocab", [2, 61])
def test_a_uniform_models_perplexity_is_the_size_of_its_vocabulary(vocab, ids):
    found = perplexity(Fixed(torch.zeros(vocab, vocab)), [ids(4, 9, vocab=vocab)])
    assert found["ppl"]["value"] == pytest.approx(vocab)
    assert found["ppl"]["stderr"] == pytest.approx(0, abs=1e-4)


def by_hand(model, batches):
    """Mean loss per sequence, token after token."""
    losses = []
    for batch in batches:
        for row in batch:
            with torch.no_grad():
                logits = model(input_ids=row[None, :-1], use_cache=False).logits[0].double()
            nll = [-(logits[t, row[t + 1]] - logits[t].logsumexp(0)).item() for t in range(len(row) - 1)]
            losses.append(nll)
    return losses


def test_perplexity_and_its_error_by_hand(teacher, ids):
    batches = [ids(3, 17, seed=1), ids(2, 17, seed=2)]
    found = perplexity(teacher, batches)
    means = [sum(nll) / len(nll) for nll in by_hand(teacher, batches)]
    mean = sum(means) / 5
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 4 / 5)
    assert found["ppl"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["ppl"]["stderr"] == pytest.approx(math.exp(mean) * spread, rel=1e-3)
    assert set(found) == {"ppl"}


def test_every_token_weighs_the_same_also_in_sequences_of_other_lengths(teacher, ids):
    batches = [ids(2, 33, seed=1), ids(3, 5, seed=2)]
    tokens = [x for nll in by_hand(teacher, batches) for x in nll]
    assert len(tokens) == 2 * 32 + 3 * 4
    assert perplexity(teacher, batches)["ppl"]["value"] == pytest.approx(
        math.exp(sum(tokens) / len(tokens)), rel=1e-4
    )


def test_how_the_sequences_are_batched_does_not_matter(teacher, ids):
    tokens = ids(6, 17)
    one, many = perplexity(teacher, [tokens])["ppl"], perplexity(teacher, tokens.split(1))["ppl"]
    assert one == pytest.approx(many, rel=1e-5)


@pytest.mark.parametrize(("shift", "expected"), [(0, math.exp(30)), (1, 1), (2, math.exp(30))])
def test_the_label_of_a_token_is_the_next_one(shift, expected):
    counting = (torch.arange(9) + torch.tensor([[0], [5]])) % 10
    model = Fixed(30 * torch.eye(10).roll(shift, dims=1))
    assert perplexity(model, [counting])["ppl"]["value"] == pytest.approx(expected, rel=1e-3)


def test_bits_per_byte_are_the_mean_loss_in_bits_over_the_bytes_of_a_token(teacher, ids):
    found = perplexity(teacher, [ids(4, 17)], bytes_per_token=3.5)
    assert found["bits_per_byte"]["value"] == pytest.approx(math.log2(found["ppl"]["value"]) / 3.5)
    relative = found["ppl"]["stderr"] / found["ppl"]["value"]
    assert found["bits_per_byte"]["stderr"] == pytest.approx(relative / math.log(2) / 3.5)


def test_a_single_sequence_has_no_standard_error(teacher, ids):
    assert set(perplexity(teacher, [ids(1, 17)])["ppl"]) == {"value"}
    assert measured(3.0, math.nan) == {"value": 3.0}
    assert measured(3.0, 0.5) == {"value": 3.0, "stderr": 0.5}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in_without_gradients(teacher, ids, training):
    teacher.train(training).requires_grad_(True)
    modes = []
    teacher.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    perplexity(teacher, [ids(2, 9)])
    assert modes == [(False, False)]
    assert teacher.training == training


def test_bfloat16_gives_nearly_the_same(make_student, tiny_teacher, ids):
    student, tokens = make_student(tiny_teacher, "hedgehog"), [ids(2, 33, vocab=4096)]
    exact, rounded = (perplexity(student, tokens, precision=p)["ppl"]["value"] for p in ("fp32", "bf16"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


def test_no_text_and_a_loss_that_is_not_finite_are_errors(ids):
    with pytest.raises(ValueError, match="at least one batch"):
        perplexity(Fixed(torch.zeros(5, 5)), [])
    with pytest.raises(ValueError, match="nan"):
        perplexity(Fixed(torch.full((5, 5), math.nan)), [ids(2, 9, vocab=5)])


def test_the_embedded_teacher_knows_english(tiny_teacher):
    from hm.teacher import load_tokenizer

    text = "The history of the city is long, and many of the people who lived there were farmers."
    tokens = load_tokenizer("tiny")(text, return_tensors="pt").input_ids
    found = perplexity(tiny_teacher, [tokens])["ppl"]["value"]
    shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    assert found < 200
    assert perplexity(tiny_teacher, [shuffled])["ppl"]["value"] > 5 * found


# --- beyond the training length, and against another model


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_a_sequence_in_segments_has_the_losses_of_the_whole(of, teacher, make_student, ids, monkeypatch):
    model, tokens = teacher if of == "teacher" else make_student(teacher), [ids(2, 51)]
    (whole,) = token_losses(model, tokens)
    monkeypatch.setattr("hm.evaluate.SEGMENT", 16)
    (pieces,) = token_losses(model, tokens)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_perplexity_by_position_parts_the_tokens_at_doubling_positions():
    losses = [torch.arange(12.0).repeat(2, 1) / 10, torch.arange(12.0)[None] / 5]
    found = by_position(losses, first=3)
    assert found["positions"] == [3, 6, 12]
    means = [(2 * sum(x) / 10 + sum(x) / 5) / 3 / len(x) for x in ([0, 1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11])]
    assert found["ppl"] == pytest.approx([math.exp(m) for m in means])
    assert all(error > 0 for error in found["stderr"])
    assert by_position([torch.ones(1, 2)])["stderr"] == [None]


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_strided_losses_are_those_of_the_end_of_a_window_that_is_moved(teacher, stride, tmp_path):
    text = np.random.default_rng(0).integers(0, teacher.config.vocab_size, 41)
    held = SimpleNamespace(split="validation", num_blocks=lambda n: 40 // n, tokens=lambda a, b: text[a:b], __len__=lambda: 41)
    found = strided_losses(teacher, held, 8, stride, 3, batch_size=2)
    assert [x.shape for x in found] == [(1, 8)] * 3
    for block, losses in zip((0, 1, 3), found, strict=True):
        for i in range(8):
            end = block * 8 + min(8, (i // stride + 1) * stride)
            window = torch.from_numpy(text[max(0, end - 8) : end + 1])[None]
            assert end - max(0, end - 8) == 8 or block == 0
            expected = token_losses(teacher, [window])[0][0, i - end + block * 8]
            assert losses[0, i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_agrees_with_itself_and_less_with_another(make_teacher, ids):
    teacher, other, batches = make_teacher("neox"), make_teacher("neox", seed=1), [ids(3, 17), ids(1, 17, seed=5)]
    own = agreement(teacher, teacher, batches)
    assert own["top1"] == {"value": 100, "stderr": 0}
    assert own["kl"]["value"] == pytest.approx(0, abs=1e-5)
    found = agreement(other, teacher, batches)
    with torch.no_grad():
        a, b = (m(input_ids=batches[1]).logits[0].log_softmax(-1) for m in (other, teacher))
    by_hand = (b.exp() * (b - a)).sum(-1).mean().item()
    assert agreement(other, teacher, batches[1:])["kl"]["value"] == pytest.approx(by_hand, rel=1e-4)
    assert found["kl"]["value"] > 0.1
    assert found["top1"]["value"] < 50
