"""Bits in, the same bits out: ours -> Hugging Face -> ours, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import EVERY_KIND, Save, Saved, last_of_each
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from nemotron3_megatron.checkpoint.huggingface import export_model, import_model
from nemotron3_megatron.checkpoint.huggingface.config import model_config
from nemotron3_megatron.checkpoint.huggingface.export import published_specs
from nemotron3_megatron.checkpoint.huggingface.mapping import entries
from nemotron3_megatron.checkpoint.huggingface.reading import CheckpointReader
from nemotron3_megatron.config import compose
from nemotron3_megatron.config.errors import UserError


def files_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library through the index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: tensor for file in set(index.values()) for name, tensor in load_file(directory / file).items()}
    assert found.keys() == index.keys()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision=bf16",),
        ("precision=fp32", "model.moe_latent_size=null", "model.mtp_use_repeated_layer=false"),
    ],
    ids=["latent, shared MTP, bf16", "standard, two MTP blocks, fp32"],
)
def test_ours_to_theirs_to_ours(save: Save, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    saved = save(*EVERY_KIND, *overrides)
    exported = export_model(saved.path, tmp_path / "hf", shard_bytes=50_000)
    assert len(list(exported.glob("model-*.safetensors"))) > 3
    back = import_model(exported, saved.recipe, tmp_path / "back", file_bytes=50_000)
    before, after = CheckpointReader(saved.path), CheckpointReader(back)
    assert after.shapes == before.shapes
    for entry in entries(saved.run.model):
        assert after.dtype(entry) == before.dtype(entry)
        assert torch.equal(after.tensor(entry), before.tensor(entry)), entry.name
    # An imported checkpoint describes itself, and exports the same files.
    assert_same(files_of(export_model(back, tmp_path / "again")), files_of(exported))


def test_files_are_what_the_recipe_alone_says(every_kind: Saved, tmp_path: Path) -> None:
    found = files_of(export_model(every_kind.path, tmp_path / "hf"))
    expected = {spec.name: (spec.shape, spec.dtype) for spec in published_specs(every_kind.run)}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == expected


def test_theirs_to_ours_to_theirs(tmp_path: Path) -> None:
    """A model that transformers made and saved, in its own way of writing configuration and files."""
    recipe, _ = compose(last_of_each("recipe=tiny", *EVERY_KIND, "model.mtp_depths=0", "model.mtp_pattern=''"))
    config = NemotronHConfig(**model_config(recipe.model, "float32"))
    torch.manual_seed(3)
    theirs = NemotronHForCausalLM(config)
    for bias in (t for name, t in theirs.named_buffers() if name.endswith("e_score_correction_bias")):
        bias.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = import_model(tmp_path / "theirs", recipe, tmp_path / "ours")
    exported = export_model(checkpoint, tmp_path / "back")
    assert_same(files_of(exported), load_file(tmp_path / "theirs" / "model.safetensors"))
    loaded, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert type(loaded) is NemotronHForCausalLM
    assert not any(report.values()), report
    assert_same(loaded.state_dict(), theirs.state_dict())


def test_another_model_is_refused_with_a_table(every_kind: Saved, tmp_path: Path) -> None:
    exported = export_model(every_kind.path, tmp_path / "hf")
    with pytest.raises(
        UserError, match=r"(?s)not the recipe's model.*hidden_size: 64 in config.json, 128 in the recipe"
    ):
        import_model(exported, "tiny", tmp_path / "out")
    wider = last_of_each(*EVERY_KIND, "model.ffn_hidden_size=64")
    with pytest.raises(UserError, match=r"(?s)2 tensors differ.*layers.3.mixer.up_proj.weight +48 x 64 +64 x 64"):
        import_model(exported, "tiny", tmp_path / "out", overrides=wider)
    assert not any(tmp_path.glob("*out*"))
    assert not any(tmp_path.glob(".*out*"))


def test_missing_mtp_is_named(every_kind: Saved, tmp_path: Path) -> None:
    """transformers drops MTP when it saves a model."""
    exported = export_model(every_kind.path, tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"(?s)mtp.layers.0.*absent.*model.mtp_depths=0"):
        import_model(tmp_path / "theirs", every_kind.recipe, tmp_path / "out")


def test_other_files_are_refused(every_kind: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        import_model(tmp_path, every_kind.recipe, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a llama"):
        import_model(tmp_path, every_kind.recipe, tmp_path / "out")
    exported = export_model(every_kind.path, tmp_path / "hf")
    shard = next(exported.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        import_model(exported, every_kind.recipe, tmp_path / "out")
    shard.unlink()
    with pytest.raises(UserError, match="not a readable safetensors file"):
        import_model(exported, every_kind.recipe, tmp_path / "out")
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        (exported / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match="is not the index"):
            import_model(exported, every_kind.recipe, tmp_path / "out")
    for text in ("{", "[1]", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            import_model(tmp_path, every_kind.recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_keep_their_type_whatever_the_recipe_says(every_kind: Saved, tmp_path: Path) -> None:
    """And ``config.json`` names it: transformers loads a model in that type."""
    exported = export_model(every_kind.path, tmp_path / "hf")
    shard = next(exported.glob("model-*.safetensors"))
    tensors = load_file(shard)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, shard)
    back = export_model(import_model(exported, every_kind.recipe, tmp_path / "in"), tmp_path / "back")
    assert {tensor.dtype for tensor in files_of(back).values()} == {torch.float64}
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float64"
    save_file({name: tensor.long() for name, tensor in tensors.items()}, shard)
    with pytest.raises(UserError, match="has type I64, weights have one of"):
        import_model(exported, every_kind.recipe, tmp_path / "out")
