"""Codes and scales on disk against the operands that training's own GEMMs read from the same weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_models import save_model
from torch import Tensor

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.huggingface import export_model, import_model
from nemotron3_megatron.checkpoint.huggingface.shards import ShardReader
from nemotron3_megatron.checkpoint.quantised.read import read_linear
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.precision.emulation.read import Read, read
from nemotron3_megatron.precision.plan import PlanRow

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PUBLISHED = {
    "mixer.in_proj": ["in_proj"],
    "mixer.out_proj": ["out_proj"],
    "self_attention.linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "self_attention.linear_proj": ["o_proj"],
    "mlp.fc1_latent_proj": ["fc1_latent_proj"],
    "mlp.fc2_latent_proj": ["fc2_latent_proj"],
    "mlp.shared_experts.linear_fc1": ["shared_experts.up_proj"],
    "mlp.shared_experts.linear_fc2": ["shared_experts.down_proj"],
    "mlp.linear_fc1": ["up_proj"],
    "mlp.linear_fc2": ["down_proj"],
}


def files_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def linears_of(row: PlanRow, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Our weights of a module of the decoder -> published linears that hold its rows."""
    layer, leaf = row.module.removeprefix("decoder.layers.").split(".", 1)
    here = f"backbone.layers.{layer}.mixer."
    if leaf.startswith("mlp.experts."):
        name = {"linear_fc1": "up_proj", "linear_fc2": "down_proj"}[leaf.rpartition(".")[2]]
        return {f"{row.module}.weight{i}": [f"{here}experts.{i}.{name}"] for i in range(4)}
    return {f"{row.module}.weight": [here + name for name in PUBLISHED[leaf]]}


def as_training_reads(row: PlanRow, weight: Tensor, *, fold: bool = False) -> Read:
    found, _ = read(weight.contiguous(), row.gemms.fprop[1], None, fold=fold)
    assert found is not None
    return found


def from_modelopts_layout(files: dict[str, Tensor], linear: str) -> tuple[Tensor, Tensor]:
    """Values (N, K) without, and the scale of the tensor, as ModelOpt's own dequantisation defines them."""
    packed, scales = files[f"{linear}.weight"], files[f"{linear}.weight_scale"]
    if packed.dtype == torch.float8_e4m3fn:
        assert scales.dtype == torch.uint8
        return packed.float() * torch.exp2(scales.float() - 127).repeat_interleave(32, -1), torch.ones(())
    assert (packed.dtype, scales.dtype) == (torch.uint8, torch.float8_e4m3fn)
    codes = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.long)
    codes[:, 0::2], codes[:, 1::2] = packed & 0x0F, packed >> 4
    return E2M1[codes] * scales.float().repeat_interleave(16, -1), files[f"{linear}.weight_scale_2"]


def merged(linears: list[str], parts: list[Tensor], kv_heads: int) -> Tensor:
    """Rows of queries, keys and values as training has them together; one part is itself."""
    if len(parts) == 1:
        return parts[0]
    heads = [part.view(kv_heads, -1, part.shape[-1]) for part in parts]
    return torch.cat(heads, 1).flatten(0, 1)


@pytest.mark.parametrize("name", ["published_plan", "everything_in_nvfp4"])
def test_bits_are_those_that_training_reads(name: str, request: pytest.FixtureRequest) -> None:
    exported = request.getfixturevalue(name)
    run, weights, files = exported.saved.run, exported.saved.weights, files_of(exported.directory)
    compared: Counter[str] = Counter()
    for row in (row for row in run.precision_plan.rows if row.block == "decoder"):
        for ours, linears in linears_of(row, weights).items():
            if row.format == "bf16":
                whole = merged(linears, [files[f"{one}.weight"] for one in linears], run.model.num_query_groups)
                assert torch.equal(whole, weights[ours]), ours
                continue
            expected = as_training_reads(row, weights[ours])
            values, scales = zip(*(from_modelopts_layout(files, one) for one in linears), strict=True)
            found = merged(linears, list(values), run.model.num_query_groups)
            assert torch.equal(found, expected.values.float()), ours
            assert all(scale == (1 if expected.scale is None else expected.scale) for scale in scales), ours
            compared[row.format] += len(linears)
    assert compared["nvfp4"] > 20
    assert compared["mxfp8"] == (2 if name == "published_plan" else 0)


def test_reading_back_gives_the_values_of_bf16_training(published_plan: Any) -> None:
    """With the tensor's scale multiplied in, in the order in which grouped kernels do it, rounded to BF16."""
    reader = ShardReader(published_plan.directory)
    checked = 0
    for row in published_plan.saved.run.precision_plan.rows:
        if row.format != "bf16":
            for ours, linears in linears_of(row, published_plan.saved.weights).items():
                expected = as_training_reads(row, published_plan.saved.weights[ours], fold=True)
                found = read_linear(reader, linears[0]).dequantize(torch.bfloat16)
                assert torch.equal(found, expected.values), ours
                checked += 1
    assert checked > 20


