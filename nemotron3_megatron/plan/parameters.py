"""The parameters that one rank holds, in the order in which the built modules list them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from math import prod

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.sizes import CONV_KERNEL
from nemotron3_megatron.precision.policy import Role
from nemotron3_megatron.precision.shapes import weight_shape

BYTES = {"bf16": 2, "fp32": 4}
"""Of one element of ``precision.dtype``."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter tensor on a rank."""

    shape: tuple[int, ...]
    role: Role | None = None
    """None: not the weight of a linear that a policy can quantise."""
    wide: bool = False
    """Kept in FP32 in a BF16 model (``model/builder.py`` ``FLOAT32_PARAMETERS``)."""
    expert: bool = False
    """Reduced over the ranks that hold the same experts rather than over all data-parallel ones."""
    shared: bool = False
    """The embedding where it lies on two pipeline ranks; Megatron-Core gives it a gradient bucket of its own."""

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one pipeline rank holds of the model in one piece."""

    layers: str
    """Symbols of the main stack."""
    start: int
    """Global number of the first of them."""
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the final norm, MTP, the output layer and the loss."""


def chunks(run: Run, pp_rank: int) -> tuple[Chunk, ...]:
    """The model chunks of a pipeline rank: segment v * pp + rank is its chunk v."""
    segments = run.layout.hybrid_layer_pattern.partition("/")[0].split("|")
    starts = list(accumulate(map(len, segments), initial=0))
    mine = range(pp_rank, len(segments), run.layout.pp)
    return tuple(Chunk(segments[index], starts[index], index == 0, index == len(segments) - 1) for index in mine)


def chunk_parameters(run: Run, chunk: Chunk) -> tuple[Parameter, ...]:
    """All of a chunk's parameters on one rank of its tensor- and expert-parallel groups.

    Ranks differ only in values. The order is that of the torch spec; Transformer Engine's linears list their norm
    before their weight, which moves padding but changes its sum by a bucket's last rounding at most.
    """
    model, layout = run.model, run.layout
    shared = layout.pp > 1 and model.mtp_depths > 0
    vocabulary = Parameter((model.vocab_size // layout.tp, model.hidden_size))
    embedding = Parameter(vocabulary.shape, shared=shared)
    norm = Parameter((model.hidden_size,))
    blocks = min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths
    parts: list[Iterator[Parameter]] = [layer_parameters(run, symbol) for symbol in chunk.layers]
    if chunk.first or (chunk.last and model.mtp_depths):
        parts.insert(0, iter([embedding]))
    if chunk.last:
        parts.append(iter([norm]))
        for _ in range(blocks):
            parts.append(iter([norm, norm, _linear(run, "mtp.eh_proj")]))
            parts += [layer_parameters(run, symbol) for symbol in model.mtp_pattern]
            parts.append(iter([norm]))
        parts.append(iter([vocabulary]))
    return tuple(chain.from_iterable(parts))


def layer_parameters(run: Run, symbol: str) -> Iterator[Parameter]:
    """One layer's, its norm included."""
    model, layout = run.model, run.layout
    norm = Parameter((model.hidden_size,))
    if symbol == "M":
        yield from _mamba(run)
    elif symbol == "*":
        yield from (_linear(run, "attention.proj"), _linear(run, "attention.qkv"), norm)
    elif symbol == "-":
        yield from (_linear(run, "mlp.fc1"), norm, _linear(run, "mlp.fc2"))
    else:
        yield norm
        yield Parameter((model.num_moe_experts, model.hidden_size), wide=True)  # router
        if model.moe_latent_size:
            yield from (_linear(run, "moe.latent_down"), _linear(run, "moe.latent_up"))
        apart = layout.ep > 1 or layout.etp != layout.tp
        local = model.num_moe_experts // layout.ep
        for role in ("moe.experts.fc1", "moe.experts.fc2"):
            yield from [_linear(run, role, expert=apart)] * local
        if model.moe_shared_expert_intermediate_size:
            yield from (_linear(run, "moe.shared.fc1"), _linear(run, "moe.shared.fc2"))


def router_buffer_bytes(run: Run, chunk: Chunk) -> int:
    """Expert biases and token counts of a chunk's routers: two FP32 numbers an expert."""
    model = run.model
    blocks = min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths
    routers = chunk.layers.count("E") + (blocks * model.mtp_pattern.count("E") if chunk.last else 0)
    return routers * 2 * 4 * model.num_moe_experts


def _mamba(run: Run) -> Iterator[Parameter]:
    model, tp = run.model, run.layout.tp
    inner = model.mamba_num_heads * model.mamba_head_dim // tp
    convolved = inner + 2 * model.mamba_num_groups * model.mamba_state_dim // tp
    yield from (Parameter((convolved, 1, CONV_KERNEL)), Parameter((convolved,)))
    yield from [Parameter((model.mamba_num_heads // tp,), wide=True)] * 3  # dt_bias, A_log, D
    yield from (_linear(run, "mamba.in_proj"), Parameter((model.hidden_size,)))
    yield from (Parameter((inner,)), _linear(run, "mamba.out_proj"))


def _linear(run: Run, role: Role, *, expert: bool = False) -> Parameter:
    return Parameter(weight_shape(role, run.model, run.layout.tp, run.layout.etp), role, expert=expert)
