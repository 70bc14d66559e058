"""Why a rank ended, as a file: torchrun exits with 1 whatever its ranks' statuses were. Standard library only.

Under the launcher, a rank that fails leaves ``rank_XXXXX.json`` in the directory that ``NEMOTRON3_EXITS`` names.
Without that variable nothing is written.
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nemotron3_megatron.config.cluster import SECRET_NAME

DIRECTORY = "NEMOTRON3_EXITS"
RECORDS_LIMIT = 64
"""Of a segment: a failure of 3,000 ranks needs no more witnesses, and a shared file system no more files."""
_MESSAGE_LENGTH = 2000
_SHORTEST_SECRET = 6
"""Characters; shorter values occur in ordinary text."""
_FAILURE = 1


def recorded(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Call ``main`` and leave a record if it raises; the exception goes on to Python's own report."""
    try:
        return main(arguments)
    except SystemExit:
        raise
    except BaseException as error:
        leave_record(_FAILURE, error)
        raise


def leave_record(code: int, error: BaseException, environment: Mapping[str, str] = os.environ) -> None:
    """Write this rank's record; of several, the first stands. Never raises: the failure itself is what matters."""
    directory = environment.get(DIRECTORY)
    if not directory:
        return
    rank = int(environment.get("RANK", "0"))
    path = Path(directory) / f"rank_{rank:05d}.json"
    record = {
        "rank": rank,
        "code": code,
        "host": socket.gethostname(),
        "time": time.time(),
        "kind": type(error).__name__,
        "message": without_secrets(str(error), environment)[:_MESSAGE_LENGTH],
        "stack": _stack(error),
    }
    try:
        if len(os.listdir(directory)) < RECORDS_LIMIT:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(record, file, indent=2)
    except OSError:
        return


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """``text`` with the values of secret variables replaced by their names."""
    for name, value in environment.items():
        if SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"<{name}>")
    return text


def _stack(error: BaseException) -> list[str]:
    """Places of the exception, outermost first: ``file:line function``. No source lines and no values."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
