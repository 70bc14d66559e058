"""``nemotron3 VERB key=value ...``: everything around training. Training itself is ``torchrun train.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import nearest_name
from nemotron3_megatron.logs import start_logging

USER_ERROR = 2
"""Exit status when the user's input is wrong."""


PIPE_WIDTH = 140
"""Columns of tables that go to a file or a pipe."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A command of ``nemotron3``."""

    run: Callable[[list[str], bool], int]
    """Takes the overrides and whether JSON is wanted; returns the exit status."""
    summary: str
    usage: str
    has_json: bool = False
    page: Callable[[list[str], str], None] | None = None
    """Takes the overrides and the file of ``--html``."""
    search: Callable[[list[str], bool], int] | None = None
    """With ``--search``, in place of ``run``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nemotron3``; returns the exit status (2: the user's input is wrong)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_verbs()
        return 0 if arguments else USER_ERROR
    start_logging()
    try:
        verb = VERBS.get(arguments[0])
        if verb is None:
            close = nearest_name(arguments[0], VERBS)
            raise UserError(
                arguments[0],
                where="command line",
                why="is not a verb of nemotron3",
                nearest=close or f"one of {', '.join(VERBS)}",
            )
        parsed = _parser(arguments[0], verb).parse_intermixed_args(arguments[1:])
        run = verb.search if verb.search is not None and parsed.search else verb.run
        status = run(parsed.overrides, getattr(parsed, "json", False))
        if verb.page is not None and parsed.html is not None:
            verb.page(parsed.overrides, parsed.html)
        return status
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"nemotron3 {name}",
        description=verb.summary,
        epilog=verb.usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see below")
    if verb.has_json:
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    # A search has no one layout to draw.
    instead = parser.add_mutually_exclusive_group() if verb.search is not None else parser
    if verb.search is not None:
        instead.add_argument("--search", action="store_true", help="find the fastest layouts that fit the GPUs")
    if verb.page is not None:
        instead.add_argument("--html", metavar="FILE", help="also write all of it, with pictures, as one page")
    return parser


def _print_verbs() -> None:
    lines = ["usage: nemotron3 VERB key=value ...   (nemotron3 VERB --help says more)", ""]
    lines += [f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()]
    sys.stdout.write("\n".join(lines) + "\n")


def _plan(overrides: list[str], as_json: bool) -> int:
    from rich.console import Console

    from nemotron3_megatron.config import compose, resolve
    from nemotron3_megatron.plan import report
    from nemotron3_megatron.plan.memory_table import write_memory_chart

    recipe, origins = compose(overrides)
    run = resolve(recipe, recipe.world_size or 1, origins)
    if as_json:
        sys.stdout.write(report.as_json(run) + "\n")
    else:
        report.show(run, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    sys.stdout.flush()
    sys.stderr.write(f"{report.write_map(run)}\n{write_memory_chart(run)}\n")
    return 0


def _search(overrides: list[str], as_json: bool) -> int:
    from rich.console import Console

    from nemotron3_megatron.config import compose
    from nemotron3_megatron.plan import search_table
    from nemotron3_megatron.plan.search import search

    named = [f"world_size={text.removeprefix('gpus=')}" if text.startswith("gpus=") else text for text in overrides]
    recipe, _ = compose(named)
    found = search(recipe, recipe.world_size or 1)
    if as_json:
        sys.stdout.write(search_table.as_json(recipe, found) + "\n")
    else:
        search_table.show(recipe, found, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    return 0


def _plan_page(overrides: list[str], file: str) -> None:
    from pathlib import Path

    from nemotron3_megatron.config import compose, resolve
    from nemotron3_megatron.plan.html import write_page

    recipe, origins = compose(overrides)
    write_page(Path(file), resolve(recipe, recipe.world_size or 1, origins))
    sys.stderr.write(f"page: {file}\n")


def _doctor(overrides: list[str], as_json: bool) -> int:
    from nemotron3_megatron.platform.doctor import run_doctor

    if overrides:
        raise UserError(overrides[0], where="command line", why="doctor takes no values", nearest="nemotron3 doctor")
    status: int = run_doctor(as_json)
    return status


def _report(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.telemetry.report import report_main

    status: int = report_main(overrides)
    return status


def _generate(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.evaluate.generate import generate_main

    status: int = generate_main(overrides)
    return status


VERBS = {
    "plan": Verb(
        _plan,
        "print the resolved run: origin of each value, layers, precision, parameters, layout, schedule; starts nothing",
        "nemotron3 plan recipe=NAME [world_size=N] [gpu=h200] [key=value ...] [--json] [--html FILE]\n"
        "nemotron3 plan recipe=NAME gpus=N [gpu=h200] [key=value ...] --search [--json]\n"
        "Draws which layer computes in which format and what fills a GPU: run_dir/precision_map.png, memory.png.\n"
        "world_size defaults to the recipe's. The keys are those of train.py (see train.py --help).",
        has_json=True,
        page=_plan_page,
        search=_search,
    ),
    "doctor": Verb(
        _doctor,
        "report versions, devices, and which optional packages are missing and what that costs",
        "nemotron3 doctor [--json]",
        has_json=True,
    ),
    "report": Verb(
        _report,
        "draw the loss curves of a run from its metrics.jsonl: PNG and terminal",
        "nemotron3 report run_dir=PATH",
    ),
    "generate": Verb(
        _generate,
        "continue a prompt with a trained checkpoint",
        "nemotron3 generate checkpoint=DIR prompt=TEXT [max_new_tokens=64] [temperature=0.8] [top_p=0.95] [seed=0]\n"
        "                   [tokenizer=PATH]        temperature=0: the likeliest token; tokenizer: the run's",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
