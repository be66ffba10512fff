"""Each number, mark, note and missing cell of the tables, against values computed here from records."""

import statistics

import pytest

from analysis import paper
from analysis.load import load_records
from analysis.paper import Above
from analysis.table import Cell, number_text
from analysis.tables import build

# --- rows -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("study", ["main", "mixer", "split", "budget", "one_step"])
def test_rows_are_the_papers_also_where_none_was_run(runs, study):
    runs.teacher(study)
    table = runs.table(study)
    expected = list(paper.TABLES[study].rows)
    assert [row.label for row in table.rows] == (expected if study == "main" else ["teacher", *expected])
    for row in table.rows[1:]:
        assert all(key.startswith("paper_") for key in row.cells)


@pytest.mark.parametrize(("study", "row", "settings"), [
    ("main", "hedgehog", {"mixer": "hedgehog"}),
    ("mixer", "hedgehog", {"mixer": "hedgehog"}),
    ("mixer", "+ssm", {"mixer": "ssm"}),
    ("mixer", "+ssm+conv", {"mixer": "ssm_conv"}),
    ("mixer", "+ssm+conv+gate", {"mixer": "hedgemamba"}),
    ("mixer", "+ssm+conv", {"mixer": "hedgemamba", "gate": False}),
    ("mixer", "+gate", {"mixer": "gate"}),
    ("split", "25/75", {"one": 25, "two": 75}),
    ("split", "0/100", {"one": 0, "two": 100}),
    ("split", "hedgehog 10/90", {"mixer": "hedgehog"}),
    ("budget", "2B", {"one": 200_000_000, "two": 1_800_000_000}),
    ("one_step", "one_step", {"recipe": "one_step", "mixer": "mamba"}),
    ("demo", "hedgemamba 10/90", {}),
    ("demo", "hedgehog 10/90", {"mixer": "hedgehog"}),
    ("demo", "0/100", {"one": 0, "two": 100}),
    ("demo", "adapted_teacher", {"recipe": "adapted_teacher"}),
])
def test_a_record_without_a_row_finds_it_by_its_settings(runs, study, row, settings):
    runs.add(study, ppl=33.0, **settings)
    assert runs.rows(study)[row]["ppl"].value == 33.0
    assert sum("ppl" in cells for cells in runs.rows(study).values()) == 1


def test_the_row_of_a_record_wins_over_its_settings(runs):
    runs.add("mixer", "gate + conv", mixer="gate")
    assert "gate + conv" in runs.rows("mixer")


def test_a_row_that_only_names_the_mixer_is_completed(runs):
    runs.add("demo", "hedgemamba", 31.0)
    runs.add("mixer", "hedgemamba", 32.0)
    assert runs.rows("demo")["hedgemamba 10/90"]["ppl"].value == 31.0
    assert runs.rows("mixer")["+ssm+conv+gate"]["ppl"].value == 32.0


def test_the_split_is_what_was_asked_for_and_the_tokens_are_what_was_spent(runs):
    runs.add("demo", "hedgemamba", 31.0, one=50_000, two=450_000,
             record={"tokens": {"stage1": 49_152, "stage2": 448_512}})
    cells = runs.rows("demo")["hedgemamba 10/90"]
    assert (cells["stage1_tokens"].value, cells["stage2_tokens"].value) == (49_152, 448_512)


@pytest.mark.parametrize("kept", [4, [3, 7], "every other"])
def test_a_hybrid_is_labelled_so_and_never_fills_a_row_of_the_paper(runs, kept):
    runs.add("main", "hedgemamba", 21.0, keep_attention=kept)
    rows = runs.rows("main")
    assert "ppl" not in rows["hedgemamba"]
    [label] = [name for name in rows if "hybrid" in name]
    assert rows[label]["ppl"].value == 21.0
    assert "paper_ppl" not in rows[label]


