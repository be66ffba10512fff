"""Many processes and machines want the same artifact; the claims of hm.claim are tried through the store."""

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

import hm.claim
from hm.store import Store

# Children skip hm/__init__.py, so that they start in a moment whatever it imports.
CHILD = f"""
import os, sys, time, types
from pathlib import Path
package = types.ModuleType("hm")
package.__path__ = [{str(Path(hm.claim.__file__).parent)!r}]
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
    seen = hm.claim._Seen.read(claim)
    successor = tmp_path / "successor"
    successor.write_text(json.dumps({"token": "mine"}))
    assert hm.claim._end_claim(claim, seen, successor)
    assert not hm.claim._end_claim(claim, seen)
    assert hm.claim._Seen.read(claim).token == "mine"


def test_only_one_at_a_time_may_end_a_claim(tmp_path):
    claim = foreign_claim(Store(tmp_path), "kind", "key")
    seen = hm.claim._Seen.read(claim)
    claim.with_name(claim.name + ".theirs.end").touch()
    assert not hm.claim._end_claim(claim, seen)
    assert claim.exists()


def test_an_artifact_finished_between_look_and_claim_is_not_built_again(tmp_path, monkeypatch):
    store, attempt = Store(tmp_path), hm.claim.Claimant.attempt

    def late(claimant):
        monkeypatch.undo()
        Store(tmp_path).artifact("kind", "key", write_text("theirs"))
        return attempt(claimant)

    monkeypatch.setattr(hm.claim.Claimant, "attempt", late)
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
