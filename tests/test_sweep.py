"""The one entry: what a command line runs, prints and leaves on disk, and how a wrong one is answered."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from hm.config import names

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "sweep.py"
STUDIES = sorted(p.stem for p in (ROOT / "sweeps/study").glob("*.yaml"))
SCALES = sorted(p.stem for p in (ROOT / "sweeps/scale").glob("*.yaml"))
MINE = """\
# @package _global_
study: mine
row: teacher
rows:
  teacher: {recipe: teacher}
  slow: {mixer: ssm, stage2.lr: 1e-4}
hydra:
  sweeper:
    params:
      row: ${row_names:${rows}}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_teacher, byte_tokenizer):
    """The arguments that make a cell take a second: a small teacher of bytes, and small texts."""
    folder = tmp_path_factory.mktemp("small")
    make_teacher("neox", vocab_size=257).save_pretrained(folder / "teacher")
    byte_tokenizer.save_pretrained(folder / "teacher")
    for name, start, count in (("train", 0, 80), ("validation", 100, 10)):
        lines = [f"{n}: the {['cat', 'dog', 'owl', 'fox', 'hen'][n % 5]} sees {n * n} birds." for n in range(start, start + count)]
        (folder / f"{name}.txt").write_text("\n\n\n".join(lines))
    return [
        f"teacher={folder}/teacher", f"data={folder}/train.txt", f"validation={folder}/validation.txt", "seq_len=16",
        "stage1.batch_size=1", "stage2.batch_size=1", "eval.sequences=4", "eval.batch_size=4", "device=cpu",
    ]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and the checkout importable as it is for `python sweep.py`."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("HM_RUNS", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for name in ("TRITON_CACHE_AUTOTUNING", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HM_CACHE"):
        monkeypatch.setenv(name, "")  # so that what sweep.py sets is put back
        monkeypatch.delenv(name)
    return folder


@pytest.fixture
def sweep(here, tmp_path, monkeypatch, capfd):
    """sweep("-m", "seed=0,1"): the same as `python sweep.py -m seed=0,1 runs=...`, within this process.

    Gives status, out, err, and lines: those of err that begin with "error:".
    """

    def run(*arguments, runs=tmp_path / "runs"):
        given = [*arguments, f"runs={runs}"] if runs else list(arguments)
        if "-m" in arguments and not any(a.startswith("hydra/launcher=") for a in arguments):
            given.append("hydra.launcher.jobs=0")  # in this process: others would take seconds to start
        monkeypatch.setattr(sys, "argv", [str(SWEEP), *given])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(SWEEP), run_name="__main__")
        except SystemExit as left:
            status = left.code or 0
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert list(here.iterdir()) == [], "nothing is written into the current folder"
        return SimpleNamespace(status=status, out=out, err=err, lines=lines)

    return run


def records(folder):
    found = {}
    for path in sorted(folder.glob("*/*/record.json")):
        found[path.parent.name.rpartition("-")[0]] = json.loads(path.read_text())
    return found


def untouched(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "multirun.yaml"}


def nothing_computed(folder):
    return not list(folder.glob("*/*/record.json")) and not list(folder.glob("artifacts/**/*"))


# --- as it is typed


