"""Where stages run: processes of this machine, SLURM or Ray, all through datatrove's executor interface."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import loguru
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from data_prep.libraries import library
from data_prep.recipe import PreparationRecipe
from data_prep.stage import Stage
from nemotron3_megatron.config.errors import UserError

_POLL_SECONDS = 2.0
_SHARED_DISK_SECONDS = 10.0
"""A file that another machine wrote may appear this much later."""


class LocalExecutor(PipelineExecutor):  # type: ignore[misc]  # datatrove is not typed
    """Runs the tasks in processes of this machine, or with one worker in this process.

    datatrove's own LocalPipelineExecutor waits for ever when a worker is killed, as happens when memory runs out.
    """

    def __init__(self, steps: Sequence[PipelineStep], tasks: int, workers: int, logging_dir: str) -> None:
        super().__init__(list(steps), logging_dir)
        self.tasks = tasks
        self.workers = workers

    @property
    def world_size(self) -> int:
        """Number of tasks."""
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> Any:
        """Part of datatrove's interface, for tasks that span nodes."""
        raise NotImplementedError("tasks of this machine span no nodes")

    def run(self) -> None:
        """Run the tasks that are not complete.

        Raises:
            UserError: a task's, or a worker died. Completed tasks stay so.
        """
        ranks = self.get_incomplete_ranks()
        with _workers(min(self.workers, len(ranks))) as executor:
            futures = [executor.submit(_run_task, self, rank) for rank in ranks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process died",
                    why="most often because memory ran out",
                    nearest="fewer num_workers or smaller shard_bytes; run again, finished shards are kept",
                ) from error
            finally:
                executor.shutdown(cancel_futures=True)


def _run_task(executor: LocalExecutor, rank: int) -> None:
    data = None
    for step in deepcopy(executor.pipeline):  # each task counts for itself
        data = step(data, rank, executor.world_size)
    if data is not None:
        deque(data, maxlen=0)
    executor.mark_rank_as_completed(rank)


@contextmanager
def _workers(count: int) -> Iterator[Executor]:
    if count <= 1:
        with ThreadPoolExecutor(1) as threads:
            yield threads
        return
    # spawn, not fork: the progress bar and the tokenizer have threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_start_worker) as processes:
        yield processes


def _start_worker() -> None:
    """Workers share the cores among themselves, and end with the process that started them, however that ends."""
    os.environ.update(RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    loguru.logger.disable("datatrove")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker left behind would wait for work for ever, or write into the shards of the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by another process"
    parent.join()
    os._exit(1)


def run_stages(recipe: PreparationRecipe, stages: Sequence[Stage]) -> None:
    """Run every stage after the one before it; on SLURM they are only submitted unless ``executor.wait``.

    Raises:
        UserError: a task failed; what is finished stays.
    """
    loguru.logger.disable("datatrove")  # each task has its log in its stage's directory
    if recipe.executor.kind == "slurm":
        _run_on_slurm(recipe, stages)
        return
    for stage in stages:
        if recipe.executor.kind == "ray" and stage.reads:
            executor = _ray(recipe, stage)
        else:
            executor = LocalExecutor(stage.steps, stage.num_tasks, recipe.num_workers or _cores(), str(stage.logs))
        executor.run()
        _check_complete(stage)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _check_complete(stage: Stage) -> None:
    if failed := stage.num_tasks - len(stage.completed):
        raise UserError(
            f"{failed} of {stage.num_tasks} tasks of the stage {stage.name!r} failed",
            why=f"see {stage.logs}/logs",
            nearest="run the same command again; finished shards are kept",
        )


def _ray(recipe: PreparationRecipe, stage: Stage) -> PipelineExecutor:
    from datatrove.executor.ray import RayPipelineExecutor

    ray = library("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return RayPipelineExecutor(
        list(stage.steps),
        tasks=stage.num_tasks,
        workers=recipe.num_workers or -1,
        cpus_per_task=recipe.executor.cpus_per_task,
        mem_per_cpu_gb=recipe.executor.mem_per_cpu_gb,
        logging_dir=str(stage.logs),
    )


def _run_on_slurm(recipe: PreparationRecipe, stages: Sequence[Stage]) -> None:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise UserError("executor.kind=slurm", why="there is no sbatch on this machine", nearest="executor.kind=local")
    config, before, names = recipe.executor, None, []
    mark = hashlib.sha256(str(Path(recipe.output).resolve()).encode()).hexdigest()[:8]
    root, binaries = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
    for stage in stages:
        names.append(f"data-{stage.logs.name}-{mark}")
        before = SlurmPipelineExecutor(
            list(stage.steps),
            tasks=stage.num_tasks,
            time=config.time,
            partition=config.partition,
            qos=config.qos,
            cpus_per_task=config.cpus_per_task,
            mem_per_cpu_gb=config.mem_per_cpu_gb,
            workers=recipe.num_workers or -1,
            job_name=names[-1],
            env_command=f'export PATH={binaries}:$PATH PYTHONPATH={root}:"$PYTHONPATH"',
            logging_dir=str(stage.logs.resolve()),
            depends=before,
        )
        before.run()
    if not config.wait:
        return

    _wait_for(names, lambda: all(len(stage.completed) == stage.num_tasks for stage in stages))
    for stage in stages:
        _check_complete(stage)


def _wait_for(names: Sequence[str], complete: Callable[[], bool]) -> None:
    """Return when everything is complete, or when no job of these names is left that could complete it."""
    command = ["squeue", "--noheader", "--format=%r", f"--name={','.join(names)}"]
    while not complete():
        reasons = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        if not reasons or _stuck({reason.strip() for reason in reasons}):
            time.sleep(_SHARED_DISK_SECONDS)
            for name in () if complete() else names:  # scancel takes one name
                subprocess.run(["scancel", "--state=PENDING", f"--name={name}"], check=True)
            return
        time.sleep(_POLL_SECONDS)


def _stuck(reasons: set[str]) -> bool:
    """All jobs wait for others, one of which failed."""
    return reasons <= {"Dependency", "DependencyNeverSatisfied"} and "DependencyNeverSatisfied" in reasons
