"""One cell: what its record holds, what is computed once, what its keys depend on, and what a failure leaves behind."""

import errno
import itertools
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import hm.cell
import hm.checkpoint
from hm.cell import Cell, check
from hm.config import MIXERS, from_dict
from hm.data import DataSpec, TokenDataset, validation_batches
from hm.errors import UserError
from hm.evaluate import perplexity
from hm.feature_maps import HedgehogFeatureMap
from hm.inputs import Inputs
from hm.mixer import KINDS, Mixer
from hm.record import curve
from hm.store import Store
from hm.teacher import fingerprint, load_teacher
from hm.text import spec_fingerprint

STEP = 32  # tokens: two sequences of 16
TWO_STAGE = {"stage1_tokens": 2 * STEP, "stage2_tokens": 3 * STEP}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def documents(start, count):
    words = ["cat", "dog", "owl", "fox", "hen", "sees", "likes", "follows"]
    return [
        f"{n}: " + " ".join(words[(n * 7 + j * j) % 8] for j in range(12)) for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_teacher, byte_tokenizer):
    """A teacher of 257 bytes' vocabulary and two text files."""
    folder = tmp_path_factory.mktemp("cell")
    for name, seed in (("teacher", 0), ("other_teacher", 1)):
        make_teacher("neox", seed=seed, vocab_size=257).save_pretrained(folder / name)
        byte_tokenizer.save_pretrained(folder / name)
    (folder / "train.txt").write_text("\n\n\n".join(documents(0, 60)))
    (folder / "other.txt").write_text("\n\n\n".join(documents(200, 60)))
    (folder / "validation.txt").write_text("\n\n\n".join(documents(100, 10)))
    return folder


def settings_in(files, **changes):
    base = {
        "teacher": str(files / "teacher"), "data": str(files / "train.txt"), "validation": str(files / "validation.txt"),
        "seq_len": 16, "device": "cpu", "stage1.batch_size": 2, "stage2.batch_size": 2, "stage1.warmup": 0.0,
        "eval.sequences": 6, "eval.batch_size": 3, "log_every": 1,
    }  # fmt: skip
    given = {name.replace("__", "."): value for name, value in changes.items()}
    spends = any(name in given for name in ("budget", "stage1_tokens", "stage2_tokens"))
    return from_dict(base | ({} if spends else TWO_STAGE) | given)


@pytest.fixture
def settings(files):
    """settings(**changes): those of a small two-stage cell; a dot in a name is written as two underscores."""
    return lambda **changes: settings_in(files, **changes)


@pytest.fixture
def cell(settings, tmp_path):
    """cell(**changes): that cell in the store tmp_path/runs (runs= names another)."""

    def make(runs="runs", **changes):
        return Cell(settings(**changes), Store(tmp_path / runs, heartbeat=0.2, poll=0.05))

    return make


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    """What that cell gives when nothing happens to it."""
    made = Cell(settings_in(files), Store(tmp_path_factory.mktemp("undisturbed")))
    record = made.run()
    return SimpleNamespace(
        metrics=record["metrics"], artifacts=record["provenance"]["artifacts"], weights=weights(made)
    )


@pytest.fixture
def trained(monkeypatch):
    """The names of the training runs so far; trained.stop_at = (name, step) raises Stopped there."""
    seen = SimpleNamespace(names=[], asked=[], stop_at=None)
    original = hm.cell.train

    def train(objective, batch, steps, stage, run):
        name = re.search("(stage [12]|one step|adapt teacher)$", run.name)[1]
        seen.names.append(name)

        def give(step):
            if seen.stop_at == (name, step):
                raise Stopped
            seen.asked.append((name, step))
            return batch(step)

        return original(objective, give, steps, stage, run)

    monkeypatch.setattr(hm.cell, "train", train)
    return seen


class Stopped(Exception):
    pass


def found(tmp_path, runs="runs"):
    """Records in the store, and finished artifacts as kind/key."""
    root = tmp_path / runs
    finished = {f"{p.parent.parent.name}/{p.parent.name}" for p in root.glob("artifacts/*/*/artifact.json")}
    return sorted(root.glob("*/*/record.json")), {name for name in finished if "/." not in name}


def weights(cell):
    return load_file(cell.store.path("student", cell.student_key) / "model" / "model.safetensors")


# --- the record


