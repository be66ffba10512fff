"""Runs and artifacts on disk: computed once, complete or absent, also on a file system shared by many nodes.

    <root>/artifacts/<kind>/<key>/            a finished artifact; artifact.json lists its files with sha256
    <root>/artifacts/<kind>/.<key>.claim      who builds it now (host, pid, token); its mtime is the heartbeat
    <root>/artifacts/<kind>/.<key>.work-<t>/  where holder <t> builds; outlives a crash and is gone on from
    <root>/artifacts/<kind>/.<key>.failed     why the last attempt at it failed (slurm.job)
    <root>/<study>/<cell>-<key>/              one run; record.json comes last and means done
    <root>/<study>/plans/                     the plans of its sweeps, for slurm.status
    <root>/jobs/, jobs.json                   logs of SLURM jobs, and which job computes which step
    <root>/tensorboard/<study>/               event files of training runs

hm.claim says how one of many comes to hold a claim. The next holder renames the work folder to its own name,
so a holder that was only asleep finds its folder gone: it can neither write on nor publish.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hm.claim import Claim, Claimant
from hm.errors import UserError
from hm.files import (
    FULL,
    atomic_write,
    disk_errors,
    file_sha256,
    fsync_dir,
    fsync_tree,
    to_json,
    write_synced,
)

FORMAT = 1
OWN_FOLDERS = ("artifacts", "cache", "jobs", "tensorboard")


def content_key(obj: Mapping, length: int = 16) -> str:
    """The first `length` hex digits of the sha256 of `obj` and FORMAT as JSON, whatever the order of keys.

    Raises TypeError for values that JSON can't hold and ValueError for NaN and infinities.
    """
    return hashlib.sha256(to_json([FORMAT, obj], separators=(",", ":")).encode()).hexdigest()[:length]


def _name(text: str, what: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*", text):
        raise UserError(f"{what} {text!r} can't name a folder: use letters, digits and . _ + = , @ -")
    return text


class Store:
    """The folder `root` (default: HM_RUNS, or ./runs). `heartbeat`, `stale_after` and `poll` are in seconds.

    Raises UserError at once if the folder can't be made or written.
    """

    def __init__(self, root: Path | str | None = None, heartbeat: float = 10.0, stale_after: float = 60.0,
                 poll: float = 0.5) -> None:
        self.root = Path(root or os.environ.get("HM_RUNS") or "runs").expanduser().absolute()
        self.heartbeat, self.stale_after, self.poll = heartbeat, stale_after, poll
        probe = self.root / f".probe.{uuid.uuid4().hex}.tmp"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                write_synced(probe, b"writable")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"`runs` (HM_RUNS) is {self.root}, which can't be written "
                            f"({os.strerror(error.errno or 0)}): choose a folder that can") from error

    # artifacts

    def path(self, kind: str, key: str) -> Path:
        return self.root / "artifacts" / _name(kind, "artifact kind") / _name(key, "artifact key")

    def has(self, kind: str, key: str) -> bool:
        return (self.path(kind, key) / "artifact.json").is_file()

    def read_json(self, kind: str, key: str, name: str = "artifact.json") -> dict[str, Any]:
        """A JSON file of a finished artifact. Raises UserError if it is missing or damaged."""
        return self._load_json(self.path(kind, key) / name)

    def artifact(self, kind: str, key: str, build: Callable[[Path], dict | None],
                 describe: Mapping | None = None) -> Path:
        """The folder of the artifact `kind`/`key`; where it is absent, `build(workdir)` is called to fill it.

        Of all processes on all machines one builds; the others wait for it, and go on from its work folder if
        it dies. What `build` returns is kept as "result" in artifact.json, `describe` (the settings behind
        the key) as "describe". If `build` raises, the claim is released, its work folder stays and the error
        passes on. Raises UserError for a finished artifact with a file missing or cut short, and a full disk.
        """
        final = self.path(kind, key)
        with disk_errors(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
        claimant = Claimant(final.with_name(f".{key}.claim"), self.heartbeat, self.stale_after)
        while not final.exists():
            with disk_errors(final.parent):
                claim = claimant.attempt()
            if claim is None:
                time.sleep(self.poll)
                continue
            try:
                with claim:
                    self._build(final, claim, build, describe)
            except Exception as error:
                if not claim.lost:
                    raise
                print(f"{kind}/{key}: another process took over what this one was building ({error!r}); "
                      "waiting for it", file=sys.stderr, flush=True)
        self.verify(kind, key, checksums=False)
        return final

    def _build(self, final: Path, claim: Claim, build: Callable[[Path], dict | None],
               describe: Mapping | None) -> None:
        work = final.with_name(f".{final.name}.work-{claim.token[:12]}")
        with disk_errors(final.parent, FULL):
            left = sorted(final.parent.glob(f".{final.name}.work-*"), key=lambda path: path.stat().st_mtime)
            if left:
                os.rename(left[-1], work)
                for temp in list(work.rglob(".*.tmp")):
                    shutil.rmtree(temp) if temp.is_dir() else temp.unlink(missing_ok=True)
            if final.exists():  # published since the caller looked, or by one that slept, before the rename
                return
            work.mkdir(exist_ok=True)
            result = build(work)
            files = {path.relative_to(work).as_posix():
                     {"size": path.stat().st_size, "sha256": file_sha256(path)}
                     for path in sorted(work.rglob("*")) if path.is_file() and path != work / "artifact.json"}
            manifest = {"format": FORMAT, "kind": final.parent.name, "key": final.name,
                        "describe": describe or {}, "result": result or {}, "files": files}
            atomic_write(work / "artifact.json", to_json(manifest, indent=1))
            fsync_tree(work)
            if not claim.check():
                raise OSError(errno.ESTALE, f"the claim on {final} was lost")
            os.rename(work, final)
            fsync_dir(final.parent)

    def verify(self, kind: str, key: str, checksums: bool = True) -> None:
        """Raises UserError naming the first file of the artifact that is missing or not as it was written."""
        final = self.path(kind, key)
        remedy = f"delete {final} and run the same command again"
        for name, wanted in self.read_json(kind, key)["files"].items():
            try:
                size = (final / name).stat().st_size
            except FileNotFoundError:
                raise UserError(f"{final / name} is missing ({wanted['size']} bytes): {remedy}") from None
            if size != wanted["size"]:
                raise UserError(f"{final / name} has {size} bytes, expected {wanted['size']}: {remedy}")
            if checksums and (found := file_sha256(final / name)) != wanted["sha256"]:
                raise UserError(f"{final / name} has sha256 {found}, expected {wanted['sha256']}: {remedy}")

    # runs

    def run_path(self, study: str, cell: str, key: str) -> Path:
        """Where the run lies or would lie; nothing is made."""
        if study in OWN_FOLDERS:
            raise UserError(f"study {study!r} is the name of a folder of the store's own: choose another")
        return self.root / _name(study, "study") / f"{_name(cell, 'cell')}-{_name(key, 'key')}"

    def run_dir(self, study: str, cell: str, key: str) -> Path:
        """The folder of one run, made if absent."""
        folder = self.run_path(study, cell, key)
        with disk_errors(folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def next_run_dir(self, study: str, cell: str, key: str) -> Path:
        """A new, empty folder beside the cell's earlier runs: <cell>-<key>, <cell>-<key>.2, and so on."""
        first, n = self.run_path(study, cell, key), 1
        while True:
            folder = first if n == 1 else first.with_name(f"{first.name}.{n}")
            try:
                with disk_errors(folder.parent):
                    folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                n += 1

    def write_record(self, run_dir: Path, record: Mapping) -> Path:
        """Writes record.json, which says that the run is done. ValueError for a number that is not finite."""
        return atomic_write(Path(run_dir) / "record.json", to_json(record, indent=1) + "\n")

    def read_record(self, run_dir: Path) -> dict[str, Any] | None:
        """The run's record; None if it isn't done. Raises UserError if it is damaged."""
        path = Path(run_dir) / "record.json"
        return self._load_json(path) if path.exists() else None

    def records(self, study: str | None = None) -> Iterator[dict[str, Any]]:
        """The records of all runs that are done, of one study or of all, in the order of their folders."""
        for path in sorted(self.root.glob(f"{study or '*'}/*/record.json")):
            if path.parent.parent.name not in OWN_FOLDERS:
                yield self._load_json(path)

    @staticmethod
    def _load_json(path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read ({error}): delete {path.parent} and run the command again"
                            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{path} holds no JSON object: delete {path.parent} and run the command again")
        return value
