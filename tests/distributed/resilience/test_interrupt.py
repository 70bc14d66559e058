"""Ctrl-C: the real ``train.py`` says what goes on, without a trace, and loses nothing that was saved."""

from __future__ import annotations

import signal
from pathlib import Path

from e2e_start import Start, checkpoints, ended, overrides, records, write_corpora


def test_ctrl_c_ends_quietly_and_the_same_command_continues(tmp_path: Path) -> None:
    command = overrides(tmp_path / "run", write_corpora(tmp_path), "parallel.ep=1")
    with Start(command, ranks=1) as start:
        start.signal_when(lambda: len(records(tmp_path / "run")) >= 3, 0, signal.SIGINT)
        outcome = start.wait()
    assert outcome.codes == (128 + signal.SIGINT,), outcome.output
    assert outcome.output.count("interrupted; the same command continues") == 1
    assert "Traceback" not in outcome.output
    assert "step_00000002" in checkpoints(tmp_path / "run")
    again = ended(command, ranks=1)
    assert again.codes == (0,), again.output
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 9))
