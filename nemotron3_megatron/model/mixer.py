"""Mamba-2 mixers: Megatron-Core's projections, sharding and context parallelism around a choice of kernels."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from nemotron3_megatron.model.gated_norm import GatedRMSNorm
from nemotron3_megatron.model.mamba2 import mamba2_mix
from nemotron3_megatron.model.mamba_parts import MixWeights, mix_in_parts
from nemotron3_megatron.model.parts import LARGEST_INDEX, scan_parts, tokens_at_a_time

MAMBA_NORM_EPSILON = 1e-5
"""Epsilon of the gated norm, fixed in Megatron-Core's mixer (core/ssm/mamba_mixer.py)."""


class DocumentMambaMixer(MambaMixer):  # type: ignore[misc]
    """Training forward that resets state and convolution at document boundaries, also under context parallelism.

    Megatron-Core's own forward lays packed sequences out per document when CP > 1; here the sequence is laid out
    as a whole (the same zig-zag as without documents) and the boundaries travel as document indices.
    """

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: object = None,
        *,
        inference_params: object = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (S, B, H) -> (S, B, H), bias None."""
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("this mixer trains; it keeps no inference state")
        projected, _ = self.in_proj(hidden_states)
        whole = self.cp.pre_conv_ssm(projected).transpose(0, 1).contiguous()
        documents = None if packed_seq_params is None else packed_seq_params.seq_idx
        mixed = self.mix(whole, documents).transpose(0, 1).contiguous()
        output: tuple[Tensor, Tensor | None] = self.out_proj(self._normed(self.cp.post_conv_ssm(mixed)))
        return output

    def _normed(self, mixed: Tensor) -> Tensor:
        """(S, B, inner) -> the same, in as many calls as the norm's indices need (``parts.LARGEST_INDEX``)."""
        rows = tokens_at_a_time(mixed.shape[0], mixed[0].numel(), LARGEST_INDEX)
        return torch.cat([self.norm(part) for part in mixed.split(rows)]) if rows < len(mixed) else self.norm(mixed)

    @abstractmethod
    def mix(self, zxbcdt: Tensor, documents: Tensor | None) -> Tensor:
        """Convolution, scan and gate: zxbcdt (B, G, z + x + B + C + dt), documents (B, G) -> (B, G, inner)."""


class TorchMambaMixer(DocumentMambaMixer):
    """The mixer on pure-torch kernels: any device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _let_constructor_pass()
        super().__init__(*args, **kwargs)
        # In place of mamba-ssm's Triton norm, which the constructor builds where it can.
        self.norm: GatedRMSNorm = GatedRMSNorm(
            self.d_inner_local_tp,
            eps=MAMBA_NORM_EPSILON,
            group_size=self.d_inner_local_tp // self.ngroups_local_tp,
            norm_before_gate=False,
            device=self.D.device,
            dtype=self.config.params_dtype,
        )
        self.norm.tp_group = self.pg_collection.tp
        set_tensor_model_parallel_attributes(self.norm.weight, is_parallel=True, dim=0, stride=1)

    def mix(self, zxbcdt: Tensor, documents: Tensor | None) -> Tensor:
        return mamba2_mix(
            zxbcdt,
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias(),
            -torch.exp(self.cp.get_A_log().float()),
            self.cp.get_D(),
            head_dim=self.headdim,
            num_groups=self.cp.ngroups_local_tpcp,
            chunk_size=self.chunk_size,
            seq_idx=documents,
        )


class FusedMambaMixer(DocumentMambaMixer):
    """The mixer on mamba-ssm's fused Triton and causal-conv1d kernels: CUDA."""

    def mix(self, zxbcdt: Tensor, documents: Tensor | None) -> Tensor:
        weights = MixWeights(
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias().float(),
            -torch.exp(self.cp.get_A_log().float()),
            self.cp.get_D(),
        )
        positions, width = zxbcdt.shape[0] * zxbcdt.shape[1], zxbcdt.shape[2]
        inner, groups = self.cp.nheads_local_tpcp * self.headdim, self.cp.ngroups_local_tpcp
        parts = scan_parts(positions, width, inner, self.d_state, groups, self.chunk_size)

        def fused(columns: Tensor, own: MixWeights) -> Tensor:
            mixed: Tensor = mamba_mixer.mamba_split_conv1d_scan_combined(
                columns,
                *own[:4],
                D=own.D,
                chunk_size=self.chunk_size,
                activation=self.activation,
                headdim=self.headdim,
                ngroups=groups // parts,
                norm_before_gate=self.norm_before_gate,
                seq_idx=documents,
            )
            return mixed

        return mix_in_parts(fused, zxbcdt, weights, parts, self.headdim)


def _let_constructor_pass() -> None:
    """Without mamba-ssm, Megatron's constructor refuses to build although none of its kernels is called here."""
    if not mamba_mixer.HAVE_MAMBA_SSM:
        mamba_mixer.HAVE_MAMBA_SSM = True
        mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
