"""Differences, their intervals and Holm's correction, against values worked out here."""

import json
import math
import statistics

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.stats import (
    LEVEL,
    SEED_MARGIN,
    SEED_POINTS,
    _interval,
    _part,
    _serial_part,
    accuracy_difference,
    difference,
    holm,
)


def record(ppl, seed=0, stderr=0.3, recipe="two_stage", path="x/record.json", **tasks):
    found = {"settings.seed": seed, "settings.recipe": recipe, "metrics.ppl.value": ppl, "metrics.ppl.stderr": stderr, "path": path}
    for task, (value, error) in tasks.items():
        found |= {f"metrics.{task}.value": value, f"metrics.{task}.stderr": error}
    return found


def test_seeds_are_paired_and_the_interval_is_students(tmp_path):
    a, b = [30.0, 31.0, 29.5], [33.0, 33.5, 32.0]
    found = difference([record(p, s) for s, p in enumerate(a)], [record(p, s) for s, p in reversed(list(enumerate(b)))], tmp_path)
    each = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    test = scipy_stats.ttest_1samp(each, 0)
    low, high = test.confidence_interval(0.95)
    assert (found.value, found.low, found.high, found.p) == pytest.approx((statistics.mean(each), low, high, test.pvalue))
    assert found.how == "paired over 3 seeds"


def test_only_seeds_that_both_have_are_compared(tmp_path):
    found = difference([record(30.0, 0), record(31.0, 1), record(99.0, 7)], [record(33.0, 0), record(34.0, 1), record(1.5, 8)], tmp_path)
    assert found.how == "paired over 2 seeds"
    assert difference([record(30.0, 0)], [record(30.0, 1)], tmp_path) is None


def test_a_teacher_goes_with_every_seed(tmp_path):
    found = difference([record(30.0, 0), record(31.0, 1)], [record(20.0, 0, recipe="teacher")], tmp_path)
    assert found.value == pytest.approx((math.log(1.5) + math.log(1.55)) / 2)


def test_one_seed_without_losses_has_both_standard_errors_and_the_margin_of_seeds(tmp_path):
    found = difference([record(30.0, stderr=0.6)], [record(40.0, stderr=0.4)], tmp_path)
    half = 1.959964 * math.hypot(0.6 / 30, 0.4 / 40) + SEED_MARGIN
    assert (found.low, found.high) == pytest.approx((math.log(0.75) - half, math.log(0.75) + half))


def write_losses(root, name, losses, tokens="t"):
    (root / name).mkdir()
    (root / name / "losses.json").write_text(json.dumps({"tokens": tokens, "seq_len": 8, "loss": losses}))
    return f"{name}/record.json"


def test_one_seed_with_the_loss_of_each_sequence_is_paired_over_them(tmp_path):
    rng = np.random.default_rng(0)
    text = rng.normal(3, 1, 50)
    a, b = (text + rng.normal(shift, 0.01, 50) for shift in (0, 0.2))
    paths = [write_losses(tmp_path, name, x.tolist()) for name, x in (("a", a), ("b", b))]
    found = difference([record(math.exp(a.mean()), path=paths[0])], [record(math.exp(b.mean()), path=paths[1])], tmp_path)
    stretches = [(a - b)[i : i + 5].mean() for i in range(0, 50, 5)]
    half = scipy_stats.t.ppf(0.975, 9) * statistics.stdev(stretches) / math.sqrt(10) + SEED_MARGIN
    assert (found.value, found.low) == pytest.approx(((a - b).mean(), (a - b).mean() - half))
    assert "50 sequences, one seed" in found.how
    unpaired = difference([record(math.exp(a.mean()), stderr=4.0)], [record(math.exp(b.mean()), stderr=4.0)], tmp_path)
    assert unpaired.high - unpaired.low > 2 * (found.high - found.low)


@pytest.mark.parametrize("losses", [("t", [1.0, 2.0]), ("other text", [1.0, 2.0, 3.0]), ("t", [1.0, math.nan, 2.0]), ("t", "x")])
def test_losses_of_other_sequences_or_broken_ones_are_not_paired(tmp_path, losses):
    paths = [write_losses(tmp_path, "a", [1.0, 2.0, 3.0]), write_losses(tmp_path, "b", losses[1], losses[0])]
    found = difference([record(30.0, path=paths[0])], [record(31.0, path=paths[1])], tmp_path)
    assert found.how == "standard errors of one seed"


def test_seeds_and_sequences_add_up(tmp_path):
    rng = np.random.default_rng(1)
    pairs = []
    for seed in range(3):
        text = rng.normal(3, 1, 40)
        a, b = text, text + rng.normal(0.1, 0.2, 40) + 0.01 * seed
        pairs.append([record(math.exp(x.mean()), seed, path=write_losses(tmp_path, f"{name}{seed}", x.tolist())) for name, x in (("a", a), ("b", b))])
    both = difference(*zip(*pairs, strict=True), tmp_path)
    seeds = difference(*([{**r, "path": "none/record.json"} for r in side] for side in zip(*pairs, strict=True)), tmp_path)
    assert both.value == pytest.approx(seeds.value)
    assert both.how == "paired over 3 seeds and 40 sequences"
    assert both.p != seeds.p