@pytest.mark.parametrize("kept", [None, [], 0])
def test_no_kept_layer_is_no_hybrid(runs, kept):
    runs.add("main", "hedgemamba", keep_attention=kept)
    assert "ppl" in runs.rows("main")["hedgemamba"]


def test_an_unknown_study_has_a_row_for_each_cell(runs):
    runs.add("lab", cell="b", ppl=30.0)
    runs.add("lab", cell="a", ppl=31.0)
    assert {name: cells["ppl"].value for name, cells in runs.rows("lab").items()} == {"a": 31.0, "b": 30.0}
    assert not any(c.key.startswith("paper") for c in runs.table("lab").columns)


def test_cells_of_one_name_in_an_unknown_study_are_told_apart_by_their_settings(runs):
    for seed in (0, 1):
        runs.add("lab", cell="x", ppl=30.0 + seed, seed=seed, **{"stage2.lr": 0.001})
    runs.add("lab", cell="x", ppl=35.0, **{"stage2.lr": 0.003})
    rows = runs.rows("lab")
    assert rows["x (stage2.lr=0.001)"]["ppl"].value == 30.5
    assert rows["x (stage2.lr=0.003)"]["ppl"].value == 35.0


def test_a_study_run_with_two_teachers_makes_two_tables(runs):
    runs.teacher("main", 20.0)
    runs.teacher("main", 12.0, scale="smollm2", teacher="smollm2")
    runs.add("main", "hedgemamba", 30.0)
    runs.add("main", "hedgemamba", 18.0, scale="smollm2", teacher="smollm2")
    tables = build(load_records(runs.root), "main")
    assert [table.name for table in tables] == ["main (smollm2)", "main (tiny)"]
    gaps = [{r.label: r.cells for r in table.rows}["hedgemamba"]["gap_teacher_pct"].value for table in tables]
    assert gaps == pytest.approx([50.0, 50.0])
    assert not any("Conflict" in note for table in tables for note in table.notes)


# --- numbers ----------------------------------------------------------------------------------------------

def test_several_seeds_give_mean_and_standard_deviation_with_their_number(runs):
    values = [30.0, 31.0, 33.5]
    for seed, ppl in enumerate(values):
        accuracy = {"arc_easy": {"value": ppl + 10, "stderr": 1.0}}
        runs.add("main", "hedgemamba", ppl, seed=seed, metrics=accuracy)
    cells = runs.rows("main")["hedgemamba"]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert cells["ppl"] == Cell(pytest.approx(mean), pytest.approx(deviation))
    assert cells["seeds"].value == 3
    assert cells["arc_easy"].value == pytest.approx(mean + 10)
    assert runs.notes("main", "standard deviation")
    assert not runs.notes("main", "one seed")


def test_one_seed_gives_the_records_standard_error_and_is_marked(runs):
    runs.add("main", "hedgemamba", 30.0)
    assert runs.rows("main")["hedgemamba"]["ppl"] == Cell(30.0, 0.25, one_seed=True)
    assert runs.notes("main", "one seed")


def test_the_gap_is_relative_to_the_teacher_and_to_the_adapted_one(runs):
    runs.teacher("main", 20.0)
    runs.add("main", "hedgemamba", 30.0)
    runs.add("main", "hedgemamba", 32.0, seed=1)
    runs.add("main", "adapted_teacher", 16.0, recipe="adapted_teacher", one=0)
    rows = runs.rows("main")
    assert rows["hedgemamba"]["gap_teacher_pct"].value == pytest.approx(100 * (31 / 20 - 1))
    assert rows["hedgemamba"]["gap_adapted_teacher_pct"].value == pytest.approx(100 * (31 / 16 - 1))
    assert rows["adapted_teacher"]["gap_teacher_pct"].value == pytest.approx(-20.0)


