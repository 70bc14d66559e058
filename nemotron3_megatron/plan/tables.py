"""How the plan's tables look."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table


def new_table(title: str, *columns: str) -> Table:
    """A table whose inner columns are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < index < len(columns) - 1 else "left", overflow="fold")
    return table
