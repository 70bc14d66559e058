"""Peak memory against sequence length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

GIB = 2**30


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """All ranks' memory together by length, what was there before the step, and a line from the two ends.

    Args:
        rows: of ``long_context.py``'s JSON, those without an error are drawn.
        title: of the picture.
        path: of the PNG.
    """
    good = [row for row in rows if not row["error"]]
    lengths = [row["length"] for row in good]
    peaks = [sum(rank["peak"] for rank in row["ranks"]) / GIB for row in good]
    before = [sum(rank["before"] for rank in row["ranks"]) / GIB for row in good]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if len(good) > 1:
        slope = (peaks[-1] - peaks[0]) / (lengths[-1] - lengths[0])
        ends = (0, lengths[-1])
        values = [peaks[0] + slope * (end - lengths[0]) for end in ends]
        axes.plot(ends, values, color="0.7", linestyle="--", label="line through the ends")
    axes.plot(lengths, peaks, "o-", label="peak, all ranks")
    axes.plot(lengths, before, "s:", color="C1", label="before the step")
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("GiB")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
