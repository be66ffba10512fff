"""Files that are whole or absent: JSON, atomic and synced writes, and what to say when the disk refuses."""

import errno
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hm.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
UNWRITABLE = FULL | {errno.EACCES, errno.EPERM}
NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}  # a file lies where a folder belongs


def to_json(obj: Any, **style: Any) -> str:
    """JSON with sorted keys. TypeError for what JSON can't hold (also keys not text), ValueError for NaN."""
    return json.dumps(_plain(obj, ""), sort_keys=True, allow_nan=False, **style)


def _plain(obj: Any, where: str) -> Any:
    if isinstance(obj, Mapping):
        for name in obj:
            if not isinstance(name, str):
                raise TypeError(f"key {name!r} in {where or 'the object'} is not text, which JSON needs")
        return {name: _plain(value, f"{where}.{name}" if where else name) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value, f"{where}[{i}]") for i, value in enumerate(obj)]
    if isinstance(obj, float) and not math.isfinite(obj):
        raise ValueError(f"{where or 'the value'} is {obj}, which JSON can't hold")
    if not isinstance(obj, str | int | float | bool | None):
        raise TypeError(f"{where or 'the value'} is a {type(obj).__name__}, which JSON can't hold")
    return obj


@contextmanager
def disk_errors(folder: Path, codes: set[int] = UNWRITABLE) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into a UserError naming the folder; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        place = folder
        if isinstance(error.filename, str):
            place = Path(error.filename) if error.errno in NO_FOLDER else Path(error.filename).parent
        raise UserError(f"{place} can't be written ({os.strerror(error.errno)}): free space or give rights "
                        "there, or set `runs` (HM_RUNS) to another folder, and run it again") from error


def fsync_dir(folder: Path) -> None:
    """Makes the names in `folder` durable, where the file system can."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Makes all files below `folder` durable, and their names."""
    for here, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(here, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_dir(Path(here))


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and syncs it; FileExistsError if there is one of that name."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def atomic_write(path: Path, data: bytes | str) -> Path:
    """Writes `data` to `path`; a crash leaves the old file or the new one. UserError on a full disk."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path.parent):
        try:
            write_synced(temp, data.encode() if isinstance(data, str) else data)
            os.replace(temp, path)
            fsync_dir(path.parent)
        finally:
            temp.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def weight_errors() -> Iterator[None]:
    """Raises what safetensors says of a full disk as the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
