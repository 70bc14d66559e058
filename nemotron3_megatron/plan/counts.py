"""Exact parameter counts of a model, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.sizes import (
    KINDS,
    Kind,
    forward_flops,
    layer_size,
    mtp_block_size,
    mtp_flops,
    output_flops,
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the main stack."""

    index: int
    kind: Kind
    parameters: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a model, expert biases counted in (as the checkpoints of the family do)."""

    total: int
    """Without MTP."""
    mtp: int
    """One block when depths share it, else one a depth."""
    active: int
    """Passed through by one token: both embeddings, the top-k experts, no MTP."""
    layers: tuple[Layer, ...]


def count_parameters(model: ModelConfig) -> Counts:
    """Count what Megatron-Core would build; no tensor is made."""
    sizes = [layer_size(model, KINDS[symbol]) for symbol in model.pattern]
    ends = 2 * model.vocab_size * model.hidden_size + model.hidden_size  # embedding, output, final norm
    blocks = min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths
    return Counts(
        total=ends + sum(size.total for size in sizes),
        mtp=blocks * mtp_block_size(model).total,
        active=ends + sum(size.active for size in sizes),
        layers=tuple(
            Layer(index, KINDS[symbol], size.total)
            for index, (symbol, size) in enumerate(zip(model.pattern, sizes, strict=True))
        ),
    )


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Floating-point operations of training on one token: forward and twice that backward, MTP included."""
    layers = sum(forward_flops(model, KINDS[symbol], seq_length) for symbol in model.pattern)
    return 3 * (layers + output_flops(model) + mtp_flops(model, seq_length))
