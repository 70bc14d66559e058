"""The import hook that lets Megatron-Core run where there is no CUDA.

``install`` only places one finder; torch is not imported until the first ``megatron.*`` module is looked up.
Then the finder decides once: with CUDA it never interferes, without CUDA it hands every module of Megatron to
:mod:`nemotron3_megatron.platform.rewrite`.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "megatron."


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


class MegatronFinder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.*`` for a machine without CUDA; leaves all else to the ordinary finders."""

    @cached_property
    def _decision(self) -> Callable[[str, Sequence[str] | None, ModuleType | None], ModuleSpec | None]:
        if _cuda_is_available():
            return lambda fullname, path, target: None
        from nemotron3_megatron.platform import rewrite

        rewrite.silence_hints_about_cuda()
        return rewrite.find_rewritten

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a rewritten module, or None to let the next finder look."""
        return self._decision(fullname, path, target) if fullname.startswith(_PACKAGE) else None


def install() -> None:
    """Place the hook (once; further calls do nothing).

    Raises:
        ImportError: Megatron-Core is loaded already, unmodified, on a machine without CUDA.
    """
    if any(isinstance(finder, MegatronFinder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules and not _cuda_is_available():
        raise ImportError(
            "megatron.core was imported before nemotron3_megatron. Without CUDA, Megatron-Core has to be adapted "
            "while it is imported: put `import nemotron3_megatron` before the first import of megatron."
        )
    sys.meta_path.insert(0, MegatronFinder())
