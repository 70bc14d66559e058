"""Where a run is submitted to: the ``cluster`` group of a recipe. Training itself reads none of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from nemotron3_megatron.config.duration import FOUR_HOURS, ONE_MINUTE, TEN_MINUTES, Duration
from nemotron3_megatron.config.errors import UserError

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?($|_)", re.IGNORECASE)
"""Names of variables whose values are never written: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, ..."""

_WORD = re.compile(r"[\w.,:@+&|*()\[\]/=-]+", re.ASCII)
"""What Slurm's own names and feature expressions are made of; nothing that a shell reads."""
_OPTION = re.compile(r"--[a-z][a-z-]*(=[\w.,:@+*()\[\]/=-]+)?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NEEDS_DURATION = "a wall-clock time such as '4 h' or '90 min'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerConfig:
    """An image that the training processes run in; the batch script itself runs on the host."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: ``srun --container-image`` (Pyxis and Enroot); apptainer: ``apptainer exec``."""
    image: str
    mounts: tuple[str, ...] = ()
    """``SOURCE:TARGET`` or ``SOURCE:TARGET:ro``. Run and working directory are mounted at their own places anyway."""
    code: str | None = None
    """Path of a checkout inside the image to train with; null: the snapshot in the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One cluster and how much of it a segment takes. null leaves a choice to Slurm's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    processes_per_node: int = 2
    """Ranks on a node; a segment takes world size / this many nodes."""
    gpus_per_node: int | None = None
    """What ``--gpus-per-node`` asks for; null: GPUs are not asked for (CPUs, or nodes handed out whole)."""
    cpus_per_node: int | None = None
    exclusive: bool = False
    nodes_per_segment: int | None = None
    """``--segment``: nodes that must lie under one switch or NVLink domain (topology/block, Slurm 23.11 or newer)."""
    sbatch_options: tuple[str, ...] = ()
    """Further options, such as ``--comment=nightly``."""

    time_limit: Duration = FOUR_HOURS
    """Of one segment of the chain."""
    save_lead: Duration = TEN_MINUTES
    """How long before the limit the ranks are told to save and leave; longer than a step and a save together."""
    retries: int = 3
    """Failed segments in a row that are tried again."""
    retry_wait: Duration = ONE_MINUTE
    """Before the first retry; doubled for each further one, up to half an hour."""
    restarts_in_job: int = 1
    """Retries in a row that start anew on the same nodes, without waiting in the queue; further ones get a new job."""

    python: str | None = None
    """Interpreter of the processes; null: the one that submits, or ``python`` of the image."""
    modules: tuple[str, ...] = ()
    """Environment modules to load first."""
    container: ContainerConfig | None = None
    env: dict[str, str] = field(default_factory=dict)
    """Variables of the job, such as fabric settings. Secrets are refused: they stay out of every file we write."""
    secrets_file: str | None = None
    """File of ``NAME=value`` lines that the job reads; only its owner may be able to read it."""
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = None
    """torchrun's ``--numa-binding``: ranks stay on the cores and the memory beside their GPU."""
    jit_cache: str | None = None
    """Directory on a node's own disk for compiled kernels, filled from the run directory at each start."""


def check_cluster(cluster: ClusterConfig, place: Callable[[str], str | None]) -> None:
    """Refuse what cannot be submitted.

    Args:
        cluster: as composed.
        place: where a dotted key was written.

    Raises:
        UserError: a value that Slurm or a shell would read as something else, a secret, or impossible times.
    """

    def refuse(key: str, value: object, why: str, nearest: str) -> UserError:
        return UserError(f"cluster.{key}={value}", where=place(f"cluster.{key}"), why=why, nearest=nearest)

    for key in ("partition", "account", "qos", "reservation", "constraint"):
        value = getattr(cluster, key)
        if value is not None and not _WORD.fullmatch(value):
            raise refuse(key, repr(value), "is no name that Slurm knows", "letters, digits and . _ - , : @")
    for option in cluster.sbatch_options:
        if not _OPTION.fullmatch(option):
            raise refuse("sbatch_options", repr(option), "is no option of sbatch's", "--name=value")
    for number in ("processes_per_node", "gpus_per_node", "cpus_per_node", "nodes_per_segment"):
        value = getattr(cluster, number)
        if value is not None and value < 1:
            raise refuse(number, value, "must be positive", f"cluster.{number}=1, or null")
    for number in ("retries", "restarts_in_job"):
        if getattr(cluster, number) < 0:
            raise refuse(number, getattr(cluster, number), "must not be negative", f"cluster.{number}=0")
    _check_times(cluster, refuse)
    for name in cluster.env:
        if not _VARIABLE.fullmatch(name):
            raise refuse(f"env.{name}", "...", "is no name of a variable", "letters, digits and _")
        if SECRET_NAME.search(name):
            why = "looks like a secret, and would be written into the job's script"
            raise refuse(f"env.{name}", "...", why, "cluster.secrets_file=FILE, readable by you only")
    _check_texts(cluster, refuse)


def _check_times(cluster: ClusterConfig, refuse: Callable[[str, object, str, str], UserError]) -> None:
    for item in fields(cluster):
        value = getattr(cluster, item.name)
        if isinstance(value, Duration) and value.unit != "seconds":
            raise refuse(item.name, value, f"must be {_NEEDS_DURATION}", f"cluster.{item.name}='10 min'")
    if cluster.time_limit.value < 60 or cluster.time_limit.value % 60:
        raise refuse("time_limit", cluster.time_limit, "must be whole minutes: Slurm counts in them", "'60 min'")
    if not 30 <= cluster.save_lead.value <= cluster.time_limit.value / 2:
        why = "must leave time to save (30 s, the beat of Slurm's clock) and more time to train"
        raise refuse("save_lead", cluster.save_lead, why, f"at most half of {cluster.time_limit}")


def _check_texts(cluster: ClusterConfig, refuse: Callable[[str, object, str, str], UserError]) -> None:
    texts = [("python", cluster.python), ("secrets_file", cluster.secrets_file), ("jit_cache", cluster.jit_cache)]
    texts += [("modules", name) for name in cluster.modules]
    texts += [(f"env.{name}", value) for name, value in cluster.env.items()]
    if (container := cluster.container) is not None:
        texts += [("container.image", container.image), ("container.code", container.code)]
        texts += [("container.mounts", mount) for mount in container.mounts]
        for mount in container.mounts:
            if "," in mount or mount.count(":") not in (1, 2):
                raise refuse("container.mounts", repr(mount), "is not SOURCE:TARGET[:ro]", "/data:/data:ro")
    for key, value in texts:
        if value is not None and (not value or not value.isprintable()):
            raise refuse(key, repr(value), "is empty or holds control characters", "a printable text")
