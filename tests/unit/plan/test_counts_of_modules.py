"""Parameter counts of whole models against the modules that Megatron-Core builds of them, on the meta device.

Nothing here comes from the arithmetic under test: elements of the real tensors are added up. A world of one holds every
parameter of the model (Ultra's 560.5 billion, too); meta tensors have shapes and no storage.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.model.specs.torch import torch_stack_spec
from nemotron3_megatron.model.transformer_config import transformer_config
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.platform import select

MODELS = ["nano", "lightning", "super", "ultra", "standard_moe_8b", "proxy_latent_moe", "tiny"]


def alone(model: str) -> Run:
    """The model under the recipe of Nano on one rank."""
    recipe, origins = compose(["recipe=nano_bf16", f"model={model}", "parallel=single", "device=cpu"])
    return resolve(recipe, 1, origins)


def built(run: Run) -> Nemotron3Model:
    """The whole model on the meta device."""
    platform = select("cpu")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        groups = start_groups(run, platform)
        with torch.device("meta"):
            return Nemotron3Model(
                config=transformer_config(run, platform.megatron_flags("torch")),
                hybrid_stack_spec=torch_stack_spec(run.model.mamba_chunk_size),
                vocab_size=run.model.vocab_size,
                max_sequence_length=run.stages[0].seq_length,
                hybrid_layer_pattern=run.layout.hybrid_layer_pattern,
                share_embeddings_and_output_weights=False,
                position_embedding_type="none",
                pg_collection=groups,
            )
    finally:
        stop_groups()


def saved(module: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Name and elements of what a checkpoint of the family holds: parameters, and the experts' biases."""
    for name, parameter in module.named_parameters():
        assert parameter.is_meta, f"{name} has storage"
        yield name, parameter.numel()
    for name, buffer in module.named_buffers():
        if name.endswith("expert_bias"):
            yield name, buffer.numel()


@pytest.mark.parametrize("name", MODELS)
def test_plan_counts_what_megatron_builds(name: str) -> None:
    run = alone(name)
    model, counts = built(run), count_parameters(run.model)
    elements = list(saved(model))
    mtp = sum(count for name, count in elements if name.startswith("mtp."))
    main = [(name, count) for name, count in elements if not name.startswith("mtp.")]
    assert (sum(count for _, count in main), mtp) == (counts.total, counts.mtp)
    layers = [sum(count for _, count in saved(layer)) for layer in model.decoder.layers]
    assert layers == [layer.parameters for layer in counts.layers]
    # Of its routed experts a token passes topk; everything else it passes whole.
    experts = sum(count for name, count in main if ".mlp.experts." in name)
    passed = experts * run.model.moe_router_topk // run.model.num_moe_experts
    assert counts.total - experts + passed == counts.active
