"""The stack in pure torch: CPU, or CUDA without Transformer Engine and mamba-ssm."""

from __future__ import annotations

from functools import partial

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from nemotron3_megatron.model.attention import DocumentAttention
from nemotron3_megatron.model.gathered import GatheringTorchMoELayer
from nemotron3_megatron.model.hybrid import TorchHybridStack
from nemotron3_megatron.model.layers import (
    ColumnParallelGroupedLinear,
    ColumnParallelLinear,
    LayerNormColumnParallelLinear,
    RMSNorm,
    RowParallelGroupedLinear,
    RowParallelLinear,
)
from nemotron3_megatron.model.mixer import TorchMambaMixer
from nemotron3_megatron.model.moe import TorchMoELayer
from nemotron3_megatron.model.router import Float32Router
from nemotron3_megatron.model.specs.stack import StackClasses, stack_spec


def torch_stack_spec(chunk_size: int, *, gathers: bool = False) -> ModuleSpec:
    """Spec of the hybrid stack.

    Args:
        chunk_size: the Mamba-2 scan's, in tokens.
        gathers: experts that are sent every token of their group (``model/gathered.py``).

    Experts use ``TEGroupedMLP``, which without its fused path is plain routing around the grouped linears it is
    given, so names and checkpoints match those of Transformer Engine's grouped experts.
    """
    experts = partial(
        TEGroupedMLP,
        submodules=GroupedMLPSubmodules(
            linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear, activation_func=None
        ),
    )
    shared = partial(
        SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return stack_spec(
        StackClasses(
            stack=TorchHybridStack,
            norm=RMSNorm,
            norm_linear=LayerNormColumnParallelLinear,
            column_linear=ColumnParallelLinear,
            row_linear=RowParallelLinear,
            core_attention=DocumentAttention,
            mixer=TorchMambaMixer,
            moe=partial(
                GatheringTorchMoELayer if gathers else TorchMoELayer,
                submodules=MoESubmodules(router=Float32Router, experts=experts, shared_experts=shared),
            ),
        ),
        chunk_size,
    )
