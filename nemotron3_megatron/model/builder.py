"""Run -> model chunks of this rank, with weights that depend on nothing but the seed."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.experts import gathers_tokens, keeps_counts_on_device
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.model.initialize import initialize
from nemotron3_megatron.model.transformer_config import transformer_config
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.platform.base import Spec, cores_per_rank
from nemotron3_megatron.precision.backend import Backend
from nemotron3_megatron.precision.lowering.recipes import model_fields

FLOAT32_PARAMETERS = ("mixer.A_log", "mixer.D", "mixer.dt_bias", "router.weight")
"""Kept in FP32 in a BF16 model: Mamba-2's recurrence is exponential in them, and routing decides on small gaps."""


def build_model(
    run: Run, platform: Platform, groups: ProcessGroupCollection, backend: Backend = "none"
) -> list[Nemotron3Model]:
    """Build and initialise this rank's model, one module for each virtual pipeline chunk.

    Args:
        run: architecture, layout, precision and seed.
        platform: device and kernels.
        groups: process groups of the layout (``parallel.start_groups``).
        backend: that the precision plan will be installed with (``precision.install``); none: it will not be.
    """
    implementation = chosen_spec(run.model, platform)
    check_supported(run, platform, implementation)
    flags = platform.megatron_flags(implementation)
    if implementation == "te" and backend != "none":
        flags |= model_fields(run.precision_plan, backend)
    config = transformer_config(run, flags)
    spec = stack_spec(run, implementation, backend)
    chunks = []
    for vp_stage in range(run.layout.vpp):
        stage = vp_stage if run.layout.vpp > 1 else None
        chunk = Nemotron3Model(
            config=config,
            hybrid_stack_spec=spec,
            vocab_size=run.model.vocab_size,
            max_sequence_length=run.longest,
            hybrid_layer_pattern=run.layout.hybrid_layer_pattern,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            pg_collection=groups,
            vp_stage=stage,
        )
        _let_repeated_layers_add_up(chunk)
        for module in chunk.modules():
            if hasattr(module, "list_weights_backwards"):
                module.list_weights_backwards()
        _keep_float32(chunk)
        chunk.to(platform.device)
        _initialize(chunk, run, groups)
        chunks.append(chunk)
    return chunks


def chosen_spec(model: ModelConfig, platform: Platform) -> Spec:
    """The module implementation that ``model.spec`` means on this platform."""
    return platform.default_spec if model.spec == "auto" else model.spec


def check_supported(run: Run, platform: Platform, implementation: Spec) -> None:
    """Refuse what this device or module spec cannot do.

    Raises:
        UserError: an option of the run is impossible here.
    """
    if platform.name == "cpu" and run.parallel.moe_token_dispatcher_type == "flex":
        raise UserError(
            "parallel.moe_token_dispatcher_type=flex",
            why="its kernels (DeepEP, HybridEP) run on CUDA only",
            nearest="parallel.moe_token_dispatcher_type=alltoall",
        )
    if (
        implementation == "te"
        and run.layout.cp > 1
        and run.precision.dtype == "fp32"
        and not run.data.isolate_documents
    ):
        raise UserError(
            f"parallel.cp={run.layout.cp} with precision.dtype=fp32 and data.isolate_documents=false",
            why="Transformer Engine splits attention over ranks in BF16 only",
            nearest="precision.dtype=bf16 or model.spec=torch",
        )
    if implementation == "torch" and run.model.moe_router_fusion:
        raise UserError(
            "model.moe_router_fusion=true",
            why="the kernels are Transformer Engine's, which the torch spec does without",
            nearest="model.moe_router_fusion=false",
        )
    wanted = [module for module in run.parallel.recompute_modules if module in ("moe_act", "layernorm")]
    if implementation == "torch" and wanted:
        raise UserError(
            f"parallel.recompute_modules=[{', '.join(wanted)}]",
            why="Megatron-Core recomputes them by Transformer Engine, which the torch spec does without",
            nearest="parallel.recompute_modules=[moe]",
        )


def stack_spec(run: Run, implementation: Spec, backend: Backend) -> ModuleSpec:
    """The hybrid stack in the given implementation (imported on demand: ``te`` needs its packages)."""
    model, gathers = run.model, gathers_tokens(run)
    if implementation == "te":
        from nemotron3_megatron.model.specs.te import te_stack_spec

        device_counts = keeps_counts_on_device(run, native=backend == "native")
        experts = model.num_moe_experts
        return te_stack_spec(model.mamba_chunk_size, experts, device_counts=device_counts, gathers=gathers)
    from nemotron3_megatron.model.specs.torch import torch_stack_spec

    return torch_stack_spec(model.mamba_chunk_size, gathers=gathers)


def model_sharded_state(chunk: Nemotron3Model, groups: ProcessGroupCollection) -> ShardedStateDict:
    """The chunk's tensors with their global names and offsets: the basis of checkpoints and initialisation."""
    return chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp, "singleton_local_shards": False})


def _let_repeated_layers_add_up(chunk: Nemotron3Model) -> None:
    """Transformer Engine's linears write the first micro-batch's gradient over ``main_grad`` and add later ones.

    In an MTP block that all depths share, the first depth's backward pass comes last and would wipe out the others'.
    Without weights kept between micro-batches they always add.
    """
    if chunk.config.mtp_use_repeated_layer and hasattr(chunk, "mtp"):
        for module in chunk.mtp.modules():
            if hasattr(module, "disable_parameter_transpose_cache"):
                module.disable_parameter_transpose_cache = True


def _keep_float32(chunk: nn.Module) -> None:
    for name, parameter in chunk.named_parameters():
        if name.endswith(FLOAT32_PARAMETERS):
            parameter.data = parameter.data.float()


def _initialize(chunk: Nemotron3Model, run: Run, groups: ProcessGroupCollection) -> None:
    written = initialize(model_sharded_state(chunk, groups), run.model, run.seed, cores_per_rank())
    expected = sum(t.numel() for t in (*chunk.parameters(), *_saved_buffers(chunk)))
    if written != expected:
        raise RuntimeError(f"initialised {written} of {expected} elements: a parameter has no global name")


def _saved_buffers(chunk: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
