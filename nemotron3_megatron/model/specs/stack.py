"""The shape of the hybrid stack, given the classes that implement its roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from nemotron3_megatron.model.mtp import PackedMTPLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class StackClasses:
    """Implementations of the stack's roles."""

    stack: type
    norm: type
    norm_linear: type
    """Norm fused with the column-parallel GEMM that follows it."""
    column_linear: type
    row_linear: type
    core_attention: type
    mixer: type
    moe: Callable[..., Any]


def stack_spec(classes: StackClasses, chunk_size: int) -> ModuleSpec:
    """Assemble Megatron-Core's spec of a hybrid stack with Mamba-2, attention, MLP, MoE layers and MTP.

    Args:
        classes: implementation of each role.
        chunk_size: tokens in one chunk of the Mamba-2 scan.
    """
    return ModuleSpec(
        module=classes.stack,
        submodules=HybridStackSubmodules(
            mamba_layer=_mamba_layer(classes, chunk_size),
            attention_layer=_attention_layer(classes),
            mlp_layer=_mlp_layer(classes),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=classes.norm, mlp=classes.moe, mlp_bda=get_bias_dropout_add
                ),
            ),
            mtp_block_spec=_mtp_block(classes),
        ),
    )


def _mamba_layer(classes: StackClasses, chunk_size: int) -> ModuleSpec:
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(
                module=classes.mixer,
                params={"chunk_size": chunk_size},
                submodules=MambaMixerSubmodules(in_proj=classes.norm_linear, out_proj=classes.row_linear),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )


def _attention_layer(classes: StackClasses) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=classes.norm_linear,
                    core_attention=classes.core_attention,
                    linear_proj=classes.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _mlp_layer(classes: StackClasses) -> ModuleSpec:
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=classes.norm_linear, linear_fc2=classes.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mtp_block(classes: StackClasses) -> ModuleSpec:
    layer = ModuleSpec(
        module=PackedMTPLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=classes.norm,
            hnorm=classes.norm,
            eh_proj=classes.column_linear,
            mtp_model_layer=None,
            layer_norm=classes.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
