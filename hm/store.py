"""Runs and artifacts on disk: computed once, complete or absent, also on a file system shared by many nodes.

    <root>/artifacts/<kind>/<key>/            a finished artifact; artifact.json lists its files with sha256
    <root>/artifacts/<kind>/.<key>.claim      who builds it now (host, pid, token); its mtime is the heartbeat
    <root>/artifacts/<kind>/.<key>.work-<t>/  where holder <t> builds; outlives a crash and is gone on from
    <root>/<study>/<cell>-<key>/              one run; record.json comes last and means done

Three rules make a claim safe without advisory locks or synchronised clocks:

1. A claim is made by linking a finished file to its name, which only one process can do.
2. A claim ends (released by its holder, or taken over) only through whoever first creates
   `<claim>.<token>.end`, so one who was slow to see it as stale can't remove its successor. Stale means: the
   waiter saw no change for `stale_after` seconds of its own clock, or the holder's process is gone from this
   very machine.
3. The next holder renames the work folder to its own name. A holder that was only asleep finds its folder
   gone: it can neither write on nor publish.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hm.errors import UserError

FORMAT = 1

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_UNWRITABLE = _FULL | {errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


# --- JSON and keys ------------------------------------------------------------------------------------------

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


def content_key(obj: Mapping, length: int = 16) -> str:
    """The first `length` hex digits of the sha256 of `obj` and FORMAT as JSON, whatever the order of keys.

    Raises TypeError for values that JSON can't hold and ValueError for NaN and infinities.
    """
    return hashlib.sha256(to_json([FORMAT, obj], separators=(",", ":")).encode()).hexdigest()[:length]


# --- files --------------------------------------------------------------------------------------------------

@contextmanager
def disk_errors(folder: Path, codes: set[int] = _UNWRITABLE) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into a UserError naming the folder; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        place = Path(error.filename).parent if isinstance(error.filename, str) else folder
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


def _fsync_tree(folder: Path) -> None:
    for here, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(here, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_dir(Path(here))


def _write_synced(path: Path, data: bytes) -> None:
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
            _write_synced(temp, data.encode() if isinstance(data, str) else data)
            os.replace(temp, path)
            fsync_dir(path.parent)
        finally:
            temp.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _create_exclusive(path: Path, data: bytes) -> bool:
    """Creates `path` holding `data`; True for the one caller, of all machines, that did.

    Not synced: a claim need not outlive the machine, and one must be released also when the disk is full.
    """
    temp = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temp.write_bytes(data)
        try:
            os.link(temp, path)
            return True
        except FileExistsError:
            return os.stat(temp).st_nlink == 2  # NFS: the link was made and its reply got lost
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        try:
            with open(path, "xb") as file:  # O_EXCL
                file.write(data)
            return True
        except FileExistsError:
            return False
    finally:
        temp.unlink(missing_ok=True)


# --- claims -------------------------------------------------------------------------------------------------

def _pid_space() -> str:
    """Names the processes among which a pid means something: the boot of a machine and its pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a live process began, "alive" where that can't be seen, None if there is none with this pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


class _Seen(NamedTuple):
    """A claim as it stands on disk. It is opened and not only stat'ed: opening refreshes NFS's cache."""

    token: str
    mtime_ns: int
    holder: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "_Seen | None":
        try:
            with open(path, "rb") as file:
                text, mtime_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            holder = json.loads(text)
            return cls(str(holder["token"]), mtime_ns, holder)
        except (ValueError, KeyError, TypeError):
            return cls("unreadable", mtime_ns, {})

    def process_is_gone(self) -> bool:
        if self.holder.get("pid_space") != _pid_space():
            return False
        then, now = self.holder["process_start"], _process_start(self.holder["pid"])
        return now is None or (now != then and "alive" not in (now, then))


def _end_claim(path: Path, seen: _Seen, successor: Path | None = None, if_unchanged: bool = False) -> bool:
    """Removes the claim `seen` or puts `successor` in its place; True for the one that did (rule 2)."""
    end = path.with_name(f"{path.name}.{seen.token}.end")
    if not _create_exclusive(end, b""):
        return False
    try:
        now = _Seen.read(path)
        if now is None or now.token != seen.token or (if_unchanged and now.mtime_ns != seen.mtime_ns):
            return False
        if successor is None:
            os.unlink(path)
        else:
            os.replace(successor, path)
        return True
    finally:
        end.unlink(missing_ok=True)