def test_a_records_fields_are_those_of_the_contract(cell, files, tmp_path):
    made = cell(study="mixer", row="+ssm+conv+gate", mixer="hedgemamba", seed=3)
    record = made.run()

    (path,), artifacts = found(tmp_path)
    assert record == json.loads(path.read_text())
    assert path.parent.name == f"{record['cell']}-{record['key']}"
    assert {k: record[k] for k in ("schema", "study", "row", "status", "key")} == {
        "schema": 1, "study": "mixer", "row": "+ssm+conv+gate", "status": "done", "key": made.key,
    }  # fmt: skip
    assert record["settings"].items() >= {
        "mixer": "hedgemamba", "recipe": "two_stage", "budget": 5 * STEP, "stage1_tokens": 2 * STEP,
        "stage2_tokens": 3 * STEP, "seed": 3, "ssm": True, "conv": True, "gate": True,
    }.items()  # fmt: skip
    assert record["settings"]["stage2"]["loss"] == "ce"
    for name in ("ppl", "bits_per_byte", "ppl_start"):
        assert math.isfinite(record["metrics"][name]["value"])
        assert record["metrics"][name]["stderr"] > 0
    params = record["params"]
    assert params["total"] == sum(params["by_part"].values()) == sum(t.numel() for t in weights(made).values())
    assert 0 < params["new"] < params["trainable"] == params["total"] - params["by_part"]["embeddings"]
    assert record["tokens"] == {"stage1": 2 * STEP, "stage2": 3 * STEP}
    timing = record["timing"]
    assert timing["tokenise"] >= 0
    for kind, tokens in (("stage1", 2 * STEP), ("student", 3 * STEP)):
        assert timing[f"{kind}_tokens_per_second"] == pytest.approx(tokens / timing[f"{kind}_seconds"])
    origin = record["provenance"]
    assert {"git_commit", "git_dirty", "packages", "host", "device", "command", "started"} <= set(origin)
    assert origin["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert origin["teacher"] == fingerprint(str(files / "teacher"))
    assert origin["data"] == spec_fingerprint(DataSpec(str(files / "train.txt"), str(files / "validation.txt")))
    assert {f"{kind}/{key}" for kind, key in origin["artifacts"].items()} == artifacts
    log = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [
        ("stage1", 0), ("stage1", 1), ("stage2", 0), ("stage2", 1), ("stage2", 2),
    ]  # fmt: skip
    assert origin["processes"] == {"stage1": 1, "student": 1}
    for kind, stage in (("stage1", "stage1"), ("student", "stage2")):
        lines = [line for line in log if line["stage"] == stage]
        for name, column in record["curves"][kind].items():
            assert column == pytest.approx([line[name] for line in lines], rel=1e-4)
    assert list(record["curves"]["stage1"]) == ["step", "tokens", "loss", *(f"layer.{i}" for i in range(len(record["curves"]["stage1"]) - 3))]
    assert list(record["curves"]["student"]) == ["step", "tokens", "loss"]


def test_a_long_log_becomes_a_curve_of_sixty_points_evenly_in_step_with_both_ends(tmp_path):
    lines = [json.dumps({"step": i, "tokens": 8 * i, "lr": 1.0, "loss": 1 / (i + 3)}) for i in range(1000)]
    (tmp_path / "log").write_text("\n".join(lines))
    kept = curve(tmp_path / "log")
    assert (kept["step"][0], kept["step"][-1], len(kept["step"])) == (0, 999, 60)
    assert {b - a for a, b in itertools.pairwise(kept["step"])} <= {16, 17}
    assert kept["tokens"] == [8 * step for step in kept["step"]]
    assert kept["loss"][1] == pytest.approx(1 / 20, rel=1e-4)
    assert max(len(f"{loss:.12g}") for loss in kept["loss"]) <= len("0.0012345")
    assert curve(tmp_path / "none") == {}


def test_the_validation_perplexity_is_that_of_the_saved_student_on_the_validation_text(cell):
    made = cell()
    record = made.run()
    student = hm.cell.load_student(str(made.store.path("student", made.student_key) / "model"))
    held = TokenDataset(made.store.path("tokens", made.tokens_key), "validation")
    own = perplexity(student, validation_batches(held, 16, 6, 6), bytes_per_token=held.text_bytes / len(held))
    for name in ("ppl", "bits_per_byte"):
        assert record["metrics"][name]["value"] == pytest.approx(own[name]["value"], rel=1e-6)


# --- computed once


def test_the_second_run_of_a_cell_does_no_work(cell, trained, monkeypatch, tmp_path, capsys):
    record = cell().run()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    trained.names.clear()
    for name in ("tokenize", "load_teacher", "token_losses"):
        monkeypatch.setattr(hm.cell, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))
    capsys.readouterr()

    assert cell().run() == record
    assert "already done" in capsys.readouterr().err
    assert trained.names == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before


