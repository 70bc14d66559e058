"""The one error for what a user wrote: shown as a message, never as a stack trace."""

from __future__ import annotations

COMMAND_LINE = "command line"
"""The place of what was written there."""


class UserError(Exception):
    """The user's input is wrong; entry points print it on stderr and exit with status 2.

    Args:
        what: what was set, and to which value, such as ``parallel.tp=3``.
        where: the place it was set at, such as ``recipes/recipe/tiny.yaml:12`` or ``command line``.
        why: why it is impossible.
        nearest: what to write instead: the nearest legal value, or the command that helps.
    """

    def __init__(self, what: str, *, where: str | None = None, why: str = "", nearest: str | None = None) -> None:
        self.what = what
        self.where = where
        self.why = why
        self.nearest = nearest
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        reason = f": {self.why}" if self.why else ""
        legal = f"\n  nearest legal: {self.nearest}" if self.nearest else ""
        return f"{self.what}{place}{reason}{legal}"
