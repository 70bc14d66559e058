"""What one pipeline rank of a layout holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Layout, Run
from nemotron3_megatron.config.sizes import CONV_KERNEL, KINDS, Kind
from nemotron3_megatron.precision.modules import LinearModule, linear_modules
from nemotron3_megatron.precision.policy import Role
from nemotron3_megatron.precision.shapes import weight_shape


@dataclass(frozen=True, slots=True)
class Segment:
    """The layers and ends of the model on one pipeline rank, all of its chunks together."""

    layers: tuple[int, ...]
    """Global indices into the main stack."""
    is_first: bool
    is_last: bool
    """The last rank holds the output layer and MTP."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Trained parameters on one rank."""

    dense: int
    experts: int
    duplicated: int
    """Those of ``dense`` that every tensor-parallel rank holds whole: norms, router, latent projections."""


def segments(run: Run) -> tuple[Segment, ...]:
    """One a pipeline rank; with interleaving, rank r holds chunks r, r + pp, ... of the pattern."""
    return _segments(run.layout.hybrid_layer_pattern, run.layout.pp)


@lru_cache(maxsize=256)
def _segments(pattern: str, pp: int) -> tuple[Segment, ...]:
    pieces = pattern.partition("/")[0].split("|")
    starts = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
    chunks = [range(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)]
    return tuple(
        Segment(tuple(index for chunk in chunks[rank::pp] for index in chunk), rank == 0, rank == pp - 1)
        for rank in range(pp)
    )


def kinds(model: ModelConfig, segment: Segment) -> Iterator[Kind]:
    """Kinds of the layers that a micro-batch passes on this rank, MTP's once a depth."""
    yield from (KINDS[model.pattern[index]] for index in segment.layers)
    if segment.is_last:
        yield from (KINDS[symbol] for _ in range(model.mtp_depths) for symbol in model.mtp_pattern)


def modules(model: ModelConfig, segment: Segment) -> Iterator[LinearModule]:
    """The linears held, MTP's block once."""
    for module in linear_modules(model):
        if segment.is_last if module.layer is None else module.layer in segment.layers:
            yield module


@lru_cache(maxsize=4096)
def weights(model: ModelConfig, segment: Segment, layout: Layout) -> Weights:
    """Parameters of one rank of this segment (without routers' biases, which are no parameters).

    The embedding stands on the first pipeline rank and, for MTP, on the last.
    """
    dense = experts = latent = 0
    for module in modules(model, segment):
        size = prod(weight_shape(module.role, model, layout.tp, layout.etp))
        if is_routed(module.role):
            experts += size * model.num_moe_experts // layout.ep
        else:
            dense += size
            latent += size if module.role.startswith("moe.latent") else 0
    blocks = min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths
    held = [KINDS[model.pattern[index]] for index in segment.layers]
    norms = len(held) * model.hidden_size
    if segment.is_last:
        held += [KINDS[symbol] for symbol in model.mtp_pattern] * blocks
        # final norm; of MTP two norms before eh_proj, one at the end, one a layer
        norms += (1 + blocks * (3 + len(model.mtp_pattern))) * model.hidden_size
    routers = held.count("moe") * model.num_moe_experts * model.hidden_size
    tables = segment.is_first + segment.is_last * (1 + (model.mtp_depths > 0 and not segment.is_first))
    own = held.count("mamba") * _mamba_vectors(model) // layout.tp
    dense += own + tables * model.vocab_size * model.hidden_size // layout.tp + norms + routers
    return Weights(dense, experts, norms + routers + latent)


def is_routed(role: Role) -> bool:
    """Whether the linear is an expert's."""
    return role.startswith("moe.experts")


def _mamba_vectors(model: ModelConfig) -> int:
    """Convolution and its bias, A_log, D, dt_bias and the gated norm of one layer."""
    inner = model.mamba_num_heads * model.mamba_head_dim
    channels = inner + 2 * model.mamba_num_groups * model.mamba_state_dim
    return channels * (CONV_KERNEL + 1) + 3 * model.mamba_num_heads + inner