def test_four_mixers_share_one_stage_1_and_all_start_where_hedgehog_starts(cell, trained):
    records = {m: cell(mixer=m).run() for m in ("hedgehog", "ssm", "ssm_conv", "hedgemamba")}
    assert trained.names == ["stage 1"] + 4 * ["stage 2"]
    start = records["hedgehog"]["metrics"]["ppl_start"]["value"]
    for record in records.values():
        assert record["metrics"]["ppl_start"]["value"] == pytest.approx(start, rel=1e-5)
    ends = {record["metrics"]["ppl"]["value"] for record in records.values()}
    assert len(ends) == 4
    assert start not in ends


@pytest.fixture
def cubed(monkeypatch):
    """mixer=cubed: another feature map, which Hedgehog's stage 1 knows nothing of."""

    class Cubed(HedgehogFeatureMap):
        def forward(self, x):
            return super().forward(x) ** 3

    class CubedMixer(Mixer):
        FEATURE_MAP = Cubed

    monkeypatch.setitem(KINDS, "cubed", CubedMixer)
    monkeypatch.setitem(MIXERS, "cubed", {"ssm": True, "conv": True, "gate": False})
    return CubedMixer


def test_a_mixer_with_other_feature_maps_has_a_stage_1_of_its_own(cell, trained, cubed):
    made, hedgehog = cell(**TWO_STAGE, mixer="cubed"), cell(**TWO_STAGE, mixer="hedgehog")
    stage1 = made.fresh_student(made.teacher(), stage1=True).mixers[0]
    assert (type(stage1), stage1.ssm, stage1.conv) == (cubed, None, None)
    made.run()
    hedgehog.run()
    assert trained.names == ["stage 1", "stage 2"] * 2
    learnt, hedgehogs = (load_file(c.store.path("stage1", c.stage1_key) / "feature_maps.safetensors") for c in (made, hedgehog))
    assert learnt.keys() == hedgehogs.keys()
    assert not any(torch.equal(learnt[name], hedgehogs[name]) for name in learnt)


def test_feature_maps_that_a_mixer_makes_behind_stage_1s_back_are_refused(cell, cubed, monkeypatch):
    own = cubed.FEATURE_MAP

    class Hidden(Mixer):
        def __init__(self, spec, layer_idx):
            super().__init__(spec, layer_idx)
            self.phi_q = own(self.shape.num_heads, self.shape.head_dim)

    monkeypatch.setitem(KINDS, "cubed", Hidden)
    with pytest.raises(TypeError, match="Hidden has feature maps of its own: name their class in FEATURE_MAP"):
        cell(**TWO_STAGE, mixer="cubed")


def test_what_a_mixer_refuses_is_refused_before_any_work(settings, monkeypatch):
    class Fixed(Mixer):
        def __init__(self, spec, layer_idx):
            if spec.ssm:
                raise UserError("ssm=true can't be had with mixer=fixed; leave ssm out.")
            super().__init__(spec, layer_idx)

    monkeypatch.setitem(KINDS, "fixed", Fixed)
    monkeypatch.setitem(MIXERS, "fixed", {"ssm": False, "conv": False, "gate": False})
    check(settings(mixer="fixed"))
    shared = Inputs()
    for _ in range(2):
        check(settings(mixer="fixed"), inputs=shared)
    assert len(shared.built) == 1
    with pytest.raises(UserError, match="ssm=true can't be had with mixer=fixed"):
        check(settings(mixer="fixed", ssm=True))


@pytest.mark.parametrize(("parts", "name"), [({}, "hedgehog_bypass"), ({"gate": True}, "hedgehog_bypass_gate"), ({"conv": True, "gate": True}, "hedgehog_bypass_conv_gate")])
def test_a_mixer_of_another_kind_is_named_with_the_parts_that_were_switched(cell, parts, name):
    made = cell(**TWO_STAGE, mixer="hedgehog_bypass", **parts)
    assert made.name.startswith(f"{name}-")
    assert made.parts == name.replace("_conv", "+conv").replace("_gate", "+gate")


