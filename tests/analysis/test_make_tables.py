"""The command and the three formats: escapes, missing cells, same bytes for same records, exit codes."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis import command, make_tables
from analysis.formats import to_csv, to_latex, to_markdown
from analysis.make_tables import main, print_table
from analysis.paper import Above
from analysis.table import Cell, Column, Row, Table
from hm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NASTY = r"a|b_c & 50% $x$ #1 {y} ~ ^ \n <b> *z* [l](u) `t` é 漢"


def record(runs, study="main", row="hedgemamba", ppl=30.0, seed=0, command=None, **settings):
    folder = runs / study / "-".join([row, str(seed), *map(str, settings.values())])
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({
        "schema": 1, "study": study, "cell": row, "key": folder.name, "row": row,
        "settings": {"recipe": "teacher" if row == "teacher" else "two_stage", "mixer": "hedgemamba",
                     "seed": seed, "scale": "tiny", "teacher": "tiny", **settings},
        "metrics": {"ppl": {"value": ppl, "stderr": 0.5}}, "provenance": {"command": command}}))


def table(label="row", cell=None, notes=(), commands=()):
    cells = {} if cell is None else {"ppl": cell}
    return Table("t", "Caption", [Column("row", "row"), Column("ppl", "ppl", "ppl", "down")],
                 [Row(label, cells, list(commands))], list(notes))


def markdown_rows(text):
    """Cells of all table lines, split as Markdown does: at each bar that no backslash precedes."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in text.splitlines() if line.startswith("|")]


def latex_rows(text):
    return [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in text.splitlines()
            if line.endswith(r" \\")]


def write_tables(runs, out):
    """The tables' files by study."""
    assert main(["--runs", str(runs), "--out", str(out)]) == 0
    return {folder.name: [folder / f"tables/{folder.name}.{ending}" for ending in ("md", "tex", "csv")]
            for folder in Path(out).iterdir()}


def csv_rows(text):
    return list(csv.DictReader(io.StringIO(text)))


# --- formats ----------------------------------------------------------------------------------------------

def test_a_reader_that_goes_away_ends_the_command_without_a_traceback(runs, tmp_path):
    runs.teacher("main")
    command = f"{sys.executable} {Path(make_tables.__file__)} --runs {runs.root} --out {tmp_path / 'out'} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
    assert "Error" not in done.stderr


def test_a_missing_cell_is_a_dash_two_dashes_in_latex_and_empty_in_csv():
    empty = table()
    assert markdown_rows(to_markdown(empty))[-1] == ["row", "–"]
    assert latex_rows(to_latex(empty))[-1] == ["row ", " -- "]
    assert csv_rows(to_csv([empty]))[0]["ppl"] == ""


def test_a_real_zero_is_not_shown_as_missing():
    zero = table(cell=Cell(0.0))
    assert markdown_rows(to_markdown(zero))[-1] == ["row", "0.00"]
    assert csv_rows(to_csv([zero]))[0]["ppl"] == "0"


def test_spread_and_the_mark_of_one_seed_are_shown():
    one, several = table(cell=Cell(30.0, 0.5, one_seed=True)), table(cell=Cell(30.0, 0.5))
    assert markdown_rows(to_markdown(one))[-1][1] == "30.00 ± 0.50 †"
    assert markdown_rows(to_markdown(several))[-1][1] == "30.00 ± 0.50"
    assert r"30.00 $\pm$ 0.50 $^\dagger$ \\" in to_latex(one)
    [row] = csv_rows(to_csv([one]))
    assert (row["ppl"], row["ppl_pm"], row["ppl_pm_is"]) == ("30", "0.5", "stderr")
    assert csv_rows(to_csv([several]))[0]["ppl_pm_is"] == "sd"


def test_headers_say_which_way_is_better():
    assert markdown_rows(to_markdown(table()))[0][1] == "ppl ↓"
    assert r"ppl $\downarrow$" in to_latex(table())


def test_a_bound_is_shown_as_one_in_each_format():
    bound = table(cell=Cell(Above(100.0)))
    assert markdown_rows(to_markdown(bound))[-1][1] == "> 100"
    assert latex_rows(to_latex(bound))[-1][1].strip() == "$>$ 100"
    assert csv_rows(to_csv([bound]))[0]["ppl"] == "> 100"


