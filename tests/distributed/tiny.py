"""A run with every layer kind, LatentMoE and two MTP depths, small enough for milliseconds a step."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nemotron3_megatron.config.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TelemetryConfig,
)
from nemotron3_megatron.config.run import Layout, Run, Schedule, Stage

VOCABULARY = 64
SEQ_LENGTH = 32
GLOBAL_BATCH = 8
MICRO_BATCH = 2
EOD = 0


def tiny_run(
    world_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    dispatcher: Literal["alltoall", "allgather"] = "alltoall",
    dtype: str = "fp32",
    stack: str = "MEM*|ME-*",
    hidden: int = 32,
    latent: int | None = 16,
    mtp_depths: int = 2,
    repeated_mtp: bool = True,
    distributed_optimizer: bool = True,
    overlap: bool = False,
    router_fusion: bool = False,
    recompute: str = "none",
    recompute_modules: tuple[str, ...] = (),
    isolate_documents: bool = True,
    seed: int = 11,
    device: Literal["cpu", "cuda"] = "cpu",
    spec: Literal["torch", "te"] = "torch",
    cuda_graph: Literal["none", "passes"] = "none",
) -> Run:
    """``stack`` carries the pipeline cuts, which are left out when pp = 1."""
    pattern = stack.replace("|", "")
    model = ModelConfig(
        pattern=pattern,
        hidden_size=hidden,
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=48,
        mamba_num_heads=8,
        mamba_head_dim=8,
        mamba_state_dim=8,
        mamba_num_groups=2,
        mamba_chunk_size=8,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=16,
        moe_latent_size=latent,
        # Far above the published 1e-4, so that a wrongly scaled balancing loss shows in the gradients.
        moe_aux_loss_coeff=1e-2,
        mtp_pattern="*E" if mtp_depths else "",
        mtp_depths=mtp_depths,
        mtp_use_repeated_layer=repeated_mtp,
        mtp_loss_scaling_factor=0.3,
        init_method_std=0.1,
        spec=spec,
        moe_router_fusion=router_fusion,
    )
    dp = world_size // (tp * pp * cp)
    stage = Stage(
        name="only",
        first_step=0,
        steps=100,
        first_token=0,
        tokens_per_step=SEQ_LENGTH * GLOBAL_BATCH,
        seq_length=SEQ_LENGTH,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        num_microbatches=GLOBAL_BATCH // MICRO_BATCH // dp,
    )
    return Run(
        name="tiny_test",
        run_dir=Path("unused"),
        seed=seed,
        device=device,
        total_steps=100,
        model=model,
        precision=PrecisionConfig(name=dtype, dtype=dtype),  # type: ignore[arg-type]
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            vpp=vpp,
            cp=cp,
            ep=ep,
            etp=etp,
            moe_token_dispatcher_type=dispatcher,
            cuda_graph=cuda_graph,
            distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distributed_optimizer,
            recompute=recompute,  # type: ignore[arg-type]
            recompute_modules=recompute_modules,
        ),
        layout=Layout(
            world_size=world_size,
            tp=tp,
            pp=pp,
            vpp=vpp,
            cp=cp,
            ep=ep,
            etp=etp,
            dp=dp,
            sequence_parallel=tp > 1,
            hybrid_layer_pattern="/".join([stack if pp > 1 else pattern, *["*E"] * mtp_depths]),
        ),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4),
        schedule=Schedule(
            max_lr=1e-3,
            min_lr=1e-4,
            warmup_tokens=0,
            decay_end_tokens=10**6,
            wsd_decay_tokens=0,
            decay_style="constant",
            wsd_decay_style="linear",
        ),
        stages=(stage,),
        data=DataConfig(sources={}, isolate_documents=isolate_documents, eod_token=EOD),
        checkpoint=CheckpointConfig(),
        telemetry=TelemetryConfig(precision_every=None),
        origins=(),
    )
