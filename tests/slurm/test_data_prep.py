"""Data preparation as array jobs of a real Slurm: the result of one machine, after a failure only what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four files, a shard each; some documents are in two of them."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for file in range(4):
        texts = [
            f"document {number} of a small corpus, number {number % 7}" for number in range(60 * file, 60 * file + 80)
        ]
        lines = (json.dumps({"text": text}) for text in texts)
        (directory / f"{file}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return directory


def prepare(lab: Lab, corpus: Path, output: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """``python -m data_prep`` on the login node."""
    command = [sys.executable, "-m", "data_prep", "recipe=files", f"input.paths=['{corpus}']", f"output='{output}'"]
    command += ["tokenizer.kind=bpe", "tokenizer.path=null", "tokenizer.vocab_size=280", "validation_fraction=0.2"]
    command += ["shard_bytes=1", *settings]
    return subprocess.run(command, cwd=ROOT, env=lab.environment, capture_output=True, text=True, check=False)


def contents(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in OUTPUTS]


SLURM = ("executor.kind=slurm", "executor.partition=main", "executor.mem_per_cpu_gb=1")


def test_the_result_is_that_of_one_machine(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    """With a pass for copies, so that stages wait for each other."""
    assert prepare(lab, corpus, tmp_path / "local", "dedup.exact=true").returncode == 0
    done = prepare(lab, corpus, tmp_path / "slurm", "dedup.exact=true", *SLURM)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "slurm") == contents(tmp_path / "local")
    dropped = json.loads((tmp_path / "slurm/manifest.json").read_text())["dropped"]
    assert sum(dropped.values()) == 3 * 20


def test_a_failed_shard_is_redone_alone(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "out", corpus / "2.jsonl"
    whole = file.read_text()
    file.write_text(whole + "not JSON\n")
    settings = ("tokenizer.train_bytes=1000", *SLURM)  # too little for the tokenizer to meet the defect
    failed = prepare(lab, corpus, output, *settings)
    assert failed.returncode == 2
    assert f"{output}/shards/logs/tokens/logs" in failed.stderr
    assert not (output / "manifest.json").exists()
    assert lab.call("squeue", "--noheader") == "", "the job that was to write the manifest is gone"
    kept = {path: path.stat().st_mtime_ns for path in (output / "shards").glob("*.bin")}
    assert {path.name[:5] for path in kept} == {"00000", "00001", "00003"}

    file.write_text(whole)
    done = prepare(lab, corpus, output, *settings)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert prepare(lab, corpus, tmp_path / "local", "tokenizer.train_bytes=1000").returncode == 0
    assert contents(output) == contents(tmp_path / "local")
