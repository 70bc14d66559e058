"""``make quickstart``: data, training with a restart in the middle, report and generation, in minutes on two cores.

Every step runs the command that a user would type, and shows it.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.telemetry.report import Findings, read_findings, show_report, write_report
from nemotron3_megatron.telemetry.throughput import format_duration

RECIPE = "tiny"
RANKS = 2
RUN_DIR = Path("runs/quickstart")
FIRST_PART = 0.4
"""Share of the steps before the restart."""
CLEAR_MARGIN_NATS = 0.5
"""How far below the unigram entropy the validation loss must end: 40 % off the perplexity, far beyond the noise of a
validation pass (a few hundredths)."""
PROMPTS = ("def __init__(self", "import os\nimport sys\n\n\ndef main(", 'class Error(Exception):\n    """')
NEW_TOKENS = 48

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


class Failed(Exception):
    """A command of the quickstart ended with an error, which it has shown itself."""

    def __init__(self, command: str, status: int) -> None:
        self.command = command
        self.status = status
        super().__init__(f"{command} ended with status {status}")


def main(overrides: Sequence[str]) -> int:
    """Run the quickstart; returns 0 only if the model learned more than word frequencies.

    Args:
        overrides: nothing, or ``run_dir=PATH``; without it the first of ``runs/quickstart``, ``runs/quickstart_2``, …
            that holds no finished run. An unfinished run is continued.
    """
    console = Console(width=None if Console().is_terminal else 100)
    # Deprecations inside Megatron-Core and torch are of no use to somebody who meets the project for the first time.
    warnings.simplefilter("ignore")
    started = time.monotonic()
    try:
        total_steps = _total_steps()
        run_dir = _chosen_run_dir(overrides, total_steps)
        learned = _run(console, run_dir, total_steps, started)
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except Failed as failure:
        console.print(f"\nfailed with status {failure.status}: {failure.command}", style="red", markup=False)
        console.print("`make quickstart` continues from here; `nemotron3 doctor` checks the installation", markup=False)
        return failure.status or 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; `make quickstart` continues from here")
        return 130
    return 0 if learned else 1


def _run(console: Console, run_dir: Path, total_steps: int, started: float) -> bool:
    python = [sys.executable, "-m"]
    _heading(console, 1, "Data: Python's own sources, a tokenizer trained on them")
    _call(console, [*python, "data_prep", "recipe=quickstart"])

    train = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", str(_TRAIN)]
    train += [f"recipe={RECIPE}", f"run_dir={run_dir}"]
    first_part = round(FIRST_PART * total_steps)
    _heading(console, 2, f"Training, first part: {first_part} of {total_steps} steps, then the process ends")
    if (done := newest_step(run_dir)) < first_part:
        _call(console, [*train, f"max_steps={first_part}"])
    else:
        console.print(f"already done: {run_dir} has a checkpoint of step {done}", highlight=False)

    resumed = newest_step(run_dir)
    _heading(console, 3, f"Training, second part: the same command resumes from its checkpoint of step {resumed}")
    _call(console, train)

    _heading(console, 4, "Report")
    findings = read_findings(run_dir)
    write_report(findings)
    show_report(findings, console)

    _heading(console, 5, "The model continues Python code")
    checkpoint = run_dir / "checkpoints" / f"step_{newest_step(run_dir):08d}"
    _generate(console, checkpoint)

    console.print()
    console.print(_closing(findings, checkpoint, time.monotonic() - started))
    console.print("What to try next:", *_next_commands(checkpoint), sep="\n  ", soft_wrap=True, markup=False)
    return has_learned(findings.validation_loss, findings.unigram_entropy)


