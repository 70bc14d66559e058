"""The pictures show each operand where it belongs, in the colour of its value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from nemotron3_megatron.telemetry import OperandRecord, StepRecord
from nemotron3_megatron.telemetry.precision_map import draw_precision_history, draw_precision_map

Step = Callable[..., StepRecord]
Operands = tuple[OperandRecord, ...]


def pixels(path: Path, colour: tuple[float, ...]) -> int:
    """How many pixels of the picture are close to a colour."""
    return int((np.abs(imread(path)[..., :3] - np.array(colour[:3])).max(axis=-1) < 0.02).sum())


def test_the_map_colours_each_operand_by_its_share(tmp_path: Path, step: Step, operands: Operands) -> None:
    path = tmp_path / "map.png"
    draw_precision_map(path, step(1, precision=operands), title="t")
    shares = colormaps["magma_r"]
    # The colour bar has every colour too, each a line of a few pixels.
    cell = pixels(path, shares(0.1 / 0.3))
    assert cell > 2000
    for other in (0.05, 0.3):
        assert pixels(path, shares(other / 0.3)) == pytest.approx(cell, rel=0.25)
    assert pixels(path, shares(0.0)) == pytest.approx(2 * cell, rel=0.25)


def test_layers_without_a_quantised_linear_keep_their_place(tmp_path: Path, step: Step, operands: Operands) -> None:
    paths = tmp_path / "near.png", tmp_path / "far.png"
    far = tuple(dataclasses.replace(o, layer=80) if o.layer == 2 else o for o in operands)
    for path, found in zip(paths, (operands, far), strict=True):
        draw_precision_map(path, step(1, precision=found), title="t")
    near, wide = (imread(path).shape[1] for path in paths)
    assert wide > near + 300  # 82 columns, one above the other, in place of 4, side by side


@pytest.mark.parametrize("flushed", [0.0, 1.0, math.nan])
def test_any_share_can_be_drawn(tmp_path: Path, step: Step, operands: Operands, flushed: float) -> None:
    record = step(1, precision=tuple(dataclasses.replace(o, flush_to_zero=flushed) for o in operands))
    draw_precision_map(tmp_path / "map.png", record, title="t")
    draw_precision_history(tmp_path / "history.png", [record], title="t")
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("map.png", "history.png"))


def test_the_history_has_a_line_for_each_role(tmp_path: Path, step: Step, operands: Operands) -> None:
    path = tmp_path / "history.png"
    records = [step(n, precision=operands if n % 10 == 0 else ()) for n in range(1, 41)]
    draw_precision_history(path, records, title="t")
    for role in range(2):
        assert pixels(path, colormaps["tab10"](role)) > 300
    assert pixels(path, colormaps["tab10"](2)) == 0


def test_without_a_sampled_step_there_is_nothing_to_draw(tmp_path: Path, step: Step) -> None:
    with pytest.raises(ValueError, match="step 3 has no sampled operands"):
        draw_precision_map(tmp_path / "x.png", step(3), title="t")
    with pytest.raises(ValueError, match="no step has sampled operands"):
        draw_precision_history(tmp_path / "x.png", [step(1), step(2)], title="t")
