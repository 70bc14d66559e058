"""Published models know no layout: what any saves is exported alike, and an imported model trains under every one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 ep2": {"tp": 2, "ep": 2},
    "pp2": {"pp": 2},
}
MODEL: dict[str, Any] = {"stack": "ME|*M-E"}


def save_everywhere(folder: str) -> None:
    """The same initial weights under each layout, saved with the record of their run."""
    from job import running, save
    from tiny import tiny_run

    from nemotron3_megatron import platform as platforms
    from nemotron3_megatron.train.record import write_run_record

    for name, options in LAYOUTS.items():
        place = Path(folder) / name
        run = replace(tiny_run(2, **MODEL, **options), run_dir=place)
        with running(run) as trainer:
            save(trainer, place, 0)
            if trainer.groups.dp.rank() == trainer.groups.tp.rank() == trainer.groups.pp.rank() == 0:
                write_run_record(run, platforms.select("cpu"))


def start_everywhere(folder: str, imported: str) -> dict[str, Any]:
    """Losses of two steps from an imported model, and from initial weights that it should equal."""
    from job import job, train

    from nemotron3_megatron.checkpoint.huggingface.start import is_imported, start_from_weights
    from nemotron3_megatron.checkpoint.store import CheckpointStore

    assert is_imported(Path(imported))
    report = {}
    for name, options in LAYOUTS.items():
        with job(**MODEL, **options) as trainer:
            expected = train(trainer, 0, 2)
        with job(**MODEL, **options, seed=99) as trainer:
            start_from_weights(CheckpointStore(Path(folder)), Path(imported), trainer.chunks, trainer.optimizer)
            report[name] = {"found": train(trainer, 0, 2), "expected": expected}
    return report


def test_any_layout_exports_and_imports(tmp_path: Path) -> None:
    from tiny import tiny_run

    from nemotron3_megatron.checkpoint.huggingface import export_model, import_model
    from nemotron3_megatron.config import Recipe, compose

    run_ranks(save_everywhere, 2, folder=str(tmp_path))
    exported = {}
    for name in LAYOUTS:
        out = export_model(tmp_path / name / "checkpoints" / "step_00000000", tmp_path / f"{name}_hf")
        exported[name] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert exported["tp2 ep2"] == exported["pp2"]
    assert json.loads(exported["pp2"]["model.safetensors.index.json"])["weight_map"]

    recipe: Recipe = replace(compose(["recipe=tiny", "data.tokenizer=null"])[0], model=tiny_run(1, **MODEL).model)
    imported = import_model(tmp_path / "pp2_hf", recipe, tmp_path / "imported")
    for report in run_ranks(start_everywhere, 2, folder=str(tmp_path / "new"), imported=str(imported)):
        for name, losses in report.items():
            # The same weights, master weights and arithmetic: the same bits.
            assert losses["found"] == losses["expected"], name
