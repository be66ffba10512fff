import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import hm.store
from hm.errors import UserError
from hm.store import Store, atomic_write, content_key, disk_errors

# Children skip hm/__init__.py, so that they start in a moment whatever it imports.
CHILD = f"""
import os, sys, time, types
from pathlib import Path
package = types.ModuleType("hm")
package.__path__ = [{str(Path(hm.store.__file__).parent)!r}]
sys.modules["hm"] = package
from hm.store import Store
root = Path(sys.argv[1])
store = Store(root / "runs", poll=0.02)
"""


def child(root: Path, code: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD + code, str(root)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def write_text(text: str):
    def build(work: Path) -> dict:
        (work / "data.txt").write_text(text)
        return {"length": len(text)}
    return build


def must_not_build(work: Path) -> dict:
    raise AssertionError("built again")


def foreign_claim(store: Store, kind: str, key: str) -> Path:
    """A claim held by a process on a machine that can't be looked at."""
    claim = store.path(kind, key).with_name(f".{key}.claim")
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps({"token": "theirs", "host": "node7", "pid": 1, "pid_space": "elsewhere",
                                 "process_start": "1", "time": "2026-01-01T00:00:00Z"}))
    return claim


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


# --- one builder --------------------------------------------------------------------------------------------

def test_an_artifact_is_built_once_and_tells_what_it_is(tmp_path):
    store = Store(tmp_path)
    path = store.artifact("shards", "k1", write_text("hello"), describe={"seed": 0})
    assert store.artifact("shards", "k1", must_not_build) == path == store.path("shards", "k1")
    about = store.read_json("shards", "k1")
    assert about["describe"] == {"seed": 0}
    assert about["result"] == {"length": 5}
    assert about["files"]["data.txt"]["size"] == 5
    assert leftovers(path.parent) == []


def test_processes_that_start_together_build_each_artifact_once(tmp_path):
    code = """
def build(work):
    with open(root / "log", "a") as log:
        log.write(work.name.split(".")[1] + "\\n")
    time.sleep(0.01)
    (work / "x").write_text("x")
while not (root / "go").exists(): time.sleep(0.001)
for i in range(15):
    assert (store.artifact("kind", f"key{i}", build) / "x").read_text() == "x"
"""
    children = [child(tmp_path, code) for _ in range(4)]
    (tmp_path / "go").touch()
    assert [(c.wait(30), c.stderr.read())[0] for c in children] == [0] * 4
    built = Counter((tmp_path / "log").read_text().split())
    assert built == {f"key{i}": 1 for i in range(15)}
    assert leftovers(tmp_path / "runs/artifacts/kind") == []


def test_a_second_process_waits_says_for_whom_and_computes_nothing(tmp_path, capfd):
    holder = child(tmp_path, """
def build(work):
    (root / "building").touch()
    while not (root / "finish").exists(): time.sleep(0.01)
    (work / "x").write_text("theirs")
store.artifact("kind", "key", build)
""")
    wait_for(tmp_path / "building")
    threading.Timer(0.3, (tmp_path / "finish").touch).start()
    path = Store(tmp_path / "runs", poll=0.02).artifact("kind", "key", must_not_build)
    assert (path / "x").read_text() == "theirs"
    assert holder.wait(10) == 0
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert "waiting for kind/key" in told[0]
    assert f"pid {holder.pid}" in told[0]


def test_a_killed_holder_is_replaced_at_once_and_its_work_gone_on_from(tmp_path, capfd):
    holder = child(tmp_path, """
def build(work):
    (work / "half").write_text("done before the kill")
    (work / ".half.0.tmp").write_text("amid an atomic write")
    (root / "building").touch()
    time.sleep(60)
store.artifact("kind", "key", build)
""")
    wait_for(tmp_path / "building")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(10)

    def build(work: Path) -> None:
        assert (work / "half").read_text() == "done before the kill"

    started = time.monotonic()
    path = Store(tmp_path / "runs", poll=0.02).artifact("kind", "key", build)
    assert time.monotonic() - started < 2
    assert sorted(p.name for p in path.iterdir()) == ["artifact.json", "half"]
    assert leftovers(path.parent) == []
    assert "taking over" in capfd.readouterr().err


def test_a_silent_holder_on_another_machine_is_replaced_by_one_of_many_waiters(tmp_path):
    store = Store(tmp_path, stale_after=0.4, poll=0.005)
    foreign_claim(store, "kind", "key")
    built = []
    started = time.monotonic()

    def build(work: Path) -> None:
        built.append(time.monotonic() - started)
        time.sleep(0.1)

    waiters = [threading.Thread(target=store.artifact, args=("kind", "key", build)) for _ in range(8)]
    for thread in waiters:
        thread.start()
    for thread in waiters:
        thread.join(20)
    assert len(built) == 1
    assert built[0] >= 0.4
    assert leftovers(tmp_path / "artifacts/kind") == []


