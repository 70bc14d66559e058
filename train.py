"""Train a recipe.

  torchrun --nproc-per-node=2 train.py recipe=tiny optimizer.lr=1e-3     one run
  python train.py -m recipe=tiny optimizer.lr=1e-3,3e-3 seed=1,2         a sweep: four runs, one after the other
  python train.py --help                                                 recipes, groups and every key

A sweep starts torchrun itself for each combination, with the recipe's world_size as processes on this machine, in
run_dir/<swept values>. The same command again resumes every run. Exit status: 0 target reached; 2 the input is wrong
(message on stderr); 75 saved and wants to be started again; anything else is a failure.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.launch.exit_record import leave_record, recorded
from nemotron3_megatron.logs import start_logging
from nemotron3_megatron.platform.kernel_cache import use_kernel_cache

if TYPE_CHECKING:
    from nemotron3_megatron.config import Run

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
"""As a shell has it."""


def main(argv: Sequence[str]) -> int:
    """Run one training, a sweep, or the help; returns the exit status."""
    arguments = list(argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        from nemotron3_megatron.config.compose import RECIPES
        from nemotron3_megatron.config.keys import help_text

        sys.stdout.write(f"{__doc__}\n{help_text(RECIPES)}")
        return 0
    try:
        if {"-m", "--multirun"} & set(arguments):
            from nemotron3_megatron.config.sweep import run_sweep

            return run_sweep([text for text in arguments if text not in ("-m", "--multirun")], __file__)
        os.umask(os.umask(0o077) | 0o027)  # others neither read nor write what a run leaves
        run = prepare(arguments)
    except UserError as error:
        return refuse(error, on_every_rank=True)

    start_logging(int(os.environ.get("RANK", "0")))
    use_kernel_cache()
    try:
        from nemotron3_megatron.resilience.watch import watched
        from nemotron3_megatron.train.run import train  # imports torch and Megatron-Core

        with watched(run) as watch:
            return train(run, watch)
    except UserError as error:
        return refuse(error, on_every_rank=False)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends it once more
        leave_record(INTERRUPTED, interrupt)
        if os.environ["RANK"] == "0":
            sys.stderr.write(f"interrupted; the same command continues from {run.run_dir}'s newest checkpoint\n")
        return INTERRUPTED


def prepare(overrides: Sequence[str]) -> Run:
    """Compose the recipe and resolve it for the world that torchrun made and the stage in force; make its directory."""
    from nemotron3_megatron.checkpoint.resume import step_to_resume
    from nemotron3_megatron.config import check_data, compose, make_run_dir, resolve
    from nemotron3_megatron.launch.torchrun import world_made

    recipe, origins = compose(overrides)
    run = resolve(recipe, world_made(recipe, origins, overrides), origins, step_to_resume(recipe))
    check_data(run)
    make_run_dir(run)
    return run


def refuse(error: UserError, *, on_every_rank: bool) -> int:
    """Show the error once: rank 0 at once, another rank only if rank 0 has not failed in the same way.

    The others wait, because torchrun ends all processes as soon as one has failed.
    """
    leave_record(USER_ERROR, error)
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(2)
    if rank == 0 or not on_every_rank:
        sys.stderr.write(f"error: {error}\n")
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(recorded(main, sys.argv[1:]))
