"""Where a rank is, kept in memory that the process beside it reads without the rank's help."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass
from typing import Self

_SIZE = 4096
_BEAT = struct.Struct("=dq")
_ASKED_AT, _PLACE_AT = 32, 64
"""Bytes from the beginning, where the beat stands."""
_LONGEST_STAGE = 200
"""Characters of a stage's name that are kept: all of it must fit into a page."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the main thread of a rank is, and since when."""

    phase: str
    step: int
    stage: str
    since: float
    """``time.monotonic``, which all processes of a machine share."""
    limit_s: float | None = None
    """Longest time in this phase; None: no limit."""

    def late(self, now: float) -> bool:
        """Whether the limit has passed."""
        return self.limit_s is not None and now - self.since > self.limit_s


@dataclass(frozen=True, slots=True)
class Seen:
    """One reading."""

    place: Place
    beat: float
    """When the watch thread last had Python's lock; ``time.monotonic``."""
    thread: int
    """Its number, as the kernel counts."""
    asked: bool
    """It wants the native stacks of this rank."""


class SharedPlace:
    """Anonymous memory of one page. Each of its parts has one writer, so none waits for another."""

    def __init__(self, descriptor: int) -> None:
        """Use a file descriptor; see :meth:`create`."""
        self.descriptor = descriptor

    @classmethod
    def create(cls) -> Self:
        """Make the memory.

        Raises:
            OSError: the kernel refuses.
        """
        descriptor = os.memfd_create("place")
        os.truncate(descriptor, _SIZE)
        return cls(descriptor)

    def put(self, place: Place) -> None:
        """The main thread is elsewhere."""
        fields = asdict(place) | {"stage": place.stage[:_LONGEST_STAGE]}
        text = json.dumps(fields).encode()
        os.pwrite(self.descriptor, text.ljust(_SIZE - _PLACE_AT), _PLACE_AT)

    def beat(self, now: float, thread: int) -> None:
        """The watch thread runs."""
        os.pwrite(self.descriptor, _BEAT.pack(now, thread), 0)

    def ask(self) -> None:
        """Ask for the native stacks."""
        os.pwrite(self.descriptor, b"\x01", _ASKED_AT)

    def get(self) -> Seen | None:
        """What is there; None while it is being written, or before."""
        page = os.pread(self.descriptor, _SIZE, 0)
        beat, thread = _BEAT.unpack_from(page)
        try:
            place = Place(**json.loads(page[_PLACE_AT:]))
        except (ValueError, TypeError):
            return None
        return Seen(place, beat, thread, page[_ASKED_AT] == 1)
