"""A cluster and a corpus for the session; tests are skipped where Slurm is not installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed")]
from e2e_start import write_corpora  # noqa: E402
from lab import Lab  # noqa: E402

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "unshare")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no real Slurm here ({', '.join(missing)} missing); docs/cluster.md says how to install it")
    cluster = Lab(tmp_path_factory.mktemp("lab"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))
