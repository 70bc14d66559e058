"""What one micro-batch leaves behind for its backward pass on the torch spec, tensor by tensor.

Letters as in ``plan/activation_shape.py``; v bytes a value, 2 in BF16 and 4 in FP32, where tensors that are widened to
FP32 are the same as before and count once. The kernels are plain torch operations, so that autograd keeps most of what
they make; the terms were read off ``torch.autograd.graph.saved_tensors_hooks`` on CPU, and
``tests/distributed/test_activation_memory.py`` compares their sums with the allocator. A quantised linear saves a
quantised copy of its input, gathered under sequence parallelism, in place of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nemotron3_megatron.plan.activation_shape import FLOAT, LONG, Kept, Shape
from nemotron3_megatron.precision.policy import Role

SCORE_BYTES = 256 * 2**20
"""Of ``model/attention.py``, which imports torch: queries whose scores fill more go in blocks."""


def _norm(at: Shape) -> int:
    """The input widened and the input normed, 4 H each, and 4 for the norm's scale (``model/layers.py`` rms_norm)."""
    return at.between * FLOAT * (2 * at.model.hidden_size + 1)


def _input(at: Shape, role: Role, width: int) -> int:
    """A linear's input of t tokens, or its quantised copy of T."""
    return round(at.copies[role] * at.tokens * width) if role in at.copies else at.value * at.between * width


def _widened(at: Shape) -> int:
    """Bytes of an element's gradient in FP32 beside its rounded one; an FP32 model has no such copy."""
    return FLOAT if at.value != FLOAT else 0


def _mamba(at: Shape) -> Kept:
    """Bytes a token, of a rank's I = heads * head_dim / tp, N = groups * state / tp, C = I + 2 N, h = heads / tp,
    chunks of q:

    ``conv``: what in_proj made of x, B, C and of z, widened: 4 C + 4 I (in FP32 views of all of it, 4 (C + I + h)), the
    document's number 8, SiLU's input 4 C. ``scan`` (``model/ssd.py``): x widened 4 I (FP32: SiLU's output 4 C), dt
    before and after softplus and as FP64 16 h, B and C laid out for four products 16 N (with one group they are views:
    8 N, FP32: none), decays inside chunks, their product with C B, and that, 4 q (2 h + groups), x dt as three products
    read it 12 I, decays to and from the chunk's ends 2 (8 h + 1), the states' contribution 4 I. ``across``: states
    between chunks 4 I state / q, once more in micro-batches of several rows, decays 4 (I + 2 h) / q. ``gate``: y and
    silu(z) 8 I; the norm's input and output 8 I and scales 4 groups. Then out_proj's input v I.

    Under context parallelism a rank has its share of heads and groups, at least one group, of the whole sequence.

    Backward: gradients of norm and gate, three of 4 I, in BF16 and one of 2 I; or, where chunks are long against
    heads, of the decays inside chunks, three of 4 h q, and of C B, 4 q groups, with 32 I of what came before given
    back.
    """
    model, layout = at.model, at.run.layout
    heads = model.mamba_num_heads // layout.tp
    inner = heads * model.mamba_head_dim
    local = model.mamba_num_groups // layout.tp
    groups = max(local, layout.cp)
    wide, state = at.value == FLOAT, groups * model.mamba_state_dim
    convolved = inner + 2 * state
    chunk = min(model.mamba_chunk_size, at.stage.seq_length)
    conv = FLOAT * (2 * convolved + inner + (heads if wide else 0)) + LONG * layout.cp
    views = groups == layout.cp
    laid_out = (0 if wide else 2 * FLOAT * state) if views else 4 * FLOAT * state
    within = FLOAT * chunk * (2 * heads + groups)
    scan = FLOAT * (convolved if wide else inner) + 2 * (FLOAT + FLOAT) * heads + laid_out + within
    scan += 3 * FLOAT * inner + 2 * (2 * FLOAT * heads + 1) + FLOAT * inner
    copies = (1 if at.stage.micro_batch_size == 1 else 2) + chunk / at.stage.seq_length
    across = FLOAT * (inner * model.mamba_state_dim * copies + inner + 2 * heads) / chunk
    gate = FLOAT * (2 * inner + 2 * inner + local)
    kept = at.tokens * (conv + scan + across + gate) + round(at.saved_input("mamba.out_proj") * at.tokens * inner)
    gates = (2 * FLOAT + _widened(at) + at.value) * inner
    backward = at.tokens * max(gates, FLOAT * ((3 * heads + groups) * chunk - 8 * inner))
    return Kept(_norm(at) + _input(at, "mamba.in_proj", model.hidden_size) + round(kept), backward + _between(at))


