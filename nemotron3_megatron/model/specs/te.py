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

from nemotron3_megatron.model.attention import document_attention, gather_sequence, zigzag_slices
from nemotron3_megatron.model.device_counts import (
    DeviceCountsColumnLinear,
    DeviceCountsGroupedMLP,
    DeviceCountsMoELayer,
    DeviceCountsRowLinear,
)
from nemotron3_megatron.model.gathered import GatheringMoELayer
from nemotron3_megatron.model.mixer import FusedMambaMixer
from nemotron3_megatron.model.router import Float32Router
from nemotron3_megatron.model.segments import segment_attention
from nemotron3_megatron.model.specs.stack import StackClasses, stack_spec


class DocumentTEAttention(TEDotProductAttention):  # type: ignore[misc]
    """Transformer Engine attention that isolates documents by its variable-length (``thd``) kernels.

    Under context parallelism Transformer Engine wants every document cut over the ranks; ours lie whole, as without
    documents, so each rank attends from its own queries to gathered keys (``model/segments.py``).
    """

    cp_group: Any

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
        if self.cp_group is not None and query.dtype == torch.float32:
            # No kernel takes it, and Transformer Engine's own torch code wants as many queries as keys.
            return document_attention(query, key, value, packed_seq_params.seq_idx, self.cp_group, None)
        if self.cp_group is not None:
            keys, values = (gather_sequence(each, self.cp_group) for each in (key, value))
            slices = zigzag_slices(len(keys), self.cp_group.rank(), self.cp_group.size())
            return segment_attention(query, keys, values, packed_seq_params.seq_idx, slices, self._segments)
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

    def _segments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_key: int,
    ) -> Tensor:
        """``segments.VariableLength`` on this rank alone."""
        group, self.cp_group = self.cp_group, None
        out: Tensor = super(TEDotProductAttention, self).forward(
            query,
            key,
            value,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=query_ends,
            cu_seqlens_kv=key_ends,
            max_seqlen_q=longest_query,
            max_seqlen_kv=longest_key,
        )
        self.cp_group = group
        return out


def _boundaries(documents: Tensor) -> Tensor:
    """Cumulative lengths (n + 1,) int32 of the documents in the rows of documents (B, S), rows end to end."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten().to(torch.int32)
    return torch.cat([first, first.new_tensor([documents.numel()])])


def te_stack_spec(chunk_size: int, num_experts: int, *, device_counts: bool, gathers: bool = False) -> ModuleSpec:
    """Spec of the hybrid stack.

    Args:
        chunk_size: the Mamba-2 scan's, in tokens.
        num_experts: of each MoE layer.
        device_counts: see :func:`expert_layer`.
        gathers: likewise.
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
            moe=expert_layer(num_experts, device_counts=device_counts, gathers=gathers),
        ),
        chunk_size,
    )


def expert_layer(num_experts: int, *, device_counts: bool, gathers: bool = False) -> partial[Any]:
    """The MoE layer's class with its submodules.

    Args:
        num_experts: of each layer.
        device_counts: experts whose token counts stay on the GPU (``model/device_counts.py``).
        gathers: experts that are sent every token of their group (``model/gathered.py``).
    """
    moe = get_moe_module_spec(use_te=True, num_experts=num_experts, moe_grouped_gemm=True)
    submodules = replace(moe.keywords["submodules"], router=Float32Router)
    layer = GatheringMoELayer if gathers else DeviceCountsMoELayer if device_counts else moe.func
    if device_counts:
        linears = GroupedMLPSubmodules(
            linear_fc1=DeviceCountsColumnLinear, linear_fc2=DeviceCountsRowLinear, activation_func=None
        )
        submodules = replace(submodules, experts=partial(DeviceCountsGroupedMLP, submodules=linears))
    return partial(layer, submodules=submodules)
