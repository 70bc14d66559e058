"""Logging of an entry point: our messages on stderr, the libraries' chatter left out."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress

_NOISY = ("megatron", "torch", "transformer_engine", "wandb")


def to_stderr(text: str) -> None:
    """Write for a person, if there is one: what ends a process must not fail because stderr's reader has gone."""
    with suppress(OSError, ValueError, AttributeError):  # broken, closed, never opened
        sys.stderr.write(text)
        sys.stderr.flush()


def start_logging(rank: int = 0) -> None:
    """Show our INFO messages on rank 0 and warnings of every rank (with its number); hide libraries' warnings.

    Call before Megatron-Core is imported: most of what it warns about (deprecations, optional packages, its own
    source) it says at import, and none of it is about the user's input. `nemotron3 doctor` reports missing packages.
    """
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s %(message)s"))
    ours = logging.getLogger("nemotron3_megatron")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours.propagate = False
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_NOISY)})(\.|$)")
