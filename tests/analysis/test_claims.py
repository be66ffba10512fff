"""Each claim's verdict on records that are made to hold it, to break it, or to leave it open."""

import json
import shlex
from pathlib import Path

import pytest

from analysis import claims, paper
from analysis.claims import RULES, judge
from analysis.load import load_records
from analysis.rows import split_of

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"hedgehog": {}, "ssm": {"ssm"}, "ssm_conv": {"ssm", "conv"}, "hedgemamba": {"ssm", "conv", "gate"}, "gate": {"gate"}}


@pytest.fixture
def lab(runs):
    """Adds cells with three seeds that lie close together around a perplexity, at a split in percent."""

    class Lab:
        def cell(self, mixer, ppl, split=10, recipe="two_stage", seeds=3, study="main", **more):
            parts = {p: p in PARTS.get(mixer, ()) for p in ("ssm", "conv", "gate")}
            budget, params = more.pop("total", 1000), more.pop("params", 7_350_000 if "gate" in PARTS.get(mixer, ()) else 6_900_000)
            one, record = budget * split // 100, {"params": {"total": params}, **more.pop("record", {})}
            for seed in range(seeds):
                runs.add(study, f"{recipe} {mixer} {split} {more}", ppl * (1 + 0.001 * (seed - 1)), seed=seed, mixer=mixer, recipe=recipe,
                         one=one, two=budget - one, record=record, **parts, **more)

        def teacher(self, ppl=20.0, **more):
            runs.teacher("main", ppl, **more)

        def verdict(self, claim):
            return next(c for c in judge(load_records(runs.root)) if c.id == claim)

    return Lab()


def said(claim):
    return claim.findings[-1].why, "\n".join([*claim.findings[-1].evidence, *claim.findings[-1].controls])


@pytest.mark.parametrize("ours", [{"stage1": {"train": "mixer"}}, {"stage1": {"loss": "mse"}}, {"stage1": {"feed": "student"}}, {"stage2": {"loss": "kl"}}, {"ssm_init": "decay"}])
def test_a_recipe_of_ours_decides_no_claim_of_the_papers(lab, ours):
    lab.teacher()
    lab.cell("hedgehog", 24.0, stage1={"train": "maps", "loss": "cosine"})
    lab.cell("hedgemamba", 28.0)
    before = lab.verdict("C2")
    assert before.verdict == "not reproduced"
    lab.cell("hedgemamba", 21.0, study="recipes", **ours)
    lab.cell("hedgemamba", 21.0, study="recipes", split=75, **ours)
    assert lab.verdict("C2") == before


def test_every_claim_of_the_paper_has_a_rule_with_its_reason():
    assert list(RULES) == list(paper.CLAIMS)
    assert all(rule and reason for rule, reason in RULES.values())


@pytest.mark.parametrize(("student", "adapted", "verdict"), [
    (20.4, 20.2, "reproduced"), (22.0, 20.2, "not reproduced"), (20.4, 18.0, "not reproduced"), (20.4, None, "undecided"), (20.74, 20.7, "undecided")])
def test_closeness_is_to_the_teacher_and_to_the_adapted_one(lab, student, adapted, verdict):
    lab.teacher()
    lab.cell("hedgemamba", student)
    if adapted:
        lab.cell("hedgemamba", adapted, recipe="adapted_teacher")
    found = lab.verdict("C1")
    assert found.verdict == verdict
    assert "1k tokens" in found.where
    if adapted is None:
        assert "adapted teacher" in said(found)[0]


@pytest.mark.parametrize(("hedgehog", "verdict"), [(31.0, "reproduced"), (30.03, "not reproduced"), (29.0, "not reproduced")])
def test_an_advantage_counts_at_the_same_split(lab, hedgehog, verdict):
    lab.teacher()
    lab.cell("hedgemamba", 30.0)
    lab.cell("hedgehog", hedgehog)
    lab.cell("hedgehog", 99.0, split=50)
    found = lab.verdict("C2")
    assert found.verdict == verdict
    assert "the paper's pair, of different splits: does not decide" in said(found)[1]


