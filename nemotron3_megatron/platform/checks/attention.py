"""Core attention: causal, grouped queries; Transformer Engine chooses FlashAttention, cuDNN or its own.

Shapes: S sequence, B batch, N query heads, K key/value heads, D head dim (of Nano: 32, 2, 128).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.platform.checks.kernel import Draw, KernelFamily

DOCUMENTS = 4


def _inputs(draw: Draw) -> dict[str, Any]:
    length, heads, groups, width = draw.size(1024, 96), draw.size(32, 4), 2, draw.size(128, 32)
    return {
        "query": draw.normal(length, 1, heads, width),
        "key": draw.normal(length, 1, groups, width),
        "value": draw.normal(length, 1, groups, width),
    }


def _attention(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> Tensor:
    import transformer_engine.pytorch as te

    core = te.DotProductAttention(query.shape[2], query.shape[3], num_gqa_groups=key.shape[2], attn_mask_type="causal")
    if not packed:
        y: Tensor = core(query, key, value)
        return y
    rows = [t.squeeze(1) for t in (query, key, value)]
    ends = boundaries(query.shape[0]).to(query.device)
    longest = int(ends.diff().max())
    y = core(
        *rows,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return y.unsqueeze(1)


def boundaries(length: int) -> Tensor:
    """Cumulative lengths (DOCUMENTS + 1,) int32 of documents of uneven lengths in one row."""
    shares = torch.arange(1, DOCUMENTS + 1).square().cumsum(0)
    return torch.cat([shares.new_zeros(1), shares * length // shares[-1]]).int()


def attention_reference(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> Tensor:
    """query (S, B, N, D), key and value (S, B, K, D) -> (S, B, N * D)."""
    length, batch, heads, width = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) / math.sqrt(width)
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    if packed:
        documents = torch.bucketize(torch.arange(length), boundaries(length)[1:], right=True).to(query.device)
        hidden |= documents[:, None] != documents[None, :]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).reshape(length, batch, heads * width)


def _chosen_backend() -> str:
    """What Transformer Engine keeps about its last choice."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module

    last = getattr(module, "_attention_backends", {})
    if last.get("use_flash_attention"):
        return f"FlashAttention {last.get('flash_attention_backend')}"
    if last.get("use_fused_attention"):
        return f"cuDNN, {last.get('fused_attention_backend')}"
    return "Transformer Engine's unfused attention" if last.get("use_unfused_attention") else ""


def _family(*, packed: bool) -> KernelFamily:
    # Forward: the weights, the output. Backward: the weights, the output (in the row sums), the scores' gradient, the
    # result, and the keys' and values' gradients of each query head before heads of a group are summed.
    return KernelFamily(
        needs=("transformer-engine",),
        inputs=_inputs,
        kernel=partial(_attention, packed=packed),
        reference=partial(attention_reference, packed=packed),
        forward=2,
        backward=5,
        note=_chosen_backend,
    )


ATTENTION = _family(packed=False)
DOCUMENT_ATTENTION = _family(packed=True)
