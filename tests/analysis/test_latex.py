"""The LaTeX tables compile, whatever the records hold. Needs pdflatex with booktabs."""

import shutil
import subprocess

import pytest

from analysis.formats import to_latex
from analysis.load import load_records
from analysis.tables import build

pytestmark = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)")


def compiled(tables, folder):
    """What LaTeX says of a document with the tables."""
    text = "\n".join(map(to_latex, tables))
    (folder / "t.tex").write_text("\\documentclass{article}\n\\usepackage{booktabs}\n\\usepackage[margin=25mm]{geometry}\n"
                                  f"\\begin{{document}}\n{text}\\end{{document}}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=folder, capture_output=True,
                          text=True, errors="replace", timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def test_the_latex_of_every_study_compiles_with_hostile_names(runs, nasty, tmp_path):
    for study in ("main", "mixer", "split", "demo", nasty):
        runs.teacher(study, metrics=runs.tasks(50.0))
        for row in ("hedgemamba", "hedgehog", f"[2pt] {nasty}"):
            runs.add(study, row, data=nasty, metrics=runs.tasks(40.0), record={"provenance": {"command": nasty}})
    frame = load_records(runs.root)
    printed = compiled([table for study in sorted(set(frame["study"])) for table in build(frame, study)], tmp_path)
    assert "Missing character" not in printed


def test_all_columns_fit_on_a_page(made, tmp_path):
    made.store(tmp_path / "runs", seeds=(0, 1))
    frame = load_records(tmp_path / "runs")
    printed = compiled([table for study in ("main", "mixer") for table in build(frame, study)], tmp_path)
    assert "Overfull" not in printed