def test_a_cell_with_the_same_settings_in_another_study_takes_over_its_results(cell, trained, tmp_path):
    first = cell(study="split", row="10/90", mixer="hedgemamba").run()
    trained.names.clear()
    second = cell(study="main", row="hedgemamba", ssm=True, conv=True, gate=True).run()
    assert trained.names == []
    assert second["metrics"] == first["metrics"]
    assert second["key"] == first["key"]
    assert (second["study"], second["row"]) == ("main", "hedgemamba")
    assert len(found(tmp_path)[0]) == 2


def test_keys_do_not_depend_on_where_how_fast_or_under_which_name_a_cell_runs(cell, files, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(files, moved)
    key = cell().key
    for changes in (
        {"teacher": str(moved / "teacher")},
        {"data": str(moved / "train.txt"), "validation": str(moved / "validation.txt")},
        {"device": "auto" if not torch.cuda.is_available() else "cpu"},
        {"stage1__micro_batch": 1, "stage2__micro_batch": 1},
        {"log_every": 7},
        {"checkpoint_every": 3},
        {"eval__batch_size": 2},
        {"scan": "naive"},
        {"study": "other", "row": "name", "scale": "smollm2"},
        {"runs": "other_runs"},
    ):
        assert cell(**changes).key == key, changes


@pytest.mark.parametrize(
    "change",
    [{"stage2__lr": 5e-4}, {"stage2__lr_new": 1e-2}, {"stage1__lr": 5e-3}, {"stage1__feed": "student"}, {"seed": 1},
     {"seq_len": 8}, {"mixer": "ssm"}, {"gate": False}, {"keep_attention": 2}, {"stage2__loss": "kl"},
     {"stage1_tokens": STEP, "stage2_tokens": 4 * STEP}, {"stage1_tokens": 2 * STEP, "stage2_tokens": 4 * STEP},
     {"precision": "bf16"}, {"feature_map__softmax": "separate"}, {"decay": "channel"}, {"ssm_init": "decay"}, {"stage2__batch_size": 3}, {"recipe": "one_step", "budget": 160}],
    ids=str,
)  # fmt: skip
def test_the_students_key_depends_on_what_determines_it(cell, change):
    assert cell(**change).student_key != cell().student_key


def test_the_key_of_stage_1_depends_on_what_it_computes_and_on_nothing_that_comes_later(cell):
    key = cell().stage1_key
    for changes in (
        {"stage1__lr": 5e-3}, {"stage1__feed": "student"}, {"stage1__batch_size": 1}, {"seed": 1}, {"seq_len": 8},
        {"stage1_tokens": STEP, "stage2_tokens": 4 * STEP}, {"feature_map__softmax": "separate"},
        {"feature_map__per_head": True}, {"precision": "bf16"},
    ):  # fmt: skip
        assert cell(**changes).stage1_key != key, changes
    for changes in (
        {"mixer": "ssm"}, {"gate": False}, {"keep_attention": 2}, {"stage2__lr": 5e-4}, {"stage2__loss": "kl"},
        {"stage1_tokens": 2 * STEP, "stage2_tokens": 9 * STEP}, {"eval__sequences": 2},
    ):  # fmt: skip
        assert cell(**changes).stage1_key == key, changes


def test_keys_depend_on_the_contents_of_text_and_teacher(cell, files):
    for change in ({"data": str(files / "other.txt")}, {"validation": str(files / "other.txt")}):
        assert cell(**change).tokens_key != cell().tokens_key
        assert cell(**change).student_key != cell().student_key
    other = cell(teacher=str(files / "other_teacher"))
    assert other.tokens_key == cell().tokens_key, "both have the same tokenizer"
    assert other.stage1_key != cell().stage1_key
    assert other.student_key != cell().student_key


def test_more_validation_sequences_are_evaluated_without_training_again(cell, trained, capsys):
    first = cell().run()
    trained.names.clear()
    assert "there already" not in capsys.readouterr().err
    second = cell(eval__sequences=3).run()
    assert trained.names == []
    assert "there already: tokens, stage1, student\n" in capsys.readouterr().err
    assert second["key"] != first["key"]
    assert second["metrics"]["ppl"] != first["metrics"]["ppl"]


# --- splits and recipes


def test_with_all_tokens_in_stage_1_the_student_is_evaluated_as_it_was_converted(cell, trained):
    made = cell(budget=2 * STEP, stage1_tokens="100%")
    record = made.run()
    assert trained.names == ["stage 1"]
    learnt = load_file(made.store.path("stage1", made.stage1_key) / "feature_maps.safetensors")
    untrained = cell(budget=0)
    untrained.run()
    assert learnt
    for name, tensor in learnt.items():
        assert torch.equal(weights(made)[name], tensor)
        assert not torch.equal(weights(untrained)[name], tensor)
    assert record["tokens"] == {"stage1": 2 * STEP, "stage2": 0}
    assert record["metrics"]["ppl"]["value"] == pytest.approx(record["metrics"]["ppl_start"]["value"], rel=1e-6)


def test_with_no_tokens_in_stage_1_stage_2_starts_from_untrained_feature_maps(cell, trained):
    record = cell(budget=2 * STEP, stage1_tokens=0).run()
    assert trained.names == ["stage 2"]
    assert record["tokens"] == {"stage1": 0, "stage2": 2 * STEP}
    assert "stage1" not in record["provenance"]["artifacts"]


def test_with_no_budget_at_all_the_student_is_only_converted(cell, trained):
    record = cell(budget=0).run()
    assert trained.names == []
    assert record["tokens"] == {"stage1": 0, "stage2": 0}
    assert record["metrics"]["ppl"]["value"] == pytest.approx(record["metrics"]["ppl_start"]["value"], rel=1e-6)


def test_stage_2_goes_on_in_the_text_where_stage_1_of_its_budget_ends(cell):
    assert cell().first_block == 2 * 2
    assert cell(recipe="one_step", budget=5 * STEP).first_block == 0


def test_the_untouched_teacher_is_evaluated_and_nothing_is_trained(cell, trained, files):
    made = cell(recipe="teacher", seed=5)
    record = made.run()
    held = TokenDataset(made.store.path("tokens", made.tokens_key), "validation")
    own = perplexity(load_teacher(str(files / "teacher")), validation_batches(held, 16, 6, 6))
    assert trained.names == []
    assert record["metrics"]["ppl"]["value"] == pytest.approx(own["ppl"]["value"], rel=1e-6)
    assert "ppl_start" not in record["metrics"]
    assert record["params"]["new"] == record["params"]["trainable"] == 0
    assert record["tokens"] == {"stage1": 0, "stage2": 0}
    assert record["key"] == cell(recipe="teacher", seed=6, mixer="ssm").key, "nothing about it is drawn"


def test_the_adapted_teacher_sees_the_text_that_stage_2_sees(cell):
    student, adapted = cell(stage1_tokens="50%"), cell(stage1_tokens="50%", recipe="adapted_teacher")
    assert adapted.first_block == student.first_block > 0
    assert (adapted.stage1_steps, adapted.stage2_steps) == (0, student.stage2_steps)


def test_the_adapted_teacher_spends_what_stage_2_would_and_keeps_its_architecture(cell, trained, files):
    made = cell(recipe="adapted_teacher")
    record = made.run()
    adapted, teacher = weights(made), load_file(files / "teacher" / "model.safetensors")
    changed = {name for name, tensor in adapted.items() if not torch.equal(tensor, teacher[name])}
    assert trained.names == ["adapt teacher"]
    assert record["tokens"] == {"stage1": 0, "stage2": 3 * STEP}
    assert adapted.keys() == teacher.keys()
    assert changed == set(teacher) - {"gpt_neox.embed_in.weight", "embed_out.weight"}
    assert record["params"]["new"] == 0
    assert record["params"]["trainable"] == record["params"]["total"] - record["params"]["by_part"]["embeddings"]


def test_one_step_trains_a_plain_mamba_on_the_whole_budget(cell, trained):
    record = cell(recipe="one_step", budget=3 * STEP).run()
    assert trained.names == ["one step"]
    assert record["tokens"] == {"stage1": 0, "stage2": 3 * STEP}
    assert record["settings"]["mixer"] == "mamba"
    assert record["cell"] == "one_step-s0"


def test_a_hybrid_keeps_attention_in_the_chosen_layers_and_shares_stage_1_with_the_full_student(cell, trained):
    full = cell().run()
    hybrid = cell(keep_attention=2).run()
    assert trained.names == ["stage 1", "stage 2", "stage 2"]
    assert 0 < hybrid["params"]["new"] == full["params"]["new"] / 2
    assert hybrid["params"]["by_part"]["attention"] > 0
    assert hybrid["cell"] == "hedgemamba-40-60-hybrid-s0"


def test_each_loss_of_stage_2_gives_a_student_of_its_own(cell):
    ends = {loss: cell(stage2__loss=loss, mixer="ssm").run()["metrics"]["ppl"]["value"] for loss in ("ce", "kl", "ce+kl")}
    assert len(set(ends.values())) == 3


# --- again, and after a stop


def test_force_runs_a_cell_again_beside_the_old_run(cell, trained, tmp_path):
    record = cell().run()
    (old,), _ = found(tmp_path)
    text = old.read_text()
    trained.names.clear()
    again = cell(force=True).run()
    assert trained.names == ["stage 2"], "what it shares with other cells stays"
    assert again["metrics"] == record["metrics"]
    records, _ = found(tmp_path)
    assert len(records) == 2
    assert old in records
    assert old.read_text() == text


def test_force_on_a_cell_that_never_ran_makes_one_run(cell, tmp_path):
    cell(force=True, budget=STEP, stage1_tokens=0).run()
    ((path,), _) = found(tmp_path)
    assert not path.parent.name.endswith(".2")


@pytest.mark.parametrize("stop", [("stage 1", 1), ("stage 2", 2)], ids=["stage 1", "stage 2"])
def test_a_cell_that_was_stopped_and_run_again_equals_one_that_never_was(cell, undisturbed, trained, tmp_path, stop):
    trained.stop_at = stop
    with pytest.raises(Stopped):
        cell(checkpoint_every=1).run()
    records, artifacts = found(tmp_path)
    assert records == []
    assert not any(name.startswith(("student/", "eval/")) for name in artifacts)
    trained.stop_at = None
    trained.asked.clear()
    resumed = cell()
    record = resumed.run()

    name, first = stop
    asked = [step for n, step in trained.asked if n == name]
    assert asked == list(range(first, {"stage 1": 2, "stage 2": 3}[name]))
    own = weights(resumed)
    assert own.keys() == undisturbed.weights.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in undisturbed.weights.items())
    assert record["metrics"] == undisturbed.metrics
    assert record["provenance"]["artifacts"] == undisturbed.artifacts