def test_of_several_adapted_teachers_the_one_with_as_many_tokens_is_compared_with(runs):
    runs.add("budget", "a1", 16.0, recipe="adapted_teacher", one=0, two=90)
    runs.add("budget", "a2", 10.0, recipe="adapted_teacher", one=0, two=180)
    runs.add("budget", "small", 32.0)
    runs.add("budget", "large", 30.0, one=20, two=180)
    runs.add("budget", "other", 30.0, one=1, two=2)
    rows = runs.rows("budget")
    assert rows["small"]["gap_adapted_teacher_pct"].value == pytest.approx(100.0)
    assert rows["large"]["gap_adapted_teacher_pct"].value == pytest.approx(200.0)
    assert "gap_adapted_teacher_pct" not in rows["other"]


def test_of_adapted_teachers_at_several_rates_the_best_is_compared_with(runs):
    for rate, ppls in ((0.001, (15.0, 25.0)), (0.0003, (16.0, 18.0))):
        for seed, ppl in enumerate(ppls):
            runs.add("tuning", "adapted_teacher", ppl, seed=seed, recipe="adapted_teacher", **{"stage2.lr": rate})
    runs.add("tuning", "hedgemamba", 34.0)
    assert runs.rows("tuning")["hedgemamba"]["gap_adapted_teacher_pct"].value == pytest.approx(100.0)
    assert runs.notes("tuning", "gaps are to the best")


@pytest.mark.parametrize("other", [{"data": "hf:openwebtext"}, {"seq_len": 1024},
                                   {"eval": {"sequences": None}}, {"validation": "other.txt"}])
def test_a_teacher_measured_otherwise_gives_no_gap(runs, other):
    runs.teacher("main", 20.0, **other)
    runs.add("main", "hedgemamba", 30.0)
    [table] = [t for t in build(load_records(runs.root), "main") if any("ppl" in row.cells for row in t.rows[1:])]
    assert "gap_teacher_pct" not in {row.label: row.cells for row in table.rows}["hedgemamba"]
    assert any("gap is missing" in note for note in table.notes)


def test_the_teacher_of_another_study_serves_where_there_is_no_own(runs):
    runs.teacher("demo", 20.0)
    runs.add("split", "10/90", 30.0)
    rows = runs.rows("split")
    assert rows["10/90"]["gap_teacher_pct"].value == pytest.approx(50.0)
    assert rows["teacher"]["ppl"].value == 20.0
    assert runs.notes("split", "is that of study demo")


def test_parameters_tokens_and_the_perplexity_at_conversion_are_shown(runs):
    for seed, start in ((0, 300.0), (1, 320.0)):
        runs.add("main", "hedgemamba", seed=seed, metrics={"ppl_start": {"value": start, "stderr": 1}})
    cells = runs.rows("main")["hedgemamba"]
    expected = {"params_millions": 7.35, "stage1_tokens": 10, "stage2_tokens": 90, "ppl_start": 310.0}
    assert {key: cells[key].value for key in expected} == expected


def test_columns_that_nothing_fills_are_dropped(runs):
    runs.add("main", "hedgemamba", record={"params": {}, "tokens": {}}, one=0, two=0)
    keys = [c.key for c in runs.table("main").columns]
    assert "arc_easy" not in keys
    assert "ppl_start" not in keys
    assert "gap_adapted_teacher_pct" not in keys
    assert "paper_arc_easy" in keys


def test_a_null_metric_is_missing(runs):
    runs.add("main", "hedgemamba", metrics={"ppl": {"value": None, "stderr": None}})
    assert not {"ppl", "seeds", "gap_teacher_pct"} & set(runs.rows("main")["hedgemamba"])


# --- the paper's columns ----------------------------------------------------------------------------------

