"""The Mamba and attention rules against the code they restate: Megatron-Core itself accepts exactly the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

import nemotron3_megatron  # noqa: F401  (makes Megatron importable without CUDA)
from nemotron3_megatron.config import compose
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import mamba, tensor_parallel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of TransformerConfig

TINY = compose(["recipe=tiny"])[0]
COUNTS = [1, 2, 3, 4, 6, 8, 12, 16]


@dataclass(frozen=True)
class Ranks:
    """What ``MambaContextParallel`` asks of its process group."""

    count: int

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return 0


def with_sizes(heads: int, groups: int, tp: int, cp: int) -> Recipe:
    model = replace(TINY.model, mamba_num_heads=heads, mamba_num_groups=groups)
    return replace(TINY, model=model, parallel=replace(TINY.parallel, tp=tp, cp=cp, ep=1))


@pytest.mark.parametrize("cp", COUNTS)
@pytest.mark.parametrize("groups", COUNTS)
def test_mamba_context_parallel_accepts_the_same(groups: int, cp: int) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("megatron.core.ssm.mamba_context_parallel")
    for heads in COUNTS:
        for tp in COUNTS:
            if heads % tp or groups % tp or heads % groups:  # asserted by MambaMixer before
                continue
            empty = torch.empty(0)
            try:
                module.MambaContextParallel(
                    Ranks(cp), heads // tp, heads // tp, groups // tp, 1, empty, empty, 0, empty, empty, empty, False
                )
                accepted = True
            except AssertionError:
                accepted = False
            ours = not list(mamba(with_sizes(heads, groups, tp, cp), tp * cp))
            assert ours == accepted, (heads, groups, tp, cp)


@pytest.mark.parametrize("tp", COUNTS)
def test_transformer_config_accepts_the_same_heads(tp: int) -> None:
    config = pytest.importorskip("megatron.core.transformer.transformer_config")
    for heads in COUNTS:
        for groups in (count for count in COUNTS if heads % count == 0):
            try:
                config.TransformerConfig(
                    num_layers=1,
                    hidden_size=128,
                    num_attention_heads=heads,
                    num_query_groups=groups,
                    kv_channels=16,
                    tensor_model_parallel_size=tp,
                )
                accepted = True
            except ValueError:
                accepted = False
            model = replace(TINY.model, num_attention_heads=heads, num_query_groups=groups, vocab_size=tp * 64)
            model = replace(model, moe_shared_expert_intermediate_size=tp * 64)
            recipe = replace(TINY, model=model, parallel=replace(TINY.parallel, tp=tp, ep=1))
            assert (not list(tensor_parallel(recipe, tp))) == accepted, (heads, groups, tp)


def test_recomputable_modules_are_megatron_s() -> None:
    config = pytest.importorskip("megatron.core.transformer.transformer_config")
    from nemotron3_megatron.config.rules import RECOMPUTABLE

    for module in RECOMPUTABLE:
        config.TransformerConfig(
            num_layers=1,
            hidden_size=128,
            num_attention_heads=4,
            recompute_granularity="selective",
            recompute_modules=[module],
            moe_grouped_gemm=module == "moe_act",
            num_moe_experts=4,
        )
