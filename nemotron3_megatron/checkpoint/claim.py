"""One job at a time in a run directory.

The claim is a file with its owner in it. Whether the owner still lives is found out without comparing clocks:

- on the owner's machine (same boot, same process namespace) from the process table;
- elsewhere from a counter that the owner writes every BEAT_S seconds: a claim whose counter stands still for
  PATIENCE_S seconds, by the watcher's own monotonic clock, is nobody's.

It is made by ``link``, which is atomic on network file systems too, where ``flock`` often is not. An owner that was
suspended for so long that it lost its claim notices before it publishes anything (:meth:`Claim.require`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron3_megatron.config.errors import UserError

_log = logging.getLogger(__name__)

FILE_NAME = "run.lock"
BEAT_S = 10.0
PATIENCE_S = 45.0
"""Over four beats, and over the time for which NFS clients cache attributes by default (acregmax 60 s applies to
files that have not changed for long; acregmin is 3 s)."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a claim."""

    token: str
    host: str
    machine: str
    """Boot and process namespace: process numbers mean the same only where this is equal."""
    pid: int
    started: int
    """Of the process, in clock ticks since boot: a reused process number is another process."""
    beat: int = 0


class Claim:
    """A held claim; :meth:`take` makes one."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self._path = path
        self._owner = owner
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._pulse.start()

    @classmethod
    def take(cls, run_dir: Path, *, patience_s: float = PATIENCE_S) -> Claim:
        """Claim ``run_dir`` for this process.

        Raises:
            UserError: another job has it, and lives.
        """
        path = Path(run_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        me = Owner(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()))
        with one_at_a_time(path.parent):
            while not _create(path, me):
                other = _read(path)
                if other is not None and _lives(path, other, patience_s):
                    raise UserError(
                        f"run_dir={run_dir}",
                        where=str(path),
                        why=f"process {other.pid} on {other.host} is running in it, and two would overwrite each other",
                        nearest="another run_dir, or end that job first",
                    )
                _log.warning("taking over %s: %s", path, "its owner is gone" if other else "it cannot be read")
                _set_aside(path, other, me)
        return cls(path, me)

    def require(self) -> None:
        """Make sure that the claim is still held.

        Raises:
            UserError: another job has taken it over (this one was suspended, or could not reach the disk).
        """
        current = _read(self._path)
        if current is None or current.token != self._owner.token:
            raise UserError(
                f"run_dir={self._path.parent}",
                where=str(self._path),
                why="another job has taken it over, because this one gave no sign of life; nothing more is written",
            )

    def release(self) -> None:
        """Let the next job in at once."""
        self._ended.set()
        self._pulse.join()
        current = _read(self._path)
        if current is not None and current.token == self._owner.token:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S):
            count += 1
            current = _read(self._path)
            if current is None or current.token != self._owner.token:
                return
            with suppress(OSError):  # a full disk must not end the run here; saving will say so
                _replace(self._path, Owner(**{**asdict(self._owner), "beat": count}))


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let processes on one machine take turns in ``folder``: of several that find the same dead owner, one must not set
    aside the file that another has just made. Network file systems may have no such lock; there
    :meth:`Claim.require` finds out."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lives(path: Path, owner: Owner, patience_s: float) -> bool:
    if owner.machine == _machine():
        return _started(owner.pid) == owner.started
    _log.warning("%s belongs to a job on %s; watching for %.0f s whether it lives", path, owner.host, patience_s)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 4))
        if _read(path) != owner:
            return _read(path) is not None
    return False


def _create(path: Path, owner: Owner) -> bool:
    """Whether the file could be made, complete from its first moment; False if there is one."""
    scratch = path.with_name(f".{path.name}.{owner.token}")
    _write(scratch, owner)
    try:
        os.link(scratch, path)
    except FileExistsError:
        # A network file system may say so of a link that it has made, when its first answer was lost.
        return scratch.stat().st_nlink == 2
    else:
        return True
    finally:
        scratch.unlink()


def _replace(path: Path, owner: Owner) -> None:
    scratch = path.with_name(f".{path.name}.{owner.token}.beat")
    _write(scratch, owner)
    scratch.rename(path)


def _set_aside(path: Path, stale: Owner | None, me: Owner) -> None:
    """Remove a dead owner's file; if another job was quicker, and this is its file, put it back."""
    aside = path.with_name(f".{path.name}.{me.token}.stale")
    with suppress(FileNotFoundError):
        path.rename(aside)
        found = _read(aside)
        if found is not None and (stale is None or found.token != stale.token):
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _write(path: Path, owner: Owner) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(asdict(owner), file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Owner | None:
    """The owner in a file; None if there is no file, or nobody could have written it."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError):
        return None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: no process is ever known to be on this machine
        return f"unknown {secrets.token_hex(8)}"


def _started(pid: int) -> int:
    """When a process of this machine started; -1 if there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[19])  # proc(5): state is field 3, starttime field 22
