"""The plan of a sweep: shared steps once, what is done, what it costs, and how fast it is made."""

import json
import math
import time

import pytest
import torch

from hm.cell import Cell
from hm.config import MIXERS, from_dict
from hm.convert import convert, report
from hm.errors import UserError
from hm.inputs import Inputs
from hm.store import Store
from slurm.estimate import Estimator
from slurm.offline import OfflineInputs
from slurm.plan import describe, make_plan


@pytest.fixture
def cell(small, tmp_path):
    """cell(**settings): a small cell in tmp_path/runs."""
    inputs = Inputs()

    def make(**changes):
        values = dict(a.split("=", 1) for a in small) | {"budget": "64", "stage1_tokens": "32"} | changes
        return Cell(from_dict(values), Store(tmp_path / "runs", poll=0.05), inputs=inputs)

    return make


def plan_of(*cells, **options):
    return make_plan([(f"default/{i} {c.name}", c, {"gpus": 0}) for i, c in enumerate(cells)], **options)


def kinds(plan):
    return [step.kind for step in plan.steps.values()]


def test_four_mixers_share_tokens_and_one_stage_1_and_each_step_follows_the_one_it_needs(cell):
    plan = plan_of(*(cell(mixer=m) for m in ("hedgehog", "ssm", "ssm_conv", "hedgemamba")))
    assert kinds(plan) == ["tokens", "stage1", *["student"] * 4, *["eval"] * 4]
    seen = set()
    for step in plan.steps.values():
        assert step.parent is None or step.parent in seen
        seen.add(step.id)
    assert [s.kind for s in plan.chain(next(iter(plan.cells)))] == ["eval", "student", "stage1", "tokens"]
    shown = describe(plan)
    assert "4 cells, 10 steps: 0 done, 10 to do; 2 shared, which saves 96 training tokens" in shown
    assert shown.count("stage 1") == 1


def test_cells_without_stage_1_and_the_teacher_hang_on_the_tokens(cell):
    plan = plan_of(cell(stage1_tokens="0"), cell(recipe="one_step", stage1_tokens="0"), cell(recipe="teacher"))
    parents = [(s.kind, s.parent and s.parent.partition("/")[0]) for s in plan.steps.values()]
    assert parents == [("tokens", None), ("student", "tokens"), ("student", "tokens"), ("eval", "student"), ("eval", "student"), ("eval", "tokens")]


def test_what_is_in_the_store_is_planned_as_done(cell):
    first, second = cell(mixer="hedgehog"), cell(mixer="ssm")
    first.run()
    plan = plan_of(first, second)
    assert [(s.kind, s.done) for s in plan.steps.values()] == [
        ("tokens", True), ("stage1", True), ("student", True), ("student", False), ("eval", True), ("eval", False)]  # fmt: skip
    assert [s.kind for s in plan.to_do()] == ["student", "eval"]


def test_a_planned_steps_settings_give_its_key_again(cell, tmp_path):
    cells = [cell(), cell(recipe="one_step", stage1_tokens="0"), cell(recipe="teacher"), cell(recipe="adapted_teacher"),
             cell(keep_attention="[1]", mixer="gate", ssm="true")]  # fmt: skip
    plan = plan_of(*cells)
    for step in plan.steps.values():
        again = Cell(from_dict(json.loads(json.dumps(step.settings))), Store(tmp_path / "elsewhere"))
        assert again.step_keys()[step.kind] == step.key


def test_a_thousand_cells_are_planned_and_described_in_under_five_seconds(small, tmp_path):
    inputs, store = Inputs(), Store(tmp_path / "runs")
    base = dict(a.split("=", 1) for a in small) | {"budget": "640"}
    before = time.process_time()
    cells = []
    for seed in range(100):
        for mixer in ("hedgehog", "hedgemamba"):
            for tokens in (0, 64, 128, 256, 320):
                cells.append(Cell(from_dict(base | {"seed": seed, "mixer": mixer, "stage1_tokens": tokens}), store, inputs=inputs))
    plan = make_plan((f"default/{i}", c, {"gpus": 0}) for i, c in enumerate(cells))
    assert describe(plan, 40).count("\n") < 60
    assert time.process_time() - before < 5
    assert len(plan.cells) == 1000
    assert kinds(plan).count("stage1") == 400


