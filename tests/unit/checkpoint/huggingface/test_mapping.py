"""Names, shapes and numbers of tensors, against the published checkpoints, transformers and Megatron-Core."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from saved_models import EVERY_KIND, Save, Saved
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron3_megatron.checkpoint import compare
from nemotron3_megatron.checkpoint.huggingface.config import model_config
from nemotron3_megatron.checkpoint.huggingface.export import published_specs
from nemotron3_megatron.checkpoint.huggingface.mapping import checkpoint_shapes, entries
from nemotron3_megatron.config import Run, compose, resolve


def official(name: str) -> Run:
    recipe, origins = compose([f"recipe={name}"])
    return resolve(recipe, recipe.world_size or 1, origins)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        # Megatron-Bridge's verification cards of the published checkpoints.
        ("super_nvfp4", 42_683, 123_611_033_088),
        ("lightning_bf16", 6_513, 32_913_266_240),
    ],
)
def test_published_numbers(name: str, tensors: int, elements: int) -> None:
    specs = list(published_specs(official(name)))
    assert len({spec.name for spec in specs}) == len(specs) == tensors
    assert sum(prod(spec.shape) for spec in specs) == elements


def test_correction_biases_of_super_are_float32() -> None:
    """The card counts 41."""
    specs = published_specs(official("super_bf16"))
    assert sum(s.name.endswith("e_score_correction_bias") and s.dtype == torch.float32 for s in specs) == 41


@pytest.mark.parametrize("name", ["nano_bf16", "super_bf16", "ultra_nvfp4"])
def test_transformers_has_the_same_tensors(name: str) -> None:
    """transformers' own class, on the meta device; it keeps experts of a layer in one tensor and has no MTP."""
    run = official(name)
    with torch.device("meta"):
        theirs = NemotronHForCausalLM(NemotronHConfig(**model_config(run.model)))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for spec in published_specs(run):
        if not spec.name.startswith("mtp."):
            stem, expert, rest = spec.name.replace("backbone.", "model.").partition(".experts.")
            projection = rest.partition(".")[2].removesuffix(".weight")
            merged = f"{stem}.experts.{projection}" if expert else stem
            found[merged] = (run.model.num_moe_experts, *spec.shape) if expert else spec.shape
    assert found == expected


@pytest.mark.parametrize("latent", ["32", "null"])
@pytest.mark.parametrize("repeated", ["true", "false"])
def test_checkpoint_of_the_built_model(save: Save, latent: str, repeated: str) -> None:
    saved = save(*EVERY_KIND, f"model.moe_latent_size={latent}", f"model.mtp_use_repeated_layer={repeated}")
    assert checkpoint_shapes(saved.run.model) == compare.stored_shapes(saved.path)


def test_every_element_is_published_once(every_kind: Saved) -> None:
    model = every_kind.run.model
    painted = {key: torch.zeros(shape) for key, shape in checkpoint_shapes(model).items()}
    for box in (box for entry in entries(model) for box in entry.boxes):
        painted[box.key][tuple(slice(s, s + n) for s, n in zip(box.start, box.size, strict=True))] += 1
    assert all(torch.all(count == 1) for count in painted.values())


def test_mtp_blocks_of_their_own_are_numbered_on(every_kind: Saved) -> None:
    model = replace(every_kind.run.model, mtp_use_repeated_layer=False)
    layers = Counter(entry.name.split(".")[2] for entry in entries(model) if entry.name.startswith("mtp."))
    attention, moe = 5, 7 + 2 * model.num_moe_experts
    assert layers == {"0": attention + 3, "1": moe + 1, "2": attention + 3, "3": moe + 1}
