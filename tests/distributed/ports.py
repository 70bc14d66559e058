"""TCP ports for worlds that tests start: no two tests of one pytest run are ever given the same."""

from __future__ import annotations

import itertools
import os
import socket
import zlib

PORTS_IN_A_ROW = 32
"""A rank function may start several worlds, each on the next port."""
FIRST_PORT, END_PORT = 15_000, 31_000
"""Below the range from which the system picks ports of outgoing connections (32768 on Linux): none of these is taken
between the look at it and the moment when rank 0 listens. Slurm's tests use those from 31000 on."""
_BLOCKS = (END_PORT - FIRST_PORT) // PORTS_IN_A_ROW
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_CALLS = itertools.count()


def free_port() -> int:
    """The first of ``PORTS_IN_A_ROW`` free ports. Test processes side by side take turns over the blocks; other pytest
    runs on the machine begin elsewhere."""
    start = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode())
    for call in _CALLS:
        block = (start + call * _WORKERS + _WORKER) % (_BLOCKS - _BLOCKS % _WORKERS)
        first = FIRST_PORT + block * PORTS_IN_A_ROW
        if all(_is_free(first + i) for i in range(PORTS_IN_A_ROW)):
            return first
    raise AssertionError("never: itertools.count() has no end")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