def has_learned(validation_loss: float | None, unigram_entropy: float | None) -> bool:
    """Whether the loss is below the entropy by ``CLEAR_MARGIN_NATS``; False when either was not measured."""
    if validation_loss is None or unigram_entropy is None:
        return False
    return validation_loss < unigram_entropy - CLEAR_MARGIN_NATS  # False for NaN


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint in ``run_dir``; 0 when there is none."""
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in (run_dir / "checkpoints").glob("step_*"))
    return max((int(match[1]) for match in found if match), default=0)


def free_run_dir(first: Path, total_steps: int) -> Path:
    """``first``, or ``first_2``, ``first_3``, … where those before hold a finished run; nothing is overwritten."""
    number, candidate = 1, first
    while newest_step(candidate) >= total_steps:
        number += 1
        candidate = first.with_name(f"{first.name}_{number}")
    return candidate


def _chosen_run_dir(overrides: Sequence[str], total_steps: int) -> Path:
    if not overrides:
        return free_run_dir(RUN_DIR, total_steps)
    key, _, value = overrides[0].partition("=")
    if len(overrides) > 1 or key != "run_dir" or not value:
        raise UserError(
            " ".join(overrides), where="command line", why="quickstart knows only run_dir", nearest=f"run_dir={RUN_DIR}"
        )
    if newest_step(Path(value)) >= total_steps:
        raise UserError(f"run_dir={value}", why="holds a finished run", nearest=f"nemotron3 report run_dir={value}")
    return Path(value)


def _total_steps() -> int:
    recipe, origins = compose([f"recipe={RECIPE}"])
    return resolve(recipe, RANKS, origins).total_steps


def _heading(console: Console, number: int, title: str) -> None:
    console.print()
    console.rule(f"[bold cyan]{number}/5[/bold cyan] [bold]{title}[/bold]", align="left", style="cyan")


def _call(console: Console, command: Sequence[str]) -> None:
    shown = shlex.join([_relative(command[0]), *map(_relative, command[1:])])
    console.print(f"$ {shown}", style="dim", markup=False, highlight=False, soft_wrap=True)
    console.file.flush()
    quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, env=quiet | dict(os.environ), check=False).returncode
    if status:
        raise Failed(shown, status)


def _generate(console: Console, checkpoint: Path) -> None:
    from nemotron3_megatron.evaluate.generate import complete
    from nemotron3_megatron.evaluate.sampling import Sampling
    from nemotron3_megatron.evaluate.trained import trained

    with trained(checkpoint, spec="torch") as model:
        for prompt in PROMPTS:
            text = complete(model, prompt, Sampling(), max_new_tokens=NEW_TOKENS, seed=0)
            body = Text().append(prompt, "bold").append(text, "green")
            console.print(Panel(body, border_style="dim", title=Text(f"prompt: {prompt!r}"), title_align="left"))


def _closing(findings: Findings, checkpoint: Path, seconds: float) -> Panel:
    """Validation loss beside the unigram entropy, and where everything lies."""
    loss, entropy = findings.validation_loss, findings.unigram_entropy
    learned = has_learned(loss, entropy)
    numbers = Table.grid(padding=(0, 2))
    for name, value in (("validation loss", loss), ("unigram entropy", entropy)):
        shown = "not measured" if value is None else f"{value:.4f} nats per token"
        numbers.add_row(
            name, Text(shown, "bold"), "" if value is None else f"perplexity {math.exp(min(value, 50)):,.0f}"
        )
    verdict = Text("The model has learned far more than word frequencies.", "bold green")
    if not learned:
        verdict = Text(f"Not {CLEAR_MARGIN_NATS} nats below the unigram entropy: something is wrong.", "bold red")
    run_dir, places = findings.run_dir, Table.grid(padding=(0, 2))
    for name, path in (
        ("run", run_dir / "run.json"),
        ("checkpoint", checkpoint),
        ("metrics", run_dir / "metrics.jsonl"),
        ("loss curve", run_dir / "loss.png"),
        ("report", run_dir / "report.html"),
        ("TensorBoard", run_dir / "tensorboard"),
    ):
        places.add_row(name, Text(str(path), "cyan"))
    return Panel(
        Group(numbers, verdict, Text(), places),
        title=f"quickstart finished in {format_duration(seconds)}",
        border_style="green" if learned else "red",
    )


def _next_commands(checkpoint: Path) -> list[str]:
    scripts = Path(_relative(sys.executable)).parent
    train = f"--nproc-per-node={RANKS} {_relative(str(_TRAIN))} recipe={RECIPE} run_dir=runs/mine optimizer.lr=1e-3"
    return [
        f"{scripts / 'nemotron3'} generate checkpoint={checkpoint} prompt='def main('",
        f"{scripts / 'torchrun'} {train}",
        f"{scripts / 'nemotron3'} plan recipe=nano_bf16",
    ]


def _relative(word: str) -> str:
    """A path below the working directory without it; any other word as it is."""
    path = Path(word)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else word


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