def test_formats_are_the_plans(published_plan: Any) -> None:
    description = json.loads((published_plan.directory / "hf_quant_config.json").read_text())["quantization"]
    in_config = json.loads((published_plan.directory / "config.json").read_text())["quantization_config"]
    layers = description["quantized_layers"]
    assert (description["quant_algo"], in_config["quant_method"]) == ("MIXED_PRECISION", "modelopt")
    assert (in_config["quantized_layers"], in_config["ignore"]) == (layers, description["exclude_modules"])
    assert layers["backbone.layers.0.mixer.in_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert layers["backbone.layers.0.mixer.out_proj"] == {"quant_algo": "MXFP8", "group_size": 32}
    files = files_of(published_plan.directory)
    assert {name.removesuffix(".weight_scale") for name in files if name.endswith(".weight_scale")} == layers.keys()
    excluded = set(description["exclude_modules"])
    assert {"lm_head", "backbone.layers.2.mixer.q_proj", "mtp.layers.0.eh_proj"} <= excluded
    assert not excluded & layers.keys()
    targets = [name for group in in_config["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(layers)


def test_one_format_is_named_for_the_whole_model(everything_in_nvfp4: Any) -> None:
    description = json.loads((everything_in_nvfp4.directory / "hf_quant_config.json").read_text())["quantization"]
    assert (description["quant_algo"], description["group_size"]) == ("W4A16_NVFP4", 16)
    assert description["exclude_modules"] == ["lm_head"]


def test_inputs_observed_in_training_make_their_scale(published_plan: Any, tmp_path: Path) -> None:
    """The last sample up to the checkpoint's step."""
    copy = tmp_path / "run"
    shutil.copytree(published_plan.saved.path.parents[1], copy)
    module = "decoder.layers.1.mlp.experts.linear_fc1"

    def sample(step: int, amax: float, **other: str) -> str:
        found = {"module": module, "tensor": "input", "direction": "rows", "amax": amax} | other
        return json.dumps({"step": step, "precision": [found]})

    lines = [sample(1, 5.0), sample(5, 3.5), sample(6, 9.0, tensor="weight"), '{"step": 7}', sample(8, 2.0)]
    torn = '{"step": 6, "precision": [{"mod'  # the job was killed here, and went on
    (copy / "metrics.jsonl").write_text("\n".join([lines[0], torn, *lines[1:], torn]))
    out = export_model(copy / "checkpoints" / "step_00000007", tmp_path / "hf", number_format="quantised")
    files = files_of(out)
    scales = {name: tensor for name, tensor in files.items() if name.endswith("input_scale")}
    assert scales.keys() == {f"backbone.layers.1.mixer.experts.{i}.up_proj.input_scale" for i in range(4)}
    # float32: the product of 3.5 and 1 / 2688, once rounded
    assert all(scale.item() == pytest.approx(3.5 / 2688, rel=2**-23) for scale in scales.values())
    layers = json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quantized_layers"]
    assert layers["backbone.layers.1.mixer.experts.0.up_proj"]["quant_algo"] == "NVFP4"
    assert layers["backbone.layers.1.mixer.experts.0.down_proj"]["quant_algo"] == "W4A16_NVFP4"


def test_refused(published_plan: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its weights are quantised"):
        import_model(published_plan.directory, published_plan.saved.recipe, tmp_path / "out")
    plain = save_model(tmp_path / "run", "data.tokenizer=null", "precision=bf16")
    with pytest.raises(UserError, match="quantises nothing"):
        export_model(plain.path, tmp_path / "hf", number_format="quantised")
    assert not (tmp_path / "hf").exists()


def test_a_run_that_went_on_under_another_plan(published_plan: Any, tmp_path: Path) -> None:
    """``run.json`` has the plan of the latest start, the checkpoint the fingerprint of its own."""
    copy = tmp_path / "run"
    shutil.copytree(published_plan.saved.path.parents[1], copy)
    path, plan = copy / "checkpoints" / "step_00000007", published_plan.saved.run.precision_plan
    saved = manifest.read(path)

    def trained_under(fingerprint: str) -> Path:
        precision = {"name": "mxfp8", "fingerprint": fingerprint}
        manifest.write(replace(saved, state={**saved.state, "precision": precision}), path)
        return export_model(path, tmp_path / fingerprint, number_format="quantised")

    trained_under(plan.fingerprint)
    with pytest.raises(UserError, match=r"another precision plan \(mxfp8\)"):
        trained_under("another")


def test_the_warning_about_cut_weights_is_of_the_checkpoint_s_layout(
    published_plan: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``run.json`` has the layout of the latest start."""
    copy = tmp_path / "run"
    shutil.copytree(published_plan.saved.path.parents[1], copy)
    path = copy / "checkpoints" / "step_00000007"
    saved = manifest.read(path)
    export_model(path, tmp_path / "whole", number_format="quantised")
    assert "each part of a weight" not in caplog.text
    manifest.write(replace(saved, layout={**saved.layout, "tp": 2}), path)
    export_model(path, tmp_path / "cut", number_format="quantised")
    assert "trained with tp=2" in caplog.text
