"""The short way to the tensors of a known plan leads to those of Megatron-Core's way."""

from __future__ import annotations

from typing import Any

from launch import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "overlap": {"dtype": "bf16", "overlap": True},
    "plain": {"distributed_optimizer": False},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
}


def short_and_long_way() -> dict[str, dict[str, Any]]:
    """For each layout: whether a known plan takes the short way, and what then differs from a new plan's data."""
    import torch
    from job import job, train

    from nemotron3_megatron.checkpoint import content
    from nemotron3_megatron.checkpoint.planning import Planner

    report = {}
    for name, options in LAYOUTS.items():
        with job(**options) as trainer:
            train(trainer, 0, 1)
            replicas, planner = trainer.groups.dp_cp, Planner()

            def state(trainer: Any = trainer) -> dict[str, Any]:
                return content.to_save(trainer.chunks, trainer.optimizer)

            first = planner.shards(state(), replicas)
            train(trainer, 1, 2)
            second, anew = planner.shards(state(), replicas), Planner().shards(state(), replicas)
            assert planner._agreed is not None
            tensors = [value for value in second.data if isinstance(value, torch.Tensor)]
            report[name] = {
                "direct": planner._agreed.is_direct,
                "tensors": len(tensors) > 20,
                "same plan": second.plan is first.plan and second.plan.items == anew.plan.items,
                "differ": [
                    item.index.fqn
                    for item, a, b in zip(second.plan.items, second.data, anew.data, strict=True)
                    if (a.getvalue() != b.getvalue() if not isinstance(a, torch.Tensor) else _place(a) != _place(b))
                ],
            }
    return report


def test_known_plans_find_the_live_tensors() -> None:
    for rank in run_ranks(short_and_long_way, 2):
        for name, found in rank.items():
            assert found == {"direct": True, "tensors": True, "same plan": True, "differ": []}, name


def _place(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
