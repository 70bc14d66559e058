"""``job.sbatch``: the template in ``slurm/`` filled in. Every value that reaches a shell is quoted here."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from string import Template

from nemotron3_megatron.config.cluster import ClusterConfig
from nemotron3_megatron.launch.submission import Submission, World

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "job.sbatch"
FILE_NAME = "job.sbatch"
LOGS = "logs"
_NAME_LENGTH = 40


class _Template(Template):
    delimiter = "@@"


def job_name(name: str, run_dir: Path) -> str:
    """The Slurm name of all segments of a run: readable, and different for every run directory."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:_NAME_LENGTH].lstrip("-")
    return f"{readable}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


def render(submission: Submission, world: World) -> str:
    """The batch script of a segment on ``world``."""
    cluster = submission.cluster
    quote, run_dir = shlex.quote, submission.run_dir
    numa = [f"--numa-binding={cluster.numa_binding}"] if cluster.numa_binding else []
    values = {
        "name": _comment(submission.name),
        "stage": _comment(world.stage),
        "nodes": str(world.nodes),
        "processes": str(world.processes_per_node),
        "options": "\n".join(f"#SBATCH {option}" for option in _options(submission, world)),
        "modules": _modules(cluster),
        "environment": "\n".join(_environment(cluster)),
        "run_dir": quote(str(run_dir)),
        "code": quote(str(submission.code)),
        "arguments": "\n".join(f"  {quote(argument)}" for argument in submission.arguments),
        "jit_cache": quote(cluster.jit_cache or ""),
        "srun": shlex.join(_srun_options(submission)),
        "python": shlex.join([*_inside(submission), submission.python]),
        "per_node": str(world.processes_per_node),
        "torchrun": shlex.join(numa),
        # Beyond it a restart would be told to save and leave before it was worth its start.
        "last_restart": str(round(cluster.time_limit.value - 2 * cluster.save_lead.value)),
        "tool": _tool(submission),
    }
    return _Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _options(submission: Submission, world: World) -> list[str]:
    cluster, seconds = submission.cluster, round(submission.cluster.save_lead.value)
    chosen = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_node,
        "segment": cluster.nodes_per_segment and min(cluster.nodes_per_segment, world.nodes),
    }
    logs = str(submission.run_dir / LOGS).replace("%", "%%")
    return [
        f"--job-name={job_name(submission.name, submission.run_dir)}",
        f"--nodes={world.nodes}",
        "--ntasks-per-node=1",
        f"--time={round(cluster.time_limit.value) // 60}",
        f"--signal=B:USR1@{seconds}",
        "--dependency=singleton",
        "--requeue",
        "--open-mode=append",
        f'--chdir="{submission.working_dir}"',
        f'--output="{logs}/segment_%j.log"',
        *(f"--{name}={value}" for name, value in chosen.items() if value is not None),
        *(["--exclusive"] if cluster.exclusive else []),
        *cluster.sbatch_options,
    ]


def _modules(cluster: ClusterConfig) -> str:
    if not cluster.modules:
        return ""
    # A batch shell is no login shell: where `module` is not there yet, the profile defines it.
    return f"command -v module >/dev/null || . /etc/profile\nmodule load {shlex.join(cluster.modules)} || exit 1"


def _environment(cluster: ClusterConfig) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    if cluster.secrets_file is not None:
        lines.append(f"set -a; . {shlex.quote(cluster.secrets_file)} || exit 1; set +a")
    return lines


def _srun_options(submission: Submission) -> list[str]:
    cluster, container = submission.cluster, submission.cluster.container
    options = [f"--cpus-per-task={cluster.cpus_per_node}"] if cluster.cpus_per_node else []
    if cluster.exclusive and not cluster.cpus_per_node:
        options.append("--whole")
    if container is not None and container.runtime == "pyxis":
        options += [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(_mounts(submission))}",
            f"--container-workdir={submission.working_dir}",
            "--no-container-mount-home",
        ]
    return options


def _inside(submission: Submission) -> list[str]:
    """What stands before a command that runs in an Apptainer image; Pyxis is srun's own."""
    container = submission.cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    binds = [f"--bind={mount}" for mount in _mounts(submission)]
    gpu = ["--nv"] if submission.cluster.gpus_per_node or submission.cluster.exclusive else []
    return ["apptainer", "exec", *gpu, *binds, f"--pwd={submission.working_dir}", container.image]


def _mounts(submission: Submission) -> list[str]:
    container, cluster = submission.cluster.container, submission.cluster
    own = [submission.run_dir, submission.working_dir, *([Path(cluster.jit_cache)] if cluster.jit_cache else [])]
    return [*dict.fromkeys(f"{path}:{path}" for path in own), *(container.mounts if container else ())]


def _tool(submission: Submission) -> str:
    """``nemotron3`` as the batch script calls it: in the image where there is one."""
    call = [*_inside(submission), submission.python, "-m", "nemotron3_megatron.cli"]
    container = submission.cluster.container
    if container is not None and container.runtime == "pyxis":
        call = ["srun", "--overlap", "--nodes=1", "--ntasks=1", *_srun_options(submission), *call]
    return shlex.join(call)


def _comment(text: str) -> str:
    """One line, whatever the text."""
    return "".join(mark if mark.isprintable() else "?" for mark in text)