def test_the_papers_values_stand_in_columns_of_their_own(runs):
    runs.add("mixer", "+ssm", 40.0)
    cells = runs.rows("mixer")["+ssm"]
    assert (cells["ppl"].value, cells["paper_ppl"].value) == (40.0, 14.89)
    assert cells["paper_params_millions"].value == 1020
    assert cells["paper_gap_teacher_pct"].value == pytest.approx(100 * (14.89 / 13.86 - 1))
    assert all("paper" in c.header for c in runs.table("mixer").columns if c.key.startswith("paper_"))


def test_the_papers_one_step_value_is_a_bound(runs):
    runs.add("one_step", "one_step", 182.7, recipe="one_step")
    assert runs.rows("one_step")["one_step"]["paper_ppl"].value == Above(100)
    assert number_text(Above(100), "ppl") == "> 100"


def test_the_papers_hedgehog_is_marked_where_ours_has_another_split(runs):
    runs.add("demo", "hedgehog 10/90", mixer="hedgehog")
    assert runs.rows("demo")["hedgehog 10/90"]["paper_ppl"] == Cell(14.89, remark="50/50")


def test_a_budget_row_that_ran_with_another_budget_is_noted(runs):
    runs.add("budget", "1B", one=100_000, two=900_000)
    assert runs.notes("budget", "named by the paper's budgets")


# --- conflicts --------------------------------------------------------------------------------------------

def test_a_row_run_with_two_settings_becomes_two_rows_and_a_note_says_so(runs):
    for seed in (0, 1):
        runs.add("main", "hedgemamba", 30.0 + seed, seed=seed, **{"stage2.lr": 0.001})
    runs.add("main", "hedgemamba", 90.0, **{"stage2.lr": 0.003})
    rows = runs.rows("main")
    assert "hedgemamba" not in rows
    assert rows["hedgemamba (stage2.lr=0.001)"]["ppl"].value == 30.5
    assert rows["hedgemamba (stage2.lr=0.003)"]["ppl"].value == 90.0
    assert rows["hedgemamba (stage2.lr=0.003)"]["paper_ppl"].value == 14.11
    assert runs.notes("main", "several settings of stage2.lr")
    assert not runs.notes("main", "Conflict")


def test_a_setting_that_one_record_leaves_at_its_default_is_named_with_that(runs):
    runs.add("main", "hedgemamba", 30.0, ssm_init="exact")
    runs.add("main", "hedgemamba", 29.0, ssm_init="decay")
    assert {"hedgemamba (ssm_init=exact)", "hedgemamba (ssm_init=decay)"} <= set(runs.rows("main"))


def test_same_settings_that_gave_other_students_are_a_conflict_and_none_is_taken(runs):
    runs.add("main", "hedgemamba", 30.0, key="aaa")
    runs.add("main", "hedgemamba", 90.0, key="bbb")
    assert "ppl" not in runs.rows("main")["hedgemamba"]
    [note] = runs.notes("main", "Conflict")
    assert all(word in note for word in ("hedgemamba, seed 0", "aaa", "bbb", "other data, weights or code"))


def test_two_evaluations_of_one_student_are_one_record_with_the_metrics_commands_and_files_of_both(runs):
    def pairs(*counts):
        return {"recall": [{"pairs": n, "length": 256, "accuracy": 10.0} for n in counts]}

    def origin(day, command):
        return {"provenance": {"artifacts": {"student": "w"}, "started": f"2026-01-0{day}", "command": command}}

    runs.add("main", "hedgemamba", 30.0, record=origin(1, "first"), metrics={"piqa": {"value": 60.0, "stderr": 1.0, "n": 500}, **pairs(4, 16)})
    runs.add("main", "hedgemamba", 30.0, record=origin(2, "second"), metrics={
        "piqa": {"value": 10.0, "stderr": 9.0, "n": 20}, "boolq": {"value": 50.0, "stderr": 2.0}, **pairs(4)})
    [row] = [r for r in runs.table("main").rows if r.label == "hedgemamba"]
    cells = row.cells
    assert (cells["seeds"].value, cells["piqa"].value, cells["piqa"].spread, cells["boolq"].value) == (1, 60.0, 1.0, 50.0)
    assert "recall_16" in cells, "a measurement of less does not hide one of more"
    assert (row.commands, len(set(row.paths))) == (["first", "second"], 2)
    assert not runs.notes("main", "Conflict")