def test_one_seed_needs_a_difference_beyond_the_margin_of_seeds(lab):
    lab.cell("hedgemamba", 30.0, seeds=1)
    lab.cell("hedgehog", 31.0, seeds=1)
    found = lab.verdict("C2")
    assert found.verdict == "undecided"
    command = shlex.split(found.findings[-1].decide)
    assert command[:4] == ["python", "sweep.py", "-m", "+study=main"]
    assert {"scale=tiny", "budget=1k", "seed=0,1,2"} <= set(command)
    lab.cell("hedgehog", 40.0, split=50, seeds=1)
    lab.cell("hedgemamba", 30.0, split=50, seeds=1)
    assert "50/50" in said(lab.verdict("C2"))[1]


def test_cells_are_compared_at_the_settings_that_they_share(lab):
    lab.cell("hedgemamba", 30.0, **{"stage2.lr": 0.001})
    lab.cell("hedgemamba", 20.0, **{"stage2.lr": 0.003})
    lab.cell("hedgehog", 29.0, **{"stage2.lr": 0.001})
    found = lab.verdict("C2")
    assert found.verdict == "not reproduced"
    assert "30" in said(found)[1]


def test_cells_without_a_setting_in_common_are_compared_at_their_own_and_it_is_said(lab):
    lab.cell("hedgemamba", 25.0, **{"stage2.lr": 0.003})
    lab.cell("hedgehog", 29.0, **{"stage2.lr": 0.001})
    assert "each at its own settings: stage2.lr 0.003 / 0.001" in said(lab.verdict("C2"))[1]


@pytest.mark.parametrize(("one_step", "verdict"), [(150.0, "reproduced"), (100.0, "not reproduced"), (144.4, "undecided")])
def test_collapse_is_a_multiple_of_the_teacher_and_not_an_absolute_number(lab, one_step, verdict):
    lab.teacher(20.0)
    lab.cell("mamba", one_step, split=0, recipe="one_step")
    assert lab.verdict("C3").verdict == verdict


def test_a_one_step_variant_that_does_not_collapse_breaks_the_claim(lab):
    lab.teacher(20.0)
    lab.cell("mamba", 200.0, split=0, recipe="one_step")
    lab.cell("mamba", 60.0, split=0, recipe="one_step", **{"mamba.copy_projections": True})
    found = lab.verdict("C3")
    assert found.verdict == "not reproduced"
    assert "copied projections True" in said(found)[1]


def ladder(lab, **ppls):
    for mixer, ppl in ({"hedgehog": 31.0, "ssm": 31.0, "ssm_conv": 31.0, "hedgemamba": 30.0} | ppls).items():
        lab.cell(mixer, ppl, split=50)


@pytest.mark.parametrize(("changes", "verdict", "why"), [
    ({}, "reproduced", "controls"), ({"gate": 30.2}, "reproduced", "controls"), ({"ssm": 29.0, "ssm_conv": 29.0, "hedgemamba": 28.0}, "not reproduced", "ssm alone"),
    ({"hedgemamba": 31.02}, "not reproduced", "the gate's advantage"), ({"gate": 31.1}, "not reproduced", "the gate alone is not ahead")])
def test_the_gate_must_bring_the_gain_also_alone(lab, changes, verdict, why):
    ladder(lab, **changes)
    found = lab.verdict("C4")
    assert found.verdict == verdict
    assert why in said(found)[0]


def test_a_hedgehog_with_as_many_parameters_that_is_as_good_breaks_the_gates_claim(lab):
    ladder(lab)
    assert lab.verdict("C4").verdict == "reproduced"
    lab.cell("hedgehog", 29.9, split=50, params=7_340_000, **{"feature_map.per_head": True})
    found = lab.verdict("C4")
    assert found.verdict == "not reproduced"
    assert "as many parameters" in said(found)[0]


@pytest.mark.parametrize(("bypass", "verdict"), [(29.9, "not reproduced"), (30.9, "reproduced")])
def test_the_linear_path_is_a_control_also_at_another_split(lab, bypass, verdict):
    ladder(lab)
    lab.cell("hedgemamba", 30.0)
    lab.cell("hedgehog_bypass", bypass, params=7_300_000)
    found = lab.verdict("C4")
    assert found.verdict == verdict
    assert "hedgehog_bypass 10/90" in said(found)[1]


