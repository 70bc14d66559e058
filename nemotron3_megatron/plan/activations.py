"""What one micro-batch leaves behind for its backward pass, on the module spec that the run will use.

Layers and ends of each spec are in ``plan/activations_te.py`` and ``plan/activations_torch.py``; here is what both
share: recomputation of whole layers, MTP depths, logits. Letters as in ``plan/activation_shape.py``.
"""

from __future__ import annotations

from types import ModuleType

from nemotron3_megatron.model.logits import rows_at_a_time
from nemotron3_megatron.plan import activations_te, activations_torch
from nemotron3_megatron.plan.activation_shape import FLOAT, Kept, Shape
from nemotron3_megatron.plan.parameters import Chunk


def layer(at: Shape, symbol: str) -> Kept:
    """One layer of the stack, recomputation considered.

    ``recompute: full`` keeps a layer's input (t, H) and makes the rest anew: it is transient then.
    """
    whole: Kept = _spec(at).LAYERS[symbol](at)
    if at.run.parallel.recompute != "full":
        return whole
    return _made_anew(whole, at.value * at.between * at.model.hidden_size)


def mtp_depth(at: Shape) -> Kept:
    """One MTP depth: its layers and what surrounds them.

    ``recompute: full`` keeps the two inputs of a depth, hidden states and embedded tokens, (t, H) each, and makes all
    its layers anew, whose inputs are kept meanwhile (Megatron-Core's ``transformer/multi_token_prediction.py``,
    ``_checkpointed_forward``).
    """
    layers = [layer(at, symbol) for symbol in at.model.mtp_pattern]
    around: int = _spec(at).mtp_ends(at)
    saved, lasting = (sum(getattr(each, name) for each in layers) for name in ("saved", "lasting"))
    whole = Kept(around + saved, max(each.transient for each in layers), lasting)
    if at.run.parallel.recompute != "full":
        return whole
    return _made_anew(whole, 2 * at.value * at.between * at.model.hidden_size)


def ends(at: Shape, chunk: Chunk) -> int:
    """The final norm, and the hidden states of all depths as the losses read them."""
    found: int = _spec(at).ends(at) if chunk.last else 0
    return found


def logits(at: Shape, chunk: Chunk) -> int:
    """Of all depths, 2 V / tp a token each, kept in BF16 until each becomes its own gradient; and one gradient 2 H of
    the hidden states. Beyond ``model/logits.py``'s limit they are made in parts, of which one exists at a time.
    The kernels of GPUs need no more than that.
    """
    if not chunk.last:
        return 0
    depths, hidden = 1 + at.model.mtp_depths, at.model.hidden_size
    width = at.model.vocab_size // at.run.layout.tp
    part = rows_at_a_time(at.tokens, width, at.value)
    kept = depths * at.tokens if part == at.tokens else part
    steady = kept * at.value * width + at.tokens * (depths * FLOAT + at.value * hidden)
    return steady + (activations_torch.loss(at, part, width) if at.on_cpu else 0)


def _spec(at: Shape) -> ModuleType:
    return activations_torch if at.spec == "torch" else activations_te


def _made_anew(whole: Kept, inputs: int) -> Kept:
    saved = inputs + whole.lasting
    return Kept(saved, whole.saved - saved + whole.transient, whole.lasting)
