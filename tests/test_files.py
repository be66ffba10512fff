import errno
import os
from pathlib import Path

import pytest

from hm.errors import UserError
from hm.files import NO_FOLDER, atomic_write, disk_errors


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


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/out can't be written"), disk_errors(tmp_path, NO_FOLDER):
        (tmp_path / "out").mkdir(parents=True, exist_ok=True)


def test_disk_errors_lets_other_errors_pass():
    with pytest.raises(FileNotFoundError), disk_errors(Path("/")):
        raise FileNotFoundError(errno.ENOENT, "missing")
