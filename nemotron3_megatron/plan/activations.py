"""What one micro-batch leaves behind for its backward pass on the te spec, tensor by tensor.

Letters: T tokens of a micro-batch on a context-parallel rank, t those between blocks (T / tp under sequence
parallelism), H hidden, tp the tensor-parallel ranks. Values are BF16 (2 bytes) unless said otherwise. A tensor that two
operations save counts once, where it is made; buffers that live inside one operation are ``transient``.

Sources: Transformer Engine 2.20 ``module/layernorm_linear.py``, ``linear.py``, ``permutation.py``; mamba-ssm 2.3
``ssd_combined.py``; Megatron-Core 0.19 ``transformer/moe``, ``fusions/fused_weighted_squared_relu.py``; our
``model/vocabulary_loss.py`` and ``model/device_counts.py``. The torch spec keeps more: its kernels are unfused.
A quantised linear saves a quantised copy of its input in place of it (``plan/quantised.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.model.logits import rows_at_a_time
from nemotron3_megatron.plan.parameters import BYTES, Chunk
from nemotron3_megatron.plan.quantised import input_bytes_saved
from nemotron3_megatron.precision.policy import Role

FLOAT = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes on a rank."""

    saved: int
    """From the forward pass to the backward pass."""
    transient: int
    """Most that is alive besides, inside the layer's backward pass."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the terms are made of."""

    run: Run
    tokens: int
    """T."""
    between: int
    """t."""
    imbalance: float
    """Tokens of the fullest expert-parallel rank over the mean."""
    copies: Mapping[Role, float]
    """Bytes an element that quantised linears save of their input (``quantised.input_bytes_saved``)."""
    groups_experts: bool
    """One product serves all unquantised experts: their weights, and the gradients, are in one tensor meanwhile."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.run.model

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.run.precision.dtype]

    def saved_input(self, role: Role) -> float:
        """Bytes an element of a linear's input, where nothing else saves it."""
        return self.copies.get(role, self.value)

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation leaves out what ``module`` saves."""
        parallel = self.run.parallel
        return parallel.recompute == "selective" and module in parallel.recompute_modules


def shape(run: Run, stage: Stage, imbalance: float = 1.0) -> Shape:
    """The shape of a stage's micro-batches."""
    layout = run.layout
    tokens = stage.micro_batch_size * stage.seq_length // layout.cp
    between = tokens // layout.tp if layout.sequence_parallel else tokens
    return Shape(run, tokens, between, imbalance, input_bytes_saved(run), _groups_experts(run))


def _groups_experts(run: Run) -> bool:
    """As ``model/builder.py`` ``keeps_counts_on_device`` decides, of experts that are not quantised."""
    plain = run.parallel.moe_token_dispatcher_type == "alltoall" and "moe_act" not in run.parallel.recompute_modules
    rows = run.precision_plan.rows
    bf16 = all(row.format == "bf16" for row in rows if row.role.startswith("moe.experts"))
    return run.layout.etp == 1 and plain and bf16 and run.precision.dtype == "bf16"


def layer(at: Shape, symbol: str) -> Kept:
    """One layer of the stack, recomputation considered.

    ``recompute: full`` keeps a layer's input (t, H) and makes the rest anew: it is transient then.
    """
    whole = {"M": _mamba, "*": _attention, "E": _moe, "-": _mlp}[symbol](at)
    if at.run.parallel.recompute != "full":
        return whole
    saved = at.value * at.between * at.model.hidden_size
    return Kept(saved, whole.saved - saved + whole.transient)


def _norm_linear(at: Shape, role: Role) -> int:
    """A norm fused with the linear behind it saves its input (the residual) and its output, the linear's input:
    4 H bytes a token, and 4 for the norm's scale. Under sequence parallelism these are this rank's tokens."""
    return round(at.between * ((at.value + at.saved_input(role)) * at.model.hidden_size + FLOAT))


def _gathered(at: Shape) -> int:
    """Under sequence parallelism a linear's input is gathered over the tensor-parallel ranks, and again backward."""
    return at.value * at.tokens * at.model.hidden_size if at.between < at.tokens else 0


