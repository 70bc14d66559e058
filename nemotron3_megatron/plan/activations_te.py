"""What one micro-batch leaves behind for its backward pass on the te spec, tensor by tensor.

Letters as in ``plan/activation_shape.py``. Values are BF16 (2 bytes) unless said otherwise. A tensor that two
operations save counts once, where it is made; buffers that live inside one operation are ``transient``.

Sources: Transformer Engine 2.20 ``module/layernorm_linear.py``, ``linear.py``, ``permutation.py``; mamba-ssm 2.3
``ssd_combined.py``; Megatron-Core 0.19 ``transformer/moe``, ``fusions/fused_weighted_squared_relu.py``; our
``model/vocabulary_loss.py`` and ``model/device_counts.py``. A quantised linear saves a quantised copy of its input in
place of it (``plan/quantised.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nemotron3_megatron.config.experts import gathers_tokens
from nemotron3_megatron.config.graphs import why_no_graph
from nemotron3_megatron.model.parts import expert_bytes, scan_parts, tokens_at_a_time
from nemotron3_megatron.model.row_forecast import CAPTURED_MARGIN, MARGIN
from nemotron3_megatron.plan.activation_shape import FLOAT, Kept, Shape, largest_imbalance
from nemotron3_megatron.precision.policy import Role


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

    A scan too long for its kernels' indices goes in parts (``model/mamba_parts.py``), each made anew: the output before
    the gate is not kept; backward there are the gradients of the gated output and of all parts' P, and for one part a
    copy of P, both outputs, the gradients of these three, and states.
    """
    model, tp = at.model, at.run.layout.tp
    inner = model.mamba_num_heads * model.mamba_head_dim // tp
    width = 2 * inner + (2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_num_heads) // tp
    states = 2 * FLOAT * inner * model.mamba_state_dim // model.mamba_chunk_size
    gradients = at.value * (width + 2 * inner) + states
    parts = _scan_parts(at, width, inner)
    before_gate = inner if parts == 1 else 0
    if parts > 1:
        gradients = at.value * (width + inner) + (at.value * (width + 2 * inner) + gradients) // parts
    scanned = at.value * (width + inner + before_gate) + at.saved_input("mamba.out_proj") * inner
    saved = _norm_linear(at, "mamba.in_proj") + round(at.tokens * scanned)
    return Kept(saved, at.tokens * gradients + _gathered(at))


def _scan_parts(at: Shape, width: int, inner: int) -> int:
    """Context parallelism gives a rank all positions of a share of the groups: the same elements."""
    model, layout = at.model, at.run.layout
    groups = max(model.mamba_num_groups // (layout.tp * layout.cp), 1)
    try:
        return scan_parts(at.tokens, width, inner, model.mamba_state_dim, groups, model.mamba_chunk_size)
    except ValueError:  # the layer will refuse it; how much memory it would take is known nonetheless
        return groups


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
    # The dispatcher's attributes: gates and map of the tokens that it saw last.
    lasting = at.between * (FLOAT + 1) * model.num_moe_experts
    row_bytes = expert_bytes(model.moe_router_topk, latent, width, at.value)
    part = tokens_at_a_time(at.between, row_bytes) / at.between
    if part < 1 and at.groups_experts and not gathers_tokens(at.run):
        # ``model/moe_parts.py``: the router whole, the rest for a part at a time; gradients of whole input and gates.
        remade = part * (experts + projected + shared + 2 * routed * (latent + width) + travelling)
        whole = normed + FLOAT * at.between * model.num_moe_experts + gradient + _gathered(at)
        return Kept(norm + router + _read_normed(at), round(remade) + whole, lasting)
    if at.recomputes("moe"):
        return Kept(norm + normed + lasting, inside + backward - lasting, lasting)
    return Kept(norm + saved + (0 if at.recomputes("layernorm") else _read_normed(at)), backward, lasting)


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
    """Rows that there is room for among this rank's experts; expert tensor parallelism gathers those of its ranks."""
    share = min(at.imbalance * (1 + _spare(at)), largest_imbalance(at.run))
    return round(at.between * at.run.layout.etp * at.model.moe_router_topk * share)


def _spare(at: Shape) -> float:
    """Room for rows that may yet come, over those that did (``model/row_forecast.py``)."""
    if not (at.groups_experts and gathers_tokens(at.run)):
        return 0.0
    captured = not why_no_graph(at.run, spec="te", backend="none")
    return CAPTURED_MARGIN if captured else MARGIN


def ends(at: Shape) -> int:
    """4 H for the final norm; with MTP, 2 H for the copy of all depths' outputs that the losses read. Under sequence
    parallelism the losses keep gathered tokens instead."""
    hidden, depths = at.value * at.model.hidden_size, at.model.mtp_depths
    copied = depths > 0 or at.between < at.tokens
    return hidden * (2 * at.between + (1 + depths) * at.tokens * copied)


def mtp_ends(at: Shape) -> int:
    """Around a depth's layers: 2 H (embedding) + 4 H (eh_proj's input, both halves) + 4 H (its final norm)."""
    return 5 * at.value * at.between * at.model.hidden_size


LAYERS: Mapping[str, Callable[[Shape], Kept]] = {"M": _mamba, "*": _attention, "E": _moe, "-": _mlp}
