"""Which part of which checkpoint tensor a published ``nemotron_h`` tensor is: names and shapes, from the model alone.

Every published tensor is a number of boxes of checkpoint tensors, one below the other. Source of the names:
Megatron-Bridge's ``nemotron_h_bridge.py``; of the order of rows: Megatron-Core (``attention.py``: for each key-value
head its query heads, the key, the value; ``mamba_mixer.py``: z, x, B, C, dt). Numbers of tensors and elements are
those of the published Super and Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.model.initialize import CONV_WIDTH

FLOAT32_KEYS = ("mixer.A_log", "mixer.D", "mixer.dt_bias", "router.weight", "router.expert_bias")
"""Endings of what training keeps in FP32 whatever the model's type (``model/builder.py``); the bias is a buffer."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor of the distributed checkpoint."""

    key: str
    start: Shape
    size: Shape


@dataclass(frozen=True, slots=True)
class Entry:
    """One published tensor."""

    name: str
    shape: Shape
    boxes: tuple[Box, ...]
    """Each reshaped to (rows, ``shape[1:]``), one below the other."""
    module: str | None = None
    """The linear of the precision plan whose weight this is, or a part of it."""

    @property
    def rows(self) -> tuple[slice, ...]:
        """Where each box lies along the first dimension of the published tensor."""
        row = prod(self.shape[1:])
        ends = list(accumulate(prod(box.size) // row for box in self.boxes))
        return tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))


