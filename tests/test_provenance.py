import json
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

import hm.provenance
from hm.provenance import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True,
                          text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed git checkout that holds a package hm, from which provenance believes to run."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "hm"
    package.mkdir()
    (package / "__init__.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "hm")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(hm.provenance, "__file__", str(package / "provenance.py"))
    return tmp_path


def test_it_names_code_packages_machine_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "teacher=two words"])
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"][0].isdigit()
    assert found["command"].endswith("sweep.py 'teacher=two words'")
    assert found["cpus"] >= 1
    assert all(found[name] for name in ("host", "platform", "device"))
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["started"])).total_seconds()) < 60


def test_it_is_quick():
    fastest = min(_timed() for _ in range(3))
    assert fastest < 0.3


def _timed() -> float:
    started = time.perf_counter()
    provenance()
    return time.perf_counter() - started


def test_the_commit_is_given_and_whether_tracked_files_changed(checkout):
    assert provenance()["git_commit"] == git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked").touch()
    assert provenance()["git_dirty"] is False
    (checkout / "hm/__init__.py").write_text("changed = True\n")
    assert provenance()["git_dirty"] is True


def test_an_installation_inside_another_checkout_has_no_commit(checkout):
    git(checkout, "rm", "-q", "--cached", "hm/__init__.py")
    found = provenance()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_commit"] is None
