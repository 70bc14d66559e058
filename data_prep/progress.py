"""Progress through files, so that it is the same in this process, in others, and on other machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITE_SECONDS = 0.5
_POLL_SECONDS = 0.2


class Progress:
    """Bytes of input that a task has used up, written to its file now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._done = 0
        self._written = 0.0

    def advance(self, count: int) -> None:
        """Count bytes."""
        self._done += count
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the count down."""
        self._path.write_text(str(self._done))
        self._written = time.monotonic()


def done(directory: Path) -> int:
    """Bytes that all tasks with files in a directory have used up."""
    return sum(_count(path) for path in directory.glob("*.bytes"))


def _count(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):  # just being written, or just removed
        return 0


@contextmanager
def followed(look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` several times a second while the body runs, and once at its end."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(_POLL_SECONDS):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
