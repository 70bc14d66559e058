"""What is refused before anything is written, what a dry run writes (nothing), and what a snapshot holds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nemotron3_megatron import cli
from nemotron3_megatron.config import compose
from nemotron3_megatron.config.cluster import ClusterConfig, check_cluster
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.launch.snapshot import CHECKOUT, copy_code
from nemotron3_megatron.launch.submission import read_submission, write_submission
from nemotron3_megatron.launch.submit import dry_run, prepare, write_run_directory


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare(["recipe=tiny", *overrides])
    return str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "a\tb", 'a\\"b', "a:b", "a,b", "a\x1b[31m"])
def test_paths_that_sbatch_or_mounts_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="run_dir"):
        prepare(["recipe=tiny", f'run_dir="/runs/{name}"'])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.partition='a b'", "no name that Slurm knows"),
        ("cluster.account='x;reboot'", "no name that Slurm knows"),
        ("cluster.qos='$(id)'", "no name that Slurm knows"),
        ("cluster.sbatch_options=['--wrap=x y']", "no option of sbatch's"),
        ("cluster.sbatch_options=[comment]", "no option of sbatch's"),
        ("cluster.env.WANDB_API_KEY=abc", "looks like a secret"),
        ("cluster.env.HF_TOKEN=abc", "looks like a secret"),
        ("cluster.env={A-B: x}", "no name of a variable"),
        ("cluster.processes_per_node=0", "must be positive"),
        ("cluster.retries=-1", "must not be negative"),
        ("cluster.time_limit='90 s'", "whole minutes"),
        ("cluster.time_limit='5 steps'", "wall-clock time"),
        ("cluster.save_lead='45 min'", "leave time to save"),
        ("cluster.container={runtime: pyxis, image: x, mounts: ['/a']}", "SOURCE:TARGET"),
        ("cluster.container={runtime: docker, image: x}", "pyxis | apptainer"),
        ("cluster.partion=gpu", "cluster.partition"),
        ("cluster=h100", "h100x8"),
        ("world_size=3", ""),
    ],
)
def test_clusters_that_cannot_be_meant_are_refused(override: str, message: str) -> None:
    assert message in refusal(override, "run_dir=/runs/x", "parallel.ep=1")


@pytest.mark.parametrize("name", ["local", "generic", "h100x8", "gb200_nvl72"])
def test_every_profile_is_legal(name: str) -> None:
    recipe, _ = compose(["recipe=nano_bf16", f"cluster={name}"])
    check_cluster(recipe.cluster, lambda key: None)
    assert recipe.cluster != ClusterConfig()


def test_stages_of_their_own_worlds_get_nodes_of_their_own() -> None:
    late = "stages.late={tokens: 8 steps, seq_length: 256, global_batch_size: 16, micro_batch_size: 4, world_size: 4,"
    late += " parallel: {tp: 2}}"
    arguments = ["recipe=tiny", "run_dir=/runs/x", "cluster.processes_per_node=1", late]
    _, submission = prepare(arguments)
    main, second = submission.worlds
    assert [(world.stage, world.nodes, world.processes_per_node) for world in (main, second)] == [
        ("main", 2, 1),
        ("late", 4, 1),
    ]
    assert submission.world_at(main.end_step - 1) == main
    assert submission.world_at(main.end_step) == second
    with pytest.raises(UserError, match="cannot be right for all"):
        prepare([*arguments, "world_size=2"])


def test_worlds_that_do_not_fill_their_nodes_are_refused() -> None:
    message = refusal("run_dir=/runs/x", "world_size=4", "cluster.processes_per_node=3")
    assert "do not fill nodes of 3 processes" in message
    assert "a world size of 6" in message


@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_secrets_file_that_others_can_read_is_refused(tmp_path: Path, mode: int, refused: bool) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("WANDB_API_KEY=abc\n")
    secrets.chmod(mode)
    arguments = ["recipe=tiny", "run_dir=/runs/x", f"cluster.secrets_file={secrets}"]
    if refused:
        with pytest.raises(UserError, match="can be read by others"):
            prepare(arguments)
    else:
        assert prepare(arguments)[1].cluster.secrets_file == str(secrets)


def test_a_secret_among_the_arguments_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(UserError, match="its value stands in an argument") as caught:
        dry_run(["recipe=tiny", f"run_dir={tmp_path}/0123456789abcdef"])
    assert "0123456789abcdef" not in str(caught.value)


def test_a_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no sbatch
    run_dir = tmp_path / "run"
    assert cli.main(["submit", "recipe=tiny", f"run_dir={run_dir}", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=1\n" in out
    assert "not validated" in err
    assert not run_dir.exists()


def test_the_directory_is_whole_and_closed_to_others_and_is_not_taken_twice(tmp_path: Path) -> None:
    run_dir = tmp_path / "a b"
    run, submission = prepare(["recipe=tiny", f'run_dir="{run_dir}"', "seed=7"])
    write_run_directory(run, submission, "#!/bin/bash\n")
    assert read_submission(run_dir) == submission
    assert submission.arguments == ("recipe=tiny", "seed=7", f'run_dir="{run_dir}"')
    names = {"code", "environment.json", "job.sbatch", "launch.json", "logs", "plan.html", "recipe.json"}
    assert {path.name for path in run_dir.iterdir()} == names
    assert run_dir.stat().st_mode & 0o027 == 0
    for name in ("job.sbatch", "launch.json", "recipe.json", "environment.json"):
        assert (run_dir / name).stat().st_mode & 0o137 == 0, name
    assert (run_dir / "code/recipes/config.yaml").read_bytes() == (CHECKOUT / "recipes/config.yaml").read_bytes()
    with pytest.raises(UserError, match="was submitted there already"):
        prepare(["recipe=tiny", f'run_dir="{run_dir}"'])


def test_the_stage_in_force_decides_the_world() -> None:
    _, submission = prepare(["recipe=tiny", "run_dir=/runs/x"])
    assert submission.world_at(0) == submission.world_at(10**9) == submission.worlds[0]
    assert (submission.worlds[0].nodes, submission.worlds[0].processes_per_node) == (1, 2)


def test_a_submission_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run was submitted in it"):
        read_submission(tmp_path)
    _, submission = prepare(["recipe=tiny", f"run_dir={tmp_path}/x"])
    (tmp_path / "x").mkdir()
    write_submission(submission)
    path = tmp_path / "x" / "launch.json"
    path.write_text(path.read_text().replace('"total_steps"', '"all_steps"'))
    with pytest.raises(UserError, match="all_steps"):
        read_submission(tmp_path / "x")


def git(folder: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(["git", "-C", folder, *arguments], env={**os.environ, **identity}, check=True, capture_output=True)


def test_the_snapshot_is_the_working_tree_not_the_last_commit(tmp_path: Path) -> None:
    """Changed and new code, but neither ignored nor private files."""
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    (checkout / "recipes").mkdir(parents=True)
    git(checkout, "init", "-q")
    for name in ("train.py", "gone.py", "recipes/a b.yaml"):
        (checkout / name).write_text("old")
    (checkout / ".gitignore").write_text("*.log\n")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "x")
    (checkout / "train.py").write_text("changed")
    (checkout / "gone.py").unlink()
    for name in ("recipes/new.yaml", "recipes/x.log", "private.txt"):
        (checkout / name).write_text("new")
    copy_code(copy, checkout)
    found = {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()}
    wanted = {"train.py": "changed", "recipes/a b.yaml": "old", "recipes/new.yaml": "new", ".gitignore": "*.log\n"}
    assert found == wanted


def test_a_checkout_without_git_is_copied_by_folder(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("train.py", "recipes/a.yaml", "recipes/__pycache__/x.pyc", "runs/big.bin"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    copy_code(tmp_path / "copy", checkout)
    files = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert files == {"train.py", "recipes/a.yaml"}
