"""The flat files, and what is kept beside the tables."""

import json

import pandas as pd
import pytest

from analysis.export import write_flat
from analysis.load import load_records
from analysis.make_tables import main


def test_parquet_and_csv_have_a_row_for_each_cell_with_settings_and_metrics(runs, tmp_path):
    runs.add("main", "hedgemamba", 30.0, seed=3, keep_attention=[1, 2], metrics={"ppl_by_position": {"positions": [256], "ppl": [31.0]}})
    runs.add("main", "hedgehog", 31.0)
    runs.add("other", "x", 32.0)
    files = write_flat(load_records(runs.root), "main", tmp_path / "out")
    for frame in (pd.read_parquet(files[0]), pd.read_csv(files[1])):
        frame = frame.set_index("row")
        assert list(frame.index) == ["hedgemamba", "hedgehog"]
        assert frame.loc["hedgemamba", "metrics.ppl.value"] == 30.0
        assert frame.loc["hedgemamba", "settings.seed"] == 3
        assert json.loads(frame.loc["hedgemamba", "settings.keep_attention"]) == [1, 2]
        assert json.loads(frame.loc["hedgemamba", "metrics.ppl_by_position.ppl"]) == [31.0]
        assert pd.isna(frame.loc["hedgehog", "settings.keep_attention"])


def test_a_column_of_several_types_becomes_text(runs, tmp_path):
    for value in (1, "many", True):
        runs.add("main", str(value), odd=value)
    frame = pd.read_parquet(write_flat(load_records(runs.root), "main", tmp_path)[0])
    assert sorted(frame["settings.odd"]) == ["1", "many", "true"]


def test_csv_disarms_formulas_and_parquet_keeps_the_text(runs, tmp_path):
    runs.add("main", "=HYPERLINK(1)", **{"=1+1": "@SUM(A1)"})
    files = write_flat(load_records(runs.root), "main", tmp_path)
    assert pd.read_csv(files[1])["row"][0] == "'=HYPERLINK(1)"
    assert "'@SUM(A1)" in files[1].read_text()
    assert pd.read_parquet(files[0])["row"][0] == "=HYPERLINK(1)"


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    runs.add("main", "hedgemamba")
    files = [write_flat(load_records(runs.root), "main", tmp_path / name) for name in "ab"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_losses_are_kept_with_the_record_and_it_reads_the_same_from_there(made, tmp_path):
    made.store(tmp_path / "runs", seeds=(0,), limit=4)
    out = tmp_path / "results"
    assert main(["--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    kept = sorted(p.name for p in out.glob("main/records/hedgehog-s0*/*"))
    assert kept == ["losses.json", "record.json"]
    assert load_records(out).drop(columns="path").equals(load_records(tmp_path / "runs").drop(columns="path"))


@pytest.mark.parametrize("study", ["../up", "..", "a/b"])
def test_a_study_name_never_leads_out_of_the_folder(runs, tmp_path, study):
    runs.add("x", "r")
    file = next(runs.root.rglob("record.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "study": study}))
    for path in write_flat(load_records(runs.root), study, tmp_path / "in/out"):
        assert path.resolve().is_relative_to((tmp_path / "in/out").resolve())
