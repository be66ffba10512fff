"""The tables of speed, from the files of the benchmarks."""

import json

import pytest

from analysis.bench import load_bench, speed_tables
from analysis.formats import to_markdown
from analysis.make_tables import main


def test_each_kind_and_device_has_a_table_with_the_units_of_its_header(made, tmp_path):
    made.bench(tmp_path)
    training, inference = speed_tables(load_bench(tmp_path)[0])
    assert training.name == "speed (training, NVIDIA H200)"
    [stage1, _] = training.rows
    assert stage1.label == "smollm2, stage1, hedgemamba, ssd, length 1024, batch 16, compile"
    assert stage1.cells["share_of_peak"].value == pytest.approx(31)
    assert stage1.cells["peak_memory_bytes"].value == pytest.approx(40)
    assert inference.rows[0].cells["seconds_per_token"].value == pytest.approx(10)
    assert stage1.commands == ["python -m hm.bench training"]


def test_rows_that_differ_in_gpus_compilation_or_only_in_their_file_are_told_apart(tmp_path):
    row = {"shape": "smollm2", "what": "stage2", "tokens_per_second": 1.0}
    for name, more in (("one", {"gpus": 1}), ("again", {"gpus": 1}), ("ddp", {"gpus": 2, "parallel": "ddp"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"schema": 1, "kind": "training", "rows": [row | more]}))
    (tmp_path / "fast.json").write_text(json.dumps({"schema": 1, "kind": "inference", "compile": True, "rows": [{"model": "student"}]}))
    labels = [row.label for table in speed_tables(load_bench(tmp_path)[0]) for row in table.rows]
    assert labels == ["smollm2, stage2 (again)", "smollm2, stage2, 2 GPUs (ddp)", "smollm2, stage2 (one)", "student, compiled"]


def test_running_out_of_memory_is_a_row(made, tmp_path):
    made.bench(tmp_path)
    last = speed_tables(load_bench(tmp_path)[0])[1].rows[-1]
    assert last.label.endswith("batch 256: out of memory")
    assert last.cells == {}


def test_missing_and_odd_values_are_missing_cells(tmp_path):
    rows = [{"what": "stage2", "tokens_per_second": None, "share_of_peak": "many", "seq_len": "long", "batch": True}, {}]
    (tmp_path / "a.json").write_text(json.dumps({"schema": 1, "kind": "training", "rows": rows}))
    [table] = speed_tables(load_bench(tmp_path)[0])
    assert [row.cells for row in table.rows] == [{}, {}]
    assert "| stage2, length long, batch |" in to_markdown(table)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "kind": "training", "rows": []}', '{"schema": 1, "kind": "x", "rows": []}',
                                  '{"schema": 1, "kind": "training", "rows": {}}', "\udcff", '{"schema": 1, "kind": "training", "rows": [1]}'])
def test_a_file_that_is_no_benchmark_is_listed_and_the_rest_is_read(made, tmp_path, text):
    made.bench(tmp_path)
    (tmp_path / "bad.json").write_bytes(text.encode(errors="surrogateescape"))
    found, problems = load_bench(tmp_path)
    assert (len(found), [name for name, _ in problems]) == (2, ["bad.json"])


def test_no_folder_has_no_benchmarks(tmp_path):
    assert load_bench(tmp_path / "nowhere") == ([], [])


def test_the_command_writes_them_beside_the_studies_and_prints_them_if_they_are_asked_for(made, runs, tmp_path, capsys):
    made.bench(tmp_path / "out/bench")
    runs.teacher("main")
    assert main(["--runs", str(runs.root), "--out", str(tmp_path / "out")]) == 0
    assert "Training speed on NVIDIA H200" in (tmp_path / "out/speed/tables/speed.md").read_text()
    assert "Training speed" not in capsys.readouterr().out  # it may be another machine's
    assert main(["--runs", str(runs.root), "--out", str(tmp_path / "out"), "--bench", str(tmp_path / "out/bench")]) == 0
    assert "Training speed" in capsys.readouterr().out
