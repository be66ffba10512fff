"""The table and plot of recipes, against values computed here from the records."""

import math
import statistics

import pytest

from analysis import make_tables
from analysis.load import load_records
from analysis.make_plots import draw
from analysis.plots import all_plots
from analysis.rows import records_of

PPLS = {  # row -> budget -> by seed
    "adapted_teacher": {1000: (20.0, 20.2), 2000: (19.0, 19.1)},
    "paper": {1000: (40.0, 41.0), 2000: (30.0, 30.5)},
    "tuned": {1000: (30.0, 30.2), 2000: (26.0, 26.1)},
    "best": {1000: (25.0, 25.3), 2000: (22.0, 22.2)},
    "best without KL": {1000: (27.0, 27.3), 2000: (26.05, 26.06)},
}


def add(runs, row, budget, ppls, **settings):
    recipe = "adapted_teacher" if row == "adapted_teacher" else "two_stage"
    for seed, ppl in enumerate(ppls):
        runs.add("recipes", row, ppl, seed=seed, recipe=recipe, one=budget // 10, two=budget - budget // 10, **settings)


@pytest.fixture
def study(runs):
    runs.teacher("recipes", 24.0)
    for row, budgets in PPLS.items():
        for budget, ppls in budgets.items():
            add(runs, row, budget, ppls, stage2={"lr": {"paper": 3e-4}.get(row, 1e-3 if budget == 1000 else 2e-3)})
    return runs


def test_each_budget_has_perplexity_gap_and_what_is_left_of_the_papers_gap_over_the_seeds(study):
    rows = study.rows("recipes")
    assert list(rows) == ["teacher", "adapted_teacher", "paper", "tuned", "best", "best without KL"]  # first those of sweeps/study/recipes.yaml
    for row, budgets in PPLS.items():
        for budget, name in ((1000, "1k"), (2000, "2k")):
            ppls, cells = budgets[budget], rows[row]
            gaps = [math.log(ppl / adapted) for ppl, adapted in zip(ppls, PPLS["adapted_teacher"][budget], strict=True)]
            assert (cells[f"ppl_{name}"].value, cells[f"ppl_{name}"].spread) == pytest.approx((statistics.mean(ppls), statistics.stdev(ppls)))
            assert (cells[f"log_gap_{name}"].value, cells[f"log_gap_{name}"].spread) == pytest.approx((statistics.mean(gaps), statistics.stdev(gaps)))
            assert cells[f"seeds_{name}"].value == 2
            if row == "adapted_teacher":
                assert f"left_pct_{name}" not in cells
                continue
            papers = [math.log(ppl / adapted) for ppl, adapted in zip(PPLS["paper"][budget], PPLS["adapted_teacher"][budget], strict=True)]
            left = [100 * gap / of for gap, of in zip(gaps, papers, strict=True)]
            assert (cells[f"left_pct_{name}"].value, cells[f"left_pct_{name}"].spread) == pytest.approx((statistics.mean(left), statistics.stdev(left)))
    teacher = statistics.mean(math.log(24.0 / adapted) for adapted in PPLS["adapted_teacher"][1000])
    assert rows["teacher"]["log_gap_1k"].value == pytest.approx(teacher)
    assert "left_pct_1k" not in rows["teacher"]


def test_the_best_student_is_marked_at_each_budget_and_a_tie_for_second_is_not(study):
    rows = study.rows("recipes")
    for key in ("ppl", "log_gap"):
        assert [rows[row][f"{key}_1k"].mark for row in ("best", "best without KL", "tuned", "adapted_teacher")] == ["best", "second", "", ""]
        assert [rows[row][f"{key}_2k"].mark for row in ("best", "best without KL", "tuned")] == ["best", "", ""]


def test_the_gap_is_over_the_seeds_that_the_adapted_teacher_has_too(study):
    study.add("recipes", "best", 99.0, seed=7, one=100, two=900, stage2={"lr": 1e-3})
    cells = study.rows("recipes")["best"]
    assert cells["seeds_1k"].value == 3
    assert cells["log_gap_1k"].value == pytest.approx(statistics.mean([math.log(25 / 20), math.log(25.3 / 20.2)]))


def test_one_seed_has_the_standard_errors_of_both_over_the_sequences(runs):
    for row, ppl in (("adapted_teacher", 20.0), ("paper", 40.0)):
        add(runs, row, 1000, (ppl,))
    cell = runs.rows("recipes")["paper"]["log_gap_1k"]
    assert cell.one_seed
    assert cell.spread == pytest.approx(math.hypot(0.25 / 20, 0.25 / 40))
    assert runs.notes("recipes", "† one seed")


def test_a_budget_without_adapted_teacher_or_paper_row_says_so_and_shows_the_rest(study):
    add(study, "best", 4000, (21.0, 21.1))
    assert study.rows("recipes")["best"]["ppl_4k"].value == pytest.approx(21.05)
    assert "log_gap_4k" not in study.rows("recipes")["best"]
    assert study.notes("recipes", "No gap at 4k for teacher, best")
    assert study.notes("recipes", "left at 4k")


def test_the_share_is_left_out_where_the_papers_recipe_leaves_no_gap(runs):
    for row, ppl in (("adapted_teacher", 20.0), ("paper", 19.0), ("best", 18.0)):
        add(runs, row, 1000, (ppl, ppl))
    cells = runs.rows("recipes")["best"]
    assert cells["log_gap_1k"].value == pytest.approx(math.log(18 / 20))
    assert "left_pct_1k" not in cells
    assert runs.notes("recipes", "left at 1k")


def test_a_row_with_several_settings_at_one_budget_is_a_row_for_each(study):
    add(study, "best", 1000, (26.0, 26.1), stage2={"lr": 5e-3})
    assert {"best (stage2.lr=0.001)", "best (stage2.lr=0.005)", "best"} <= set(study.rows("recipes"))  # one setting at 2k


def test_what_else_was_measured_has_columns_at_the_budgets_where_a_student_was_asked(runs):
    def recall(accuracy):
        return {"recall": [{"pairs": 4, "length": 64, "accuracy": accuracy, "stderr": 2.0}], "agreement": {"kl": {"value": 0.5}}}

    runs.teacher("recipes", 24.0, metrics=recall(90.0))
    add(runs, "best", 1000, (25.0,))
    add(runs, "best", 2000, (22.0,), metrics={k: v for k, v in recall(25.0).items() if k == "recall"})
    table = runs.table("recipes")
    assert [(c.key, c.block) for c in table.columns if c.key.startswith(("recall", "agreement"))] == [
        ("recall_4_2k", "recall, agreement with the teacher, generated text, 2k tokens")]
    rows = {row.label: row.cells for row in table.rows}
    assert (rows["teacher"]["recall_4_2k"].value, rows["best"]["recall_4_2k"].value) == (90.0, 25.0)
    assert runs.notes("recipes", "by chance 25.00")


def test_the_plot_has_a_bar_for_each_row_and_budget_and_the_files_are_written(study, tmp_path):
    plots, _ = all_plots(records_of(load_records(study.root)))
    plot = next(p for p in plots if p.name == "recipes")
    assert [(s.label, s.colour) for s in plot.series] == [("1k tokens", "hedgemamba"), ("2k tokens", "hedgemamba")]
    first = plot.series[0]
    assert first.x == ["paper", "tuned", "best", "best without KL"]
    assert first.y[2] == pytest.approx(statistics.mean([math.log(25 / 20), math.log(25.3 / 20.2)]))
    assert plot.note.endswith("Error bars: standard deviation over 2 seeds.")
    draw(plot).savefig(tmp_path / "recipes.png")
    assert make_tables.main(["--runs", str(study.root), "--out", str(tmp_path / "out")]) == 0
    assert "| paper " in (tmp_path / "out/recipes/tables/recipes.md").read_text()


def test_a_hybrid_is_named_one_and_never_the_best(runs):
    for name, ppl, more in (("adapted_teacher", 20.0, {"recipe": "adapted_teacher"}), ("paper", 30.0, {}), ("tuned", 25.0, {}), ("tuned", 21.0, {"keep_attention": 3})):
        for seed in (0, 1, 2):
            runs.add("recipes", name, ppl + seed / 100, seed=seed, **more)
    rows = runs.rows("recipes")
    label = "tuned (hybrid, keep_attention=3)"
    assert rows[label]["ppl_100"].value == pytest.approx(21.01)
    assert rows["tuned"]["ppl_100"].mark == "best"
    assert rows[label]["ppl_100"].mark == ""


def test_a_row_that_was_run_at_several_splits_says_which_one_also_where_there_is_one_at_each_budget(study):
    for budget in (1000, 2000):
        for seed, ppl in enumerate((24.0, 24.2)):
            study.add("recipes", "both", ppl, seed=seed, one=budget // 2, two=budget // 2)
    assert {"ppl_1k", "ppl_2k"} <= set(study.rows("recipes")["both"])
    study.add("recipes", "both", 21.0, one=3000, two=1000)
    rows = study.rows("recipes")
    assert {name: {key for key in cells if key.startswith("ppl")} for name, cells in rows.items() if name.startswith("both")} == {
        "both (50/50)": {"ppl_1k", "ppl_2k"}, "both (75/25)": {"ppl_4k"}}


def test_at_a_budget_without_an_adapted_teacher_of_its_own_another_studys_is_taken(runs):
    for budget in (1000, 2000):
        add(runs, "best", budget, (25.0,))
    add(runs, "adapted_teacher", 1000, (20.0,))
    runs.add("main", "adapted_teacher", 19.0, recipe="adapted_teacher", one=200, two=1800)
    rows = runs.rows("recipes")
    assert {key: rows["best"][f"log_gap_{key}"].value for key in ("1k", "2k")} == pytest.approx({"1k": math.log(25 / 20), "2k": math.log(25 / 19)})
    assert rows["adapted_teacher"]["ppl_2k"].value == 19.0
