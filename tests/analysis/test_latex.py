"""The LaTeX tables compile, whatever the records hold. Needs pdflatex with booktabs."""

import shutil
import subprocess

import pytest

from analysis.formats import to_latex
from analysis.load import load_records
from analysis.tables import build

pytestmark = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)")


def test_the_latex_of_every_study_compiles_with_hostile_names(runs, nasty, tmp_path):
    for study in ("main", "mixer", "split", "demo", nasty):
        runs.teacher(study, metrics=runs.tasks(50.0))
        for row in ("hedgemamba", "hedgehog", f"[2pt] {nasty}"):
            runs.add(study, row, data=nasty, metrics=runs.tasks(40.0), record={"provenance": {"command": nasty}})
    frame = load_records(runs.root)
    tables = "\n".join(to_latex(table) for name in sorted(set(frame["study"])) for table in build(frame, name))
    (tmp_path / "t.tex").write_text(f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{tables}\\end{{document}}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True,
                          text=True, errors="replace", timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout
