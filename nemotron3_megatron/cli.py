"""``nemotron3 VERB key=value ...``: everything around training. Training itself is ``torchrun train.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import nearest_name
from nemotron3_megatron.logs import start_logging
from nemotron3_megatron.verbs import VERBS, Verb

USER_ERROR = 2
"""Exit status when the user's input is wrong."""


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
        if verb.gpu is not None and parsed.gpu:
            return verb.gpu(parsed.overrides, parsed.json)
        if verb.dry_run is not None and parsed.dry_run:
            return verb.dry_run(parsed.overrides)
        if verb.simulate is not None and (parsed.simulate or parsed.ranks is not None):
            return verb.simulate(parsed.overrides, parsed.ranks, parsed.json)
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
    if verb.gpu is not None:
        parser.add_argument("--gpu", action="store_true", help="check this machine's GPUs: kernels and speeds")
    if verb.dry_run is not None:
        parser.add_argument("--dry-run", action="store_true", help="print the job's script and have Slurm check it")
    if verb.simulate is not None:
        instead.add_argument("--simulate", action="store_true", help="build some ranks of the layout, without storage")
        parser.add_argument("--ranks", metavar="N,N,...", help="simulate these (first, last, one in each stage)")
    if verb.page is not None:
        instead.add_argument("--html", metavar="FILE", help="also write all of it, with pictures, as one page")
    return parser


def _print_verbs() -> None:
    lines = ["usage: nemotron3 VERB key=value ...   (nemotron3 VERB --help says more)", ""]
    lines += [f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
