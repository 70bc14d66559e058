"""What a process does in the tests of ``nemotron3 quantise``: small models quantised, written and distilled."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import layouts
import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from e2e_start import VOCABULARY, write_corpus
from modelopt.recipe import load_recipe
from modelopt.torch.quantization import extensions
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt_compared import apart, differs_from_others, read_back, weights_by_kind
from safetensors.torch import load_file
from torch import Tensor

from nemotron3_megatron.checkpoint.huggingface.mapping import entries
from nemotron3_megatron.checkpoint.huggingface.shards import Item
from nemotron3_megatron.checkpoint.quantised.calibrated import calibrated_items
from nemotron3_megatron.checkpoint.quantised.calibration import calibrate, quantiser_config
from nemotron3_megatron.checkpoint.quantised.distillation import Distillation, distil
from nemotron3_megatron.checkpoint.quantised.model_reader import ModelReader
from nemotron3_megatron.checkpoint.quantised.published import attention_layers, narrow_linears
from nemotron3_megatron.checkpoint.quantised.quantise import Options, quantise
from nemotron3_megatron.checkpoint.quantised.sequences import logits_of, sequences_after
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.evaluate.trained import Loaded, loaded, on_one_rank
from nemotron3_megatron.model.builder import build_model, model_sharded_state
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.train.record import write_run_record

PUBLISHED_RECIPE = "models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-mse"
MODEL = ("pattern=ME*EM", "init_method_std=0.1", "moe_router_topk=8")
"""Every expert of a layer sees every token: rounding decides on no route, so that errors stay small."""
SEQUENCES = 8
RULE = Distillation(steps=20, batch=2, lr=2e-5)


def measure(folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``_measure(**options)`` for each case; the asserts are in the tests."""
    if torch.cuda.is_available():
        layouts._tune_nothing()
    extensions.get_cuda_ext_fp8.extension = None  # ModelOpt would compile it, for a minute
    return {name: _measure(Path(folder) / name, **options) for name, options in cases.items()}


def selections(folder: str) -> dict[str, dict[str, str]]:
    """Quantisers that are on, and their numbers: by our settings, and by the file that ModelOpt ships as the published
    checkpoint's."""
    checkpoint, _ = _saved(Path(folder), "torch")
    recipe = load_recipe(PUBLISHED_RECIPE).quantize.model_dump()
    configs = {"ours": quantiser_config("nvfp4", "mse"), "published": recipe}
    found: dict[str, dict[str, str]] = {}
    for name, config in configs.items():
        with loaded(checkpoint) as model:
            mtq.quantize(model.model, config | {"algorithm": None})
            found[name] = {
                place: f"{each.num_bits} {each.axis} {sorted((each.block_sizes or {}).items(), key=str)}"
                for place, each in model.model.named_modules()
                if isinstance(each, TensorQuantizer) and each.is_enabled
            }
    return found


def _measure(folder: Path, spec: str, settings: str, search: str, distils: bool) -> dict[str, Any]:
    checkpoint, run = _saved(folder, spec)
    options = Options(checkpoint=checkpoint, out=folder / "hf", settings=settings, search=search, sequences=SEQUENCES)
    with loaded(checkpoint) as found:
        numbers, tensors = _quantised(found, options, distils)
    quantise(options)
    written = {name: each for file in options.out.glob("*.safetensors") for name, each in load_file(file).items()}
    names = {entry.name for entry in entries(run.model)}
    return numbers | {
        "files_differ": apart(written, tensors),
        "read_back": read_back(options.out, tensors),
        "missing": sorted(names - written.keys()),
        "description": json.loads((options.out / "hf_quant_config.json").read_text()),
        "config": json.loads((options.out / "config.json").read_text()),
        "scales": {name: each.item() for name, each in written.items() if name.endswith(("k_scale", "v_scale"))},
    }


