"""Data preparation on a Ray cluster of this machine; skipped where Ray is not installed, which nothing else needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
OUTPUTS = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json")


def run(files: list[Path], output: Path, kind: str) -> subprocess.CompletedProcess[str]:
    listed = ",".join(f"'{file}'" for file in files)
    command = [sys.executable, "-m", "data_prep", "recipe=files", f"input.paths=[{listed}]", f"output='{output}'"]
    command += ["tokenizer.kind=bpe", "tokenizer.path=null", "tokenizer.vocab_size=280", "tokenizer.train_bytes=1000"]
    command += ["validation_fraction=0.2", "shard_bytes=1", "dedup.exact=true", f"executor.kind={kind}"]
    command += ["executor.mem_per_cpu_gb=1", "num_workers=2"]
    with tempfile.TemporaryDirectory() as short:  # Ray's sockets lie there, whose paths may not be long
        switches = {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        variables = {**os.environ, **switches}
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_the_result_is_that_of_one_machine_and_failures_are_named(write_jsonl, texts, tmp_path: Path) -> None:
    files = [write_jsonl(f"in/{number}.jsonl", texts[number::4] + texts[:3]) for number in range(4)]
    assert run(files, tmp_path / "local", "local").returncode == 0
    done = run(files, tmp_path / "ray", "ray")
    assert done.returncode == 0, done.stderr
    for name in OUTPUTS:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert sum(json.loads((tmp_path / "ray/manifest.json").read_text())["dropped"].values()) == 12

    files[3].write_bytes(files[3].read_bytes() + b"not JSON\n")
    failed = run(files, tmp_path / "ray", "ray")
    assert failed.returncode == 2
    assert "1 of 4 tasks of the stage 'hashes of texts' failed" in failed.stderr
    [logs] = [word for word in failed.stderr.split() if word.endswith("/logs")]
    assert "not JSON" in "".join(path.read_text() for path in Path(logs).iterdir())
