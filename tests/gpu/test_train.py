"""``train.py`` on one GPU: what is saved there resumes, also in the other module spec, as if nothing had happened."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from e2e_start import STEPS, Start, overrides, records, write_corpora
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]

HALF = STEPS // 2
GPU = ("device=cuda", "world_size=1", "parallel.ep=1", "precision=bf16", "precision.dtype=bf16")
BF16 = 2**-8
"""Of a loss between two runs whose BF16 roundings differ."""
MOMENTS = 0.1
"""Relative distance of Adam's first moments (median over parameters): five times that of two specs' BF16 gradients in
test_specs.py, since weights drift apart too. Moments that began anew at the restart differ by 0.9^4 = 0.66."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of run directories: undisturbed runs of each spec, and halves continued by each spec."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_corpora(tmp_path_factory.mktemp("data"))
    specs = ("te", "torch")
    first = {f"{spec}_alone": (spec, STEPS) for spec in specs} | {f"{spec}_half": (spec, HALF) for spec in specs}
    _start(folder, data, first)
    second = {}
    for saved in specs:
        for spec in specs:
            second[f"{saved}_then_{spec}"] = (spec, STEPS)
            shutil.copytree(folder / f"{saved}_half", folder / f"{saved}_then_{spec}")
    _start(folder, data, second)
    return folder


def _start(folder: Path, data: Path, runs: dict[str, tuple[str, int]]) -> None:
    with ExitStack() as stack:
        starts = {}
        for name, (spec, steps) in runs.items():
            own = (f"model.spec={spec}", f"max_steps={steps}", "optimizer.lr_warmup=0 steps", "optimizer.lr=1e-2")
            arguments = overrides(folder / name, data, *GPU, *own)
            starts[name] = stack.enter_context(Start(arguments, ranks=1))
        for name, start in starts.items():
            outcome = start.wait(400)
            assert outcome.codes == (0,), f"{name}:\n{outcome.output}"


@pytest.mark.parametrize("spec", ["te", "torch"])
@pytest.mark.parametrize("saved", ["te", "torch"])
def test_resumes(saved: str, spec: str, runs: Path) -> None:
    """Records after the restart, and the optimizer in the end, are those of the run that went on."""
    resumed, alone = runs / f"{saved}_then_{spec}", runs / f"{saved}_alone"
    found, expected = records(resumed), records(alone)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert found[:HALF] == records(runs / f"{saved}_half")
    for record, wanted in zip(found, expected, strict=True):
        assert record["tokens"] == wanted["tokens"]
        assert record["lr"] == wanted["lr"]
        assert record["loss"] == pytest.approx(wanted["loss"], rel=BF16)
    mine, theirs = _moments(resumed), _moments(alone)
    assert mine.keys() == theirs.keys()
    distance = torch.tensor([(mine[key] - value).norm() / value.norm() for key, value in theirs.items() if value.any()])
    print(f"{saved} then {spec}: moments {distance.median():.1e}")
    assert distance.median() < MOMENTS


def _moments(run_dir: Path) -> dict[str, torch.Tensor]:
    """Adam's first moments in the last checkpoint, by key."""
    folder = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    moments = {
        key: torch.empty(entry.size)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and "exp_avg." in key
    }
    assert moments
    torch.distributed.checkpoint.load(moments, checkpoint_id=folder, no_dist=True)
    return moments