# --- what it costs


@pytest.mark.parametrize("kind", ["neox", "llama"])
@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"mamba"}))
def test_sizes_counted_without_weights_are_those_of_the_converted_student(make_teacher, byte_tokenizer, small, tmp_path, kind, mixer):
    teacher = make_teacher(kind, vocab_size=257)
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    values = dict(a.split("=", 1) for a in small) | {"budget": "64", "stage1_tokens": "32", "keep_attention": "[1]"}
    sizes = Estimator().sizes(Cell(from_dict(values | {"teacher": str(tmp_path / "teacher"), "mixer": mixer}), Store(tmp_path / "runs")))
    counts = report(convert(teacher, mixer, keep_attention=[1])).counts
    assert sizes.student == counts["total"]
    assert sizes.embeddings == counts["by_part"]["embeddings"]
    assert sizes.stage1 == counts["by_part"]["feature map"]


def test_hours_come_from_the_nearest_measured_row_where_there_is_one(cell, tmp_path):
    one = cell(budget="6400", stage1_tokens="3200")
    size = Estimator().sizes(one)
    rows = [{"what": "stage2", "parameters": 2 * size.student, "tokens_per_second": 100.0, "device_type": "cpu"},
            {"what": "stage2", "parameters": 9 * size.student, "tokens_per_second": 1e9, "device_type": "cpu"},
            {"what": "stage2", "parameters": size.student, "tokens_per_second": 1e9, "device_type": "cpu", "gpus": 2},
            {"what": "stage1", "parameters": size.teacher, "tokens_per_second": 1e9, "device_type": "cuda"}]  # fmt: skip
    (tmp_path / "training.json").write_text(json.dumps({"device": "a machine", "rows": rows}))
    estimator = Estimator(tmp_path)
    assert estimator.hours(one, "student") == pytest.approx(3200 / 200 / 3600)
    assert estimator.hours(one, "stage1") == Estimator().hours(one, "stage1"), "a GPU's row says nothing about a CPU"
    plan = plan_of(one, estimator=estimator)
    assert "100 tokens/s measured in stage2" in describe(plan)
    assert "operations per token at 50 GFLOP/s" in describe(plan)
    (tmp_path / "training.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"training\.json can't be read as benchmark rows"):
        Estimator(tmp_path).hours(one, "student")


@pytest.mark.parametrize(("name", "millions"), [("pythia-160m", 162.3), ("pythia-410m", 405.3), ("pythia-1b", 1011.8)])
def test_a_teacher_that_no_hub_gives_is_planned_by_its_sizes_and_named_as_unresolved(monkeypatch, tmp_path, name, millions):
    def unreachable(name):
        raise UserError(f"teacher={name!r}: the hub did not give it.")

    inputs = OfflineInputs()
    inputs._found_config = unreachable
    values = {"teacher": f"EleutherAI/{name}", "data": "hf:openwebtext", "budget": "10B", "seq_len": 1024, "stage1.batch_size": 48,
              "stage2.batch_size": 48}  # fmt: skip
    one = Cell(from_dict(values), Store(tmp_path / "runs"), device=torch.device("cuda"), inputs=inputs)
    plan = make_plan([("default/one", one, {"gpus": 8})])
    shown = describe(plan)
    assert "not resolved: teacher='EleutherAI/" in shown
    assert "10B training tokens" in shown
    assert "GPU time" in shown
    assert Estimator().sizes(one).teacher == pytest.approx(millions * 1e6, rel=1e-3)
    with pytest.raises(UserError, match="the hub did not give it"):
        inputs.config("someone/else")


def test_text_of_unknown_size_is_said_to_be_unknown(cell):
    one = cell(data="hf:someone/text")
    assert math.isnan(Estimator().kept_bytes(one, "tokens"))
    assert "to keep and a text of unknown size" in describe(plan_of(one))
