"""Grouped RMSNorm with a SiLU gate: Mamba-2's norm before its output projection, in pure torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, gated by silu(z) before or after; stands in for mamba-ssm's ``RMSNorm``.

    Groups make the norm independent of tensor parallelism: a rank that holds whole groups needs no other rank.
    """

    bias: None
    tp_group: torch.distributed.ProcessGroup | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``group_size`` None is one group; ``norm_before_gate`` False norms x * silu(z), as Nemotron does.

        Raises:
            ValueError: ``hidden_size`` is not a multiple of ``group_size``.
        """
        super().__init__()
        self.group_size = hidden_size if group_size is None else group_size
        if hidden_size % self.group_size:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of group_size {self.group_size}")
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.tp_group = None

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z (..., hidden_size) -> like x, computed in float32 (float64 when x is float64)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = x.to(dtype)
        gate = None if z is None else F.silu(z.to(dtype))
        if gate is not None and not self.norm_before_gate:
            out = out * gate
        grouped = torch.unflatten(out, -1, (-1, self.group_size))
        out = F.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2) * self.weight.to(dtype)
        if gate is not None and self.norm_before_gate:
            out = out * gate
        return out.to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's distributed-checkpoint view: the weight is split over tensor-parallel ranks along axis 0.

        ``metadata["dp_cp_group"]`` names the ranks that hold replicas (default: Megatron's global groups).
        """
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group or parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state
