"""Records are read flat; one that can't be used is listed with a reason and never stops the others."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.load import load_records
from hm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def good(**changes):
    return {"schema": 1, "study": "main", "cell": "c", "key": "k", "status": "done",
            "settings": {"mixer": "hedgemamba", "seed": 0},
            "metrics": {"ppl": {"value": 20.5, "stderr": 0.1}}, **changes}


def write(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "record.json"
    file.write_text(record if isinstance(record, str) else json.dumps(record))
    return file


def test_a_record_becomes_one_row_with_dotted_columns(tmp_path):
    write(tmp_path / "main/c-k", good(
        row="hedgemamba",
        settings={"seed": 3, "stage2": {"lr": 1e-3}, "stage1.lr": 0.01, "keep_attention": [3, 7]},
        params={"total": 10, "by_part": {"ssm": 4}}, tokens={"stage1": 5, "stage2": 6},
        timing={"stage1": 1.5}, provenance={"packages": {"torch": "2.11"}}))
    [row] = load_records(tmp_path).to_dict("records")
    expected = {"study": "main", "cell": "c", "key": "k", "row": "hedgemamba", "path": "main/c-k/record.json",
                "settings.seed": 3, "settings.stage2.lr": 1e-3, "settings.stage1.lr": 0.01,
                "settings.keep_attention": [3, 7], "metrics.ppl.value": 20.5, "metrics.ppl.stderr": 0.1,
                "params.total": 10, "params.by_part.ssm": 4, "tokens.stage1": 5, "tokens.stage2": 6,
                "timing.stage1": 1.5, "provenance.packages.torch": "2.11"}
    assert {name: row[name] for name in expected} == expected


def test_rows_come_in_the_order_of_their_paths_at_any_depth(tmp_path):
    for name in ("b/deep/er", "a", "c"):
        write(tmp_path / name, good(cell=name))
    write(tmp_path / "artifacts/stage1/x", good(cell="an artifact is no run"))
    frame = load_records(tmp_path)
    assert list(frame["cell"]) == ["a", "b/deep/er", "c"]
    assert frame.attrs["problems"] == []


def test_what_a_record_lacks_is_missing_and_not_zero(tmp_path):
    write(tmp_path / "a", good(tokens={"stage1": 5}))
    write(tmp_path / "b", good())
    assert math.isnan(load_records(tmp_path)["tokens.stage1"][1])


@pytest.mark.parametrize(("broken", "reason"), [
    ("", "empty"),
    (json.dumps(good())[:60], "truncated"),
    ("[1, 2]", "list"),
    (good(schema=2), "schema 2"),
    (good(schema=True), "schema True"),
    ({k: v for k, v in good().items() if k != "schema"}, "schema None"),
    (good(status="failed"), "failed"),
    (good(key=""), "no key"),
    (good(settings=[]), "settings"),
    ({k: v for k, v in good().items() if k != "metrics"}, "metrics"),
    (good(curves=[1]), "curves that are no object"),
    (good(curves={"stage1": [1]}), "curves.stage1 where columns"),
    (good(curves={"stage1": {"tokens": [1, 2], "loss": [0.5]}}), "different lengths in curves.stage1"),
    (good(curves={"student": {"loss": [0.5, True]}}), "curves.student.loss with what is no finite number"),
    (good(metrics={"ppl": {"value": math.nan}}), "NaN"),
    (good(metrics={"ppl": {"value": math.inf}}), "Infinity"),
    (json.dumps(good()).replace("20.5", "1e999"), "metrics.ppl.value = inf"),
    (json.dumps(good(curves={"student": {"loss": [0.125]}})).replace("0.125", "1e999"), "no finite number"),
    (json.dumps(good()).replace("20.5", "9" * 400), "metrics.ppl.value = 99"),
    (good(metrics={"ppl": {"value": "20.5"}}), "'20.5', which is no number"),
    (good(metrics={"ppl": 20.5}), "{value, stderr}"),
    (good(metrics={"ppl": {"value": 0.0}}), "below 1"),
    (good(params={"total": "many"}), "params.total"),
    (good(row=3), "row 3"),
    ("[" * 100_000, "nested too deeply"),
])
def test_a_record_that_cannot_be_used_is_listed_and_the_rest_still_read(tmp_path, broken, reason):
    write(tmp_path / "good", good())
    write(tmp_path / "bad", broken)
    frame = load_records(tmp_path)
    assert list(frame["path"]) == ["good/record.json"]
    [(file, said)] = frame.attrs["problems"]
    assert file == "bad/record.json"
    assert reason in said


def test_bytes_that_are_no_text_are_listed(tmp_path):
    write(tmp_path, "x").write_bytes(b"\xff\xfe{}")
    assert "no text" in load_records(tmp_path).attrs["problems"][0][1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_rights_is_listed(tmp_path):
    write(tmp_path, good()).chmod(0)
    assert "can't be read" in load_records(tmp_path).attrs["problems"][0][1]


def test_lone_surrogates_become_question_marks_so_that_files_can_be_written(tmp_path):
    write(tmp_path, '{"\\ud800": "\\udfff",' + json.dumps(good())[1:])
    frame = load_records(tmp_path)
    assert frame["?"][0] == "?"


def test_a_folder_without_records_is_answered_with_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no record\.json; run `python sweep\.py`"):
        load_records(tmp_path)


def test_a_missing_folder_is_answered_with_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        load_records(tmp_path / "nowhere")


def test_reading_records_and_building_tables_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import analysis.make_tables"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
