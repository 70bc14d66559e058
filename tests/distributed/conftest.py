"""Corpora and a run that files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of tokenised corpora."""
    from e2e_start import write_corpora

    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of eight steps in one go, by torchrun; not to be changed."""
    from e2e_start import ended, overrides

    run_dir = tmp_path_factory.mktemp("undisturbed")
    outcome = ended(overrides(run_dir, data), torchrun=True)
    assert outcome.codes == (0,), outcome.output
    return run_dir
