"""The published numbers agree with each other and with what the claims say of them."""

import pytest

from analysis import paper
from analysis.paper import Above


def ppl(table, row):
    return paper.TABLES[table].rows[row]["ppl"]


def test_the_same_cell_has_the_same_numbers_in_every_table_that_shows_it():
    tables = paper.TABLES
    assert tables["main"].rows["hedgemamba"] == tables["split"].rows["10/90"] == tables["budget"].rows["10B"]
    assert tables["mixer"].rows["+ssm+conv+gate"] == tables["split"].rows["50/50"]
    assert ppl("main", "hedgehog") == ppl("mixer", "hedgehog")


def test_every_row_has_a_value_or_an_explicit_none_for_every_column():
    assert len(paper.COLUMNS) == 11
    for table in paper.TABLES.values():
        for row in table.rows.values():
            assert tuple(row) == paper.COLUMNS


def test_the_gaps_that_the_claims_state_follow_from_the_tables():
    assert paper.gap(ppl("main", "hedgemamba")) == pytest.approx(1.8, abs=0.05)
    teacher, hedgehog, hedgemamba = (ppl("main", row) for row in ("teacher", "hedgehog", "hedgemamba"))
    assert (hedgehog - hedgemamba) / (hedgehog - teacher) == pytest.approx(0.76, abs=0.005)
    assert "76%" in paper.CLAIMS["C2"].paper
    assert "1.8%" in paper.CLAIMS["C1"].paper


def test_perplexities_quoted_by_claims_are_those_of_the_tables():
    budget = ", ".join(str(row["ppl"]) for row in paper.TABLES["budget"].rows.values())
    assert budget in paper.CLAIMS["C6"].paper
    both = f"0/100 gives {ppl('split', '0/100')}, 100/0 gives {ppl('split', '100/0')}"
    assert both in paper.CLAIMS["C5"].paper
    ladder = [row["ppl"] for row in paper.TABLES["mixer"].rows.values()]
    assert "{}, {}, {}, then {}".format(*ladder) == paper.CLAIMS["C4"].paper
    assert list(paper.CLAIMS) == [f"C{i}" for i in range(1, 9)]


def test_one_step_is_only_known_to_be_above_100():
    assert ppl("one_step", "one_step") == Above(100)
    assert str(Above(100)) == "> 100"
    assert paper.gap(Above(100)) == Above(100 * (100 / 13.86 - 1))
    assert paper.gap(None) is None


def test_stage_tokens_of_the_recipe_are_steps_of_whole_batches():
    for stage in (paper.RECIPE["stage1"], paper.RECIPE["stage2"]):
        tokens = stage["steps"] * paper.RECIPE["batch_sequences"] * paper.RECIPE["sequence_length"]
        assert tokens == pytest.approx(stage["tokens"], rel=0.02)
