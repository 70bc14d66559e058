"""Small corpora of text, and the command run in this process."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import nemotron3_megatron  # noqa: F401  adapts Megatron-Core to this machine before it is imported
from data_prep.__main__ import main

Prepare = Callable[..., int]


@pytest.fixture
def texts() -> list[str]:
    """Documents of several lengths and scripts, all different."""
    words = ["alpha", "beta", "gamma", "delta", "naïve", "日本", "return x\n", "  indented"]
    return [" ".join(words[(i * j) % len(words)] for j in range(1, 8 + i % 5)) + f" {i}" for i in range(60)]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """write_jsonl(name, texts, field="text") -> a JSONL file, compressed as its suffix says."""

    def write(name: str, texts: Sequence[str], field: str = "text") -> Path:
        data = b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            data = gzip.compress(data)
        elif path.suffix == ".zst":
            pyarrow = pytest.importorskip("pyarrow")
            data = pyarrow.compress(data, codec="zstd", asbytes=True)
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., list[str]]:
    """arguments(paths, output, *overrides) -> the command's; a BPE of 280 entries, one worker."""

    def build(paths: Sequence[Path | str], output: str, *overrides: str, bpe: bool = True) -> list[str]:
        listed = ",".join(f"'{path}'" for path in paths)
        settings = {"input.paths": f"[{listed}]", "output": f"'{tmp_path / output}'", "num_workers": "1"}
        if bpe:
            settings |= {"tokenizer.kind": "bpe", "tokenizer.path": "null", "tokenizer.vocab_size": "280"}
        settings |= dict(override.split("=", 1) for override in overrides)
        return ["recipe=files", *(f"{key}={value}" for key, value in settings.items())]

    return build


@pytest.fixture
def prepare(arguments: Callable[..., list[str]]) -> Prepare:
    """prepare(paths, output, *overrides) -> exit status of the command with these arguments, run in this process."""
    return lambda *given, **options: main(arguments(*given, **options))