def test_one_cell_from_any_folder_says_where_it_stands_and_what_it_gave(small, tmp_path):
    command = [sys.executable, str(SWEEP), *small, "budget=64", "stage1_tokens=50%"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HM_RUNS": str(tmp_path / "store")}
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^default/hedgemamba-50-50-s0: validation perplexity [0-9.]+ ± [0-9.]+$", done.stdout, re.M)
    for shown in ("32 + 32 tokens, seed 0", "2 of 2 layers converted"):
        assert shown in done.stderr
    (record,) = records(tmp_path / "store").values()
    assert record["tokens"] == {"stage1": 32, "stage2": 32}
    assert record["provenance"]["command"].startswith("python sweep.py teacher=")
    assert list(here.iterdir()) == []


def test_a_cell_that_fails_does_not_stop_the_others_and_is_named_last(small, tmp_path):
    command = [sys.executable, str(SWEEP), "-m", *small, "budget=64", "stage1_tokens=0", "stage2.clip=0",
               "stage2.lr=1e30,1e-3", "hydra.launcher.jobs=1", f"runs={tmp_path / 'runs'}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    made = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("default/*/record.json")]
    assert sorted(r["settings"]["stage2"]["lr"] for r in made) == [1e-3]
    *_, failed, last = done.stderr.splitlines()
    assert re.match(r"failed: default/.*stage2\.lr=1e\+?30.*: .*not finite at step 1 .*lower stage2\.lr \(now 1e\+30\)", failed)
    assert last.startswith("1 of 2 cells failed")
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == []


# --- a sweep, a study


def test_a_sweep_runs_every_combination_prints_the_table_and_does_nothing_the_second_time(sweep, small, tmp_path):
    command = ("-m", *small, "budget=64", "stage1_tokens=0,16,50%")
    first = sweep(*command)
    assert first.status == 0, first.err
    made = records(tmp_path / "runs")
    assert sorted((r["tokens"]["stage1"], r["tokens"]["stage2"]) for r in made.values()) == [(0, 64), (16, 48), (32, 32)]
    table = first.out[first.out.index("###") :]
    assert len([line for line in table.splitlines() if line.startswith("| ")]) >= 4
    for record in made.values():
        assert f"{record['metrics']['ppl']['value']:.2f}" in first.out

    before = untouched(tmp_path / "runs")
    again = sweep(*command)
    assert again.status == 0
    assert again.err.count("already done") == 3
    assert untouched(tmp_path / "runs") == before
    assert again.out[again.out.index("###") :] == table


def test_a_study_fills_the_rows_of_its_table_and_cells_share_what_they_can(sweep, small, tmp_path):
    found = sweep("-m", "+study=mixer", *small, "budget=64")
    assert found.status == 0, found.err
    made = records(tmp_path / "runs")
    rows = ["teacher", "hedgehog", "+ssm", "+ssm+conv", "+ssm+conv+gate"]
    assert {r["row"] for r in made.values()} == set(rows)
    assert {r["study"] for r in made.values()} == {"mixer"}
    assert len({r["provenance"]["artifacts"].get("stage1") for r in made.values()} - {None}) == 1
    table = found.out[found.out.index("### ") :]
    for row in rows:
        line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
        (record,) = [r for r in made.values() if r["row"] == row]
        assert f" {record['metrics']['ppl']['value']:.2f} " in line
    assert "python sweep.py -m +study=mixer" in table


def test_one_row_of_a_study_is_one_cell(sweep, small, tmp_path):
    found = sweep("+study=split", "row=0/100", *small, "budget=32")
    assert found.status == 0, found.err
    (record,) = records(tmp_path / "runs").values()
    assert (record["study"], record["row"], record["tokens"]["stage1"]) == ("split", "0/100", 0)


def test_cells_of_one_export_are_refused_before_the_first_is_trained(sweep, small, tmp_path):
    found = sweep("-m", *small, "budget=64", "stage1_tokens=32", "seed=0,1", f"export={tmp_path / 'student'}")
    assert found.status == 2
    assert "student is one folder for 2 cells" in found.err
    assert "leave it out" in found.err
    assert not records(tmp_path / "runs")


def test_a_study_may_lie_outside_the_repository(sweep, small, tmp_path):
    folder = tmp_path / "own studies"
    (folder / "study").mkdir(parents=True)
    (folder / "study" / "mine.yaml").write_text(MINE)
    found = sweep("--config-dir", str(folder), "-m", "+study=mine", *small, "budget=32", "stage1_tokens=0")
    assert found.status == 0, found.err
    made = records(tmp_path / "runs")
    assert {(r["study"], r["row"]) for r in made.values()} == {("mine", "teacher"), ("mine", "slow")}
    (slow,) = [r for r in made.values() if r["row"] == "slow"]
    assert (slow["settings"]["mixer"], slow["settings"]["stage2"]["lr"]) == ("ssm", 1e-4)

    near = sweep("-cd", str(folder), "-m", "+study=mien", *small)
    assert (near.status, len(near.lines)) == (2, 1)
    assert "did you mean +study=mine?" in near.lines[0]
    (folder / "study" / "mine.yaml").write_text(MINE.replace("stage2.lr", "stage2.lrr"))
    wrong = sweep(f"--config-dir={folder}", "-m", "+study=mine", *small, runs=tmp_path / "other")
    assert (wrong.status, len(wrong.lines)) == (2, 1)
    assert "'stage2.lrr'; did you mean stage2.lr?" in wrong.lines[0]
    assert nothing_computed(tmp_path / "other")


def test_a_plan_shows_the_graph_and_computes_nothing(sweep, small, tmp_path):
    found = sweep("-m", "+study=mixer", *small, "budget=64", "plan=true")
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("tokens")] == ["tokens"]
    assert len([line for line in lines if line.startswith("  stage 1 ")]) == 1
    assert len([line for line in lines if line.startswith("    student ")]) == 4
    assert "5 cells, 11 steps: 0 done, 11 to do; 2 shared, which saves 96 training tokens" in found.out
    assert nothing_computed(tmp_path / "runs")
    one = sweep(*small, "budget=64", "stage1_tokens=0", "plan=true")
    assert "1 cells, 3 steps: 0 done, 3 to do" in one.out
    assert nothing_computed(tmp_path / "runs")


def test_settings_composed_once_for_many_cells_are_those_that_hydra_composes_for_each(here):
    import sweep as entry

    composer_of = Plugins.instance().class_name_to_class["hydra_plugins.hedgemamba.LocalLauncher"].launch.__globals__["Composer"]
    cells = [
        ["seed=3", "stage2.lr=1e-3", "stage1_tokens=10%"],
        ["scale=smollm2", "budget=2M", "stage1.micro_batch=null", "data='a b.txt'"],
        ["+study=mixer", "row='+ssm+conv'", "eval.sequences=7", "keep_attention=[1,3]"],
        ["+study=split", "scale=pythia1b", "row='0/100'", "runs=${oc.env:HOME}/x", "compile=true"],
    ]
    with initialize_config_dir(str(ROOT / "sweeps"), version_base="1.3"):
        config = compose("config", [], return_hydra_config=True)
        composer = composer_of(GlobalHydra.instance().config_loader(), config)
        for overrides in cells:
            whole = compose("config", overrides, return_hydra_config=True)
            OmegaConf.set_readonly(whole.hydra, False)
            assert composer.plain(overrides) == entry.plain_of(whole)


STYLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "slurm/README.md").read_text(), re.S)


@pytest.mark.parametrize("style", STYLES, ids=[style.splitlines()[0][2:22] for style in STYLES])
def test_each_style_of_cluster_in_the_readme_is_a_launcher_that_plans(sweep, small, tmp_path, style):
    folder = tmp_path / "mine" / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "here.yaml").write_text(style)
    found = sweep("--config-dir", str(tmp_path / "mine"), "-m", *small, "budget=64", "stage1_tokens=0", "hydra/launcher=here", "plan=true")
    assert found.status == 0, found.err
    assert "1 cells, 3 steps" in found.out


# --- a wrong command line


def test_a_study_without_m_is_not_taken_for_its_first_row(sweep, small):
    found = sweep(*small, "budget=160", "+study=mixer")
    assert found.status == 2
    assert "+study=mixer is a sweep over its rows; add -m, or choose one of them with row=." in found.lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["stage2.lrr=1e-3"], ["'stage2.lrr'", "did you mean stage2.lr?"]),
        (["nonsense"], ["nonsense is no setting", "NAME=VALUE"]),
        (["mixer=hedgehog,hedgemama"], ["mixer=hedgemama", "did you mean mixer=hedgemamba?"]),
        (["seed=0,many"], ["seed=many must be a whole number", "seed=1"]),
        (["stage2.lr=1e-3,quick"], ["stage2.lr=quick must be a number"]),
        (["stage1=5"], ["stage1=5 is a group of settings", "stage1.lr"]),
        (["stage1_tokens=[5"], ["'[5'", "--help"]),
        (["+study=mixr"], ["study=mixr is not known", "did you mean +study=mixer?"]),
        (["study=p"], ["study=p is not known", "study/p.yaml in the folder that --config-dir names"]),
        (["study=mixer"], ["study=mixer needs a plus", "+study=mixer"]),
        (["+study=mixer,split"], ["several studies", "one after the other"]),
        (["+study=mixer", "row=hedgehog,hedgehg"], ["row=hedgehg is not in this study", "did you mean hedgehog?"]),
        (["+study=mixer", "mixer=hedgehog"], ["mixer= is what the row", "leave it out"]),
        (["scale=tiny,huge"], ["scale=huge is not known", "pythia1b"]),
        (["stage1_tokens=0,96", "budget=64"], ["stage1_tokens=96 is more than the budget", "raise budget="]),
        (["budget=64,65", "stage1_tokens=32", "stage2_tokens=32"], ["budget=65", "don't add up", "two of the three"]),
        (["seq_len=16,300", "budget=0"], ["seq_len=300 is longer than the teacher", "256 or less"]),
        (["scan=chunked,ssd"], ["scan=ssd needs a CUDA device", "scan=chunked"]),
        (["data=missing.txt"], ["data=missing.txt is no file or folder"]),
        (["teacher=no/such/place/at/all"], ["teacher='no/such/place/at/all'", "name an existing one"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and "=" in value[-1] else "",
)  # fmt: skip
def test_a_wrong_command_line_is_answered_in_one_sentence_and_no_cell_begins(sweep, small, tmp_path, arguments, parts):
    names_given = {a.split("=")[0] for a in arguments}
    base = [a for a in small if a.split("=")[0] not in names_given]
    defaults = [] if "budget" in names_given else ["budget=160"]
    found = sweep("-m", *base, *defaults, *arguments)
    assert found.status == 2
    (line,) = found.lines
    for part in parts:
        assert part in line
    assert "Traceback" not in found.err
    assert nothing_computed(tmp_path / "runs")


def test_a_sweep_under_a_launcher_of_processes_is_refused(sweep, small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = sweep("-m", *small, "budget=64")
    assert found.status == 2
    assert "-m starts processes of its own; leave out the launcher" in found.lines[0]
    assert nothing_computed(tmp_path / "runs")


@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["one cell", "sweep"])
def test_a_folder_that_cannot_be_written_is_refused(sweep, small, tmp_path, mode):
    (tmp_path / "file").write_text("")
    found = sweep(*mode, *small, "budget=64", runs=tmp_path / "file" / "runs")
    assert found.status == 2
    (line,) = found.lines
    assert f"{tmp_path}/file/runs, which can't be written" in line
    assert "choose a folder" in line


@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 20, b"too short."], ids=["empty", "binary", "short"])
def test_text_that_cannot_be_trained_on_is_answered_in_one_sentence_and_no_record(sweep, small, tmp_path, content):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    found = sweep(*small[:1], f"data={text}", *small[2:], "budget=64")
    assert found.status == 2
    assert len(found.lines) == 1
    assert "Traceback" not in found.err
    assert records(tmp_path / "runs") == {}


def test_a_tokenizer_that_does_not_fit_the_teacher_is_answered_in_one_sentence(
    sweep, small, tmp_path, make_teacher, byte_tokenizer
):
    make_teacher("neox", vocab_size=100).save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    found = sweep(f"teacher={tmp_path}/teacher", *small[1:], "budget=160")
    assert found.status == 2
    (line,) = found.lines
    assert "ids up to 256" in line
    assert "only 100 rows" in line
    assert "use the teacher's own tokenizer" in line
    assert records(tmp_path / "runs") == {}


def test_runs_may_be_quoted_and_begin_with_the_home_folder(sweep, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = sweep("-m", *small, "recipe=teacher", runs="'~/my runs'")
    assert found.status == 0, found.err
    assert list(records(tmp_path / "my runs")) == ["teacher"]


# --- help and the configuration


def test_help_explains_every_setting_with_default_and_example(sweep):
    found = sweep("--help", runs=None)
    assert found.status == 0
    text = found.out[found.out.index("Settings:") :]
    for name, field in names().items():
        match = re.search(rf"^  {re.escape(name)}\s+(\S.*)\n\s+default: \S+.*example: \+?{re.escape(name)}=(\S+)", text, re.M)
        assert match, name
        assert match[1] == field.metadata["help"]
    for name in (*STUDIES, *SCALES):
        assert name in found.out[: found.out.index("Settings:")]


def resolved(*overrides):
    """What settings_of makes of a command line, checked, without loading a teacher."""
    import sweep as entry

    with initialize_config_dir(str(ROOT / "sweeps"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    return entry.settings_of(entry.plain_of(config), list(overrides)).resolve(), config


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_resolves(here, scale):
    settings, _ = resolved(f"scale={scale}")
    assert settings.scale == scale
    assert settings.study == "default"
    assert 0 < settings.stage1_tokens < settings.stage2_tokens


@pytest.mark.parametrize("scale", ["tiny", "pythia1b"])
@pytest.mark.parametrize("study", STUDIES)
def test_every_row_of_every_study_resolves_at_the_smallest_and_the_largest_scale(here, study, scale):
    _, config = resolved(f"+study={study}", f"scale={scale}")
    rows = list(config.rows)
    assert config.hydra.sweeper.params.row == ",".join(f"'{row}'" for row in rows)
    seen = set()
    for row in rows:
        settings, _ = resolved(f"+study={study}", f"scale={scale}", f"row='{row}'")
        assert (settings.study, settings.row, settings.scale) == (study, row, scale)
        seen.add(json.dumps({**vars(settings), "row": None}, default=vars, sort_keys=True))
    assert len(seen) == len(rows), "no two rows are the same cell"


RECIPES = sorted(p.stem for p in (ROOT / "sweeps/recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_same_on_the_command_line_and_in_a_row(here, recipe):
    import sweep as entry

    typed, _ = resolved(f"recipe={recipe}")
    _, config = resolved()
    plain = entry.plain_of(config) | {"rows": {"one": {"recipe": recipe}}, "row": "one"}
    named = entry.settings_of(plain, []).resolve()
    assert {**vars(named), "row": None} == vars(typed)


def test_what_is_typed_or_stands_in_a_row_comes_before_the_recipe_of_that_row(here):
    given = ("+study=recipes", "row='hedgehog'")
    settings, _ = resolved(*given)
    assert (settings.stage1.train, settings.stage1.loss, settings.mixer) == ("mixer", "mse", "hedgehog")
    assert settings.stage2.lr == resolved("recipe=aligned")[0].stage2.lr
    assert resolved(*given, "stage2.lr=7e-4")[0].stage2.lr == 7e-4
    assert resolved(*given, "stage1_tokens=20%")[0].stage1_tokens == 0.2 * settings.budget


def test_a_typed_recipe_is_for_the_rows_that_name_none(here):
    def row(name):
        return resolved("+study=one_step", f"row='{name}'", "recipe=tuned", "budget=100k")[0]

    assert row("teacher").recipe == "teacher"
    ours = row("hedgemamba")
    assert (ours.recipe, ours.stage2.lr_new, ours.stage1_tokens) == ("two_stage", 1e-2, 10_000)
    baseline = row("one_step")
    assert (baseline.recipe, baseline.stage2.lr_new, baseline.stage1_tokens, baseline.stage2_tokens) == ("one_step", None, 0, 100_000)


def test_a_recipe_of_ones_own_serves_on_the_command_line_and_in_a_row(sweep, small, tmp_path):
    folder = tmp_path / "own"
    for kind in ("study", "recipe"):
        (folder / kind).mkdir(parents=True)
    (folder / "study" / "mine.yaml").write_text(MINE.replace("{recipe: teacher}", "{recipe: gentle}"))
    (folder / "recipe" / "gentle.yaml").write_text("# @package _global_\nrecipe: adapted_teacher\nstage2: {lr: 1e-5}\n")
    small = [*small, "budget=32", "stage1_tokens=0"]
    for arguments in (["-m", "+study=mine", "row=teacher"], ["recipe=gentle"]):
        runs = tmp_path / f"runs{len(arguments)}"
        found = sweep("--config-dir", str(folder), *arguments, *small, runs=runs)
        assert found.status == 0, found.err
        (record,) = records(runs).values()
        assert (record["settings"]["recipe"], record["settings"]["stage2"]["lr"]) == ("adapted_teacher", 1e-5)
    (folder / "recipe" / "gentle.yaml").write_text("recipe: adapted_teacher\n")
    wrong = sweep("--config-dir", str(folder), "recipe=gentle", *small)
    assert (wrong.status, len(wrong.lines)) == (2, 1)
    assert "the file of recipe= lacks its first line, `# @package _global_`" in wrong.lines[0]


def test_an_unknown_recipe_is_answered_with_the_nearest_also_in_a_row(sweep, small, tmp_path):
    found = sweep("recipe=alinged", *small)
    assert (found.status, len(found.lines)) == (2, 1)
    assert "did you mean recipe=aligned?" in found.lines[0]
    folder = tmp_path / "own"
    (folder / "study").mkdir(parents=True)
    (folder / "study" / "mine.yaml").write_text(MINE.replace("{recipe: teacher}", "{recipe: tescher}"))
    found = sweep("--config-dir", str(folder), "-m", "+study=mine", *small)
    assert (found.status, len(found.lines)) == (2, 1)
    assert "did you mean recipe=teacher?" in found.lines[0]