def _mamba(at: Shape) -> Kept:
    """Bytes a token: 4 H + 2 P + 6 I, with I = heads * head_dim / tp and P = 2 I + (2 groups * state + heads) / tp.

    in_proj's norm 4 H; its output, which the fused convolution and scan save, 2 P; the scan's output before the gate
    2 I; the gated one, which the norm saves, 2 I; the normed one, out_proj's input, 2 I. Two micro-batch rows or more
    are laid out anew for the scan, which keeps the same bytes. Backward: gradients of P and of two I, and the chunks'
    states with their gradients in FP32, 8 I * state / chunk.
    """
    model, tp = at.model, at.run.layout.tp
    inner = model.mamba_num_heads * model.mamba_head_dim // tp
    width = 2 * inner + (2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_num_heads) // tp
    scanned = at.value * (width + 2 * inner) + at.saved_input("mamba.out_proj") * inner
    saved = _norm_linear(at, "mamba.in_proj") + round(at.tokens * scanned)
    states = 2 * FLOAT * inner * model.mamba_state_dim // model.mamba_chunk_size
    return Kept(saved, at.tokens * (at.value * (width + 2 * inner) + states) + _gathered(at))


def _attention(at: Shape) -> Kept:
    """Bytes a token: 4 H + 2 (2 Q + K) + 2 Q + 4 heads, with Q = heads * dim / tp and K = 2 groups * dim / tp.

    linear_qkv's norm 4 H; its output, held by the views of keys and values, 2 (Q + K); queries laid out anew 2 Q; the
    context, which is linear_proj's input too, 2 Q; the softmax's logarithm 4 heads. No scores: the kernel is fused.
    Recomputing ``core_attn`` saves the logarithm only. Keys and values travel around the context-parallel ring in two
    buffers. Backward: gradients of queries, keys and values, and of queries in FP32 besides.

    Where ranks are more than groups, linear_qkv's output is gathered over them and the views hold all of it, 2 (Q + K)
    tp; so do, backward, its gradient, and that of the rank's group before it is scattered.
    """
    model, tp = at.model, at.run.layout.tp
    query = model.num_attention_heads * model.kv_channels // tp
    key_value = 2 * max(model.num_query_groups // tp, 1) * model.kv_channels
    spans_ranks = model.num_query_groups < tp
    projected = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels if spans_ranks else 0
    logarithm = 0 if at.recomputes("core_attn") else FLOAT * model.num_attention_heads // tp
    copied = round(at.copies.get("attention.proj", 0) * query)
    held = 2 * query + (projected or query + key_value)
    saved = _norm_linear(at, "attention.qkv") + at.tokens * (at.value * held + copied + logarithm)
    ring = 2 * key_value if at.run.layout.cp > 1 else 0
    gathered = projected + projected // model.num_query_groups
    backward = at.tokens * (at.value * (2 * query + key_value + ring + gathered) + FLOAT * query)
    return Kept(saved, backward + _gathered(at))


def _mlp(at: Shape) -> Kept:
    """Bytes a token: 4 H + 4 F, F = ffn_hidden_size / tp: fc1's norm, the activation's input, fc2's input.

    Recomputing ``mlp`` leaves the layer's input, 2 H. Backward: gradients of both F.
    """
    width = (at.model.ffn_hidden_size or 0) // at.run.layout.tp
    inside = round((at.value + at.saved_input("mlp.fc2")) * at.tokens * width)
    if at.recomputes("mlp"):
        kept = at.value * at.between * at.model.hidden_size
        return Kept(kept, _norm_linear(at, "mlp.fc1") - kept + 2 * inside + _gathered(at))
    return Kept(_norm_linear(at, "mlp.fc1") + inside, inside + _gathered(at))


def _moe(at: Shape) -> Kept:
    """Bytes a token between blocks: 4 H (norm) + 4 H (the router's FP32 copy) + 29 E (router) + k i (2 l + 4 F + 4)
    (experts) + 2 l (the latent up-projection's input) + 4 S tp (shared expert), E experts, k chosen, i imbalance.

    The norm's input and output 4 H. FP32 router: its input 4 H, then sigmoid and probabilities of routing and
    balancing, four (t, E) FP32 tensors, the map of integers that scatter makes and of bytes, and int64 indices:
    29 E + 16 k. Experts, of width l (latent or hidden) and F / etp: their rows sorted by expert 2 l, fc1's output
    2 F, the weighted squared ReLU 2 F, the router's weight 4, for each of k tokens. fc2's output is not kept. Shared
    expert, of width S / tp on all T tokens: the activation's input and fc2's input. ``moe`` recomputes all but the
    norm, ``shared_experts`` the shared part, ``moe_act`` fc2's input, ``layernorm`` the norm's output.

    Backward: gradients of the experts' rows on both sides and of both F, the all-to-all's two copies, and where one
    product serves all experts (``model/device_counts.py``) their weights' gradients, a linear at a time.
    """
    model, layout = at.model, at.run.layout
    routed = _rows(at) * at.value
    latent, width = model.moe_latent_size or model.hidden_size, model.moe_ffn_hidden_size // layout.etp
    normed = at.value * at.between * model.hidden_size
    router = at.between * (FLOAT * model.hidden_size + 29 * model.num_moe_experts + 16 * model.moe_router_topk)
    weighted = 0 if at.recomputes("moe_act") else at.saved_input("moe.experts.fc2") * width
    experts = round(_rows(at) * (at.saved_input("moe.experts.fc1") * latent + at.value * width + weighted + FLOAT))
    projected = round(at.saved_input("moe.latent_up") * at.between * (model.moe_latent_size or 0))
    wide = (model.moe_shared_expert_intermediate_size or 0) // layout.tp
    shared = round((at.value + at.saved_input("moe.shared.fc2")) * at.tokens * wide)
    inside = router + experts + projected + shared
    saved = inside - (shared if at.recomputes("shared_experts") else 0)
    travelling = 2 * routed * latent if layout.ep > 1 else 0
    gradient = at.value * latent * width * (model.num_moe_experts // layout.ep) if at.groups_experts else 0
    backward = 2 * routed * (latent + width) + travelling + gradient + _gathered(at)
    norm = normed + FLOAT * at.between
    if at.recomputes("moe"):
        return Kept(norm + normed, inside + backward)
    return Kept(norm + saved + (0 if at.recomputes("layernorm") else _read_normed(at)), backward)


def _read_normed(at: Shape) -> int:
    """The norm's output as the shared expert and the latent down-projection save it: together, or a copy each."""
    model = at.model
    readers: list[Role] = []
    if model.moe_latent_size:
        readers.append("moe.latent_down")
    if model.moe_shared_expert_intermediate_size:
        readers.append("moe.shared.fc1")
    copies = sum(at.copies[role] for role in readers if role in at.copies)
    itself = at.value if any(role not in at.copies for role in readers) else 0
    return round((copies + itself) * at.between * model.hidden_size)


def _rows(at: Shape) -> int:
    """Rows that reach this rank's experts; expert tensor parallelism gathers those of its ranks."""
    layout = at.run.layout
    return round(at.between * layout.etp * at.model.moe_router_topk * at.imbalance)


def largest_imbalance(run: Run) -> float:
    """Every token of the expert-parallel ranks chooses as many experts of one rank as there are."""
    model, ep = run.model, run.layout.ep
    return ep * min(model.moe_router_topk, model.num_moe_experts // ep) / model.moe_router_topk


def ends(at: Shape, chunk: Chunk) -> int:
    """Final norm and MTP around their layers: 4 H for the norm; each depth 2 H (embedding) + 4 H (eh_proj's input, both
    halves) + 4 H (its final norm), and 2 H for the copy of all depths' outputs that the losses read. Under sequence
    parallelism the losses keep gathered tokens instead."""
    if not chunk.last:
        return 0
    hidden, depths = at.value * at.model.hidden_size, at.model.mtp_depths
    copies = (1 + depths) * (at.tokens if at.between < at.tokens else at.between if depths else 0)
    if at.run.parallel.recompute == "full":
        return hidden * (at.between * (2 + 4 * depths) + copies)
    return hidden * (at.between * (2 + 5 * depths) + copies)


def logits(at: Shape, chunk: Chunk) -> int:
    """Of all depths, 2 V / tp a token each, kept in BF16 until each becomes its own gradient; and one gradient 2 H of
    the hidden states. Beyond ``model/logits.py``'s limit they are made in parts, of which one exists at a time."""
    if not chunk.last:
        return 0
    depths = 1 + at.model.mtp_depths
    width = at.model.vocab_size // at.run.layout.tp
    part = rows_at_a_time(at.tokens, width, at.value)
    kept = depths * at.tokens if part == at.tokens else part
    return kept * at.value * width + at.tokens * (depths * FLOAT + at.value * at.model.hidden_size)
