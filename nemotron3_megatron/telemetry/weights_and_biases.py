"""Weights & Biases: online with an API key, offline without, and never a reason for a run to fail.

The run id is kept in ``run_dir/wandb_run_id``, so every start of a run continues the same W&B run. Steps are
logged against their own axis (``step``): after a resume the repeated steps fall on the curve they repeat,
where W&B's built-in counter would refuse them. Neither keys nor code are written anywhere by this module.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import to_json
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.scalars import eval_scalars, step_scalars

Mode = Literal["online", "offline", "disabled"]
INIT_TIMEOUT_S = 30.0
"""Longest a start waits for the service before it goes on offline."""
FINISH_TIMEOUT_S = 60.0
"""Longest the end of a run waits for uploads; what is left is uploaded by ``wandb sync``."""

log = logging.getLogger(__name__)


class WandB:
    """Logs to one W&B run; a service that fails is reported once and then left alone.

    Args:
        run: the run; its description becomes the W&B config.
        mode: ``online`` or ``offline`` (see :func:`resolve_mode`).
    """

    def __init__(self, run: Run, mode: Mode) -> None:
        self._run_dir = run.run_dir
        self._session = _start(run, mode) or (_start(run, "offline") if mode == "online" else None)

    def write(self, record: StepRecord) -> None:
        """Log a step's scalars."""
        self._log(step_scalars(record), record.step)

    def write_eval(self, record: EvalRecord) -> None:
        """Log a validation pass's scalars."""
        self._log(eval_scalars(record), record.step)

    def sync(self) -> None:
        """W&B writes by itself."""

    def close(self) -> None:
        """Finish uploads, for at most ``FINISH_TIMEOUT_S``."""
        if self._session is not None:
            try:
                self._session.finish()
            except Exception as error:  # whatever the service does, the run's result stands
                self._give_up(error)

    def _log(self, scalars: dict[str, float], step: int) -> None:
        if self._session is not None:
            try:
                self._session.log({**scalars, "step": step})
            except Exception as error:  # whatever the service does, the run goes on
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("W&B failed (%s); the run goes on without it, metrics.jsonl has everything", error)
        self._session = None


def resolve_mode(wanted: str, environment: Mapping[str, str], netrc_file: Path) -> Mode:
    """What ``telemetry.wandb`` means here: ``auto`` follows ``WANDB_MODE``, else whether a key is configured."""
    chosen = environment.get("WANDB_MODE", "auto") if wanted == "auto" else wanted
    match chosen:
        case "online" | "offline" | "disabled":
            return chosen
        case _:
            return "online" if has_api_key(environment, netrc_file) else "offline"


def has_api_key(environment: Mapping[str, str], netrc_file: Path) -> bool:
    """Whether ``WANDB_API_KEY`` or a netrc entry of the service's host exists; the key itself is not kept."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    try:
        return host in netrc.netrc(str(netrc_file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(run_dir: Path) -> str:
    """The W&B run id of ``run_dir``; made at random (from the operating system, no seed is touched) when new."""
    path = run_dir / "wandb_run_id"
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    made = secrets.token_hex(4)
    path.write_text(made + "\n", encoding="utf-8")
    return made


def _start(run: Run, mode: Mode) -> Any:
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
    )
    try:
        session = wandb.init(
            project=run.telemetry.wandb_project,
            name=run.name,
            id=run_id(run.run_dir),
            resume="allow",
            dir=str(run.run_dir),
            config=json.loads(to_json(run)),
            mode=mode,
            settings=settings,
        )
        session.define_metric("step")
        session.define_metric("*", step_metric="step")
    except Exception as error:  # network, service, key: none of them may stop training
        log.warning("W&B cannot start %s (%s)", mode, error)
        return None
    place = session.url if mode == "online" else f"offline run in {Path(session.dir).parent}; upload it with wandb sync"
    log.info("W&B: %s", place)
    return session


def netrc_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the netrc file is: ``NETRC``, else the home directory."""
    return Path(environment.get("NETRC", "~/.netrc")).expanduser()
