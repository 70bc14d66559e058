"""Libraries that only some preparations need, with a message where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from nemotron3_megatron.config.errors import UserError


def library(module: str) -> Any:
    """Import a module of the extra ``data``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(
            f"this preparation needs the package {package}",
            why=str(error),
            nearest=f"pip install {package} (part of the extra [data])",
        ) from error
