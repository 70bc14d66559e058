"""``run.json``: what was run, with which versions, from which commit."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import to_json
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.precision.backend import Backend
from nemotron3_megatron.precision.lowering.recipes import megatron_yaml

_PACKAGES = ("nemotron3-megatron", "torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")


def write_run_record(run: Run, platform: Platform, backend: Backend = "none") -> Path:
    """Write ``run.json`` into the run directory (atomically) and return its path.

    Beside it, for native precision, the plan as Megatron-LM would take it: ``megatron_precision.yaml``.
    """
    path = run.run_dir / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "run": json.loads(to_json(run)),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "platform": platform.describe(),
        "precision_backend": backend,
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    if backend == "native":
        path.with_name("megatron_precision.yaml").write_text(megatron_yaml(run.precision_plan), encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout this package lies in, with ``-dirty`` for uncommitted changes; None outside git."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
