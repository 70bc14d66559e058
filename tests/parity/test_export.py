"""Exported and imported models, of every layer kind, in transformers' native class: the same function of tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_models import every_layer_kind
from torch import Tensor
from transformers import AutoModelForCausalLM
from transplant import transplant

from nemotron3_megatron.checkpoint.huggingface import export_model, import_model
from nemotron3_megatron.checkpoint.huggingface.config import model_config
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.recipe import ModelConfig, Recipe
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.platform import select
from nemotron3_megatron.train.record import write_run_record

Build = Callable[[ModelConfig], Nemotron3Model]
Float64 = Callable[[], AbstractContextManager[None]]

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""transformers' implementations that float64 can have."""
LATENT = pytest.mark.parametrize("latent", [None, 16], ids=["moe", "latent_moe"])


def architecture(latent: int | None) -> ModelConfig:
    return every_layer_kind(latent, mtp_pattern="*E", mtp_depths=2)


def recipe_of(model: ModelConfig, run_dir: Path) -> Recipe:
    base, _ = compose(["recipe=tiny", "parallel=single", "precision=fp32", "data.tokenizer=null", f"run_dir={run_dir}"])
    return replace(base, model=model)


def tokens() -> Tensor:
    return torch.randint(96, (2, 46), generator=torch.Generator().manual_seed(2))


def our_logits(ours: Nemotron3Model) -> Tensor:
    with torch.no_grad():
        logits: Tensor = ours.eval()(tokens(), torch.arange(46).expand(2, -1))
    return logits


def their_logits(theirs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = theirs.eval()(tokens(), use_cache=False).logits
    return logits


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_same_function(ours: Nemotron3Model, theirs: Any, in_float64: Float64) -> None:
    """In float32 both are as far from the exact result as the order of their sums makes them.

    Both round alike, so each error is a draw of one size; transformers' own is the yardstick. Ours may be 8 times as
    unlucky (test_hf_nemotron_h.py), and theirs adds one: 9.
    """
    found, reference = our_logits(ours), their_logits(theirs)
    with in_float64():
        exact = their_logits(theirs.double())
    yardstick = distance(reference, exact)
    assert yardstick < 1e-4, "the reference is not in float32"
    assert distance(found, reference) <= 9 * yardstick


@LATENT
def test_exported_model(
    latent: int | None, build: Build, nemotron_h: ModuleType, in_float64: Float64, tmp_path: Path
) -> None:
    """Loaded without remote code: the weights of the independent transplant, bit for bit, and the same logits."""
    model = architecture(latent)
    ours = build(model)
    run_dir = tmp_path / "run"
    path = CheckpointStore(run_dir).save(1, [ours], None, {"step": 1}, keep_last=None)
    write_run_record(resolve(recipe_of(model, run_dir), 1), select("cpu"))
    theirs, report = AutoModelForCausalLM.from_pretrained(
        export_model(path, tmp_path / "hf"), output_loading_info=True, trust_remote_code=False, **EAGER
    )
    assert type(theirs) is nemotron_h.NemotronHForCausalLM
    assert not any(report.values()), report
    expected = transplant(dict(ours.state_dict()), replace(model, mtp_depths=0), nemotron_h).state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert_same_function(ours, theirs, in_float64)


def test_the_bound_of_the_time_step_would_show(build: Build, nemotron_h: ModuleType) -> None:
    """transformers' default bound of 0.001 changes this model's logits: the exported configuration must lift it."""
    model = architecture(None)
    state = dict(build(model).state_dict())
    free = transplant(state, model, nemotron_h)
    published = model_config(model, "float32")
    del published["mamba_dt_min"]
    bounded = nemotron_h.NemotronHForCausalLM(nemotron_h.NemotronHConfig(**published, **EAGER))
    bounded.load_state_dict(free.state_dict())
    assert distance(their_logits(bounded), their_logits(free)) > 1e-4


@LATENT
def test_imported_model(
    latent: int | None, build: Build, nemotron_h: ModuleType, in_float64: Float64, tmp_path: Path
) -> None:
    """A model that transformers initialised and saved, as ours."""
    model = replace(architecture(latent), mtp_pattern="", mtp_depths=0)
    torch.manual_seed(4)
    theirs = nemotron_h.NemotronHForCausalLM(nemotron_h.NemotronHConfig(**model_config(model, "float32"), **EAGER))
    for name, tensor in theirs.state_dict().items():
        if "norm" in name or name.endswith((".D", "e_score_correction_bias", "conv1d.bias")):
            tensor.add_(0.3 * torch.rand(tensor.shape))
        elif tensor.ndim > 1:
            tensor.mul_(8)  # initialised with 0.02: logits would hardly differ
    theirs.save_pretrained(tmp_path / "hf")
    path = import_model(tmp_path / "hf", recipe_of(model, tmp_path / "run"), tmp_path / "imported")
    ours = build(model)
    CheckpointStore(tmp_path / "new").load(path, [ours], None)
    assert_same_function(ours, theirs, in_float64)
