"""How long training stands still for a checkpoint: saved by the training process, or by a worker meanwhile.

    python benchmarks/checkpoint.py --recipe ladder_a315m_1b --device cuda [--folder DIR] [--saves 3] [--json]
    python benchmarks/checkpoint.py --recipe tiny --device cpu

One rank, random tokens, two sequences a step, Python's collector stopped as in training. For each kind of save: the
time for which training waits (``blocked``), from the start of the save to its publication (``published``), and of a
step while the worker writes against one without (``step``). The first save of a process also plans, and pins memory
unless it was reserved: shown apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from slices import random_batches

from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.garbage import collected_between_steps
from nemotron3_megatron.train.step import Trainer, train_step

WARMUP_STEPS = 3


def main() -> None:
    """Measure both ways and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--folder", type=Path, help="on the file system to measure; default: the system's temporary one"
    )
    parser.add_argument("--saves", type=int, default=3, help="of each kind, after the first")
    parser.add_argument("--worker-only", action="store_true", help="leave out saves by the training process")
    parser.add_argument("--steps", type=int, default=10, help="timed steps without a save")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides")
    options = parser.parse_args()
    run = _run(options.recipe, options.device, options.overrides)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, _trainer(run) as trainer, collected_between_steps():
        found = measure(trainer, Path(folder), options.saves, options.steps, blocks=not options.worker_only)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def measure(trainer: Trainer, folder: Path, saves: int, steps: int, *, blocks: bool) -> dict[str, Any]:
    """Seconds of everything that ``main`` shows; saves by the training process if ``blocks``."""
    place = {"next": 0}

    def step() -> float:
        place["next"] += 1
        batches = random_batches(trainer.run, place["next"])
        return _seconds(trainer, lambda: train_step(trainer, batches, trainer.run.stages[0], lr=1e-5))

    for _ in range(WARMUP_STEPS):
        step()
    alone = [step() for _ in range(steps)]
    store = CheckpointStore(folder)

    def blocking() -> float:
        number = place["next"]
        state = {"step": number}
        return _seconds(trainer, lambda: store.save(number, trainer.chunks, trainer.optimizer, state, keep_last=1))

    waits = []
    for _ in range(saves + 1 if blocks else 0):
        step()
        waits.append(blocking())
    start = _seconds(trainer, lambda: store.saver.start_worker(trainer.chunks, trainer.optimizer))
    background = [_in_background(trainer, store, step, place) for _ in range(saves + 1)]
    size = sum(file.stat().st_size for file in next((folder / "checkpoints").glob("step_*")).iterdir())
    store.release()
    later = background[1:]
    typical = statistics.median(waits[1:]) if blocks else 0.0
    by_itself = {"blocking": {"first_s": waits[0], "blocked_s": typical, "published_s": typical}} if blocks else {}
    return {
        "recipe": trainer.run.name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gib": size / 2**30,
        "step_s": statistics.median(alone),
        **by_itself,
        "worker": {
            "start_s": start,
            "first_s": background[0]["blocked_s"],
            "blocked_s": statistics.median(found["blocked_s"] for found in later),
            "published_s": statistics.median(found["published_s"] for found in later),
            "step_s": statistics.median(second for found in later for second in found["steps_s"]),
        },
    }


def _in_background(trainer: Trainer, store: CheckpointStore, step: Any, place: dict[str, int]) -> dict[str, Any]:
    step()
    number, began = place["next"], time.perf_counter()
    state = {"step": number}
    blocked = _seconds(trainer, lambda: store.saver.begin(number, trainer.chunks, trainer.optimizer, state))
    seconds: list[float] = []
    polls = 0.0
    while True:
        seconds.append(step())
        before = time.perf_counter()
        done = store.saver.poll(wait=False) == "published"
        polls += time.perf_counter() - before
        if done:
            return {"blocked_s": blocked + polls, "published_s": time.perf_counter() - began, "steps_s": seconds}


def _seconds(trainer: Trainer, action: Any) -> float:
    trainer.platform.synchronize()
    begin = time.perf_counter()
    action()
    trainer.platform.synchronize()
    return time.perf_counter() - begin


def _run(recipe: str, device: str, overrides: list[str]) -> Run:
    stages = compose([f"recipe={recipe}"])[0].stages
    small = [f"stages.{name}.{key}" for name in stages for key in ("global_batch_size=2", "micro_batch_size=1")]
    chosen, origins = compose([f"recipe={recipe}", f"device={device}", "parallel=single", *small, *overrides])
    return resolve(chosen, 1, origins)


@contextmanager
def _trainer(run: Run) -> Iterator[Trainer]:
    platform = select(run.device)
    platform.start(0)
    stores: Any = torch.distributed  # its stores lack type stubs
    torch.distributed.init_process_group(platform.collective_backend, store=stores.HashStore(), rank=0, world_size=1)
    yield build_trainer(run, platform, start_groups(run, platform))
    torch.distributed.destroy_process_group()


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['recipe']} on {found['device']}: {found['gib']:.2f} GiB a checkpoint, seconds")
    for column in ("saved by", "training blocked", "first save", "until published", "step meanwhile", "step alone"):
        table.add_column(column, justify="right")
    for name, row in ((name, found[name]) for name in ("blocking", "worker") if name in found):
        step = f"{row['step_s']:.3f}" if "step_s" in row else "-"
        times = (f"{row[key]:.3f}" for key in ("blocked_s", "first_s", "published_s"))
        table.add_row("training itself" if name == "blocking" else "a worker", *times, step, f"{found['step_s']:.3f}")
    Console(width=140).print(table)
    Console(width=140).print(f"getting ready for the worker, once a start: {found['worker']['start_s']:.3f} s")


if __name__ == "__main__":
    main()