def test_a_checkpoint_from_other_settings_is_refused(cell, trained, tmp_path):
    trained.stop_at = ("stage 2", 2)
    one, other = cell(checkpoint_every=1), cell(stage2__lr=5e-4)
    with pytest.raises(Stopped):
        one.run()
    trained.stop_at = None
    (work,) = (tmp_path / "runs/artifacts/student").glob(f".{one.student_key}.work-*")
    work.rename(work.with_name(work.name.replace(one.student_key, other.student_key)))
    with pytest.raises(UserError, match=r"checkpoint .*step-000002 was made with other settings.*delete"):
        other.run()
    assert found(tmp_path)[0] == []


def test_a_loss_that_is_not_finite_ends_the_cell_without_a_student(cell, tmp_path):
    with pytest.raises(UserError, match=r"stage 2: .*not finite at step 1 .*lower stage2.lr \(now 1e\+30\)"):
        cell(stage2__lr=1e30, stage2__clip=0.0).run()
    records, artifacts = found(tmp_path)
    assert records == []
    assert {name.split("/")[0] for name in artifacts} == {"tokens", "stage1"}


@pytest.mark.parametrize(("rate", "why"), [(1e30, "is nan"), (300.0, "range error")])
def test_a_student_that_the_last_step_spoilt_has_no_record(cell, tmp_path, rate, why):
    with pytest.raises(UserError, match=rf"no perplexity can be given \(.*{why}\); lower stage2.lr \(now {rate:g}".replace("+", r"\+")):
        cell(budget=STEP, stage1_tokens=0, stage2__lr=rate).run()
    assert found(tmp_path)[0] == []


