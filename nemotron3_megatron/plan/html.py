"""``nemotron3 plan --html FILE``: the plan as one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table
from rich.text import Text

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan import layer_strip
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.plan.features import features_table
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.memory import GIB, memory_plan
from nemotron3_megatron.plan.memory_table import draw_memory_chart, memory_tables
from nemotron3_megatron.plan.precision_table import notes, precision_table, shares_table
from nemotron3_megatron.plan.report import draw_map, origins_table, schedule_table
from nemotron3_megatron.plan.schedule_chart import draw_schedule
from nemotron3_megatron.plan.time import estimate
from nemotron3_megatron.plan.time_table import communication_table, time_table
from nemotron3_megatron.telemetry.html import document, image
from nemotron3_megatron.telemetry.throughput import format_count, format_duration

_STYLE = """
body { max-width: 1240px; }
.lead, .caption, .note { color: #4a5663; }
.lead { margin: 0 0 1.4rem; }
.caption { margin: 1.3rem 0 .3rem; font-size: .93rem; }
.note { margin: .3rem 0; font-size: .87rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .8rem; margin: 0; }
.figures div { background: #f3f5f7; border-radius: 8px; padding: .7rem .9rem; }
.figures dt { font-size: .82rem; color: #4a5663; }
.figures dd { margin: 0; }
.figures data { font-size: 1.35rem; font-weight: 600; display: block; line-height: 1.4; }
.figures small { color: #4a5663; font-size: .78rem; }
.scroll { overflow-x: auto; }
.scroll table { font-size: .9rem; }
th { white-space: nowrap; color: #4a5663; }
th:last-child, td:last-child { padding-right: 0; }
.right { text-align: right; }
.right, .short { white-space: nowrap; }
td { overflow-wrap: normal; }
.long { overflow-wrap: anywhere; min-width: 14rem; }
.narrow { max-width: 60rem; }
img { box-sizing: border-box; }
.over data { color: #b3261e; }
@media (max-width: 800px) { th, td { padding-right: .8rem; } .long { min-width: 10rem; } }
"""

_NUMBER = re.compile(r"[\d.,]+(%| GB)?")
_SHORT, _LONG = 18, 48
"""Characters: shorter cells break nowhere, longer ones anywhere."""

_LEGIBLE = 0.4
"""CSS pixels for one of a wide picture (160 a printed inch), at the least; narrower windows scroll it."""


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    value: float
    """Exact, as in the plan's JSON."""
    shown: str
    note: str
    is_over: bool = False
    """More than there is."""


def write_page(path: Path, run: Run) -> None:
    """Write the page; its directory is made.

    Raises:
        UserError: the file cannot be written.
    """
    text = plan_page(run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(
            f"--html {path}", where="command line", why=why, nearest="a file in a directory of yours"
        ) from None


def plan_page(run: Run) -> str:
    """The page: key figures, layers, precision, memory, schedule, step, traffic, time, origins; nothing is fetched."""
    pieces = [_head(run), _title("Layers"), layer_strip.layer_strip(run), *_precision(run), *_memory(run)]
    pieces += [
        _title("Schedule"),
        _picture(draw_schedule, run, "Learning rate over tokens"),
        *_tables(schedule_table(run)),
    ]
    pieces += [_title("A step"), *_tables(features_table(run))]
    pieces += [_title("Communication"), *_tables(communication_table(run)), _title("Time"), *_tables(time_table(run))]
    pieces += [_title("Origins"), *_tables(origins_table(run))]
    return document(f"{run.name}: plan", pieces, layer_strip.STYLE + _STYLE)


def _head(run: Run) -> str:
    layout, gpu = run.layout, gpu_of(run)
    sizes = ", ".join(
        f"{name.upper()} {getattr(layout, name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
    )
    tokens = run.tokens_at(run.total_steps)
    lead = (
        f"{layout.world_size:,} {gpu.name.upper()} ({sizes}); precision {run.precision.name};"
        f" {format_count(tokens)} tokens in {run.total_steps:,} steps"
    )
    cards = "\n".join(_card(figure) for figure in _figures(run))
    return f'<p class="lead">{escape(lead)}</p>\n<dl class="figures">\n{cards}\n</dl>'


def _card(figure: _Figure) -> str:
    alarm = ' class="over"' if figure.is_over else ""
    value = f'<data value="{figure.value}">{escape(figure.shown)}</data><small>{escape(figure.note)}</small>'
    return f"<div{alarm}><dt>{escape(figure.name)}</dt><dd>{value}</dd></div>"


def _figures(run: Run) -> Iterator[_Figure]:
    gpu, counts, memory = gpu_of(run), count_parameters(run.model), memory_plan(run).fullest
    guess, tokens, gib = estimate(run, gpu), run.tokens_at(run.total_steps), memory.total / GIB
    rate, of_gpu = guess.tokens_per_second_per_gpu, f"of {gpu.memory_gib:.0f} GiB, fullest GPU"
    yield _Figure("parameters", counts.total, format_count(counts.total), f"{counts.total:,}")
    yield _Figure("active per token", counts.active, format_count(counts.active), f"{counts.active:,}")
    if counts.mtp:
        yield _Figure("MTP, beside", counts.mtp, format_count(counts.mtp), f"{counts.mtp:,}")
    yield _Figure("tokens", tokens, format_count(tokens), f"{run.own_stages[0].tokens_per_step:,} a step")
    yield _Figure("memory", gib, f"{gib:.3g} GiB", of_gpu, is_over=gib > gpu.memory_gib)
    yield _Figure("step", guess.step_seconds, f"{guess.step_seconds:.3g} s", "estimate")
    yield _Figure("tokens/s a GPU", rate, f"{rate:,.0f}", f"{guess.tflops_per_gpu:,.0f} TFLOP/s")
    yield _Figure("MFU", guess.mfu, f"{guess.mfu:.1%}", f"of {gpu.name.upper()}'s BF16 peak")
    days = f"{guess.days:.3g} days without restarts"
    yield _Figure("whole run", guess.days, format_duration(guess.days * 86400), days)
    hours = guess.gpu_hours
    yield _Figure("GPU-hours", hours, format_count(hours) if hours > 100 else f"{hours:.2g}", "all stages")


def _precision(run: Run) -> list[str]:
    remarks = [f'<p class="note">{escape(Text.from_markup(note).plain)}</p>' for note in notes(run)]
    drawn = _picture(draw_map, run, "Format of every linear, layers from left to right", _LEGIBLE)
    tables = _tables(precision_table(run.precision_plan, run.precision), shares_table(run))
    return [_title("Precision"), drawn, *tables, *remarks]


def _memory(run: Run) -> list[str]:
    drawn = _picture(draw_memory_chart, run, "Memory of the fullest GPU by pipeline rank and term")
    drawn = f'<div class="narrow">{drawn}</div>'
    return [_title("Memory"), drawn, *_tables(*memory_tables(run))]


def _title(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _picture(draw: Callable[[Path, Run], None], run: Run, shows: str, legible: float = 0.0) -> str:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "picture.png"
        draw(path, run)
        png = path.read_bytes()
    width = int.from_bytes(png[16:20])  # PNG: signature 8 bytes, IHDR's length and name 8, width 4
    return f'<div class="scroll"><div style="min-width: {round(width * legible)}px">{image(shows, png)}</div></div>'


def _tables(*tables: Table) -> list[str]:
    """The console's tables, each below its title."""
    return [piece for table in tables if table.row_count for piece in (_caption(table), _table(table))]


def _caption(table: Table) -> str:
    return f'<p class="caption">{escape(_plain(table.title))}</p>'


def _table(table: Table) -> str:
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    numbers = [any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells if cell) for cells in columns]
    head = _row("th", [_plain(column.header) for column in table.columns], numbers)
    body = "\n".join(_row("td", cells, numbers) for cells in zip(*columns, strict=True))
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(tag: str, cells: Sequence[str], numbers: Sequence[bool]) -> str:
    pieces = []
    for text, is_number in zip(cells, numbers, strict=True):
        kind = "right" if is_number else "short" if len(text) < _SHORT else "long" if len(text) > _LONG else "text"
        pieces.append(f'<{tag} class="{kind}">{escape(text)}</{tag}>')
    return f"<tr>{''.join(pieces)}</tr>"


def _plain(cell: object) -> str:
    """A cell's text without the console's markup."""
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