class _Claim:
    """A claim that is held: as a context, renewed by a thread and released at the end. `lost`: taken over."""

    def __init__(self, path: Path, token: str, heartbeat: float) -> None:
        self.path, self.token, self.heartbeat, self.lost = path, token, heartbeat, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"claim {path.name}", daemon=True)

    def check(self) -> bool:
        """Whether the claim is still held, by what the disk says."""
        seen = _Seen.read(self.path)
        self.lost = self.lost or seen is None or seen.token != self.token
        return not self.lost

    def _renew(self) -> None:
        while not self._stop.wait(self.heartbeat):
            try:
                if not self.check():
                    return
                os.utime(self.path)
            except OSError as error:  # the file system may come back before anyone calls the claim stale
                print(f"claim {self.path} could not be renewed: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Claim":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            seen = _Seen.read(self.path)
            self.lost = seen is None or seen.token != self.token or not _end_claim(self.path, seen)
        except OSError as error:  # a full disk, say; what the holder raised must not be hidden by it
            print(f"claim {self.path} could not be released ({error}); it goes stale by itself",
                  file=sys.stderr, flush=True)


class _Claimant:
    """Tries for one claim again and again, and remembers for how long its holder has shown no life."""

    def __init__(self, path: Path, heartbeat: float, stale_after: float) -> None:
        self.path, self.heartbeat, self.stale_after = path, heartbeat, stale_after
        self.seen: _Seen | None = None
        self.since = 0.0

    def attempt(self) -> _Claim | None:
        """The claim, fresh or taken over from the dead; None while another holds it."""
        token = uuid.uuid4().hex
        data = to_json({"token": token, "host": socket.gethostname(), "pid": os.getpid(),
                        "pid_space": _pid_space(), "process_start": _process_start(os.getpid()),
                        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()
        seen = _Seen.read(self.path)
        if seen is None:
            return _Claim(self.path, token, self.heartbeat) if _create_exclusive(self.path, data) else None
        if self.seen is None or seen[:2] != self.seen[:2]:
            if self.seen is None or seen.token != self.seen.token:
                self._tell("waiting for", seen)
            self.seen, self.since = seen, time.monotonic()
        idle = time.monotonic() - self.since
        if idle < self.stale_after and not seen.process_is_gone():
            return None
        if idle > 2 * self.stale_after:  # one that was taking it over died amid that
            self.path.with_name(f"{self.path.name}.{seen.token}.end").unlink(missing_ok=True)
            self.since = time.monotonic() - self.stale_after
        successor = self.path.with_name(f"{self.path.name}.{token}.next")
        try:
            successor.write_bytes(data)
            if not _end_claim(self.path, seen, successor, if_unchanged=True):
                return None
        finally:
            successor.unlink(missing_ok=True)
        self._tell("taking over from the dead holder of", seen)
        return _Claim(self.path, token, self.heartbeat)

    def _tell(self, what: str, seen: _Seen) -> None:
        who = seen.holder
        artifact = f"{self.path.parent.name}/{self.path.name.removeprefix('.').removesuffix('.claim')}"
        print(f"{what} {artifact}: host {who.get('host', '?')}, pid {who.get('pid', '?')}, "
              f"since {who.get('time', '?')}", file=sys.stderr, flush=True)


# --- the store ----------------------------------------------------------------------------------------------

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
                _write_synced(probe, b"writable")
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
        claimant = _Claimant(final.with_name(f".{key}.claim"), self.heartbeat, self.stale_after)
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

    def _build(self, final: Path, claim: _Claim, build: Callable[[Path], dict | None],
               describe: Mapping | None) -> None:
        work = final.with_name(f".{final.name}.work-{claim.token[:12]}")
        with disk_errors(final.parent, _FULL):
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
            _fsync_tree(work)
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

    def _run_path(self, study: str, cell: str, key: str) -> Path:
        if study == "artifacts":
            raise UserError("study 'artifacts' is the name of the store's own folder: choose another")
        return self.root / _name(study, "study") / f"{_name(cell, 'cell')}-{_name(key, 'key')}"

    def run_dir(self, study: str, cell: str, key: str) -> Path:
        """The folder of one run, made if absent."""
        folder = self._run_path(study, cell, key)
        with disk_errors(folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def next_run_dir(self, study: str, cell: str, key: str) -> Path:
        """A new, empty folder beside the cell's earlier runs: <cell>-<key>, <cell>-<key>.2, and so on."""
        first, n = self._run_path(study, cell, key), 1
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
            if path.parent.parent.name != "artifacts":
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