@pytest.mark.parametrize(("others", "verdict"), [
    ({0: 35.0, 100: 50.0, 50: 32.0}, "reproduced"), ({0: 29.0, 100: 50.0, 50: 32.0}, "not reproduced"), ({0: 35.0}, "undecided"),
    ({0: 35.0, 100: 50.0, 50: 32.0, 25: 29.0}, "reproduced")])
def test_the_best_split_beats_no_stage_1_no_stage_2_and_a_heavy_stage_1(lab, others, verdict):
    lab.cell("hedgemamba", 30.0)
    for split, ppl in others.items():
        lab.cell("hedgemamba", ppl, split=split)
    found = lab.verdict("C5")
    assert found.verdict == verdict
    if verdict == "undecided":
        assert said(found)[0] == "not run: 100/0, 50/50"
        assert "+study=split" in found.findings[-1].decide


@pytest.mark.parametrize(("curve", "verdict"), [((40.0, 35.0, 30.0), "reproduced"), ((40.0, 30.0, 33.0), "not reproduced"), ((40.0, 30.0), "undecided")])
def test_perplexity_must_fall_from_each_budget_to_the_next(lab, curve, verdict):
    for i, ppl in enumerate(curve):
        lab.cell("hedgemamba", ppl, total=1000 * 2**i)
    found = lab.verdict("C6")
    assert found.verdict == verdict
    if verdict == "undecided":
        assert "default_budget=2k" in found.findings[-1].decide


def test_the_ordering_needs_three_teachers_and_fails_at_one(lab):
    for n, teacher in enumerate("abc"):
        if n:
            found = lab.verdict("C7")
            assert (found.verdict, found.why) == ("undecided", f"{n} of three teachers were run")
            others = ",".join(["pythia160m", "pythia410m"][: 3 - n])
            assert found.findings[0].decide == f"python sweep.py -m +study=main scale={others} seed=0,1,2"
        lab.cell("hedgemamba", 30.0, teacher=teacher)
        lab.cell("hedgehog", 33.0, teacher=teacher)
    assert lab.verdict("C7").verdict == "reproduced"
    lab.cell("hedgemamba", 30.0, teacher="d")
    lab.cell("hedgehog", 27.0, teacher="d")
    assert lab.verdict("C7").verdict == "not reproduced"


@pytest.mark.parametrize(("teacher", "hedgemamba", "hedgehog", "verdict"), [
    (45.0, 44.5, 43.0, "reproduced"), (45.0, 35.0, 34.0, "not reproduced"), (45.0, 43.0, 45.0, "not reproduced"), (28.0, 28.0, 27.0, "undecided"), (45.0, 43.0, None, "undecided")])
def test_accuracy_is_near_the_teachers_and_beside_hedgehogs_unless_the_teacher_guesses(lab, runs, teacher, hedgemamba, hedgehog, verdict):
    def tasks(start):
        return {t: {"value": start + i, "stderr": 0.1} for i, t in enumerate(paper.TASKS)}

    lab.teacher(metrics=tasks(teacher))
    lab.cell("hedgemamba", 30.0, metrics=tasks(hedgemamba))
    lab.cell("hedgehog", 31.0, metrics=tasks(hedgehog) if hedgehog else {})
    found = lab.verdict("C8")
    assert found.verdict == verdict
    if teacher == 28.0:
        assert "chance" in said(found)[0]


def test_without_records_of_a_claim_it_is_undecided_and_the_run_is_named(lab):
    lab.teacher()
    lab.cell("hedgemamba", 30.0)
    found = lab.verdict("C4")
    assert (found.verdict, said(found)[0]) == ("undecided", "its cells were not run")
    assert "+study=mixer" in found.findings[0].decide


def test_the_headline_is_the_largest_place_that_is_decided(lab):
    lab.cell("hedgemamba", 30.0)
    lab.cell("hedgehog", 33.0)
    lab.cell("hedgemamba", 30.0, total=9000, seeds=1)
    lab.cell("hedgehog", 30.1, total=9000, seeds=1)
    found = lab.verdict("C2")
    assert [f.verdict for f in found.findings] == ["reproduced", "undecided"]
    assert (found.verdict, "1k tokens" in found.where) == ("reproduced", True)


def test_records_from_before_a_setting_was_there_go_with_its_default(lab):
    lab.cell("hedgemamba", 30.0)
    lab.cell("hedgehog", 33.0, decay="head")
    assert "each at its own" not in said(lab.verdict("C2"))[1]