def test_an_interval_of_few_seeds_and_many_sequences_holds_what_it_should():
    rng, held = np.random.default_rng(2), 0
    for _ in range(1500):
        seeds, sequences = rng.normal(0, 1, 2), rng.normal(0, 3, 100)
        value = seeds.mean() + sequences.mean()
        found = _interval(value, [_part(seeds), _serial_part(sequences)], 0.0, "")
        held += found.low <= 0 <= found.high
        assert (found.p < LEVEL) == (not found.low <= 0 <= found.high)
    assert 0.94 < held / 1500 < 0.99, "Welch's and Satterthwaite's holds it 88 times of 100"


def test_neighbours_that_are_alike_count_as_less():
    rng, plain, serial = np.random.default_rng(3), 0, 0
    for _ in range(2000):
        x = np.repeat(rng.normal(0, 1, 38), 4)[2:152] + rng.normal(0, 0.3, 150)  # documents of four sequences
        plain += abs(x.mean()) < 1.98 * _part(x)[0]
        serial += abs(x.mean()) < 2.26 * _serial_part(x)[0]
    assert plain / 2000 < 0.75 < 0.92 < serial / 2000


@pytest.mark.parametrize(("value", "p"), [(1.959964, 0.05), (0.5, 1.0), (100.0, 1e-15), (-2.575829, 0.01)])
def test_p_is_the_level_at_which_the_interval_ends_at_the_margin(value, p):
    margin = 0.5 if value == 0.5 else 0.0
    assert _interval(value, [(1.0, math.inf)], margin, "").p == pytest.approx(p, rel=1e-4)
    assert _interval(math.copysign(3, value), [(0.0, 1)], margin, "").p == pytest.approx(1e-15, rel=1e-4)


def test_holm_is_that_of_the_textbook():
    class P:
        def __init__(self, p):
            self.p = p

    assert holm([P(0.01), P(0.04), P(0.03), P(0.005)]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_accuracies_have_the_error_of_the_mean_of_their_tasks():
    a = [record(30.0, s, piqa=(60.0 + s, 1.0), boolq=(50.0, 2.0)) for s in (0, 1)]
    b = [record(30.0, 0, piqa=(58.0, 1.0), boolq=(51.0, 2.0))]
    found = accuracy_difference(a, b, ["piqa", "boolq"])
    half = 1.959964 * math.sqrt(1 + 4 + 1 + 4) / 2 + SEED_POINTS / math.sqrt(2)
    assert (found.value, found.low) == pytest.approx(((2.5 - 1.0) / 2, (2.5 - 1.0) / 2 - half))
    assert accuracy_difference(a, b, ["piqa", "race"]) is None


def test_an_accuracy_difference_has_the_noise_of_its_seeds():
    even, odd, other = ([record(30.0, s, piqa=(v, 0.5)) for s, v in enumerate(values)] for values in ((38.0, 38.0, 38.0), (34.0, 38.0, 42.0), (36.0, 36.0, 36.0)))
    sure, unsure = (accuracy_difference(a, other, ["piqa"]) for a in (even, odd))
    assert sure.value == unsure.value == 2.0
    assert sure.p < 0.05 < unsure.p
    assert "3 seeds" in sure.how


def test_accuracies_are_compared_over_the_seeds_that_answered_every_task():
    a = [record(30.0, 0, piqa=(60.0, 0.1)), record(30.0, 1, piqa=(50.0, 0.1), boolq=(50.0, 0.1)), record(30.0, 2, boolq=(60.0, 0.1))]
    b = [record(30.0, s, piqa=(50.0, 0.1), boolq=(50.0, 0.1)) for s in range(3)]
    found = accuracy_difference(a, b, ["piqa", "boolq"])
    assert (found.value, found.how) == (5.0, "standard errors of the harness, one seed")
    assert found.low < 4.4
    assert "no seed in common" in accuracy_difference(a[:1], b[1:], ["piqa"]).how


def test_accuracies_on_other_numbers_of_items_are_not_compared():
    few, many = ([record(30.0, 0, piqa=(v, 1.0)) | {"metrics.piqa.n": n}] for v, n in ((60.0, 50), (70.0, 500)))
    assert accuracy_difference(few, many, ["piqa"]) is None
    again = [record(30.0, 1, piqa=(50.0, 1.0)) | {"metrics.piqa.n": 500}]
    assert accuracy_difference([*few, *again], many, ["piqa"]).value == -20.0


def test_equal_perplexities_are_no_difference_and_never_divide_by_zero(tmp_path):
    same = [record(30.0, s) for s in (0, 1)]
    found = difference(same, same, tmp_path)
    assert (found.value, found.p) == (0.0, 1.0)
