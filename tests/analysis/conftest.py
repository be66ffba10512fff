"""Hand-made records, as a store holds them, and a browser."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from analysis import paper
from analysis.load import load_records
from analysis.tables import build


def beside(name):
    """The module `name` of this folder."""
    spec = importlib.util.spec_from_file_location(f"analysis_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made():
    """Makes whole stores (made.py)."""
    return beside("made")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium (browser.py)."""
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium (Debian: apt install chromium)")
    started = beside("browser").Browser()
    yield started
    started.close()


@pytest.fixture
def nasty():
    """A name with what HTML, LaTeX, Markdown and shells take for their own."""
    return r"a|b_c & 50% $x$ #1 {y} ~ ^ \n <b> <script>alert(1)</script> *z* [l](u) `t` é 漢 '\"</textarea>"


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


class Runs:
    """Writes records; `table` builds the one table of a study from them."""

    def __init__(self, root):
        self.root, self.count = root, 0

    def add(self, study, row=None, ppl=40.0, *, seed=0, recipe="two_stage", mixer="hedgemamba", one=10,
            two=90, key=None, cell=None, metrics=(), record=(), **settings):
        self.count += 1
        key, cell = key or f"k{self.count}", cell or f"cell{self.count}"
        data = {
            "schema": 1, "study": study, "cell": cell, "key": key, "status": "done",
            "settings": {"scale": "tiny", "teacher": "tiny", "mixer": mixer, "recipe": recipe, "seed": seed,
                         "budget": one + two, "stage1_tokens": one, "stage2_tokens": two,
                         "data": "docstrings", "validation": None, "seq_len": 256, "eval": {"sequences": 200},
                         **settings},
            "metrics": {"ppl": {"value": ppl, "stderr": 0.25}, **dict(metrics)},
            "params": {"total": 7_350_000}, "tokens": {"stage1": one, "stage2": two}, **dict(record)}
        if row:
            data["row"] = row
        folder = self.root / "".join(c if c.isalnum() else "_" for c in study)[:40] / f"{cell}-{key}-{self.count}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(data))
        return folder

    def teacher(self, study, ppl=20.0, **more):
        self.add(study, "teacher", ppl, recipe="teacher", one=0, two=0, **more)

    @staticmethod
    def tasks(start):
        """The ten tasks at start, start + 1, ... percent with standard errors of 1, 1.1, ..."""
        return {task: {"value": start + i, "stderr": 1 + i / 10} for i, task in enumerate(paper.TASKS)}

    def table(self, study):
        [table] = build(load_records(self.root), study)
        return table

    def rows(self, study):
        return {row.label: row.cells for row in self.table(study).rows}

    def notes(self, study, word):
        return [note for note in self.table(study).notes if word in note]
