"""The tensors of a quantised export: what training's forward pass made of each weight."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.checkpoint.huggingface.mapping import Box, Entry, entries
from nemotron3_megatron.checkpoint.huggingface.reading import CheckpointReader
from nemotron3_megatron.checkpoint.huggingface.shards import Item, Spec
from nemotron3_megatron.checkpoint.quantised import layout
from nemotron3_megatron.checkpoint.quantised.inputs import observed_amax
from nemotron3_megatron.checkpoint.quantised.layout import Algorithm
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.precision.formats import mxfp8, nvfp4
from nemotron3_megatron.precision.operands import Operand

_log = logging.getLogger(__name__)


def quantised_items(reader: CheckpointReader, run: Run) -> Iterator[Item]:
    """Every tensor of the model, quantised linears as codes and scales, the others as training holds them.

    Exact for weights that training held whole. Where tensor parallelism cut one, each part had a largest magnitude of
    its own; the published layout has one, which is taken here, with a warning.

    Raises:
        UserError: the run's precision plan quantises nothing, or is not the one the checkpoint was trained under.
    """
    _require_plan(reader, run)
    tp, etp = (reader.manifest.layout.get(size, 1) for size in ("tp", "etp"))
    if tp > 1 or etp > 1:
        _log.warning(
            "trained with tp=%d, etp=%d: each part of a weight had an amax of its own there, here each weight has one",
            tp,
            etp,
        )
    amax = observed_amax(reader)
    weights = _weights(run)
    return (
        _item(reader, entry, weights.get(entry.module or ""), amax.get(entry.module or ""))
        for entry in entries(run.model)
    )


def write_description(reader: CheckpointReader, run: Run, directory: Path) -> dict[str, Any]:
    """Write ``hf_quant_config.json`` and return what ``config.json`` has to say in addition."""
    weights, amax = _weights(run), observed_amax(reader)
    linears = [entry for entry in entries(run.model) if entry.module]
    algorithms = {
        layout.linear(entry): _algorithm(weights[entry.module], amax.get(entry.module))
        for entry in linears
        if entry.module in weights
    }
    exclude = [layout.linear(entry) for entry in linears if entry.module not in weights]
    own_file, in_config = layout.descriptions(algorithms, ["lm_head", *exclude])
    (directory / layout.DESCRIPTION).write_text(json.dumps(own_file, indent=2) + "\n", encoding="utf-8")
    return {"quantization_config": in_config}


def _weights(run: Run) -> dict[str, Operand]:
    """The weight as fprop reads it, of every quantised linear, by the plan's module name."""
    weights = {row.module: row.gemms.fprop[1] for row in run.precision_plan.rows if row.format != "bf16"}
    if not weights:
        why = "the run quantises nothing, so that its forward pass read the weights as they are"
        raise UserError(f"precision={run.precision.name}", where="run.json", why=why, nearest="format=trained")
    return weights


def _require_plan(reader: CheckpointReader, run: Run) -> None:
    """``run.json`` is of the run's latest start: another stage, or the same run continued in another precision."""
    trained = reader.manifest.state.get("precision")
    if trained is not None and trained["fingerprint"] != run.precision_plan.fingerprint:
        raise UserError(
            f"checkpoint {reader.path}",
            where="run.json",
            why=f"it was trained under another precision plan ({trained['name']}) than the run's latest start "
            f"({run.precision.name}), and only that one is recorded",
            nearest="format=trained",
        )


def _algorithm(weight: Operand, input_amax: float | None) -> Algorithm:
    if weight.format == "mxfp8":
        return "MXFP8"
    return "W4A16_NVFP4" if input_amax is None else "NVFP4"


def _item(reader: CheckpointReader, entry: Entry, weight: Operand | None, input_amax: float | None) -> Item:
    if weight is None:
        return Item((Spec(entry.name, entry.shape, reader.dtype(entry)),), lambda: (reader.tensor(entry),))
    specs = layout.specs(entry, _algorithm(weight, input_amax))
    return Item(specs, partial(_quantised, reader, entry, weight, input_amax))


def _quantised(reader: CheckpointReader, entry: Entry, weight: Operand, input_amax: float | None) -> list[Tensor]:
    matrix, rows = _as_trained(reader, entry)
    if weight.format == "mxfp8":
        narrow = mxfp8.quantize(matrix)
        return [narrow.codes[rows], narrow.scales[rows]]
    assert weight.block is not None
    found = nvfp4.quantize(matrix, block=(weight.block[0], weight.block[1]))
    # The layout has a scale for each row: a square block's is repeated.
    scales = found.scales.repeat_interleave(weight.block[0], 0)
    tensors = [layout.pack(found.codes[rows]), scales[rows], found.amax * nvfp4.INVERSE_RANGE]
    return tensors if input_amax is None else [*tensors, torch.tensor(input_amax * nvfp4.INVERSE_RANGE)]


def _as_trained(reader: CheckpointReader, entry: Entry) -> tuple[Tensor, Tensor]:
    """The matrix that training quantises as one, and which of its rows are the published tensor.

    Queries, keys and values are one linear in training; every other linear is one published tensor.
    """
    key = entry.boxes[0].key
    if not key.endswith("linear_qkv.weight"):
        return reader.tensor(entry), torch.arange(entry.shape[0])
    whole = reader.box(Box(key, (0, 0), reader.shapes[key]))
    return whole, torch.cat([torch.arange(box.start[0], box.start[0] + box.size[0]) for box in entry.boxes])