def test_a_conflict_in_one_seed_leaves_the_others(runs):
    for seed, ppl in ((0, 30.0), (1, 31.0), (1, 60.0), (2, 32.0)):
        runs.add("main", "hedgemamba", ppl, seed=seed)
    cells = runs.rows("main")["hedgemamba"]
    assert (cells["ppl"].value, cells["seeds"].value) == (31.0, 2)
    assert "other data, weights or code" in runs.notes("main", "Conflict")[0]


def test_a_short_run_after_a_long_one_makes_a_table_of_its_own_and_leaves_the_long_one_whole(runs):
    runs.teacher("demo", 20.0)
    demo(runs, 0)
    demo(runs, 1)
    runs.add("demo", "hedgemamba", 90.0, one=1, two=9)
    runs.add("demo", "adapted_teacher", 19.0, recipe="adapted_teacher", one=1, two=9)
    short, long = build(load_records(runs.root), "demo")
    assert [short.name, long.name] == ["demo (budget 10)", "demo (budget 100)"]
    rows = {row.label: row.cells for row in long.rows}
    assert rows["hedgemamba 10/90"]["seeds"].value == 2
    assert "gap_adapted_teacher_pct" not in rows["hedgemamba 10/90"]
    rows = {row.label: row.cells for row in short.rows}
    assert (rows["hedgemamba 10/90"]["ppl"].value, rows["teacher"]["ppl"].value) == (90.0, 20.0)
    assert rows["hedgemamba 10/90"]["gap_adapted_teacher_pct"].value == pytest.approx(100 * (90 / 19 - 1))


def test_other_validation_sequences_make_a_table_of_their_own(runs):
    for sequences in (10, 200):
        runs.teacher("main", 20.0 + sequences, eval={"sequences": sequences})
        runs.add("main", "hedgemamba", 2 * (20.0 + sequences), eval={"sequences": sequences})
    tables = build(load_records(runs.root), "main")
    assert [t.name for t in tables] == ["main (eval.sequences 10)", "main (eval.sequences 200)"]
    gaps = [{r.label: r.cells for r in t.rows}["hedgemamba"]["gap_teacher_pct"].value for t in tables]
    assert gaps == pytest.approx([100.0, 100.0])


def test_seeds_that_differ_in_where_they_ran_are_averaged(runs):
    runs.add("main", "hedgemamba", 30.0, device="cpu", data="/here/text.jsonl", checkpoint_every=10)
    runs.add("main", "hedgemamba", 32.0, seed=1, device="cuda", data="/there/text.jsonl", checkpoint_every=90)
    assert runs.rows("main")["hedgemamba"]["ppl"].value == 31.0


def test_a_cell_run_twice_counts_once_and_the_last_is_shown(runs):
    runs.add("main", "hedgemamba", 30.0, key="k", record={"provenance": {"started": "2026-02-02"}})
    runs.add("main", "hedgemamba", 31.0, key="k", record={"provenance": {"started": "2026-01-01"}})
    cells = runs.rows("main")["hedgemamba"]
    assert (cells["ppl"].value, cells["seeds"].value) == (30.0, 1)
    assert "2 times (ppl 31.00, 30.00)" in runs.notes("main", "was run")[0]


def test_teachers_that_measure_the_same_do_not_conflict(runs):
    for key in "ab":
        runs.teacher("main", 20.0, key=key)
    assert runs.rows("main")["teacher"]["ppl"] == Cell(20.0, 0.25, one_seed=True)
    runs.teacher("main", 21.0, key="c")
    assert "ppl" not in runs.rows("main")["teacher"]


# --- marks, accuracies and cost ---------------------------------------------------------------------------

