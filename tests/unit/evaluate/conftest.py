"""A saved checkpoint of an untrained small model, with its run record and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config import Recipe, Run, compose, resolve
from nemotron3_megatron.config.serialize import to_json
from nemotron3_megatron.data.tokenizer import HuggingFaceTokenizer
from nemotron3_megatron.evaluate.trained import on_one_rank
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select

VOCABULARY = 320
TEXT = "def add(first, second):\n    return first + second\n"


@dataclass(frozen=True)
class Saved:
    """A checkpoint and what the model in it says about a text."""

    checkpoint: Path
    recipe: Recipe
    run: Run
    context: tuple[int, ...]
    logits: torch.Tensor
    """(s, V) for ``context``."""


SMALL = ("hidden_size=64", "vocab_size=64", "ffn_hidden_size=64", "init_method_std=0.3", "mamba_chunk_size=8")
ARCHITECTURES = {
    "shared MTP, LatentMoE": ("pattern=MM*E-M*", "mtp_pattern='*E'", "moe_latent_size=32"),
    "MTP of its own for each depth, with Mamba; MoE": (
        "pattern=*ME",
        "mtp_pattern='M*-'",
        "mtp_use_repeated_layer=false",
        "moe_latent_size=null",
    ),
}
"""Every kind of layer, in the main stack and in multi-token prediction."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nemotron3Model]:
    """An untrained model in float64, router included; two depths of MTP."""
    values = [f"model.{value}" for value in (*SMALL, *ARCHITECTURES[request.param])]
    recipe, origins = compose(["recipe=tiny", f"run_dir={tmp_path_factory.mktemp('exact')}", *values])
    platform, run = select("cpu"), on_one_rank(resolve(recipe, 2, origins))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (model,) = build_model(run, platform, start_groups(run, platform))
        model.eval().double()
        model.config.params_dtype, model.config.moe_router_dtype = torch.float64, "fp64"
        yield model
    finally:
        stop_groups()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.mktemp("generate")
    tokenizer = _tokenizer(directory)
    model = ("pattern=M*E", "hidden_size=96", "moe_latent_size=48", f"vocab_size={VOCABULARY}", "init_method_std=0.3")
    recipe, origins = compose(
        [
            "recipe=tiny",
            f"run_dir={directory}",
            f"data.tokenizer={directory / 'tokenizer.json'}",
            *(f"model.{value}" for value in model),
        ]
    )
    run = resolve(recipe, 2, origins)
    record = {"run": json.loads(to_json(run)), "versions": {}, "git_commit": None, "platform": "cpu"}
    (directory / "run.json").write_text(json.dumps(record))
    context = tuple(tokenizer.encode(TEXT))
    logits = _save(on_one_rank(run), context)
    return Saved(directory / "checkpoints" / "step_00000007", recipe, run, context, logits)


def _tokenizer(directory: Path) -> HuggingFaceTokenizer:
    import tokenizers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [TEXT] * 3, vocab_size=300, special_tokens=["<|endoftext|>", "</think>"], show_progress=False
    )
    adopted = HuggingFaceTokenizer.of(tokenizers.Tokenizer.from_str(trained.to_str()), "<|endoftext|>", "here")
    adopted.save(directory)
    return adopted


def _save(run: Run, context: tuple[int, ...]) -> torch.Tensor:
    platform = select("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (model,) = build_model(run, platform, start_groups(run, platform))
        CheckpointStore(run.run_dir).save(7, [model], None, {"step": 7}, keep_last=None)
        tokens = torch.tensor([context])
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(tokens, torch.arange(len(context))[None])[0]
    finally:
        stop_groups()
    return logits
