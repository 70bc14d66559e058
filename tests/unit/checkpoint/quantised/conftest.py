"""A checkpoint of a model whose plan mixes formats, and its quantised export."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "huggingface"))

from saved_models import Saved, save_model

from nemotron3_megatron.checkpoint.huggingface import export_model

MODEL = (
    "data.tokenizer=null",
    "model.pattern=ME*-MEMM",
    "model.hidden_size=64",
    "model.vocab_size=96",
    "model.ffn_hidden_size=64",
    "model.mamba_num_heads=16",  # in_proj has 2 * 128 + 2 * 2 * 32 + 16 outputs
    "model.mamba_head_dim=8",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=32",
    "model.moe_shared_expert_intermediate_size=32",
    "model.moe_latent_size=32",
)


@dataclass(frozen=True)
class Exported:
    """A saved model and the directory of its quantised export."""

    saved: Saved
    directory: Path


@pytest.fixture(scope="session")
def published_plan(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """BF16 weights, the published table: NVFP4 with square blocks, MXFP8, and a BF16 tail."""
    return _exported(tmp_path_factory, "precision=nemotron3_nvfp4")


@pytest.fixture(scope="session")
def everything_in_nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """FP32 weights; attention and MTP in NVFP4 too, with heads narrower than a square block."""
    narrow = ("model.kv_channels=8", "precision.dtype=fp32")
    return _exported(tmp_path_factory, "precision=all_nvfp4", *narrow)


def _exported(tmp_path_factory: pytest.TempPathFactory, *overrides: str) -> Exported:
    saved = save_model(tmp_path_factory.mktemp("run"), *MODEL, *overrides)
    out = tmp_path_factory.mktemp("exported") / "hf"
    return Exported(saved, export_model(saved.path, out, number_format="quantised", shard_bytes=50_000))