def test_best_and_second_best_students_are_marked_where_they_are_ahead_by_more_than_the_error(runs):
    runs.teacher("main", 20.0)
    for row, ppl in (("hedgemamba", 30.0), ("hedgehog", 31.0), ("a", 40.0), ("b", 40.2)):
        runs.add("main", row, ppl)
    marks = {name: cells["ppl"].mark for name, cells in runs.rows("main").items()}
    assert marks == {"teacher": "", "hedgemamba": "best", "hedgehog": "second", "a": "", "b": ""}


def test_a_tie_within_the_error_is_not_marked(runs):
    runs.add("main", "hedgemamba", 30.0)
    runs.add("main", "hedgehog", 30.3)  # the errors are 0.25 each, so that of the difference is 0.354
    runs.add("main", "a", 40.0)
    assert {cells["ppl"].mark for cells in runs.rows("main").values() if "ppl" in cells} == {""}
    runs.add("main", "hedgemamba", 30.0, seed=1)  # now the spread over two equal seeds is 0
    assert runs.rows("main")["hedgemamba"]["ppl"].mark == "best"


def test_accuracies_have_the_harness_error_the_distance_to_the_teacher_and_their_mean(runs):
    runs.teacher("main", metrics=runs.tasks(50.0))
    for seed, start in ((0, 40.0), (1, 43.0)):
        runs.add("main", "hedgemamba", seed=seed, metrics=runs.tasks(start))
    cells = runs.rows("main")["hedgemamba"]
    index = paper.TASKS.index("piqa")
    assert (cells["piqa"].value, cells["piqa"].spread) == pytest.approx((41.5 + index, 1 + index / 10))
    assert cells["piqa_minus_teacher"].value == pytest.approx(-8.5)
    assert cells["mean_accuracy"].value == pytest.approx(41.5 + 4.5)
    errors = [1 + i / 10 for i in range(10)]
    assert cells["mean_accuracy"].spread == pytest.approx(sum(e * e for e in errors) ** 0.5 / 10)
    assert cells["mean_accuracy_minus_teacher"].value == pytest.approx(-8.5)
    published = [paper.TABLES["main"].rows[row] for row in ("hedgemamba", "teacher")]
    mean, teachers = (statistics.mean(row[task] for task in paper.TASKS) for row in published)
    assert cells["paper_mean_accuracy_minus_teacher"].value == pytest.approx(mean - teachers)
    assert cells["paper_piqa_minus_teacher"].value == pytest.approx(68.72 - 70.72)


def test_rows_of_a_study_of_ours_come_as_its_file_lists_them_and_others_after_them(runs):
    for row in ("zebra", "hedgehog + linear path", "gate only", "apple", "hedgehog 10/90"):
        runs.add("controls", row)
    assert list(runs.rows("controls")) == ["hedgehog 10/90", "gate only", "hedgehog + linear path", "apple", "zebra"]


