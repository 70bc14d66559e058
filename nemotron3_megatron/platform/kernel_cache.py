"""Compiled GPU kernels, kept from one start to the next.

A first start tunes and compiles dozens of Triton kernels, some for half a minute. Triton keeps binaries by itself;
which of its tuned variants won is kept only when asked for before the kernels' modules are imported.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

_log = logging.getLogger(__name__)

CACHE_VARIABLE = "NEMOTRON3_KERNEL_CACHE"
"""Environment variable with the directory; node-local disk is best, one directory a node serves all its ranks."""


def use_kernel_cache() -> Path:
    """Let Triton and torch's compiler keep what they make; call before torch and Megatron-Core are imported.

    Their own variables, where set, win.

    Returns:
        The directory: ``$NEMOTRON3_KERNEL_CACHE``, else ``nemotron3_megatron`` in the user's cache directory; where
        that cannot be written (a read-only home, none at all), one of this process.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    wanted = Path(os.environ.get(CACHE_VARIABLE) or base / "nemotron3_megatron")
    try:
        folder = wanted.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        folder = Path(mkdtemp(prefix="nemotron3_megatron_"))
        why = error.strerror if isinstance(error, OSError) else error
        _log.warning("%s: %s; compiled kernels go to %s, %s names another place", wanted, why, folder, CACHE_VARIABLE)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    return folder


class CompilationLog:
    """Triton's listener: says which kernel was compiled, so that a first start does not look like a hang."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._kernels: set[str] = set()

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        """Called by Triton after each compilation; a kernel has many variants."""
        name = str(src.name)
        if cache_hit or name in self._kernels:
            return
        if not self._kernels:
            _log.info(
                "compiling GPU kernels, once a machine: %s", os.environ.get("TRITON_CACHE_DIR", "for this process")
            )
        self._kernels.add(name)
        _log.info("  %s (kernel %d, %.0f s)", name, len(self._kernels), time.monotonic() - self._started)


def announce_compilation() -> None:
    """Log each kernel that Triton compiles from now on."""
    from triton import knobs

    knobs.compilation.listener = CompilationLog()
