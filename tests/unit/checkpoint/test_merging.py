"""Merging: the weights of a decay, and the mean of what is on disk."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nemotron3_megatron import cli
from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.checkpoint.merging import arranged, merge, weights_of
from nemotron3_megatron.config.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.sampled_from(["minus_sqrt", "linear"]))
def test_the_weighted_mean_is_the_decayed_path(gaps: list[int], decay: str) -> None:
    """Against a run that is integrated in small pieces: the speed is constant between two checkpoints."""
    tokens = [0]
    for gap in gaps:
        tokens.append(tokens[-1] + gap)
    weights = weights_of(tokens, decay)  # type: ignore[arg-type]
    assert math.fsum(weights) == pytest.approx(1)
    assert min(weights) > 0
    speeds = [1.0 + (7 * number) % 5 for number in range(len(gaps))]
    positions = [0.0]
    for speed, gap in zip(speeds, gaps, strict=True):
        positions.append(positions[-1] + speed * gap)
    decayed, pieces = 0.0, 500
    for speed, (begin, end) in zip(speeds, pairwise(tokens), strict=True):
        shares = [(begin + (end - begin) * (piece + 0.5) / pieces) / tokens[-1] for piece in range(pieces)]
        rate = sum(1 - (math.sqrt(share) if decay == "minus_sqrt" else share) for share in shares) / pieces
        decayed += speed * (end - begin) * rate
    merged = math.fsum(w * p for w, p in zip(weights, positions, strict=True))
    # The midpoint rule misses the square root's steep start by less than the square root of a piece, in one interval.
    assert merged == pytest.approx(decayed, rel=1e-3)


def test_weights_of_even_checkpoints() -> None:
    """Four intervals, by hand: mean rates 1 - 2/3 * (k^1.5 - (k-1)^1.5) / 4^0.5."""
    rates = [1 - (k**1.5 - (k - 1) ** 1.5) / 3 for k in range(1, 5)]
    expected = [1 - rates[0], *(a - b for a, b in pairwise(rates)), rates[-1]]
    assert weights_of([10, 20, 30, 40, 50], "minus_sqrt") == pytest.approx(expected)
    assert weights_of([10, 20, 30, 40, 50], "linear") == pytest.approx([1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])
    assert weights_of([10, 20, 70], "mean") == [1 / 3] * 3


def test_order() -> None:
    weights = [0.5, 0.25, 0.15, 0.1]
    assert arranged(weights, "sequential", 0) == weights
    assert arranged(weights, "reversed", 0) == weights[::-1]
    assert sorted(arranged(weights, "random", 1)) == sorted(weights)
    assert arranged(weights, "random", 1) == arranged(weights, "random", 1)
    assert len({tuple(arranged(weights, "random", seed)) for seed in range(20)}) > 5


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four checkpoints, 100 tokens apart."""
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(step)
        _write(tmp_path, step, {"w": torch.randn(5, 3, generator=generator).bfloat16(), "count": torch.tensor([step])})
    return tmp_path


def test_merge(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert cli.main(["merge", f"run_dir={run_dir}", f"out={out}", "window=200 tokens", "order=reversed"]) == 0
    shown = capsys.readouterr().out.splitlines()
    weights = weights_of([200, 300, 400], "minus_sqrt")[::-1]
    assert [line.split() for line in shown[:-1]] == [
        [f"{weight:.5f}", f"step_{step:08d}"] for weight, step in zip(weights, (2, 3, 4), strict=True)
    ]
    expected = sum(
        w * torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).bfloat16().double()
        for w, step in zip(weights, (2, 3, 4), strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    found = {"w": torch.zeros(5, 3, dtype=torch.bfloat16), "count": torch.tensor([0])}
    load(found, storage_reader=FileSystemReader(out), no_dist=True)
    assert torch.equal(found["w"], expected.bfloat16())
    assert found["count"].item() == 4, "a counter is the newest's"
    document = manifest.verify(out)
    manifest.verify_contents(document, out)
    assert document.state["merged"]["weights"] == pytest.approx(weights)
    assert "data" not in document.state
    assert json.loads((out / "run.json").read_text()) == {"run": "of the test"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["window=50 tokens"], "1 of its 4 checkpoints are in the window"),
        (["window=5 steps"], "is not in tokens"),
        (["order=backwards"], "order"),
        (["window"], "is not key=value"),
    ],
)
def test_mistakes(run_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", f"run_dir={run_dir}", f"out={run_dir / 'out'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (run_dir / "out").exists()


def test_other_shapes_are_refused(run_dir: Path) -> None:
    _write(run_dir, 5, {"w": torch.zeros(5, 4, dtype=torch.bfloat16), "count": torch.tensor([5])})
    with pytest.raises(UserError, match=r"(?s)is of another model.*w +5 x 3 +5 x 4"):
        merge(run_dir, run_dir / "out")


def test_a_damaged_one_is_not_left_out_silently(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"(?s)step_00000002: is damaged.*nemotron3 checkpoint rm"):
        merge(run_dir, run_dir / "out")


BOUNDED = """
import resource, sys
from pathlib import Path
from nemotron3_megatron.checkpoint.merging import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(Path(sys.argv[1]), Path(sys.argv[2]), file_bytes=4 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model_or_the_window(tmp_path: Path) -> None:
    """64 MiB a checkpoint, six of them, in tensors of 4 MiB: a file, a box in FP64 and a shard are in memory."""
    for step in range(1, 7):
        _write(tmp_path, step, {f"w{n}": torch.full((1024, 1024), float(step)) for n in range(16)})
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    # In KiB: at most 4 (file) + 8 (FP64) + 3 * 4 (shard, its bytes, the box), and as much again for the allocator.
    assert int(done.stdout) < 48 * 1024


def _write(run_dir: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    save({**tensors, "optimizer.state.param.w": torch.zeros(2)}, storage_writer=FileSystemWriter(path), no_dist=True)
    files = {file.name: manifest.record(file) for file in path.iterdir()}
    state = {"step": step, "tokens": 100 * step, "data": {}}
    manifest.write(Manifest(step=step, optimizer_step=step, layout={}, files=files, state=state), path)
    (run_dir / "run.json").write_text(json.dumps({"run": "of the test"}))
