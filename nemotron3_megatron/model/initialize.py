"""Initial weights as a function of (seed, global parameter name, global index) only.

Stock Megatron-Core draws from per-rank streams, so each layout starts from other weights. Here every tensor is
filled in blocks of rows, each from its own counter-based stream keyed by seed, name and block; a rank draws just
the blocks that its shard touches. The same weights arise under every layout, module spec, device and world size.

Distributions follow Megatron-Core's hybrid model: N(0, std) for weights, N(0, std / sqrt(layers)) for projections
back to the residual stream (core/transformer/transformer_config.py with is_hybrid_model), and Mamba-2's own for
A_log, dt_bias and the convolution (core/ssm/mamba_mixer.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories

from nemotron3_megatron.config.recipe import ModelConfig

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Draw = Callable[[np.random.Generator, tuple[int, ...]], FloatArray]

BLOCK_ROWS = 128
"""Rows drawn from one stream. Part of the definition of the weights: changing it changes every model."""

CONV_WIDTH = 4
A_RANGE = (1.0, 16.0)
DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4
"""Mamba-2 initialisation, core/ssm/mamba_mixer.py defaults."""

_RESIDUAL_OUTPUTS = re.compile(r"(linear_proj|linear_fc2|out_proj|fc2_latent_proj)\.weight$")
_NORMS = re.compile(r"(layer_?norm(_weight|\.weight)?|norm\.weight|[eh]norm\.weight)$")


def initialize(sharded: ShardedStateDict, model: ModelConfig, seed: int, threads: int = 1) -> int:
    """Fill the parameters behind a model's sharded state dict in place.

    Args:
        sharded: ``chunk.sharded_state_dict(...)``; its tensors alias the parameters.
        model: gives standard deviations.
        seed: the run's seed.
        threads: draw at a time; of no effect on the values.

    Returns:
        Elements written (parameters and expert biases of this shard).
    """
    apply_factories(sharded)
    tensors = [tensor for tensor in nested_values(sharded) if isinstance(tensor, ShardedTensor)]
    blocks = [block for tensor in tensors for block in _blocks(tensor, draw_for(tensor.key, model), seed)]
    with ThreadPoolExecutor(threads) as pool:  # NumPy and torch leave the interpreter's lock to the others
        for _ in pool.map(_fill, blocks):
            pass
    return sum(tensor.data.numel() for tensor in tensors)


def draw_for(name: str, model: ModelConfig) -> Draw:
    """The distribution of the parameter with this global (checkpoint) name.

    Raises:
        ValueError: no rule covers the name; a new kind of layer must add one.
    """
    if _NORMS.search(name) or name.endswith("mixer.D"):
        return lambda _, shape: np.ones(shape, np.float32)
    if name.endswith("expert_bias"):
        return lambda _, shape: np.zeros(shape, np.float32)
    if name.endswith("A_log"):
        return _a_log
    if name.endswith("dt_bias"):
        return _dt_bias
    if ".conv1d" in name:
        bound = 1 / math.sqrt(CONV_WIDTH)
        return lambda rng, shape: _uniform(rng, shape, -bound, bound)
    if "weight" in name:
        layers = len(model.pattern)
        std = model.init_method_std / (math.sqrt(layers) if _RESIDUAL_OUTPUTS.search(name) else 1.0)
        return lambda rng, shape: (rng.standard_normal(shape, dtype=np.float32) * std).astype(np.float32)
    raise ValueError(f"no initialisation rule for parameter {name!r}")


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> FloatArray:
    return (rng.random(shape, dtype=np.float64) * (high - low) + low).astype(np.float32)


def _a_log(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    logarithm: FloatArray = np.log(_uniform(rng, shape, *A_RANGE)).astype(np.float32)
    return logarithm


def _dt_bias(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Inverse softplus of a time step that is log-uniform in DT_RANGE."""
    low, high = math.log(DT_RANGE[0]), math.log(DT_RANGE[1])
    dt = np.maximum(np.exp(rng.random(shape, dtype=np.float64) * (high - low) + low), DT_FLOOR)
    inverse: FloatArray = (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    return inverse


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one stream, and what of them lies in this rank's shard."""

    target: torch.Tensor
    draw: Draw
    stream: str
    """Seed, name and block: the key of the stream."""
    shape: tuple[int, ...]
    """Of the whole block, (rows, *whole row)."""
    part: tuple[slice, ...]
    """The shard's rows and columns in it."""


def _blocks(tensor: ShardedTensor, draw: Draw, seed: int) -> Iterator[_Block]:
    """Row blocks that cover this rank's slice of the global tensor; none of a simulated rank's."""
    if tensor.data.is_meta:
        return
    lead = tensor.prepend_axis_num
    offset, shape = tensor.global_offset, tensor.global_shape
    first, last = offset[lead], offset[lead] + tensor.data.shape[0]
    columns = tuple(slice(o, o + n) for o, n in zip(offset[lead + 1 :], tensor.data.shape[1:], strict=True))
    for block in range(first // BLOCK_ROWS, math.ceil(last / BLOCK_ROWS)):
        top = block * BLOCK_ROWS
        rows = slice(max(first, top) - top, min(last, top + BLOCK_ROWS) - top)
        yield _Block(
            target=tensor.data[top + rows.start - first : top + rows.stop - first],
            draw=draw,
            stream=f"{seed}/{tensor.key}{list(offset[:lead])}/{block}",
            shape=(min(BLOCK_ROWS, shape[lead] - top), *shape[lead + 1 :]),
            part=(rows, *columns),
        )


def _fill(block: _Block) -> None:
    digest = hashlib.blake2b(block.stream.encode(), digest_size=16).digest()
    whole = block.draw(np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))), block.shape)
    with torch.no_grad():  # grad mode is a thread's own
        block.target.copy_(torch.from_numpy(np.ascontiguousarray(whole[block.part])))
