"""The layer map as HTML: the pattern as a coloured strip, cut where the pipeline is, MTP at its end."""

from __future__ import annotations

from collections import Counter
from html import escape

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.sizes import KINDS, Kind, layer_size

_NAMES: dict[Kind, str] = {"mamba": "Mamba-2", "attention": "attention", "moe": "MoE", "mlp": "MLP"}

STYLE = """
.strip { display: flex; flex-wrap: wrap; gap: .7rem 1rem; }
.chunk { border-left: 3px solid #66727f; padding-left: .5rem; }
.chunk > span { display: block; font-size: .8rem; color: #66727f; margin-bottom: .2rem; }
.cells { display: flex; flex-wrap: wrap; gap: 2px; }
.cell, .key { width: 1.25rem; height: 1.7rem; border-radius: 3px; color: #1f2933;
  font: 600 .78rem/1.7rem ui-monospace, monospace; text-align: center; }
.key { display: inline-block; margin-right: .5rem; }
.mamba { background: #b7cde6; } .attention { background: #f2ac33; } .moe { background: #84c9a6; }
.mlp { background: #d5b8d9; }
.legend { list-style: none; padding: 0; margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .5rem 1.8rem; }
@media print { .cell, .key { print-color-adjust: exact; } }
"""


def layer_strip(run: Run) -> str:
    """One box a model chunk, in the order that a token passes them, and one a depth of MTP; then what colours mean."""
    main, *depths = run.layout.hybrid_layer_pattern.split("/")
    chunks, first = [], 0
    for index, chunk in enumerate(main.split("|")):
        chunks.append(_chunk(run, _label(run, index, first, len(chunk)), chunk, first))
        first += len(chunk)
    chunks += [_chunk(run, f"MTP, depth {depth}", pattern, None) for depth, pattern in enumerate(depths, start=1)]
    return f'<div class="strip">\n{"\n".join(chunks)}\n</div>\n{_legend(run)}'


def _label(run: Run, index: int, first: int, count: int) -> str:
    layout = run.layout
    layers = f"layers {first} to {first + count - 1}" if count > 1 else f"layer {first}" if count else "no layer"
    if layout.pp == 1:
        return layers
    chunk = f", chunk {index // layout.pp}" if layout.vpp > 1 else ""
    return f"pipeline rank {index % layout.pp}{chunk}: {layers}"


def _chunk(run: Run, label: str, pattern: str, first: int | None) -> str:
    cells = []
    for index, symbol in enumerate(pattern):
        kind = KINDS[symbol]
        place = label if first is None else f"layer {first + index}"
        says = f"{place}: {_NAMES[kind]}, {layer_size(run.model, kind).total:,} parameters"
        cells.append(f'<div class="cell {kind}" title="{escape(says)}">{escape(symbol)}</div>')
    return f'<div class="chunk"><span>{escape(label)}</span><div class="cells">{"".join(cells)}</div></div>'


def _legend(run: Run) -> str:
    counts = Counter(run.model.pattern)
    entries = []
    for symbol, kind in KINDS.items():
        if counts[symbol]:
            size = layer_size(run.model, kind)
            active = f", {size.active:,} active" if size.active != size.total else ""
            text = f"{counts[symbol]} {_NAMES[kind]}, {size.total:,} parameters each{active}"
            entries.append(f'<li><span class="key {kind}">{escape(symbol)}</span>{escape(text)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'