def _saved(folder: Path, spec: str) -> tuple[Path, Run]:
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "train", seed=1, documents=400)
    settings = [f"run_dir={folder / 'run'}", "data=custom", f"data.sources.train.path={folder / 'train'}"]
    settings += [f"data.validation.validation.path={folder / 'train'}", "data.tokenizer=null", "precision=bf16"]
    settings += [f"model.{text}" for text in (*MODEL, f"vocab_size={VOCABULARY}", f"spec={spec}")]
    recipe, origins = compose(["recipe=tiny", *settings])
    run = on_one_rank(resolve(recipe, 2, origins))
    platform = select("auto")
    platform.start(local_rank=0)
    dist.init_process_group(platform.collective_backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        chunks = build_model(run, platform, start_groups(run, platform))
        path = CheckpointStore(run.run_dir).save(3, chunks, None, {"step": 3}, keep_last=None)
    finally:
        stop_groups()
    write_run_record(run, platform)
    return path, run


def _quantised(found: Loaded, options: Options, distils: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, architecture = found.model, found.run.model
    formats = narrow_linears(architecture, options.settings)
    reader = ModelReader(model_sharded_state(model, found.groups))
    logits = logits_of(found.run, found.device)
    with sequences_after(found.run, found.state) as batches, torch.no_grad():
        sample, held_out = list(islice(batches, SEQUENCES)), list(islice(batches, 2))
        lessons = list(islice(batches, RULE.steps * RULE.batch))
        trained = [logits(model, batch).float() for batch in held_out]
        calibrate(
            model,
            options.settings,
            options.search,
            formats,
            attention_layers(architecture),
            lambda each: [logits(each, batch) for batch in sample],
        )
        numbers: dict[str, Any] = {"kinds": sorted(set(formats.values()))}
        items = list(calibrated_items(model, reader, architecture, formats))
        tensors = _made(items)
        if not (found.device.type == "cpu" and "nvfp4" in formats.values()):  # ModelOpt rounds to NVFP4 on CUDA only
            numbers |= {"distance": _distance(trained, [logits(model, batch).float() for batch in held_out])}
            numbers |= {"weights": weights_by_kind(model, found.run, formats, tensors)}
        if "nvfp4" in formats.values():
            numbers |= {"from_others": differs_from_others(model, reader, found.run, formats, tensors)}
    if distils:
        numbers |= _distilled(found, options, formats, reader, (trained, held_out, lessons))
    return numbers, tensors


def _distilled(
    found: Loaded, options: Options, formats: dict[str, Any], reader: ModelReader, data: tuple[list[Any], ...]
) -> dict[str, Any]:
    """Distances before and after; the weights after, as ``weights``; and whether the other weights were trained."""
    trained, held_out, lessons = data
    logits = logits_of(found.run, found.device)
    before = reader.tensor(entries(found.run.model)[0]).clone()
    (teacher,) = build_model(found.run, select("auto"), found.groups)
    CheckpointStore(found.run.run_dir).load(options.checkpoint, [teacher], None)
    teacher.eval()

    def divergence() -> float:
        with torch.no_grad():
            found_here = [logits(found.model, batch).float() for batch in held_out]
        pairs = zip(trained, found_here, strict=True)
        # KL(p || q) from its definition, in float64
        return sum(
            (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1).mean().item()
            for p, q in pairs
        ) / len(held_out)

    kl = divergence()
    losses = distil(found.model, teacher, RULE, found.run.optimizer, iter(lessons), logits)
    items = list(calibrated_items(found.model, reader, found.run.model, formats))
    tensors = _made(items)
    with torch.no_grad():
        weights = weights_by_kind(found.model, found.run, formats, tensors)
    moved = not torch.equal(before, reader.tensor(entries(found.run.model)[0]))
    return {"kl": (kl, divergence()), "losses": losses, "weights_after": weights, "moved": moved}


def _made(items: list[Item]) -> dict[str, Tensor]:
    pairs = (pair for item in items for pair in zip(item.specs, item.make(), strict=True))
    return {spec.name: tensor.clone() for spec, tensor in pairs}


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    a, b = torch.cat(first).double(), torch.cat(second).double()
    return float((a - b).norm() / a.norm())
