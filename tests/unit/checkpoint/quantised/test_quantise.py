"""``nemotron3 quantise`` before ModelOpt comes in: refusals, the sequences it reads, the tensors it writes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from saved_models import EVERY_KIND, Saved, save_model

from nemotron3_megatron.checkpoint.huggingface.mapping import entries
from nemotron3_megatron.checkpoint.huggingface.reading import CheckpointReader
from nemotron3_megatron.checkpoint.quantised import quantise as verb
from nemotron3_megatron.checkpoint.quantised.model_reader import ModelReader
from nemotron3_megatron.checkpoint.quantised.sequences import sequences_after
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.words import options_of
from nemotron3_megatron.data.training import TrainingData
from nemotron3_megatron.evaluate.trained import loaded
from nemotron3_megatron.model.builder import model_sharded_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("quantise")
    builder = IndexedDatasetBuilder(f"{folder}/text.bin", dtype=np.uint16)
    for length in np.random.default_rng(3).integers(20, 90, 300):
        builder.add_document(np.append(np.random.default_rng(length).integers(1, 96, length), 0), [int(length) + 1])
    builder.finalize(f"{folder}/text.idx")
    data = ("data=custom", f"data.sources.text.path={folder}/text", f"data.validation.text.path={folder}/text")
    return save_model(folder / "run", *EVERY_KIND, *data, "precision=bf16", "stages.main.seq_length=32")


def test_a_model_reads_like_its_checkpoint(saved: Saved) -> None:
    files = CheckpointReader(saved.path)
    with loaded(saved.path, "torch") as found:
        reader = ModelReader(model_sharded_state(found.model, found.groups))
        for entry in entries(found.run.model):
            assert reader.dtype(entry) == files.dtype(entry), entry.name
            assert torch.equal(reader.tensor(entry), files.tensor(entry)), entry.name


def test_sequences_are_those_that_training_would_read_next(saved: Saved) -> None:
    run = saved.run
    stage = run.shape_at(7)
    shape = replace(stage, num_microbatches=stage.global_batch_size // stage.micro_batch_size)  # of one rank
    training = TrainingData(run, 0, 1, 0, 1)
    training.next_step(shape)
    state = {"step": 7, "data": training.state_dict()}
    expected = torch.cat([batch.tokens for batch in training.next_step(shape)])
    training.close()
    with sequences_after(run, state) as batches:
        found = torch.cat([batch.tokens for batch in islice(batches, len(expected))])
    assert torch.equal(found, expected)
    with sequences_after(run, {"step": 0}, seq_length=16) as batches:
        assert next(batches).tokens.shape == (1, 16)


def test_without_modelopt_the_extra_is_named(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "modelopt" else find(name))
    with pytest.raises(UserError, match=r"nvidia-modelopt.*not installed.*\[cuda\]"):
        verb.quantise_main([f"checkpoint={saved.path}", f"out={tmp_path / 'hf'}"])
    assert not (tmp_path / "hf").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can")
@pytest.mark.parametrize("options", [{"search": "mse"}, {"search": "max", "distil_steps": 1}])
def test_nvfp4_products_need_cuda(saved: Saved, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="rounds to NVFP4 on CUDA only"):
        verb.require_device(
            verb.Options(checkpoint=saved.path, out=tmp_path, **options), torch.device("cpu"), has_nvfp4=True
        )


def test_small_numbers_are_read_as_people_write_them() -> None:
    options = options_of(verb.Options, ["checkpoint=a", "out=b", "distil_lr=1e-5", "shard_gb=2"])
    assert (options.distil_lr, options.shard_gb, options.settings) == (1e-5, 2.0, "nvfp4")


@pytest.mark.parametrize(
    "wrong",
    ["sequences=0", "distil_steps=-1", "distil_lr=0", "distil_lr=1", "distil_batch=4", "settings=int4", "search=best"],
)
def test_wrong_options_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        verb.quantise_main(["checkpoint=a", "out=b", wrong])