def test_markdown_lines_of_a_table_are_equally_long_and_have_as_many_cells():
    text = to_markdown(table(NASTY, Cell(30.0)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert {len(cells) for cells in markdown_rows(text)} == {2}


def test_markdown_takes_names_as_text():
    text = to_markdown(table(NASTY, notes=["_x_ <script> a &lt; b < c"]))
    assert r"a\|b_c & 50% \$x\$ #1 {y} \~ ^ \\n &lt;b> \*z\* \[l\](u) \`t\` é 漢" in text
    assert r"\_x\_ &lt;script> a &amp;lt; b < c" in text


def test_latex_takes_names_as_text_and_balances():
    text = to_latex(table(NASTY, notes=[NASTY], commands=[NASTY]))
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.isascii()
    assert (r"a$|$b\_c \& 50\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}n "
            r"$<$b$>$ *z* [l](u) `t` e ?") in body
    bare = re.sub(r"\\[{}$]", "", body)
    depth = 0
    for c in bare:
        depth += {"{": 1, "}": -1}.get(c, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", body) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended)
    assert {len(row) for row in latex_rows(body)} == {2}


@pytest.mark.parametrize("label", ["[2pt] x", "*x"])
def test_a_latex_row_cannot_begin_with_what_a_line_break_takes_for_an_argument(label):
    assert f"{{}}{label} &" in to_latex(table(label))


def test_csv_takes_names_as_text():
    [row] = csv_rows(to_csv([table('say "hi", then\nleave', commands=[NASTY])]))
    assert row["row"] == 'say "hi", then leave'
    assert row["command"] == NASTY


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1+1", "-2", "@SUM(A1)", " =1"])
def test_csv_disarms_formulas(name):
    assert csv_rows(to_csv([table(name)]))[0]["row"] == "'" + name


def test_csv_leaves_the_papers_row_names_as_they_are():
    assert csv_rows(to_csv([table("+ssm+conv")]))[0]["row"] == "+ssm+conv"


def test_a_later_block_has_only_the_rows_that_have_something_in_it():
    two = table(cell=Cell(30.0))
    two.columns.append(Column("paper_piqa", "piqa", "acc", "up", block="accuracy"))
    two.rows.append(Row("published", {"paper_piqa": Cell(70.0)}))
    rows = [["row", "30.00"], ["published", "–"], ["row", "piqa ↑"], ["published", "70.00"]]
    assert [r for r in markdown_rows(to_markdown(two)) if "-" not in r[0]][1:] == rows
    assert len(latex_rows(to_latex(two))) == 5


def test_tables_of_one_study_share_a_csv_with_the_columns_of_both():
    other = Table("u", "", [Column("row", "row"), Column("seeds", "seeds", "count")],
                  [Row("r", {"seeds": Cell(2)})], [])
    first, second = csv_rows(to_csv([table(cell=Cell(30.0)), other]))
    assert (first["table"], first["ppl"], first["seeds"]) == ("t", "30", "")
    assert (second["table"], second["ppl"], second["seeds"]) == ("u", "", "2")


def test_commands_are_listed_once_with_their_rows_and_can_be_copied():
    shown = table("a", commands=["python sweep.py x=`1`"])
    shown.rows.append(Row("b", {}, ["python sweep.py x=`1`"]))
    text = to_markdown(shown)
    assert "```sh\n# a, b\npython sweep.py x=`1`\n```" in text
    fenced = to_markdown(table(commands=["echo ```"]))
    assert "````sh\n# row\necho ```\n````" in fenced


def test_every_latex_row_of_a_real_table_has_the_columns_that_its_tabular_declares(tmp_path):
    record(tmp_path / "runs")
    [_, tex, _] = write_tables(tmp_path / "runs", tmp_path / "out")["main"]
    tabulars = re.findall(r"\\begin{tabular}{(l r*|lr+)}(.*?)\\end{tabular}", tex.read_text(), re.DOTALL)
    assert len(tabulars) == 3  # perplexity, and the paper's accuracies in two parts
    for columns, body in tabulars:
        rows = [line for line in body.splitlines() if line.endswith(r" \\")]
        assert len(rows) == 4
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}


# --- files and the command --------------------------------------------------------------------------------

def test_each_study_gets_its_files_and_is_printed(tmp_path, capsys):
    record(tmp_path / "runs")
    record(tmp_path / "runs", study="lab", row="x")
    assert main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").glob("*/tables/*"))
    assert files == [f"{s}/tables/{s}.{e}" for s in ("lab", "main") for e in ("csv", "md", "tex")]
    printed = capsys.readouterr().out
    for study in ("lab", "main"):
        assert (tmp_path / f"out/{study}/tables/{study}.md").read_text() in printed


def test_the_records_stay_with_their_tables_and_make_the_same_ones(tmp_path):
    record(tmp_path / "runs")
    (source,) = tmp_path.rglob("record.json")
    record(tmp_path / "runs", study="lab", row="x")
    out = tmp_path / "out"
    main(["--runs", str(tmp_path / "runs"), "--out", str(out), "--study", "main"])
    kept = list(out.rglob("record.json"))
    assert [k.read_bytes() for k in kept] == [source.read_bytes()]
    before = (out / "main/tables/main.md").read_bytes()
    main(["--runs", str(out), "--out", str(out), "--study", "main"])
    assert (out / "main/tables/main.md").read_bytes() == before
    assert list(out.rglob("record.json")) == kept


def test_one_study_can_be_chosen(tmp_path):
    record(tmp_path / "runs")
    record(tmp_path / "runs", study="lab", row="x")
    main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--study", "lab"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lab"]


def test_the_same_records_change_no_byte_and_touch_no_file(tmp_path):
    runs, moved = tmp_path / "runs", tmp_path / "elsewhere"
    for seed in (0, 1):
        record(runs, seed=seed, ppl=30.0 + seed)
        record(runs, row="hedgehog", seed=0, ppl=31.0 + seed, device=seed)  # a conflict, so notes are compared too
    first = write_tables(runs, tmp_path / "out")["main"]
    before = [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in first]
    runs.rename(moved)
    write_tables(moved, tmp_path / "out")
    assert [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in first] == before
    assert "Conflict" in first[0].read_text()


def test_a_new_record_changes_the_tables(tmp_path):
    record(tmp_path / "runs")
    [path, *_] = write_tables(tmp_path / "runs", tmp_path / "out")["main"]
    before = path.read_text()
    record(tmp_path / "runs", seed=1, ppl=32.0)
    write_tables(tmp_path / "runs", tmp_path / "out")
    assert before != path.read_text()
    assert "31.00 ± 1.41" in path.read_text()


def test_skipped_records_are_listed_with_reasons_and_the_rest_is_made(tmp_path, capsys):
    record(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/record.json").write_text('{"schema": 1, "stu')
    assert main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "skipped cut/record.json: is truncated" in capsys.readouterr().err


def test_no_records_ends_with_one_sentence_and_status_2(tmp_path, capsys):
    assert main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "holds no record.json" in said.err
    assert not (tmp_path / "out").exists()


def test_only_bad_records_end_with_status_2(tmp_path, capsys):
    (tmp_path / "record.json").write_text("{")
    assert main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "none of the 1 records" in capsys.readouterr().err


def test_a_misspelt_study_is_answered_with_the_nearest(tmp_path, capsys):
    record(tmp_path)
    assert main(["--runs", str(tmp_path), "--study", "mian"]) == 2
    assert "did you mean main?" in capsys.readouterr().err


def test_an_out_folder_that_is_a_file_is_answered_with_one_sentence(tmp_path, capsys):
    record(tmp_path / "runs")
    (tmp_path / "out").write_text("")
    assert main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["../../escaped", "..", "a/b"])
def test_a_study_name_never_leads_out_of_the_out_folder(tmp_path, study):
    record(tmp_path / "runs")
    file = next((tmp_path / "runs").rglob("record.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "study": study}))
    out = tmp_path / "in/out"
    [files] = write_tables(tmp_path / "runs", out).values()
    for path in files:
        assert path.resolve().relative_to(out.resolve()).parts[1:-1] == ("tables",)


def test_print_table_prints_the_markdown_of_one_study(tmp_path, capsys):
    record(tmp_path)
    record(tmp_path, study="lab", row="x")
    print_table(tmp_path, "main")
    assert capsys.readouterr().out.startswith("### main\n")
    with pytest.raises(UserError, match="study=nothing has no record"):
        print_table(tmp_path, "nothing")


def test_a_terminal_that_lacks_the_signs_gets_question_marks():
    class Ascii(io.StringIO):
        encoding = "ascii"

    screen = Ascii()
    command.say("ppl ↓", screen)
    assert screen.getvalue() == "ppl ?\n"


@pytest.mark.parametrize("how", ["as a script from any folder", "as a module"])
def test_it_runs(tmp_path, how):
    for seed in range(30):
        for row in ("hedgemamba", "hedgehog", *"abcdefgh"):
            record(tmp_path / "runs", row=row, seed=seed)
    if how == "as a module":
        place = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
        arguments, folder = ["-m", "analysis.make_tables", *place], ROOT
    else:
        arguments, folder = [str(ROOT / "analysis/make_tables.py")], tmp_path
    environment = {k: v for k, v in os.environ.items() if k not in ("HM_RUNS", "PYTHONPATH")}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, text=True, encoding="utf-8",
                          capture_output=True, check=False, env={**environment, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert ["hedgemamba", "30.00 ± 0.00", "30"] in [cells[:3] for cells in markdown_rows(done.stdout)]
    assert (tmp_path / "results/main/tables/main.tex").is_file()
    assert time.perf_counter() - start < 10  # 300 records take about half a second on an idle machine