# --- what is damaged on disk


def test_validation_text_that_is_too_short_is_refused_before_anything_is_trained(cell, trained, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UserError, match="less than one block of seq_len"):
        cell(validation=str(tmp_path / "short.txt")).run()
    assert trained.names == []


def test_text_may_stand_under_another_key(cell, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"content": f"{i} " + "word " * 100}) + "\n" for i in range(40)))
    made = cell(data=str(text), validation=None, text_key="content", validation_fraction=0.2)
    assert TokenDataset(made.tokens(), "train").num_documents > 0
    with pytest.raises(UserError, match="text_key="):
        cell(data=str(text), validation=None).tokens()


def test_a_hybrid_is_called_one(cell):
    assert cell(recipe="one_step", stage1_tokens=None, keep_attention=2).name == "one_step-hybrid-s0"
    assert cell(row="mine", keep_attention=2).name == "mine-hybrid-s0"
    assert cell(decay="channel").name == cell().name.replace("hedgemamba", "hedgemamba-channel")


def test_force_does_not_go_on_from_an_interrupted_run(cell, trained):
    trained.stop_at = ("stage 2", 2)
    made = cell(checkpoint_every=1)
    with pytest.raises(Stopped):
        made.run()
    trained.stop_at = None
    assert list(made.store.path("student", made.student_key).parent.glob(".*work*"))
    forced = cell(checkpoint_every=1, force=True)
    forced.forget()
    assert not list(forced.store.path("student", forced.student_key).parent.glob(".*work*"))


