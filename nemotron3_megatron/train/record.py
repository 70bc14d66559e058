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

_PACKAGES = ("nemotron3-megatron", "torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")


def write_run_record(run: Run, platform: Platform) -> Path:
    """Write ``run.json`` into the run directory (atomically) and return its path."""
    path = run.run_dir / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "run": json.loads(to_json(run)),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "platform": platform.describe(),
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
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