def test_recall_needle_agreement_and_generated_text_have_columns_of_their_own(runs):
    def asked(accuracy, length):
        return {"pairs": 16, "length": length, "accuracy": accuracy, "stderr": 3.0}

    for seed, accuracy in ((0, 10.0), (1, 14.0)):
        runs.add("main", "hedgemamba", seed=seed, metrics={
            "recall": [asked(99.0, 256), asked(accuracy, 1024)],
            "needle": [{"length": length, "depth": depth, "accuracy": 10.0 * length * depth} for length in (1, 4) for depth in (0.5, 1.0)],
            "ppl_at_length": {"lengths": [64, 4096], "ppl": [50.0, 30.0 + seed], "stderr": [None, 2.0], "made_for": 1024},
            "diagnostics": {"layers": [], "without": {"ssm": 4.0 + seed, "gate": -0.5}},
            "agreement": {"top1": {"value": 60.0, "stderr": 0.5}, "kl": {"value": 0.4}},
            "generation": {"greedy": {"repetition": {"value": 30.0 + seed, "stderr": 4.0}}, "sampled": {"teacher_nll": {"value": 5.0}}}})
    cells = runs.rows("main")["hedgemamba"]
    seen = {key: (cells[key].value, cells[key].spread) for key in ("ppl_at_64", "ppl_at_4096", "without_ssm", "without_gate", "recall_16", "needle_1", "needle_4", "agreement_top1", "agreement_kl", "repetition", "teacher_nll")}
    assert seen == {"ppl_at_64": (50.0, None), "ppl_at_4096": (30.5, 2.0), "without_ssm": (4.5, None), "without_gate": (-0.5, None), "recall_16": (12.0, 3.0), "needle_1": (7.5, None), "needle_4": (30.0, None), "agreement_top1": (60.0, 0.5), "agreement_kl": (0.4, None),
                    "repetition": (30.5, 4.0), "teacher_nll": (5.0, None)}
    assert "recall_4" not in cells
    assert [c.label for c in runs.table("main").columns if c.key.startswith("ppl_at")] == ["ppl at\n64", "ppl at\n4096"]
    assert runs.notes("main", "by chance 6.25")


def test_a_mean_accuracy_needs_all_ten_tasks(runs):
    runs.add("main", "hedgemamba", metrics={"piqa": {"value": 60.0, "stderr": 1.0}})
    cells = runs.rows("main")["hedgemamba"]
    assert "piqa" in cells
    assert "mean_accuracy" not in cells


@pytest.mark.parametrize(("device_type", "column"), [("cuda", "gpu_hours"), ("cpu", "cpu_hours")])
def test_hours_are_those_of_both_stages_of_one_seed_times_the_devices(runs, device_type, column):
    for seed, seconds in ((0, 3500), (1, 3700)):
        runs.add("main", "hedgemamba", seed=seed, record={
            "timing": {"stage1_seconds": 100, "student_seconds": seconds, "student_tokens_per_second": 1000 + seed},
            "provenance": {"device_type": device_type, "device": "X", "processes": {"student": 4}}})
    cells = runs.rows("main")["hedgemamba"]
    assert cells[column].value == pytest.approx((100 + 4 * 3600) / 3600)
    assert cells["tokens_per_second"].value == pytest.approx(1000.5)


def test_the_scale_table_has_a_row_for_each_teacher_also_from_the_main_study(runs):
    for teacher, ppl in (("tiny", 20.0), ("smollm2", 12.0)):
        runs.teacher("main", ppl, teacher=teacher, scale=teacher)
        runs.add("main", "hedgemamba", 1.5 * ppl, teacher=teacher, scale=teacher,
                 metrics={"bits_per_byte": {"value": 1.0}})
    rows = runs.rows("scale")
    assert {name: cells["gap_teacher_pct"].value for name, cells in rows.items() if name.startswith("hedge")} == {
        "hedgemamba, smollm2": pytest.approx(50.0), "hedgemamba, tiny": pytest.approx(50.0)}
    assert rows["hedgemamba, tiny"]["bits_per_byte"].value == 1.0


# --- the demo's ordering ----------------------------------------------------------------------------------

def demo(runs, seed, hedgemamba=30.0, hedgehog=31.0, no_stage1=40.0, one_step=180.0):
    runs.add("demo", "hedgemamba 10/90", hedgemamba, seed=seed)
    runs.add("demo", "hedgehog 10/90", hedgehog, seed=seed, mixer="hedgehog")
    runs.add("demo", "0/100", no_stage1, seed=seed, one=0, two=100)
    if one_step:
        runs.add("demo", "one_step", one_step, seed=seed, recipe="one_step", mixer="mamba", one=0, two=100)