def entries(model: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of the published form of a model, in the order of the forward pass."""
    width = (model.vocab_size, model.hidden_size)
    return (
        _whole("backbone.embeddings.weight", "embedding.word_embeddings.weight", width),
        *_decoder(model),
        _whole("backbone.norm_f.weight", "decoder.final_norm.weight", (model.hidden_size,)),
        _whole("lm_head.weight", "output_layer.weight", width),
        *_mtp(model),
    )


def checkpoint_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Global shape of every weight and buffer of the distributed checkpoint, by key."""
    shapes: dict[str, Shape] = {}
    for box in (box for entry in entries(model) for box in entry.boxes):
        end = tuple(start + size for start, size in zip(box.start, box.size, strict=True))
        known = shapes.get(box.key, end)
        shapes[box.key] = tuple(map(max, known, end))
    return shapes


def mtp_blocks(model: ModelConfig) -> int:
    """MTP blocks with weights of their own."""
    return min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths


def _decoder(model: ModelConfig) -> Iterator[Entry]:
    for index, symbol in enumerate(model.pattern):
        yield from _layer(symbol, model, f"decoder.layers.{index}.", f"backbone.layers.{index}.")


def _mtp(model: ModelConfig) -> Iterator[Entry]:
    """Published layer o * L + i is layer i of block o, of L layers; a block's own tensors are in its first and last."""
    hidden, inner = model.hidden_size, len(model.mtp_pattern)
    for block in range(mtp_blocks(model)):
        ours, first, last = (
            f"mtp.layers.{block}.",
            f"mtp.layers.{block * inner}.",
            f"mtp.layers.{(block + 1) * inner - 1}.",
        )
        yield _whole(f"{first}enorm.weight", f"{ours}enorm.weight", (hidden,))
        yield _whole(f"{first}hnorm.weight", f"{ours}hnorm.weight", (hidden,))
        yield _whole(f"{first}eh_proj.weight", f"{ours}eh_proj.weight", (hidden, 2 * hidden), f"{ours}eh_proj")
        for index, symbol in enumerate(model.mtp_pattern):
            published = f"mtp.layers.{block * inner + index}."
            yield from _layer(symbol, model, f"{ours}mtp_model_layer.layers.{index}.", published)
        yield _whole(f"{last}final_layernorm.weight", f"{ours}final_layernorm.weight", (hidden,))


def _layer(symbol: str, model: ModelConfig, ours: str, published: str) -> Iterator[Entry]:
    kinds = {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}
    yield from kinds[symbol](model, ours, published)


def _mamba(model: ModelConfig, ours: str, published: str) -> Iterator[Entry]:
    hidden, heads = model.hidden_size, model.mamba_num_heads
    inner, states = heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    convolved = {"x": inner, "B": states, "C": states}
    yield _whole(f"{published}norm.weight", f"{ours}mixer.in_proj.layer_norm_weight", (hidden,))
    mixer, here = f"{ours}mixer.", f"{published}mixer."
    projected = {"z": inner, **convolved, "dt": heads}
    yield _below(f"{here}in_proj.weight", f"{mixer}in_proj.weight.", projected, (hidden,), f"{mixer}in_proj")
    yield _below(f"{here}conv1d.weight", f"{mixer}conv1d.weight.", convolved, (1, CONV_WIDTH))
    yield _below(f"{here}conv1d.bias", f"{mixer}conv1d.bias.", convolved, ())
    for name in ("dt_bias", "A_log", "D"):
        yield _whole(f"{here}{name}", f"{mixer}{name}", (heads,))
    yield _whole(f"{here}norm.weight", f"{mixer}norm.weight", (inner,))
    yield _whole(f"{here}out_proj.weight", f"{mixer}out_proj.weight", (hidden, inner), f"{mixer}out_proj")


def _attention(model: ModelConfig, ours: str, published: str) -> Iterator[Entry]:
    hidden, groups, width = model.hidden_size, model.num_query_groups, model.kv_channels
    query = model.num_attention_heads // groups * width
    heads = {"q_proj": (0, query), "k_proj": (query, width), "v_proj": (query + width, width)}
    attention, here = f"{ours}self_attention.", f"{published}mixer."
    yield _whole(f"{published}norm.weight", f"{attention}linear_qkv.layer_norm_weight", (hidden,))
    for name, (first, rows) in heads.items():
        starts = (group * (query + 2 * width) + first for group in range(groups))
        boxes = tuple(Box(f"{attention}linear_qkv.weight", (start, 0), (rows, hidden)) for start in starts)
        yield Entry(f"{here}{name}.weight", (groups * rows, hidden), boxes, f"{attention}linear_qkv")
    inputs = model.num_attention_heads * width
    projection = f"{attention}linear_proj"
    yield _whole(f"{here}o_proj.weight", f"{projection}.weight", (hidden, inputs), projection)


def _experts(model: ModelConfig, ours: str, published: str) -> Iterator[Entry]:
    hidden, routed = model.hidden_size, model.moe_latent_size or model.hidden_size
    mlp, here = f"{ours}mlp.", f"{published}mixer."
    yield _whole(f"{published}norm.weight", f"{ours}pre_mlp_layernorm.weight", (hidden,))
    yield _whole(f"{here}gate.weight", f"{mlp}router.weight", (model.num_moe_experts, hidden))
    yield _whole(f"{here}gate.e_score_correction_bias", f"{mlp}router.expert_bias", (model.num_moe_experts,))
    if model.moe_latent_size:
        for name, latent in (("fc1_latent_proj", (routed, hidden)), ("fc2_latent_proj", (hidden, routed))):
            yield _whole(f"{here}{name}.weight", f"{mlp}{name}.weight", latent, f"{mlp}{name}")
    for expert in range(model.num_moe_experts):
        for name, linear, shape in _pair(model.moe_ffn_hidden_size, routed):
            box = Box(f"{mlp}experts.experts.{linear}.weight", (expert, 0, 0), (1, *shape))
            yield Entry(f"{here}experts.{expert}.{name}.weight", shape, (box,), f"{mlp}experts.{linear}")
    if model.moe_shared_expert_intermediate_size:
        yield from _linears(
            model.moe_shared_expert_intermediate_size, hidden, f"{mlp}shared_experts.", f"{here}shared_experts."
        )


def _mlp(model: ModelConfig, ours: str, published: str) -> Iterator[Entry]:
    assert model.ffn_hidden_size is not None  # a rule of the recipe
    yield _whole(f"{published}norm.weight", f"{ours}mlp.linear_fc1.layer_norm_weight", (model.hidden_size,))
    yield from _linears(model.ffn_hidden_size, model.hidden_size, f"{ours}mlp.", f"{published}mixer.")


def _linears(inner: int, outer: int, ours: str, published: str) -> Iterator[Entry]:
    for name, linear, shape in _pair(inner, outer):
        yield _whole(f"{published}{name}.weight", f"{ours}{linear}.weight", shape, f"{ours}{linear}")


def _pair(inner: int, outer: int) -> tuple[tuple[str, str, Shape], tuple[str, str, Shape]]:
    return ("up_proj", "linear_fc1", (inner, outer)), ("down_proj", "linear_fc2", (outer, inner))


def _whole(name: str, key: str, shape: Shape, module: str | None = None) -> Entry:
    return Entry(name, shape, (Box(key, (0,) * len(shape), shape),), module)


def _below(name: str, prefix: str, rows: Mapping[str, int], rest: Shape, module: str | None = None) -> Entry:
    """Whole checkpoint tensors ``prefix + part``, one below the other."""
    boxes = tuple(Box(f"{prefix}{part}", (0,) * (1 + len(rest)), (count, *rest)) for part, count in rows.items())
    return Entry(name, (sum(rows.values()), *rest), boxes, module)
