"""Process groups of a layout."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemotron3_megatron.config.run import Layout, Run
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.resilience.restart import rendezvous

_SEED_STRIDE = 1_000_003
"""Between the seeds of ranks: a prime, so that runs with neighbouring seeds share none."""


def start_groups(run: Run, platform: Platform, *, timeout_s: float = 1800.0) -> ProcessGroupCollection:
    """Join the world that torchrun set up and build Megatron-Core's groups for the run's layout.

    Args:
        run: gives the layout and the seed of the RNG trackers.
        platform: gives the collective backend.
        timeout_s: after this long without progress a collective fails.
    """
    if not torch.distributed.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        meeting = rendezvous(os.environ, timeout)
        torch.distributed.init_process_group(platform.collective_backend, timeout=timeout, **meeting)
    layout: Layout = run.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(timeout_s // 60),
    )
    model_parallel_cuda_manual_seed(run.seed, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Stochastic rounding draws from the device's default generator: replicas and stages round apart, so that errors
    # average out, and tensor-parallel ranks alike, which hold the same gradients of duplicated weights.
    torch.manual_seed(run.seed + _SEED_STRIDE * (groups.pp.rank() * groups.dp_cp.size() + groups.dp_cp.rank()))
    return groups


def stop_groups() -> None:
    """Undo :func:`start_groups` (tests start several layouts in one process)."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
