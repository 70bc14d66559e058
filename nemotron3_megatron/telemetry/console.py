"""The console: one aligned line a logged step, coloured on a terminal, plain in a log file.

::

    step 120/600  20%  loss 5.1234  mtp 5.8123 6.0211  |g|  1.23  lr 8.00e-04  12.3k tok/s  eta 3m12s
    prec 120/600  20%  flush to zero at most 12.3%  gradient of decoder.layers.3.mixer.in_proj in nvfp4
"""

from __future__ import annotations

import logging
import math
import os

from rich.console import Console as Terminal
from rich.text import Text

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.scalars import most_flushed
from nemotron3_megatron.telemetry.throughput import Pace, format_count, format_duration

log = logging.getLogger(__name__)


class _Stdout(Terminal):
    """rich's console, but for its answer to a reader that has gone: to end the process."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise


class Console:
    """Shows a step every ``telemetry.log_every``, the first and last ones, and every refused update."""

    def __init__(self, run: Run, terminal: Terminal | None = None) -> None:
        self._run = run
        self._terminal = terminal or _Stdout(soft_wrap=True)
        self._total_tokens = run.tokens_at(run.total_steps)
        self._seconds_per_token = Pace()
        self._first = True

    def resumed(self, step: int) -> None:
        """Say that this start continues at ``step`` optimizer steps."""
        seen, all_tokens = format_count(self._run.tokens_at(step)), format_count(self._total_tokens)
        self._show(Text(f"resumed at step {step}/{self._run.total_steps} ({seen} of {all_tokens} tokens)", "cyan"))

    def write(self, record: StepRecord) -> None:
        """Show a step when it is due."""
        if record.tokens_per_s > 0:
            self._seconds_per_token.add(1 / record.tokens_per_s)
        last = record.step == self._run.total_steps
        due = self._run.is_due(self._run.telemetry.log_every, record.step) or self._first or last or record.skipped
        self._first = False
        if due:
            eta = self._seconds_per_token.remaining(self._total_tokens - record.tokens)
            self._show(step_line(record, self._run.total_steps, eta, with_stage=len(self._run.stages) > 1))
            if record.precision:
                self._show(precision_line(record, self._run.total_steps))

    def write_eval(self, record: EvalRecord) -> None:
        """Show a validation pass."""
        self._show(eval_line(record, self._run.total_steps))

    def sync(self) -> None:
        """Lines are shown as they are written."""

    def close(self) -> None:
        """Nothing is held open."""

    def _show(self, line: Text) -> None:
        try:
            self._terminal.print(line, highlight=False, no_wrap=True, overflow="ignore", crop=False)
        except OSError as error:  # its reader has gone, its disk is full: no reason to end a run
            log.warning("stdout failed (%s); the run goes on without it, metrics.jsonl has everything", error.strerror)
            with open(os.devnull, "w") as nowhere:  # what is buffered goes there, at the latest when Python ends
                os.dup2(nowhere.fileno(), self._terminal.file.fileno())


def step_line(record: StepRecord, total_steps: int, eta_s: float | None, *, with_stage: bool = False) -> Text:
    """The line of one step; columns stay aligned over a run.

    Args:
        record: the step.
        total_steps: steps of the whole run.
        eta_s: seconds to the end of the run; None when unknown.
        with_stage: name the stage (runs with more than one).
    """
    line = _head("step", record.step, total_steps)
    if with_stage:
        line.append(f"  {record.stage}", "dim")
    line.append("  loss ", "dim").append(_loss(record.loss), "bold green" if math.isfinite(record.loss) else "bold red")
    _append_mtp(line, record.mtp_losses)
    line.append("  |g| ", "dim").append(f"{record.grad_norm:5.{'0e' if record.grad_norm >= 100 else '2f'}}")
    line.append("  lr ", "dim").append(f"{record.lr:.2e}")
    line.append(f"  {format_count(record.tokens_per_s):>5}").append(" tok/s", "dim")
    if record.model_tflops is not None:
        line.append(f"  {record.model_tflops:.0f}").append(" TFLOP/s", "dim")
    if record.mfu is not None:
        line.append(f"  {record.mfu:.1%}").append(" MFU", "dim")
    if record.precision_backend != "none":
        line.append(f"  {record.precision_backend}", "magenta" if record.precision_backend == "emulated" else "green")
    line.append("  eta ", "dim").append(format_duration(eta_s), "cyan")
    if record.skipped:
        line.append(f"  update refused: {record.skip_reason or 'no reason given'}", "bold red")
    return line


def precision_line(record: StepRecord, total_steps: int) -> Text:
    """The operand that loses most to zero, of a step with sampled operands."""
    worst = most_flushed(record.precision)
    line = _head("prec", record.step, total_steps)
    line.append("  flush to zero at most ", "dim").append(f"{worst.flush_to_zero:.1%}", "bold magenta")
    line.append(f"  {worst.label} of {worst.module} in {worst.format}", "dim")
    return line


def eval_line(record: EvalRecord, total_steps: int) -> Text:
    """The line of one validation pass, aligned with the lines of steps."""
    line = _head("eval", record.step, total_steps)
    line.append("  val  ", "dim").append(_loss(record.validation_loss), "bold yellow")
    _append_mtp(line, record.mtp_losses)
    return line


def _head(word: str, step: int, total_steps: int) -> Text:
    width = len(str(total_steps))
    percent = f"{step / max(total_steps, 1):{'4.0%' if total_steps <= 1000 else '6.1%'}}"
    progress = f"{step:>{width}}/{total_steps} {percent}"
    return Text().append(f"{word} ", "dim").append(progress)


def _append_mtp(line: Text, losses: tuple[float, ...]) -> None:
    if losses:
        line.append("  mtp ", "dim").append(" ".join(_loss(loss) for loss in losses))


def _loss(value: float) -> str:
    return f"{value:6.4f}"
