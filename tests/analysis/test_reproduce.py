"""REPRODUCE.md: every command in it runs (at a small size), and its numbers are those of the records."""

import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import Future
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

from analysis.reproduce import filled, main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "REPRODUCE.md").read_text()
BLOCKS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
INLINE = [c for c in re.findall(r"`((?:python|pip) [^`]+)`", re.sub(r"<!-- made.*?<!-- end -->", "", PAGE, flags=re.S)) if c not in BLOCKS]


class InThisProcess:
    """In place of the launcher's pool of processes, each of which would take seconds to start."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_teacher, byte_tokenizer):
    """What makes a cell take a second: a small teacher of bytes, short texts, few tokens."""
    folder = tmp_path_factory.mktemp("small")
    make_teacher("neox", vocab_size=257).save_pretrained(folder / "teacher")
    byte_tokenizer.save_pretrained(folder / "teacher")
    for name, start, count in (("train", 0, 300), ("validation", 1000, 20)):
        lines = [f"{n}: the {['cat', 'dog', 'owl', 'fox', 'hen'][n % 5]} sees {n * n} birds." for n in range(start, start + count)]
        (folder / f"{name}.txt").write_text("\n\n\n".join(lines))
    return [f"teacher={folder}/teacher", f"data={folder}/train.txt", f"validation={folder}/validation.txt", "seq_len=16",
            "stage1.batch_size=1", "stage2.batch_size=1", "eval.sequences=8", "eval.batch_size=8", "device=cpu"]  # fmt: skip


def shrunk(arguments, small):
    """The command's settings with one seed, on the small teacher and text; at other scales than the first, two rows."""
    kept = [re.sub(r"^seed=.*", "seed=0", a) for a in arguments if not a.startswith(("data=", "validation="))]
    budget = 1600 if "+study=budget" in arguments else 320  # a hundredth of it, or a tenth, is a step
    rows = ["row=teacher,hedgemamba"] if "+study=main" in arguments and any(a.startswith("scale=") for a in arguments) else []
    return [*kept, *small, *rows, f"default_budget={budget}"]


def test_every_command_of_the_page_runs_in_the_order_of_the_page(small, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("HM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", "1")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    launcher = Plugins.instance().class_name_to_class["hydra_plugins.hedgemamba.LocalLauncher"]
    monkeypatch.setitem(launcher.launch.__globals__, "ProcessPoolExecutor", InThisProcess)
    shutil.copy(ROOT / "REPRODUCE.md", tmp_path)
    assert len(BLOCKS) >= 12
    for command in [*BLOCKS, *INLINE]:
        program, *arguments = shlex.split(command)
        if program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert arguments[:2] == ["install", "-e"]
            assert arguments[2].strip(".[]") in extras
        elif arguments[0] == "sweep.py":
            monkeypatch.setattr(sys, "argv", [str(ROOT / "sweep.py"), *shrunk(arguments[1:], small)])
            runpy.run_path(str(ROOT / "sweep.py"), run_name="__main__")  # raises SystemExit if anything is wrong
        else:
            module = importlib.import_module(arguments[0].removesuffix(".py").replace("/", "."))
            own = ["--results", "results", "--page", "REPRODUCE.md"] if "reproduce" in command else []
            assert module.main([*arguments[1:], *own]) == 0, (command, capfd.readouterr().err[-2000:])
    made = {str(p.relative_to(tmp_path / "results")) for p in (tmp_path / "results").rglob("*") if p.is_file()}
    assert {f"{s}/tables/{s}.tex" for s in ("main", "mixer", "split", "budget", "one_step", "controls", "scale")} <= made
    assert {"report.html", "claims.md", "split/plots/split.pdf", "mixer/plots/mixer.pdf", "budget/plots/budget.pdf"} <= made
    assert "control: gate 50/50" in (tmp_path / "results/claims.md").read_text()


@pytest.fixture
def kept(tmp_path):
    """The page and the results that are kept, without those of this checkout's own runs: `make demo` writes to results/demo too."""
    if not (ROOT / ".git").exists():
        return ROOT
    names = subprocess.run(["git", "ls-files", "-z", "results", "REPRODUCE.md"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["git", "checkout-index", "-z", "--stdin", f"--prefix={tmp_path}/"], cwd=ROOT, input=names, check=True)
    return tmp_path


def test_the_numbers_of_the_page_are_those_of_the_records(kept):
    page = (kept / "REPRODUCE.md").read_text()
    assert filled(page, kept / "results") == page, "run python analysis/reproduce.py, then git add"


def test_a_number_that_went_stale_is_made_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made: verdicts -->\nstale\n<!-- end -->\nafter\n")
    assert main(["--page", str(page), "--results", str(ROOT / "results")]) == 0
    text = page.read_text()
    assert "stale" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| C1: " in text


def test_a_block_that_nothing_makes_is_answered_with_one_sentence(tmp_path, capsys):
    (tmp_path / "page.md").write_text("<!-- made: wishes -->\n<!-- end -->")
    assert main(["--page", str(tmp_path / "page.md"), "--results", str(ROOT / "results")]) == 2
    assert "asks for a block 'wishes'" in capsys.readouterr().err