def test_the_demo_says_that_the_ordering_held_in_each_seed(runs):
    runs.teacher("demo")
    demo(runs, 0)
    demo(runs, 1, hedgehog=30.0)  # <= allows equal
    assert runs.table("demo").notes[-1].endswith("held in 2 of 2 seeds.")


@pytest.mark.parametrize(("values", "violated"), [
    ({"hedgemamba": 19.0}, "teacher (20.00) < hedgemamba 10/90 (19.00)"),
    ({"hedgemamba": 20.0}, "teacher (20.00) < hedgemamba 10/90 (20.00)"),
    ({"hedgehog": 29.0}, "hedgemamba 10/90 (30.00) <= hedgehog 10/90 (29.00)"),
    ({"no_stage1": 30.5}, "hedgehog 10/90 (31.00) < 0/100 (30.50)"),
    ({"one_step": 39.0}, "0/100 (40.00) < one_step (39.00)"),
])
def test_the_demo_names_the_violated_pair_and_its_seed(runs, values, violated):
    runs.teacher("demo")
    demo(runs, 0)
    demo(runs, 1, **values)
    assert runs.table("demo").notes[-1].endswith(f"held in 1 of 2 seeds; seed 1: {violated} does not hold.")


def test_a_seed_that_lacks_a_row_does_not_count_as_held(runs):
    runs.teacher("demo")
    demo(runs, 0, one_step=None)
    assert runs.table("demo").notes[-1].endswith("held in 0 of 1 seeds; seed 0: no one_step.")


def test_a_demo_without_students_says_so(runs):
    runs.teacher("demo")
    assert runs.table("demo").notes[-1].endswith("nothing is run yet.")


@pytest.mark.parametrize(("value", "kind", "expected"), [
    (None, "ppl", "–"), (38.449, "ppl", "38.45"), (65533.2, "ppl", "65533"), (0.04, "pct", "0.0"),
    (1_800_000, "tokens", "1.8M"), (0, "tokens", "0"), (7.35, "millions", "7.35"),
    (1011.8, "millions", "1012"),
])
def test_numbers_have_the_decimals_of_their_kind(value, kind, expected):
    assert number_text(value, kind) == expected


def test_a_label_says_no_setting_that_follows_from_another_unless_rows_need_it(runs):
    runs.add("main", "x", 30.0, mixer="hedgemamba", ssm=True, gate=True, one=10, two=90, stage2={"loss": "ce", "kl_weight": 0.9})
    runs.add("main", "x", 31.0, mixer="ssm", ssm=True, gate=False, one=50, two=50, stage2={"loss": "kl", "kl_weight": 0.8})
    runs.add("main", "x", 31.0, seed=1, mixer="ssm", ssm=True, gate=False, one=50, two=50, stage2={"loss": "kl", "kl_weight": 0.7})
    labels = {"x (mixer=hedgemamba, stage1_tokens=10, stage2.loss=ce)", "x (mixer=ssm, stage1_tokens=50, stage2.loss=kl)"}
    assert {label for label in runs.rows("main") if label.startswith("x")} == labels
    for seed, weight in ((0, 0.5), (1, 0.1)):
        runs.add("main", "x", 32.0, seed=seed, mixer="ssm", ssm=True, gate=False, one=50, two=50, stage2={"loss": "ce+kl", "kl_weight": weight})
    assert sum("kl_weight=0.1" in label for label in runs.rows("main")) == 1


def test_cells_of_no_study_are_rows_with_their_seeds(runs):
    for seed, ppl in enumerate((30.0, 31.0)):
        runs.add("default", ppl=ppl, seed=seed, cell=f"ssm-10-90-s{seed}", mixer="ssm")
    runs.add("default", ppl=40.0, cell="hedgehog-10-90-s0", mixer="hedgehog")
    rows = runs.rows("default")
    assert {name: (cells["ppl"].value, cells["seeds"].value) for name, cells in rows.items()} == {"ssm-10-90": (30.5, 2), "hedgehog-10-90": (40.0, 1)}
