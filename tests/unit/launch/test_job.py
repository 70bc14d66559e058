"""The batch script: what it asks Slurm for, and that no text of the user's is ever read as a command."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config.cluster import ClusterConfig, ContainerConfig
from nemotron3_megatron.launch.job import job_name, render
from nemotron3_megatron.launch.submission import Submission, World

BOUNDARY = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a'b",
    'a"b',
    "a\nb",
    "\n#SBATCH --uid=0",
    ")\ntouch pwned\n(",
    "-rf",
    "@@{x}",
]


def submission(cluster: ClusterConfig | None = None, run_dir: str = "/runs/a", *arguments: str) -> Submission:
    return Submission(
        name="tiny",
        run_dir=Path(run_dir),
        working_dir=Path("/work"),
        code=Path(run_dir) / "code",
        python="/env/bin/python",
        arguments=arguments,
        worlds=(),
        total_steps=100,
        cluster=cluster or ClusterConfig(),
    )


WORLD = World(stage="main", end_step=100, nodes=4, processes_per_node=8)


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def shell(script: str, question: str, cwd: Path) -> str:
    """What bash makes of the script's settings: all of it up to the first command of Slurm's, then ``question``."""
    settings = script[: script.index("MASTER_ADDR=")].replace("export SLURM_EXPORT_ENV", "SLURM_JOB_ID=1; export A")
    done = subprocess.run(["bash", "-c", settings + question], cwd=cwd, capture_output=True, check=True)
    assert done.stderr == b"", done.stderr
    return done.stdout.decode()


def test_what_slurm_is_asked_for() -> None:
    cluster = ClusterConfig(
        partition="gpu",
        account="me",
        qos="high",
        gpus_per_node=8,
        cpus_per_node=64,
        nodes_per_segment=16,
        exclusive=True,
        sbatch_options=("--comment=x",),
    )
    found = options(render(submission(cluster), WORLD))
    wanted = {"nodes": "4", "ntasks-per-node": "1", "time": "240", "signal": "B:USR1@600", "dependency": "singleton"}
    wanted |= {"partition": "gpu", "account": "me", "qos": "high", "gpus-per-node": "8", "cpus-per-task": "64"}
    wanted |= {"segment": "4", "comment": "x", "exclusive": "", "requeue": "", "open-mode": "append"}
    wanted |= {"output": '"/runs/a/logs/segment_%j.log"', "chdir": '"/work"'}
    assert {key: found[key] for key in wanted} == wanted
    assert "partition" not in options(render(submission(), WORLD)), "what is not set is Slurm's choice"


def test_every_script_is_bash_with_all_settings(tmp_path: Path) -> None:
    container = ContainerConfig(runtime="pyxis", image="/images/a b.sqsh", mounts=("/data:/data:ro",))
    full = ClusterConfig(
        container=container,
        modules=("cuda/13", "x y"),
        secrets_file="/home/me/s",
        numa_binding="node",
        jit_cache="/tmp",
    )
    for cluster in (ClusterConfig(), full, replace(full, container=replace(container, runtime="apptainer"))):
        done = subprocess.run(["bash", "-n"], input=render(submission(cluster), WORLD), text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_pyxis_and_apptainer_get_image_and_mounts() -> None:
    container = ContainerConfig(runtime="pyxis", image="/images/a b.sqsh", mounts=("/data:/data:ro",))
    script = render(submission(ClusterConfig(container=container, gpus_per_node=8)), WORLD)
    assert shlex.quote("--container-image=/images/a b.sqsh") in script
    assert "--container-mounts=/runs/a:/runs/a,/work:/work,/data:/data:ro" in script
    apptainer = ClusterConfig(container=replace(container, runtime="apptainer"), gpus_per_node=8)
    script = render(submission(apptainer), WORLD)
    binds = "--bind=/runs/a:/runs/a --bind=/work:/work --bind=/data:/data:ro"
    assert f"apptainer exec --nv {binds} --pwd=/work '/images/a b.sqsh' /env/bin/python -m" in script


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_arrives_unchanged_and_is_not_executed(text: str, tmp_path: Path) -> None:
    cluster = ClusterConfig(env={"NAME": text}, jit_cache=text)
    run_dir = f"/runs/{text}" if text.isprintable() else "/runs/x"  # others are refused: test_submit.py
    script = render(replace(submission(cluster, run_dir, text, "last"), name=text), replace(WORLD, stage=text))
    question = 'printf "%s\\0" "$NAME" "$RUN" "$NEMOTRON3_JIT_CACHE" "${ARGUMENTS[@]}"'
    assert shell(script, question, tmp_path).split("\0") == [text, run_dir, text, text, "last", ""]
    assert not list(tmp_path.iterdir())


@given(BOUNDARY, BOUNDARY)
def test_any_text_arrives_unchanged(name: str, value: str) -> None:
    script = render(replace(submission(ClusterConfig(env={"NAME": value}), "/runs/x", value), name=name), WORLD)
    settings = shell(script, 'printf "%s\\0" "$NAME" "${ARGUMENTS[@]}"', Path("/"))
    assert settings.split("\0")[:2] == [value, value]


def test_job_names_are_plain_and_tell_runs_apart() -> None:
    names = {job_name(text, Path("/runs") / str(number)) for number, text in enumerate([*HOSTILE, "same", "same"])}
    assert len(names) == len(HOSTILE) + 2
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") for name in names)
    assert not any(name.startswith("-") for name in names)
