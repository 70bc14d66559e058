"""Export and import of a model several times larger than the memory they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

SHARD = 8 * 2**20
ALLOWED = 72 * 2**20
"""Writable memory on top of what the imported libraries hold: a shard as tensors and as the bytes to be written, the
tensor being read and the stored part it is cut from, 16 MiB blocks for checksums, and what the allocator keeps."""

MODEL = [
    "recipe=tiny",
    "data.tokenizer=null",
    "model.pattern=MEMEMEME*E",
    "model.hidden_size=1024",
    "model.vocab_size=2048",
    "model.mamba_num_heads=32",
    "model.num_moe_experts=32",
    "model.moe_latent_size=512",
    "model.moe_ffn_hidden_size=512",
    "precision=bf16",
]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits private memory on Linux only")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    size, whole = map(int, done.stdout.split())
    assert size > 3 * ALLOWED, "the model must be several times what is allowed"
    assert whole == 0, "the limit does not limit"


def _main(place: Path) -> None:
    """Make a published model, import it, export that, all below one limit; print its size."""
    import resource

    import torch

    from nemotron3_megatron.checkpoint.huggingface import export_model, import_model
    from nemotron3_megatron.checkpoint.huggingface.config import model_config
    from nemotron3_megatron.checkpoint.huggingface.export import published_specs
    from nemotron3_megatron.checkpoint.huggingface.shards import Item, ShardReader, Spec, write_shards
    from nemotron3_megatron.config import compose, resolve

    recipe, _ = compose([*MODEL, f"run_dir={place / 'run'}"])
    torch.zeros(8).normal_().to(torch.bfloat16)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + ALLOWED
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def item(spec: Spec) -> Item:
        def make() -> tuple[torch.Tensor]:
            numbers = torch.arange(prod(spec.shape), dtype=torch.int32) % 251 + len(spec.name)
            return (numbers.to(spec.dtype).view(spec.shape),)

        return Item((spec,), make)

    specs = list(published_specs(resolve(recipe, recipe.world_size or 1)))
    first = place / "first"
    first.mkdir()
    write_shards(map(item, specs), first, SHARD)
    (first / "config.json").write_text(json.dumps(model_config(recipe.model)))
    checkpoint = import_model(first, recipe, place / "checkpoint", file_bytes=SHARD)
    second = export_model(checkpoint, place / "second", shard_bytes=SHARD)
    before, after = ShardReader(first), ShardReader(second)
    for spec in specs[::7]:
        assert torch.equal(before.tensor(spec.name), after.tensor(spec.name)), spec.name
    size = sum(spec.bytes for spec in specs)
    try:
        whole = len(bytearray(size))
    except MemoryError:
        whole = 0
    sys.stdout.write(f"{size} {whole}\n")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