def test_a_truncated_token_shard_is_named_and_not_trained_on(cell, trained):
    made = cell()
    shard = made.tokens() / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(UserError, match=rf"{re.escape(str(shard))} has \d+ bytes, expected \d+: delete"):
        cell().run()
    assert trained.names == []


@pytest.mark.parametrize(
    ("kind", "name"), [("stage1", "feature_maps.safetensors"), ("student", "model/model.safetensors")]
)
def test_a_damaged_artifact_is_named_with_the_remedy(cell, tmp_path, kind, name):
    made = cell()
    made.run()
    for path in (made.store.path("eval", made.key), tmp_path / "runs" / "default"):
        shutil.rmtree(path)
    key = dict(made.training_steps())[kind]
    file = made.store.path(kind, key) / name
    os.truncate(file, 100)
    with pytest.raises(UserError, match=f"{re.escape(str(file))} has 100 bytes.*delete .*{key} and run"):
        cell().run()
    shutil.rmtree(made.store.path(kind, key))
    assert cell().run()["status"] == "done"


def test_a_damaged_record_is_named_with_the_remedy(cell, tmp_path):
    cell(recipe="teacher").run()
    (path,), _ = found(tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=re.escape(f"{path} can't be read")):
        cell(recipe="teacher").run()


# --- a full disk


def run_until_full(cell, undisturbed, tmp_path, monkeypatch, place, broken):
    """A cell that meets a full disk, and then runs with space again."""
    with monkeypatch.context() as patch:
        patch.setattr(place, broken)
        with pytest.raises(UserError, match=r"can't be written .*free space"):
            cell(checkpoint_every=1).run()
    records, artifacts = found(tmp_path)
    assert records == []
    store = Store(tmp_path / "runs")
    for name in artifacts:
        store.verify(*name.split("/"))
    again = cell()
    assert again.run()["metrics"] == undisturbed.metrics
    own = weights(again)
    assert all(torch.equal(own[name], tensor) for name, tensor in undisturbed.weights.items())


@pytest.mark.parametrize("after", [1, 4, 9, 16, 25, 36, 49])
def test_a_disk_that_is_full_at_any_time_leaves_nothing_that_is_taken_for_whole(cell, undisturbed, tmp_path, monkeypatch, after):
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) > after:
            raise FULL
        real(fd)

    run_until_full(cell, undisturbed, tmp_path, monkeypatch, "os.fsync", fsync)
    assert len(calls) > after


