"""The peer: a plain Megatron-Core loop with stock settings.

What Megatron-LM's ``pretrain_hybrid.py`` does with its example flags, without its argument parser: the Transformer
Engine stack spec, ``Float16Module``, DDP with FP32 gradients, the distributed optimizer, the pipeline schedule without
pipeline, alltoall dispatch, permute fusion, fused squared ReLU, native fused cross entropy; no CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.model.transformer_config import transformer_config
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.platform.cpu import unfused_flags

STOCK: dict[str, object] = {
    **unfused_flags(),
    "use_cpu_initialization": False,
    "perform_initialization": True,
    "transformer_impl": "transformer_engine",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "use_fused_weighted_squared_relu": True,
    "cross_entropy_loss_fusion": True,
}


class Peer:
    """Model, optimizer and step; after ``slices.open_gpu``."""

    def __init__(self, run: Run, balanced: bool) -> None:
        """Build for ``run``'s architecture, batch and optimizer settings; ``balanced`` routing ignores the router."""
        self._run = run
        start_groups(run, _platform())
        config = transformer_config(run, STOCK | {"moe_router_force_load_balancing": balanced})
        model = HybridModel(
            config=config,
            hybrid_stack_spec=hybrid_stack_spec,
            vocab_size=run.model.vocab_size,
            max_sequence_length=run.stages[0].seq_length,
            hybrid_layer_pattern=run.layout.hybrid_layer_pattern,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
        ).cuda()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self._model = DistributedDataParallel(config, ddp, Float16Module(config, model))
        options = run.optimizer
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-4,
                weight_decay=options.weight_decay,
                adam_beta1=options.adam_beta1,
                adam_beta2=options.adam_beta2,
                clip_grad=options.clip_grad,
                bf16=True,
                params_dtype=torch.bfloat16,
                use_distributed_optimizer=True,
            ),
            [self._model],
            use_gloo_process_groups=False,
        )
        config.grad_scale_func = self._optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    def step(self, batches: list[MicroBatch]) -> Tensor:
        """One optimizer step; returns the mean loss, which nobody has waited for."""
        stage = self._run.stages[0]
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        reports: list[Any] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([batch.to(torch.device("cuda")) for batch in batches]),
            model=self._model,
            num_microbatches=len(batches),
            seq_length=stage.seq_length,
            micro_batch_size=stage.micro_batch_size,
            forward_only=False,
        )
        self._optimizer.step()
        return torch.stack(reports).mean()


def _forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator)
    losses = model(batch.tokens, batch.position_ids, None, labels=batch.labels[0])
    return losses, partial(_loss, mask=batch.loss_mask[0])


def _loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = (losses.float() * mask).sum()
    return total, mask.sum().to(torch.int32), (total / mask.sum()).detach()


def _platform() -> Any:
    from nemotron3_megatron.platform import select

    return select("cuda")
