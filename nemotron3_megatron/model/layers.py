"""Pure-torch layers with the parameter names of their Transformer Engine counterparts.

Shapes: S sequence (local shard), B batch, H hidden, T tokens (S * B flattened), E local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor, nn

Gemm = Callable[[Tensor, Tensor], Tensor]
"""x (..., in) and weight (out, in) -> (..., out)."""

GroupedGemm = Callable[[Tensor, Sequence[Tensor], Sequence[int]], Tensor]
"""x (T, in), rows sorted by expert, the experts' weights (out, in) and token counts -> (T, out)."""


def empty_parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """An uninitialised parameter of the model's dtype; weights are set by name after the model is built."""
    device = torch.get_default_device() if config.use_cpu_initialization else torch.cuda.current_device()
    return nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=device))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with statistics in float32 (float64 stays), result in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Counterpart of ``TENorm`` for RMSNorm; x (S, B, H) -> like x."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(config, hidden_size)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ColumnParallelLinear(megatron_layers.ColumnParallelLinear):  # type: ignore[misc]
    """Megatron-Core's, whose product may be another: ``gemm`` sees all tokens and this rank's rows of the weight."""

    gemm: Gemm | None = None
    """None: Megatron-Core's own, which overlaps communication."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.gemm is None:
            plain: Tensor = super()._forward_impl(input, weight, **options)
            return plain
        if options["sequence_parallel"]:
            tokens = gather_from_sequence_parallel_region(input, group=options["tp_group"])
        elif options["allreduce_dgrad"]:
            tokens = copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        else:
            tokens = input
        return self.gemm(tokens, weight)


class RowParallelLinear(megatron_layers.RowParallelLinear):  # type: ignore[misc]
    """Megatron-Core's, whose product may be another: ``gemm`` sees this rank's columns of tokens and weight."""

    gemm: Gemm | None = None
    """None: Megatron-Core's own."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.gemm is None:
            plain: Tensor = super()._forward_impl(input, weight, **options)
            return plain
        return self.gemm(input, weight)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """Counterpart of ``TELayerNormColumnParallelLinear``: RMSNorm, then a column-parallel GEMM.

    Its parameters are ``layer_norm_weight`` (H,) and ``weight`` (out / tp, H).
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = empty_parameter(config, input_size)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x (S, B, H) -> ((S * sp, B, out / tp), None)."""
        normed = rms_norm(x, self.layer_norm_weight, self.eps)
        result: tuple[Tensor, Tensor | None] = super().forward(normed, *args, **kwargs)
        return result


class DuplicatedLinear(nn.Module):
    """Counterpart of ``TELinear(parallel_mode="duplicated")``: the latent projections, whole on every TP rank."""

    gemm: Gemm = staticmethod(F.linear)

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        bias: bool,
        **unused: object,
    ) -> None:
        if parallel_mode != "duplicated" or bias:
            raise ValueError(f"only bias-free duplicated linears exist here, not {parallel_mode=}, {bias=}")
        super().__init__()
        self.weight = empty_parameter(config, output_size, input_size)
        # Under sequence parallelism each TP rank sees part of the tokens: its gradient must be summed.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight.allreduce = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x (S, B, in) -> ((S, B, out), None)."""
        return self.gemm(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The whole weight, replicated over TP."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""


def grouped_linear(x: Tensor, weights: Sequence[Tensor], tokens_per_expert: Sequence[int]) -> Tensor:
    """x (T, in), rows sorted by expert, and an (out, in) weight for each -> (T, out)."""
    blocks = x.split(list(tokens_per_expert))
    return torch.cat([F.linear(rows, weight) for rows, weight in zip(blocks, weights, strict=True)])


class GroupedLinear(nn.Module):
    """Counterpart of ``TEGroupedLinear``: one bias-free GEMM for each local expert.

    Parameters are ``weight0 .. weight{E-1}``, each (out, in) with the column- or row-parallel dimension
    divided by the expert tensor parallel size.
    """

    gemm: GroupedGemm = staticmethod(grouped_linear)
    tp_axis: int
    """Weight dimension that expert tensor parallelism divides: 0 (column) or 1 (row)."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Tensor],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        pg_collection: ProcessGroupCollection,
        **unused: object,
    ) -> None:
        if bias or not is_expert:
            raise ValueError("grouped linears are bias-free expert layers")
        super().__init__()
        self.num_gemms = num_gemms
        self.groups = pg_collection
        shape = [output_size, input_size]
        shape[self.tp_axis] = divide(shape[self.tp_axis], pg_collection.expt_tp.size())
        separate_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for i in range(num_gemms):
            weight = empty_parameter(config, *shape)
            weight.allreduce = not separate_groups  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = self.tp_axis  # type: ignore[attr-defined]
            weight.partition_stride = 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{i}", weight)

    def weights(self) -> list[Tensor]:
        """The local experts' weights in order."""
        return [self.get_parameter(f"weight{i}") for i in range(self.num_gemms)]

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """x (T, in), rows sorted by expert -> ((T, out), None)."""
        return self.gemm(x, self.weights(), tokens_per_expert), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """One tensor ``weight`` with a leading axis of all global experts, as Megatron's expert layers save."""
        sharded: ShardedStateDict = {}
        num_experts = self.groups.ep.size() * self.num_gemms
        first_expert = self.groups.ep.rank() * self.num_gemms
        for i, weight in enumerate(self.weights()):
            entry = make_sharded_tensors_for_checkpoint(
                {f"{i}.weight": weight},
                "",
                {f"{i}.weight": self.tp_axis},
                (*sharded_offsets, (len(sharded_offsets), first_expert + i, num_experts)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
            replace_prefix_for_sharding(entry, f"{i}.", prefix)
            tensor = entry[f"{i}.weight"]
            tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
            sharded[f"{prefix}weight{i}"] = tensor
        return sharded

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""


class ColumnParallelGroupedLinear(GroupedLinear):
    """Experts' first GEMM: the output dimension is divided."""

    tp_axis = 0


class RowParallelGroupedLinear(GroupedLinear):
    """Experts' second GEMM: the input dimension is divided (the dispatcher sums the partial outputs)."""

    tp_axis = 1