@pytest.mark.parametrize(
    "place", ["hm.cell.save_file", "hm.checkpoint.save_file", "transformers.modeling_utils.safe_save_file"]
)
def test_a_disk_that_is_full_while_weights_are_saved_is_a_user_error(cell, undisturbed, tmp_path, monkeypatch, place):
    def full(tensors, path, *args, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run_until_full(cell, undisturbed, tmp_path, monkeypatch, place, full)


# --- what is refused before work begins


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": 100, "stage1_tokens": 64, "stage2_tokens": 64}, r"budget=100, .* don't add up .*give two of the three"),
        ({"budget": 64, "stage1_tokens": 96}, r"stage1_tokens=96 is more than the budget.*raise budget="),
        ({"stage1_tokens": 5}, r"stage1_tokens=5 is less than one step"),
        ({"seq_len": 300, "budget": 0}, r"seq_len=300 is longer than the teacher .*lower it to 256"),
        ({"teacher": "gpt2_folder"}, r"teacher='\S*gpt2_folder': the architecture 'gpt2' .*choose another teacher \(model types with an adapter: gpt_neox"),
        ({"teacher": "no/such/folder/here"}, r"teacher='no/such/folder/here'"),
        ({"scan": "ssd"}, r"scan=ssd needs a CUDA device"),
        ({"scan": "selective_scan"}, r"scan=selective_scan needs a CUDA device"),
        ({"device": "cuda"}, r"device=cuda, but .*use device=cpu"),
        ({"keep_attention": 7}, r"keep_attention=7 names a layer"),
        ({"keep_attention": 1}, r"keep_attention=1 keeps all 2 layers"),
        ({"mixer": "hedgehogg"}, r"mixer=hedgehogg is not known; did you mean mixer=hedgehog"),
        ({"data": "missing.txt"}, r"data=missing.txt is no file or folder here"),
        ({"validation": "missing.txt"}, r"validation=missing.txt is no file or folder here"),
        ({"stage2__micro_batch": 3}, r"stage2.micro_batch=3 must divide"),
        ({"recipe": "one_step", "stage1_tokens": 64}, r"stage1_tokens=64 does not go with recipe=one_step"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_before_anything_is_written(settings, tmp_path, monkeypatch, changes, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "gpt2_folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    before = sorted(tmp_path.rglob("*"))
    changes = changes | ({"teacher": str(folder)} if changes.get("teacher") == folder.name else {})
    with pytest.raises(UserError, match=sentence):
        check(settings(**changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_name_is_answered_with_the_nearest(settings):
    with pytest.raises(UserError, match=r"no setting 'stage2.lrr'; did you mean stage2.lr\?"):
        settings(stage2__lrr=1.0)


def test_a_store_that_cannot_be_written_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`runs` .*can't be written .*choose a folder"):
        Cell(settings(), Store(tmp_path / "file" / "runs"))


# --- unusable text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"text.txt holds no text"),
        (bytes(range(256)) * 20, r"text.txt .*(binary|UTF-8)"),
        (b"too short.\n", r"the train split has 11 tokens, 0 blocks of seq_len=16.*use more text"),
    ],
    ids=["empty", "binary", "short"],
)
def test_text_that_cannot_be_trained_on_ends_in_one_sentence_and_no_record(cell, tmp_path, content, sentence):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        cell(data=str(tmp_path / "text.txt")).run()
    assert found(tmp_path)[0] == []


def test_validation_text_shorter_than_a_sequence_ends_in_one_sentence_and_no_record(cell, tmp_path):
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(UserError, match=r"^the validation split has 6 tokens, less than one block"):
        cell(validation=str(tmp_path / "text.txt"), recipe="teacher").run()
    assert found(tmp_path)[0] == []


def test_a_tokenizer_with_more_entries_than_the_teachers_embedding_is_refused(
    cell, tmp_path, make_teacher, byte_tokenizer, trained
):
    folder = tmp_path / "small_teacher"
    make_teacher("neox", vocab_size=100).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"the tokenizer has ids up to 256 and the teacher's embedding only 100 rows"):
        cell(teacher=str(folder)).run()
    assert trained.names == []
    assert found(tmp_path) == ([], set())


def test_stage_1_of_the_whole_mixer_is_an_artifact_of_its_own_that_stage_2_starts_from(cell):
    whole = {"stage1__train": "mixer", "stage1__loss": "mse", "stage1__lr": 1e-3, "stage1__lr_new": 1e-2}
    made = cell(**TWO_STAGE, **whole)
    assert made.stage1_key != cell(**TWO_STAGE, **whole, gate=False).stage1_key  # another mixer, another stage 1
    assert cell(**TWO_STAGE).stage1_key == cell(**TWO_STAGE, gate=False).stage1_key  # feature maps are shared
    record = made.run()
    learnt = load_file(made.store.path("stage1", made.stage1_key) / "mixers.safetensors")
    assert {n.split(".")[-2] for n in learnt} >= {"qkv_proj", "o_proj", "phi_q", "phi_k", "proj", "up", "down"}
    started = made.converted(made.teacher()).state_dict()
    assert all(torch.equal(started[n], t) for n, t in learnt.items())
    assert record["metrics"]["ppl_start"] != cell(**TWO_STAGE).run()["metrics"]["ppl_start"]
