import errno
import os
import time
from pathlib import Path

import pytest

import hm.store
from hm.errors import UserError
from hm.store import Store, content_key


def write_text(text: str):
    def build(work: Path) -> dict:
        (work / "data.txt").write_text(text)
        return {"length": len(text)}
    return build


def must_not_build(work: Path) -> dict:
    raise AssertionError("built again")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- keys and JSON ------------------------------------------------------------------------------------------

def test_content_key_depends_on_content_and_not_on_order():
    key = content_key({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert key == content_key({"b": {"d": None, "c": (1, 2)}, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert content_key({"a": 1}) != content_key({"a": "1"})
    assert len(content_key({}, length=8)) == 8


@pytest.mark.parametrize(("bad", "error"), [
    ({"lr": float("nan")}, ValueError), ({"lr": [1.0, float("inf")]}, ValueError),
    ({"lr": Path("x")}, TypeError), ({"lr": {3: "x"}}, TypeError), ({"lr": {1, 2}}, TypeError)])
def test_content_key_refuses_what_json_cannot_hold_and_names_it(bad, error):
    with pytest.raises(error, match="lr"):
        content_key(bad)


def test_a_new_format_gives_new_keys(monkeypatch):
    before = content_key({"a": 1})
    monkeypatch.setattr(hm.store, "FORMAT", hm.store.FORMAT + 1)
    assert content_key({"a": 1}) != before


# --- artifacts ----------------------------------------------------------------------------------------------

def test_an_artifact_is_built_once_and_tells_what_it_is(tmp_path):
    store = Store(tmp_path)
    path = store.artifact("shards", "k1", write_text("hello"), describe={"seed": 0})
    assert store.artifact("shards", "k1", must_not_build) == path == store.path("shards", "k1")
    about = store.read_json("shards", "k1")
    assert about["describe"] == {"seed": 0}
    assert about["result"] == {"length": 5}
    assert about["files"]["data.txt"]["size"] == 5
    assert leftovers(path.parent) == []


def test_a_builder_that_raises_gives_the_claim_back_and_keeps_its_work(tmp_path):
    store = Store(tmp_path)

    def fails(work: Path) -> None:
        (work / "half").write_text("half")
        raise RuntimeError("diverged at step 7")

    with pytest.raises(RuntimeError, match="step 7"):
        store.artifact("kind", "key", fails)
    assert not store.has("kind", "key")
    assert not store.path("kind", "key").exists()
    started = time.monotonic()
    path = store.artifact("kind", "key", write_text("whole"))
    assert time.monotonic() - started < 2
    assert (path / "half").exists()


# --- disks that are full, read-only or damaged --------------------------------------------------------------

def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_disk_that_fills_during_a_build_leaves_no_artifact_and_no_claim(tmp_path, monkeypatch, call):
    store = Store(tmp_path)

    def build(work: Path) -> None:
        write_text("x")(work)
        monkeypatch.setattr(os, call, full)

    with pytest.raises(UserError, match="No space left"):
        store.artifact("kind", "key", build)
    monkeypatch.undo()
    assert not store.path("kind", "key").exists()
    assert not store.path("kind", "key").with_name(".key.claim").exists()
    assert store.artifact("kind", "key", write_text("y")).is_dir()


def test_a_root_that_is_no_folder_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HM_RUNS", str(tmp_path / "file/runs"))
    with pytest.raises(UserError, match=r"`runs` \(HM_RUNS\).*file/runs.*Not a directory"):
        Store()


def test_a_read_only_root_is_refused_at_once(tmp_path, monkeypatch):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(hm.store, "write_synced", read_only)
    with pytest.raises(UserError, match=rf"{tmp_path}.*Read-only"):
        Store(tmp_path)


def test_a_truncated_artifact_is_named_when_it_is_opened(tmp_path):
    store = Store(tmp_path)
    path = store.artifact("kind", "key", write_text("0123456789"))
    os.truncate(path / "data.txt", 4)
    with pytest.raises(UserError, match=r"data\.txt has 4 bytes, expected 10: delete .*key"):
        store.artifact("kind", "key", must_not_build)


@pytest.mark.parametrize("name", ["data.txt", "artifact.json"])
def test_a_missing_file_is_named_when_the_artifact_is_opened(tmp_path, name):
    store = Store(tmp_path)
    (store.artifact("kind", "key", write_text("x")) / name).unlink()
    with pytest.raises(UserError, match=name):
        store.artifact("kind", "key", must_not_build)


def test_changed_bytes_are_found_by_the_checksum(tmp_path):
    store = Store(tmp_path)
    path = store.artifact("kind", "key", write_text("0123456789"))
    store.verify("kind", "key")
    (path / "data.txt").write_text("0123456780")
    with pytest.raises(UserError, match=r"data\.txt has sha256"):
        store.verify("kind", "key")


# --- runs ---------------------------------------------------------------------------------------------------

def test_records_come_back_as_written_by_study_or_all(tmp_path):
    store = Store(tmp_path)
    store.artifact("kind", "key", write_text("x"))
    for study, cell in [("split", "b"), ("split", "a"), ("mixer", "c")]:
        run = store.run_dir(study, cell, "k")
        assert store.read_record(run) is None
        store.write_record(run, {"cell": cell, "metrics": {"ppl": {"value": 33.1}}})
    store.run_dir("split", "unfinished", "k")
    assert [r["cell"] for r in store.records("split")] == ["a", "b"]
    assert [r["cell"] for r in store.records()] == ["c", "a", "b"]
    found = store.read_record(store.run_dir("split", "a", "k"))
    assert found == {"cell": "a", "metrics": {"ppl": {"value": 33.1}}}


def test_a_record_with_a_number_that_is_not_finite_is_refused_and_not_written(tmp_path):
    store = Store(tmp_path)
    run = store.run_dir("split", "a", "k")
    with pytest.raises(ValueError, match=r"metrics\.ppl\.value is nan"):
        store.write_record(run, {"metrics": {"ppl": {"value": float("nan")}}})
    assert os.listdir(run) == []


def test_a_damaged_record_is_named(tmp_path):
    store = Store(tmp_path)
    run = store.run_dir("split", "a", "k")
    (run / "record.json").write_text('{"schema": 1, "metr')
    with pytest.raises(UserError, match=r"record\.json"):
        store.read_record(run)


def test_a_forced_run_lies_beside_the_old_ones(tmp_path):
    store = Store(tmp_path)
    assert [store.next_run_dir("split", "a", "k").name for _ in range(3)] == ["a-k", "a-k.2", "a-k.3"]
    assert store.run_dir("split", "a", "k").name == "a-k"


@pytest.mark.parametrize("study", ["../up", "a/b", "", ".hidden", "artifacts", "jobs"])
def test_a_study_that_cannot_name_a_folder_is_refused(tmp_path, study):
    with pytest.raises(UserError, match="study"):
        Store(tmp_path).run_dir(study, "a", "k")
