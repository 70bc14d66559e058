"""``run.json`` of a run directory, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import from_json

FILE_NAME = "run.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What was run, as the latest start of the run directory wrote it."""

    run: Run
    versions: dict[str, str | None]
    git_commit: str | None
    platform: str


def read_run_record(run_dir: Path) -> RunRecord:
    """Read ``run_dir/run.json``.

    Raises:
        UserError: it is missing, or not the record of a run of this version.
    """
    path = run_dir / FILE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        run, versions = record["run"], dict(record["versions"])
        commit, platform = record["git_commit"], str(record["platform"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"run_dir={run_dir}",
            why=f"it holds no {FILE_NAME}, so no run was started in it",
            nearest="the directory that train.py wrote to (runs/NAME unless run_dir was set)",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), why=f"it is not the record of a run ({error!r})") from error
    return RunRecord(from_json(json.dumps(run)), versions, commit, platform)


def unigram_entropy(run: Run) -> float | None:
    """Entropy of the validation split's token frequencies in nats per token: the best a fixed distribution can do.

    It stands in the ``manifest.json`` that data_prep leaves beside the tokens. None where there is no such file,
    or where validation reads several prepared directories.
    """
    directories = {Path(source.path).parent for source in run.data.validation.values()}
    if len(directories) != 1:
        return None
    try:
        manifest = json.loads((directories.pop() / "manifest.json").read_text(encoding="utf-8"))
        return float(manifest["unigram"]["validation_entropy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
