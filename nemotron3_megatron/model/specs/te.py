"""The stack on Transformer Engine, mamba-ssm and causal-conv1d: CUDA."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from nemotron3_megatron.model.device_counts import (
    DeviceCountsColumnLinear,
    DeviceCountsGroupedMLP,
    DeviceCountsMoELayer,
    DeviceCountsRowLinear,
)
from nemotron3_megatron.model.mixer import FusedMambaMixer
from nemotron3_megatron.model.router import Float32Router
from nemotron3_megatron.model.specs.stack import StackClasses, stack_spec


class DocumentTEAttention(TEDotProductAttention):  # type: ignore[misc]
    """Transformer Engine attention that isolates documents by its variable-length (``thd``) kernels."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query (S, B, N, D), key and value (S, B, K, D) -> (S, B, N * D)."""
        if packed_seq_params is None:
            plain: Tensor = super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, **kwargs)
            return plain
        length, batch = query.shape[:2]
        rows = [t.transpose(0, 1).reshape(batch * length, *t.shape[2:]) for t in (query, key, value)]
        boundaries = packed_seq_params.cu_seqlens_q
        if boundaries is None:
            boundaries = _boundaries(packed_seq_params.seq_idx)
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        packed: Tensor = super().forward(
            *rows, attention_mask, attn_mask_type, attention_bias, packed_seq_params=params, **kwargs
        )
        return packed.reshape(batch, length, -1).transpose(0, 1).contiguous()


def _boundaries(documents: Tensor) -> Tensor:
    """Cumulative lengths (n + 1,) int32 of the documents in the rows of documents (B, S), rows end to end."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten().to(torch.int32)
    return torch.cat([first, first.new_tensor([documents.numel()])])


def te_stack_spec(chunk_size: int, num_experts: int, *, device_counts: bool) -> ModuleSpec:
    """Spec of the hybrid stack.

    Args:
        chunk_size: the Mamba-2 scan's, in tokens.
        num_experts: of each MoE layer.
        device_counts: see :func:`expert_layer`.
    """
    return stack_spec(
        StackClasses(
            stack=HybridStack,
            norm=TENorm,
            norm_linear=TELayerNormColumnParallelLinear,
            column_linear=TEColumnParallelLinear,
            row_linear=TERowParallelLinear,
            core_attention=DocumentTEAttention,
            mixer=FusedMambaMixer,
            moe=expert_layer(num_experts, device_counts=device_counts),
        ),
        chunk_size,
    )


def expert_layer(num_experts: int, *, device_counts: bool) -> partial[Any]:
    """The MoE layer's class with its submodules.

    Args:
        num_experts: of each layer.
        device_counts: experts whose token counts stay on the GPU (``model/device_counts.py``).
    """
    moe = get_moe_module_spec(use_te=True, num_experts=num_experts, moe_grouped_gemm=True)
    submodules = replace(moe.keywords["submodules"], router=Float32Router)
    if not device_counts:
        return partial(moe.func, submodules=submodules)
    linears = GroupedMLPSubmodules(
        linear_fc1=DeviceCountsColumnLinear, linear_fc2=DeviceCountsRowLinear, activation_func=None
    )
    return partial(
        DeviceCountsMoELayer,
        submodules=replace(submodules, experts=partial(DeviceCountsGroupedMLP, submodules=linears)),
    )
