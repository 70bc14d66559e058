"""One self-contained HTML page: tables and pictures, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1100px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .7rem;
  margin: 1rem 0 1.4rem; }
.tile { padding: .7rem .9rem; border: 1px solid #e4e8ec; border-radius: 8px; background: #fafbfc; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: #66727f; font-size: .85rem; }
img { width: 100%; height: auto; margin-bottom: .8rem; border: 1px solid #e4e8ec; border-radius: 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid #e4e8ec; vertical-align: top; }
th, td.name { color: #66727f; font-weight: 500; }
td { overflow-wrap: anywhere; }
td.short { white-space: nowrap; }
@media print { body { margin: 0; } }
"""


_SHORT = 24
"""Characters of a cell that is kept on one line; a date with its time has 19."""


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table; without column names its first column is names."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG and what it shows; ``title`` stands above it unless it is empty."""

    title: str
    shows: str
    png: bytes


def page(
    title: str, pictures: Sequence[Picture], sections: Sequence[Section], tiles: Sequence[tuple[str, str]] = ()
) -> str:
    """The whole page: tiles (value, name), pictures, and sections (those without rows are left out)."""
    tables = [_section(section) for section in sections if section.rows]
    return document(title, [*([_tiles(tiles)] if tiles else []), *map(_picture, pictures), *tables])


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """A page of pieces that are HTML already, below its title; ``style`` is added to the usual one."""
    pieces = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{pieces}\n</body>\n</html>\n"
    )


def image(shows: str, png: bytes) -> str:
    """A PNG inside the page, and in words what it shows."""
    return f'<img alt="{escape(shows)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    pieces = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles]
    return '<div class="tiles">\n' + "\n".join(pieces) + "\n</div>"


def _picture(picture: Picture) -> str:
    heading = f"<h2>{escape(picture.title)}</h2>\n" if picture.title else ""
    return heading + image(picture.shows, picture.png)


def _section(section: Section) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in section.columns)
    lines = [f"<tr>{head}</tr>"] if head else []
    lines += [f"<tr>{_cells(row, first_is_name=not head)}</tr>" for row in section.rows]
    return f"<h2>{escape(section.title)}</h2>\n<table>\n" + "\n".join(lines) + "\n</table>"


def _cells(row: Sequence[str], *, first_is_name: bool) -> str:
    cells = [f"<td{' class="short"' if len(cell) <= _SHORT else ''}>{escape(cell)}</td>" for cell in row]
    if first_is_name and cells:
        cells[0] = f'<td class="name">{escape(row[0])}</td>'
    return "".join(cells)
