"""Simulated worlds: chosen ranks of the full layout, built for real in processes of their own, without storage.

Here is what is asked of a rank and what comes back; ``plan/simulation_rank.py`` is what such a process does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Layout, Run
from nemotron3_megatron.config.serialize import to_json
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.platform.base import core_count
from nemotron3_megatron.precision.modules import linear_modules

MOST_SAMPLED = 6
"""Ranks that are simulated when none are named."""

MOST_AT_A_TIME = 4
"""Processes: each of Ultra's ranks takes up to 2 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A process group of the rank."""

    size: int
    first: int
    last: int
    """Global ranks."""
    place: int
    """The rank's own, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors of a rank that are alike but for the numbers in their names."""

    name: str
    """In checkpoints, ``#`` for each number."""
    names: int
    """That many of them."""
    tensors: int
    """On this rank: several for a name where experts are."""
    shape: tuple[int, ...]
    """Of each of them."""
    whole: tuple[int, ...]
    """Of a name on all ranks together; experts are its first dimension."""
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """What a rank holds for good."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One simulated rank."""

    rank: int
    pipeline_rank: int = 0
    groups: dict[str, Group]
    layers: tuple[tuple[int, ...], ...] = ()
    """Global numbers in each model chunk, from the built modules."""
    experts: tuple[int, int] | None = None
    """First and last of its routed experts in each MoE layer; None: it has no MoE layer."""
    parameters: int = 0
    """Elements on this rank."""
    parts: tuple[Part, ...] = ()
    linears: tuple[str, ...] = ()
    """Names of its modules that the precision plan decides about."""
    held: Bytes | None = None
    """Of the real tensors."""
    planned: Bytes | None = None
    """Of the memory plan, on this rank."""
    step: str = ""
    """What one optimizer step did."""
    differences: tuple[str, ...] = ()
    """Where the rank is not what the plan says."""
    error: str = ""
    """Why the simulation ended early, with the phase it ended in."""
    seconds: dict[str, float]
    """By phase."""
    peak_bytes: int = 0
    """Resident memory of the process that simulated."""

    @property
    def is_sound(self) -> bool:
        """All phases ran and nothing differs."""
        return not self.error and not self.differences


@dataclass(frozen=True, slots=True)
class Simulation:
    """All simulated ranks, and what only they together can show."""

    ranks: tuple[RankReport, ...]
    differences: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """No rank differs from the plan or failed, and neither do all together."""
        return not self.differences and all(report.is_sound for report in self.ranks)


def sampled_ranks(layout: Layout) -> tuple[int, ...]:
    """First and last rank, and one in each pipeline stage between (evenly chosen ones if there are many stages).

    Ranks of a stage follow each other; each next stage is represented by a rank one further inside.
    """
    per_stage = layout.world_size // layout.pp
    inner = range(1, layout.pp - 1)
    stages = [inner[i * len(inner) // (MOST_SAMPLED - 2)] for i in range(MOST_SAMPLED - 2)] if inner else []
    between = {stage * per_stage + stage % per_stage for stage in stages}
    return tuple(sorted({0, *between, layout.world_size - 1}))


def parse_ranks(text: str, layout: Layout) -> tuple[int, ...]:
    """``0,1,3071`` as ranks of the layout, each once, in order.

    Raises:
        UserError: not a rank of this world.
    """
    ranks = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) >= layout.world_size:
            last = layout.world_size - 1
            raise UserError(f"--ranks {text}", why=f"{word!r} is not a rank", nearest=f"numbers from 0 to {last}")
        ranks.append(int(word))
    return tuple(sorted(set(ranks)))


def simulate_ranks(run: Run, ranks: Sequence[int]) -> Simulation:
    """Simulate each rank in a fresh process, as many at a time as there are cores (and at most ``MOST_AT_A_TIME``)."""
    with ThreadPoolExecutor(min(core_count(), MOST_AT_A_TIME, len(ranks))) as pool:
        reports = tuple(pool.map(lambda rank: _in_process(run, rank), ranks))
    return Simulation(reports, together(run, reports))


def together(run: Run, reports: Sequence[RankReport]) -> tuple[str, ...]:
    """What is missing or doubled in the model that ranks of all pipeline stages hold together.

    Empty if a stage is not among the ranks, or a rank failed.
    """
    stages = {report.pipeline_rank: report for report in reports}
    if len(stages) < run.layout.pp or any(report.error for report in reports):
        return ()
    found = []
    names = sorted(name for report in stages.values() for name in report.linears)
    planned = sorted(module.name for module in linear_modules(run.model))
    if names != planned:
        odd = sorted(set(names) ^ set(planned)) or "a module on two stages"
        found.append(f"linears of all stages: {len(names)} built, {len(planned)} planned; {odd}")
    counts = count_parameters(run.model)
    built, expected = sum(_whole_elements(report) for report in stages.values()), counts.total + counts.mtp
    if run.layout.pp > 1 and run.model.mtp_depths:
        expected += run.model.vocab_size * run.model.hidden_size  # the embedding, on the last stage once more
    if built != expected:
        found.append(f"parameters of all stages: {built:,} built, {expected:,} planned")
    return tuple(found)


def _whole_elements(report: RankReport) -> int:
    return sum(part.names * prod(part.whole) for part in report.parts)


def _in_process(run: Run, rank: int) -> RankReport:
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "run.json", Path(folder) / "report.json"
        job.write_text(to_json(run))
        module = "nemotron3_megatron.plan.simulation_rank"
        done = subprocess.run(
            [sys.executable, "-m", module, str(job), str(rank), str(result)],
            # Megatron-Core is imported for CPU, and the CLI's own place on the path is the child's, too.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[-20:])
            return RankReport(rank=rank, groups={}, seconds={}, error=f"exit status {done.returncode}\n{tail}")
        return report_from(json.loads(result.read_text()))


def report_from(data: object) -> RankReport:
    """The report that a process wrote as JSON."""
    report = typed(RankReport, data, "", lambda key: "report.json")
    assert isinstance(report, RankReport)
    return report


def _search_path() -> str:
    own = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))
