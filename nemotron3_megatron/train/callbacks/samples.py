"""``samples.jsonl``: which samples every step was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.position import Sample
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop

SAMPLES = "samples.jsonl"


class SampleLog(Callback):
    """Writes one line a step: ``{"step": 1, "seq_length": 256, "samples": [["train", 0], ...]}``, on rank 0.

    A sample is a source's name and the index of the window in the source's stream of that length. A resumed run
    drops the lines past its checkpoint, since those steps are done again.
    """

    def __init__(self, run: Run, samples: Callable[[], list[Sample]]) -> None:
        """Prepare.

        Args:
            run: gives the directory, and each step's sequence length.
            samples: of the step that was just done, the whole global batch.
        """
        self._run = run
        self._samples = samples
        self._file: TextIO | None = None

    def started(self, progress: Progress) -> None:
        path = self._run.run_dir / SAMPLES
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_lines_after(path, progress.step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step_done(self, event: StepEvent) -> None:
        assert self._file is not None
        length = self._run.shape_at(event.step - 1).seq_length
        line = {"step": event.step, "seq_length": length, "samples": self._samples()}
        self._file.write(json.dumps(line) + "\n")

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        assert self._file is not None
        self._file.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Leave the lines of a JSON-lines file up to optimizer step ``step``; a line torn by a kill goes too. Atomic."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
    os.replace(partial, path)