def _between(at: Shape) -> int:
    """Backward: the gradient of the layer's output, and under sequence parallelism a linear's input, which is gathered
    over the tensor-parallel ranks again."""
    gathered = at.tokens if at.between < at.tokens else 0
    return at.value * at.model.hidden_size * (at.between + gathered)


def _attention(at: Shape) -> Kept:
    """Bytes a token, with Q = heads * dim / tp and K = 2 groups * dim / tp: queries laid out anew v Q; linear_qkv's
    output, held by the views of keys and values, v (Q + K), or the keys and values of all context-parallel ranks,
    v K cp; the context, linear_proj's input, v Q. With a mask (documents or context parallelism) the context once as
    the kernel and once as linear_proj wants it, and the mask itself as numbers: v bytes a pair of query and key. Of the
    kernel the softmax's logarithm 4 heads. Queries of long sequences go in blocks (``model/attention.py``) of which
    neither mask nor logarithm nor context is kept.

    Where ranks are more than groups, linear_qkv's output is gathered over them and the views hold all of it.
    Recomputing ``core_attn`` keeps queries, keys, values and linear_proj's input. Backward: gradients of the context
    (twice, but with a mask its copy is given back before), queries, keys and values, linear_proj's output; and what is
    made anew.
    """
    model, layout = at.model, at.run.layout
    query = model.num_attention_heads * model.kv_channels // layout.tp
    key_value = 2 * max(model.num_query_groups // layout.tp, 1) * model.kv_channels
    whole = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    projected = whole if model.num_query_groups < layout.tp else query + key_value
    remade = at.recomputes("core_attn")
    held = key_value * layout.cp if layout.cp > 1 and not remade else projected
    masked = at.run.data.isolate_documents or layout.cp > 1
    heads = model.num_attention_heads // layout.tp
    pairs, blocked = _pairs(at, heads) if masked else (0, False)
    # A block's mask exists twice meanwhile, as bytes and as numbers.
    inside = (at.value + 1) * pairs if blocked else at.tokens * FLOAT * heads + at.value * pairs
    inside += at.value * at.tokens * query if masked and not blocked else 0
    made_anew = inside if remade or blocked else 0
    proj = round(at.saved_input("attention.proj") * at.tokens * query)
    kept = at.value * at.tokens * (query + held) + inside - made_anew + proj
    backward = at.value * at.tokens * ((1 if masked else 2) * query + key_value * layout.cp) + made_anew
    backward += at.value * at.between * model.hidden_size
    return Kept(_norm(at) + _input(at, "attention.qkv", model.hidden_size) + kept, backward + _between(at))


def _pairs(at: Shape, heads: int) -> tuple[int, bool]:
    """Pairs of query and key in the masks that exist together, if documents are as long as sequences, and whether these
    are a block's. A context-parallel rank has two slices, one as far from the end as the other from the beginning."""
    length, cp, batch = at.stage.seq_length, at.run.layout.cp, at.stage.micro_batch_size
    slice_length = length if cp == 1 else length // (2 * cp)
    masks = batch if at.run.data.isolate_documents else 1
    rows = max(SCORE_BYTES // (FLOAT * batch * heads * length), 1)
    if rows < slice_length:
        return masks * rows * length, True
    return masks * (length * length if cp == 1 else slice_length * slice_length * (2 * cp + 1)), False


def _mlp(at: Shape) -> Kept:
    """Bytes a token: v F for the activation's input (behind its ReLU) and v F for fc2's, F = ffn_hidden_size / tp.

    Recomputing ``mlp`` leaves the layer's input. Backward: gradients of both, and ReLU's.
    """
    width = (at.model.ffn_hidden_size or 0) // at.run.layout.tp
    inside = _input(at, "mlp.fc1", at.model.hidden_size)
    inside += round((at.value + at.saved_input("mlp.fc2")) * at.tokens * width)
    backward = 3 * at.value * at.tokens * width + _between(at)
    if at.recomputes("mlp"):
        kept = at.value * at.between * at.model.hidden_size
        return Kept(kept, _norm(at) + inside - kept + backward)
    return Kept(_norm(at) + inside, backward)


def _moe(at: Shape) -> Kept:
    """Bytes a token between blocks: the norm and its output, which all readers share, v H; the router's input 4 H,
    unless that is FP32 already. Router, of E experts and k chosen: sigmoid of routing and balancing and the gates
    scattered 12 E, the map of bytes E, indices of both 16 k, chosen scores 4 k, two sums 8. Permutation: the order of
    all (expert, token) pairs 8 E, of the chosen 8 k. Experts, of width l (latent or hidden) and F / etp, for each of k
    tokens: sorted rows v l, behind the ReLU v F, squared v F, weighted v F, the weight 4. The latent up-projection's
    input v l. Shared expert, of width S / tp on all T tokens: behind the ReLU v S, squared v S.

    ``moe`` recomputes all but the norm and its output, ``shared_experts`` the shared part.

    Backward, the most of: gradients of the weighted F in FP32, 8 F, in BF16 12 F; those of the experts' outputs on
    their way back, 3 v l, and of the layer's, for which the latent up-projection's input has been given back, with the
    all-to-all's two copies; the shared expert's, 3 v S, for which all of the routed experts has.
    """
    model, layout = at.model, at.run.layout
    hidden, experts, chosen = model.hidden_size, model.num_moe_experts, model.moe_router_topk
    latent, width = model.moe_latent_size or hidden, model.moe_ffn_hidden_size // layout.etp
    rows = round(at.between * layout.etp * chosen * at.imbalance)
    wide = (model.moe_shared_expert_intermediate_size or 0) // layout.tp
    normed = at.value * at.between * hidden
    router = (FLOAT * hidden if at.value != FLOAT else 0) + 13 * experts + (2 * LONG + FLOAT) * chosen + 2 * FLOAT
    routed = at.between * (router + LONG * experts + LONG * chosen)
    sorted_rows = at.saved_input("moe.experts.fc1") * latent + at.saved_input("moe.experts.fc2") * width
    inside = routed + round(rows * (sorted_rows + 2 * at.value * width + FLOAT))
    up = round(at.saved_input("moe.latent_up") * at.between * (model.moe_latent_size or 0))
    inside += up
    shared = round((at.value + at.saved_input("moe.shared.fc2")) * at.tokens * wide)
    travelling = 2 * at.value * rows * latent if layout.ep > 1 else 0
    remade = shared if at.recomputes("shared_experts") else 0
    gradients = (
        rows * (2 * FLOAT + _widened(at)) * width,
        at.value * (3 * rows * latent + at.between * hidden) + travelling - up,
        3 * at.value * at.tokens * wide + remade - inside,
    )
    backward = max(gradients) + _between(at)
    # The dispatcher's attributes: gates, map and order of the tokens that it saw last.
    lasting = at.between * ((FLOAT + 1) * experts + LONG * chosen)
    if at.recomputes("moe"):
        return Kept(_norm(at) + normed + lasting, inside + shared + backward - lasting, lasting)
    return Kept(_norm(at) + normed + inside + shared - remade, backward, lasting)


def ends(at: Shape) -> int:
    """The final norm, and what the losses read of all depths, v H of all T tokens each."""
    return _norm(at) + (1 + at.model.mtp_depths) * at.value * at.tokens * at.model.hidden_size


def loss(at: Shape, rows: int, width: int) -> int:
    """Backward of a part of ``rows`` tokens by ``width`` logits on a CPU, beside the logits: three FP32 tensors of
    their shape (``model/cross_entropy.py``). Or after it, the weight's gradient, and the sum over depths before; or the
    final norm's, two or three of 4 H."""
    hidden, depths = at.model.hidden_size, 1 + at.model.mtp_depths
    norm = at.between * (2 * FLOAT + _widened(at)) * hidden
    return max(3 * FLOAT * rows * width, min(depths, 2) * at.value * width * hidden, norm)


def mtp_ends(at: Shape) -> int:
    """Around a depth's layers: three norms, and eh_proj's input, 2 v H."""
    return 3 * _norm(at) + _input(at, "mtp.eh_proj", 2 * at.model.hidden_size)


LAYERS: Mapping[str, Callable[[Shape], Kept]] = {"M": _mamba, "*": _attention, "E": _moe, "-": _mlp}