def test_hybrids_take_no_part(lab):
    lab.cell("hedgemamba", 20.0, keep_attention=4)
    lab.cell("hedgehog", 33.0)
    assert lab.verdict("C2").findings[0].why == "its cells were not run"


def test_the_command_writes_the_verdicts_and_the_same_bytes_again(lab, runs, tmp_path, capsys):
    lab.teacher()
    lab.cell("hedgemamba", 30.0)
    arguments = ["--runs", str(runs.root), "--out", str(tmp_path / "out")]
    assert claims.main(arguments) == 0
    files = [tmp_path / "out" / f"claims.{e}" for e in ("md", "json")]
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    assert claims.main(arguments) == 0
    assert [(f.read_bytes(), f.stat().st_mtime_ns) for f in files] == before
    assert [c["id"] for c in json.loads(files[1].read_text())] == list(paper.CLAIMS)
    assert "| C1. " in capsys.readouterr().out


def test_the_runs_that_would_decide_are_command_lines_that_the_sweep_takes(lab, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("HM_RUNS", str(tmp_path / "runs"))
    from sweep import check_typed

    lab.teacher(scale="tiny")
    lab.cell("hedgemamba", 30.0, seeds=1)
    lab.cell("hedgemamba", 30.2, total=2000, seeds=1)
    lab.cell("mamba", 144.4, split=0, recipe="one_step", seeds=1)
    commands = {f.decide for c in ("C1", "C2", "C3", "C4", "C5", "C6", "C7") for f in lab.verdict(c).findings if f.decide}
    assert len(commands) == 5
    for command in (each for several in commands for each in several.split(" && ")):
        python, script, *typed = shlex.split(command)
        assert (python, script) == ("python", "sweep.py")
        check_typed(typed)


def test_the_command_that_would_decide_has_what_the_scale_does_not_say(lab):
    lab.cell("hedgemamba", 30.0, scale="tiny", teacher="my/model", seq_len=128, eval={"sequences": 8})
    lab.cell("hedgemamba", 30.0, scale="tiny", teacher="tiny", seq_len=256, eval={"sequences": 150})
    own, plain = (shlex.split(f.decide) for f in lab.verdict("C1").findings)
    assert {"teacher=my/model", "seq_len=128", "eval.sequences=8"} <= set(own)
    assert not [typed for typed in plain if typed.startswith(("teacher=", "seq_len=", "eval.", "data="))]


def test_the_reason_beside_a_verdict_is_that_of_its_place(lab):
    lab.teacher()
    lab.cell("mamba", 21.0, recipe="one_step", split=0)
    lab.cell("mamba", 21.0, recipe="one_step", split=0, total=2000, params=8_000_000, data="other.txt")
    claim = lab.verdict("C3")
    assert [f.verdict for f in claim.findings] == ["not reproduced", "undecided"]
    assert (claim.verdict, claim.where, claim.why) == ("not reproduced", claim.findings[0].where, claim.findings[0].why)


def test_a_teacher_measured_twice_is_one_teacher(lab):
    for ppl in (20.0, 20.0000002):
        lab.teacher(ppl, record={"provenance": {"teacher": "t"}})
    lab.cell("hedgemamba", 20.2, record={"provenance": {"teacher": "t"}})
    assert "+1%" in said(lab.verdict("C1"))[1]
    assert "not measured" not in said(lab.verdict("C1"))[0]


def test_two_teachers_of_one_name_are_two_places_and_one_of_two_names_is_one(lab, runs):
    for name, origin in (("/a/hf", "first"), ("/b/hf", "second")):
        for mixer, ppl in (("hedgemamba", 22.0), ("hedgehog", 24.0)):
            lab.cell(mixer, ppl, teacher=name, record={"provenance": {"teacher": origin}})
    assert [f.where for f in lab.verdict("C2").findings] == [f"hf, 1k tokens (docstrings, 256, 200, {origin})" for origin in ("first", "second")]
    assert lab.verdict("C7").findings[0].why.startswith("2 of three teachers")
    for path in Path(runs.root).glob("main/*/record.json"):
        if '"second"' in (record := path.read_text()):  # the first teacher on another text
            path.write_text(record.replace('"second"', '"first"').replace('"docstrings"', '"other"'))
    assert lab.verdict("C7").findings[0].why.startswith("1 of three teachers")


def test_the_ladder_is_compared_at_shared_settings_and_says_where_it_is_not(lab):
    for mixer, ppl in (("hedgehog", 31.0), ("ssm", 31.0), ("ssm_conv", 31.0), ("hedgemamba", 30.0)):
        lab.cell(mixer, ppl, split=50, study="mixer", stage2={"lr": 1e-3})
    before = said(lab.verdict("C4"))
    assert lab.verdict("C4").verdict == "reproduced"
    for mixer, ppl in (("ssm", 30.2), ("ssm_conv", 30.2), ("hedgemamba", 29.2)):
        lab.cell(mixer, ppl, split=50, study="mixer", stage2={"lr": 3e-3})
    assert lab.verdict("C4").verdict == "reproduced"
    assert said(lab.verdict("C4"))[0] == before[0]
    lab.cell("gate", 29.0, split=50, study="mixer", stage2={"lr": 5e-3})
    assert "gate 50/50 29 against hedgehog 50/50 31" in said(lab.verdict("C4"))[1]
    assert "each at its own settings: stage2.lr 0.005 / 0.001" in said(lab.verdict("C4"))[1]


def test_one_seed_of_a_variant_displaces_no_cell_of_several(lab, runs):
    lab.teacher(20.0, metrics=runs.tasks(50))
    lab.cell("hedgemamba", 20.4, metrics=runs.tasks(50))
    lab.cell("hedgehog", 21.0, metrics=runs.tasks(49))
    before = {claim: lab.verdict(claim).verdict for claim in ("C1", "C8")}
    lab.cell("hedgemamba", 20.37, seeds=1, study="controls", feature_map={"per_head": True})
    assert {claim: lab.verdict(claim).verdict for claim in before} == before
    assert "its cells were not run" not in said(lab.verdict("C8"))[0]


@pytest.mark.parametrize(("one", "two", "split"), [(0, 1000, "0/100"), (1000, 0, "100/0"), (4, 996, "0.4/99.6"), (4, 99_996, "0.004/99.996"),
                                                   (99_996, 4, "99.996/0.004"), (496, 504, "49.6/50.4")])
def test_next_to_nothing_is_not_nothing(one, two, split):
    assert split_of({"settings.stage1_tokens": one, "settings.stage2_tokens": two}) == split


def test_a_split_with_next_to_no_stage_1_is_light_too(lab, runs):
    for split, ppl in ((10, 30.0), (0, 35.0), (50, 32.0), (100, 50.0)):
        lab.cell("hedgemamba", ppl, split=split)
    assert lab.verdict("C5").verdict == "reproduced"
    for seed in range(3):
        runs.add("split", None, 29.9 + seed / 100, seed=seed, one=4, two=996, ssm=True, conv=True, gate=True)
    assert lab.verdict("C5").verdict == "reproduced"
    assert "0.4/99.6" in said(lab.verdict("C5"))[1]


def test_switches_of_a_mixer_that_is_no_sum_of_parts_make_other_cells(lab, runs):
    lab.cell("hedgemamba", 30.0)
    lab.cell("hedgehog", 33.0)
    for seed, (gate, ppl) in enumerate(((True, 30.0), (False, 40.0))):
        runs.add("controls", None, ppl, seed=seed, mixer="hedgehog_bypass", one=100, two=900, ssm=False, conv=False, gate=gate)
    (line,) = [line for line in said(lab.verdict("C2"))[1].splitlines() if "hedgehog_bypass" in line]
    assert "hedgehog_bypass 10/90 40:" in line


def test_a_student_without_stage_1_is_compared_whatever_its_stage_1_would_have_been(lab):
    lab.teacher()
    lab.cell("hedgemamba", 24.0, stage1={"lr": 0.03})
    lab.cell("hedgemamba", 23.0, stage1={"lr": 0.02}, stage2={"lr_new": 0.01})
    for seed, lr in enumerate((0.01, 0.03)):
        lab.cell("hedgemamba", 26.0 + seed / 100, split=0, seeds=seed + 1, stage1={"lr": lr})
    line = next(line for line in lab.verdict("C5").findings[-1].evidence if "0/100" in line)
    assert "hedgemamba 10/90 24 against hedgemamba 0/100" in line
    assert "own settings" not in line
