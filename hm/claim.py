"""A claim on one name that many processes on many machines want: one holds it, and the dead are replaced.

Two rules make a claim safe without advisory locks or synchronised clocks:

1. A claim is made by linking a finished file to its name, which only one process can do.
2. A claim ends (released by its holder, or taken over) only through whoever first creates
   `<claim>.<token>.end`, so one who was slow to see it as stale can't remove its successor. Stale means: the
   waiter saw no change for `stale_after` seconds of its own clock, or the holder's process is gone from this
   very machine.

A holder that was only asleep can still wake up; what it then does is harmless by the store's own rule.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from hm.files import to_json

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


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


def holder(path: Path, stale_after: float) -> dict[str, Any] | None:
    """Who holds the claim (host, pid, time, job), for one who only looks; None if nobody does who shows life.

    Unlike a `Claimant` this trusts the clocks of the two machines.
    """
    seen = _Seen.read(path)
    if seen is None or time.time() - seen.mtime_ns / 1e9 > stale_after or seen.process_is_gone():
        return None
    return seen.holder


def slurm_job() -> str | None:
    """The id of the SLURM job that this process runs in: 123, or 123_4 in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


class Claim:
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

    def __enter__(self) -> "Claim":
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


class Claimant:
    """Tries for one claim again and again, and remembers for how long its holder has shown no life."""

    def __init__(self, path: Path, heartbeat: float, stale_after: float) -> None:
        self.path, self.heartbeat, self.stale_after = path, heartbeat, stale_after
        self.seen: _Seen | None = None
        self.since = 0.0

    def attempt(self) -> Claim | None:
        """The claim, fresh or taken over from the dead; None while another holds it."""
        token = uuid.uuid4().hex
        data = to_json({"token": token, "host": socket.gethostname(), "pid": os.getpid(),
                        "pid_space": _pid_space(), "process_start": _process_start(os.getpid()), "job": slurm_job(),
                        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()
        seen = _Seen.read(self.path)
        if seen is None:
            return Claim(self.path, token, self.heartbeat) if _create_exclusive(self.path, data) else None
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
        return Claim(self.path, token, self.heartbeat)

    def _tell(self, what: str, seen: _Seen) -> None:
        who = seen.holder
        artifact = f"{self.path.parent.name}/{self.path.name.removeprefix('.').removesuffix('.claim')}"
        print(f"{what} {artifact}: host {who.get('host', '?')}, pid {who.get('pid', '?')}, "
              f"since {who.get('time', '?')}", file=sys.stderr, flush=True)