def test_a_holder_on_another_machine_that_shows_life_is_left_alone(tmp_path):
    store = Store(tmp_path, stale_after=0.3, poll=0.02)
    claim = foreign_claim(store, "kind", "key")
    result = []
    waiter = threading.Thread(target=lambda: result.append(store.artifact("kind", "key", write_text("mine"))))
    waiter.start()
    for beat in range(15):
        os.utime(claim, (beat, beat))  # a clock that is years off must not matter
        time.sleep(0.06)
    assert not result
    claim.unlink()
    waiter.join(10)
    assert result


def test_a_holder_that_works_long_renews_its_claim(tmp_path):
    building, built = threading.Event(), []

    def slow(work: Path) -> None:
        built.append("first")
        building.set()
        time.sleep(1)

    store = Store(tmp_path, heartbeat=0.05, stale_after=0.4, poll=0.02)
    thread = threading.Thread(target=store.artifact, args=("kind", "key", slow))
    thread.start()
    assert building.wait(10)
    store.artifact("kind", "key", lambda work: built.append("second"))
    thread.join(10)
    assert built == ["first"]


def test_one_that_was_slow_to_end_a_stale_claim_leaves_its_successor_alone(tmp_path):
    claim = foreign_claim(Store(tmp_path), "kind", "key")
    seen = hm.store._Seen.read(claim)
    successor = tmp_path / "successor"
    successor.write_text(json.dumps({"token": "mine"}))
    assert hm.store._end_claim(claim, seen, successor)
    assert not hm.store._end_claim(claim, seen)
    assert hm.store._Seen.read(claim).token == "mine"


def test_only_one_at_a_time_may_end_a_claim(tmp_path):
    claim = foreign_claim(Store(tmp_path), "kind", "key")
    seen = hm.store._Seen.read(claim)
    claim.with_name(claim.name + ".theirs.end").touch()
    assert not hm.store._end_claim(claim, seen)
    assert claim.exists()


def test_an_artifact_finished_between_look_and_claim_is_not_built_again(tmp_path, monkeypatch):
    store, attempt = Store(tmp_path), hm.store._Claimant.attempt

    def late(claimant):
        monkeypatch.undo()
        Store(tmp_path).artifact("kind", "key", write_text("theirs"))
        return attempt(claimant)

    monkeypatch.setattr(hm.store._Claimant, "attempt", late)
    path = store.artifact("kind", "key", must_not_build)
    assert (path / "data.txt").read_text() == "theirs"


def test_a_taker_that_died_while_taking_over_blocks_nobody(tmp_path):
    store = Store(tmp_path, stale_after=0.1, poll=0.02)
    claim = foreign_claim(store, "kind", "key")
    claim.with_name(claim.name + ".theirs.end").touch()
    assert store.artifact("kind", "key", write_text("x")).is_dir()


@pytest.mark.parametrize("makes_folders", [False, True])
def test_a_holder_that_slept_and_was_replaced_cannot_publish(tmp_path, makes_folders):
    asleep, replaced, paths = threading.Event(), threading.Event(), []

    def sleeper(work: Path) -> None:
        (work / "half").touch()
        asleep.set()
        assert replaced.wait(10)
        if makes_folders:
            work.mkdir(parents=True)
        (work / "data.txt").write_text("stale")

    def successor(work: Path) -> None:
        assert (work / "half").exists()
        replaced.set()
        time.sleep(0.3)
        (work / "data.txt").write_text("fresh")

    first = Store(tmp_path, heartbeat=1000, poll=0.02)
    thread = threading.Thread(target=lambda: paths.append(first.artifact("kind", "key", sleeper)))
    thread.start()
    assert asleep.wait(10)
    paths.append(Store(tmp_path, stale_after=0.2, poll=0.02).artifact("kind", "key", successor))
    thread.join(10)
    assert len(set(paths)) == 1
    assert (paths[0] / "data.txt").read_text() == "fresh"


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


def test_without_hard_links_one_of_many_still_builds(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store, built = Store(tmp_path, poll=0.005), []

    def build(work: Path) -> None:
        built.append(work)
        time.sleep(0.1)

    threads = [threading.Thread(target=store.artifact, args=("kind", "key", build)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(built) == 1
    assert leftovers(tmp_path / "artifacts/kind") == []


# --- disks that are full, read-only or damaged --------------------------------------------------------------

def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new(tmp_path, monkeypatch, call):
    path = atomic_write(tmp_path / "record.json", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match=f"{tmp_path}.*No space left"):
            atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


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

    monkeypatch.setattr(hm.store, "_write_synced", read_only)
    with pytest.raises(UserError, match=rf"{tmp_path}.*Read-only"):
        Store(tmp_path)


def test_disk_errors_lets_other_errors_pass():
    with pytest.raises(FileNotFoundError), disk_errors(Path("/")):
        raise FileNotFoundError(errno.ENOENT, "missing")


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


@pytest.mark.parametrize("study", ["../up", "a/b", "", ".hidden", "artifacts"])
def test_a_study_that_cannot_name_a_folder_is_refused(tmp_path, study):
    with pytest.raises(UserError, match="study"):
        Store(tmp_path).run_dir(study, "a", "k")
