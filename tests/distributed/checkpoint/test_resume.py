"""Resuming: bitwise under the layout that saved, and what happens when one of the repairs of Adam is left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from launch import run_ranks

Options = dict[str, Any]
# Overlapped gathering: weights are stale until the save asks for them.
BF16: Options = {"dtype": "bf16", "overlap": True}
RESUMED: dict[str, Options] = {"ep2": {"ep": 2}, "plain_ep2": {"ep": 2, "distributed_optimizer": False}, "bf16": BF16}
PLAIN_BF16: Options = {"dtype": "bf16", "distributed_optimizer": False}
PADDED = {
    "pp": 2,
    "hidden": 33,
}  # a size that leaves padding before the first stage's embedding, which has a gradient bucket of its own


def resume_bitwise(folder: str) -> dict[str, Any]:
    """3 + 3 steps against 6: losses, every bit of weights, moments and master weights, counters, random numbers."""
    from job import digest, job, load_newest, save, steps_of, train

    report: dict[str, Any] = {}
    for name, options in RESUMED.items():
        place = Path(folder) / name
        with job(**options) as trainer:
            first = train(trainer, 0, 3)
            save(trainer, place, 3, note="æ", tokens=2**60)
            draws = _draws()
            losses, bits = first + train(trainer, 3, 6), digest(trainer)
        with job(**options) as trainer:
            state = load_newest(trainer, place)
            report[name] = {
                "state": state,
                "draws": _draws() == draws,
                "steps_loaded": steps_of(trainer),
                "losses": first + train(trainer, 3, 6) == losses,
                "steps": steps_of(trainer)["values"],
                "bits": digest(trainer) == bits,
            }
    return report


def test_resume_is_bitwise(tmp_path: Path) -> None:
    for rank in run_ranks(resume_bitwise, 2, folder=str(tmp_path)):
        for report in rank.values():
            steps = report.pop("steps_loaded")
            assert steps["values"] == [3.0]
            assert steps["places"] == steps["count"] > 1
            assert report == {
                "state": {"step": 3, "note": "æ", "tokens": 2**60},
                "draws": True,
                "losses": True,
                "steps": [6.0],
                "bits": True,
            }


def without_repairs(folder: str) -> dict[str, str]:
    """What becomes of a resume when one repair is missing."""
    from job import job, save, train

    shared: list[Any] = []

    def one_tensor(step: int, *_: Any) -> Any:
        import torch

        if not shared or int(shared[0]) != step:
            shared[:] = [torch.tensor(float(step))]
        return shared[0]

    upstream = _upstream_state()
    left_out: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        # name: (options when saving, options when loading, what replaces parts of adam and content)
        "nothing": ({"ep": 2}, {"ep": 2}, {}),
        "1 allocate_state": ({"ep": 2}, {"ep": 2}, {"adam.allocate_state": lambda _: None}),
        "3 set_step": ({"ep": 2}, {"ep": 2}, {"adam._step_tensor": one_tensor}),
        "4 sharded_state": ({"ep": 2}, {}, upstream),
        "6 correct_places": (BF16, BF16, {"adam.correct_places": lambda _: None}),
        "7 _plain_state": (PLAIN_BF16, PLAIN_BF16, upstream),
        "8 _distributed_state": (PADDED, PADDED, upstream),
    }
    outcomes = {}
    for index, (name, (saving, loading, changes)) in enumerate(left_out.items()):
        place = Path(folder) / str(index)
        with _changed(changes if name.startswith(("4", "6", "7", "8")) else {}):
            try:
                with job(**saving) as trainer:
                    train(trainer, 0, 2)
                    save(trainer, place, 2)
                    expected = train(trainer, 2, 4)
            except Exception as error:
                outcomes[name] = f"save fails: {type(error).__name__}"
                continue
        with _changed(changes):
            outcomes[name] = _outcome(place, loading, expected, same_layout=saving == loading)
    with job(ep=2, distributed_optimizer=False) as trainer:
        train(trainer, 0, 1)
        outcomes["5 prefixes"] = str(_upstream_keys_have_prefix(trainer))
    return outcomes


def test_every_repair_is_needed(tmp_path: Path) -> None:
    for outcomes in run_ranks(without_repairs, 2, folder=str(tmp_path)):
        assert outcomes.pop("nothing") == "same"
        assert outcomes == {
            "1 allocate_state": "load fails: KeyError",
            "3 set_step": "other losses",
            "4 sharded_state": "load fails: KeyError",
            "5 prefixes": "True",
            "6 correct_places": "save fails: RuntimeError",
            "7 _plain_state": "save fails: AssertionError",
            "8 _distributed_state": "other losses",
        }


def _outcome(place: Path, options: dict[str, Any], expected: list[list[float]], *, same_layout: bool) -> str:
    from job import job, load_newest, train

    try:
        with job(**options) as trainer:
            load_newest(trainer, place)
            losses = train(trainer, 2, 4)
    except Exception as error:
        return f"load fails: {type(error).__name__}"
    if same_layout:
        return "same" if losses == expected else "other losses"
    return "same" if losses == [pytest.approx(step, rel=1e-5) for step in expected] else "other losses"


def _upstream_state() -> dict[str, Callable[..., Any]]:
    """Megatron-Core's own way to store and load an optimizer (with repair 2, or nothing could be loaded)."""
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from nemotron3_megatron.checkpoint import adam, content

    held: list[Any] = []

    def sharded_state(optimizer: Any, model: Any) -> Any:
        held[:] = [optimizer]
        metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
        if isinstance(adam.parts(optimizer)[0], DistributedOptimizer):
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        return optimizer.sharded_state_dict(model, False, metadata=metadata)

    def load(directory: Path, template: Any, chunks: list[Any], *, with_rng: bool) -> None:
        import torch

        loaded = dist_checkpointing.load(template, str(directory))
        for index, chunk in enumerate(chunks):
            content.unwrapped(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        for part in adam.parts(held[0]):
            for state in part.optimizer.state.values():
                state.pop("step", None)
            if isinstance(part, DistributedOptimizer):
                part._set_main_param_and_optimizer_states = partial(_without_step, part)
        with torch.no_grad():
            held[0].load_state_dict(loaded["optimizer"])

    return {"adam.sharded_state": sharded_state, "content.load": load}


def _without_step(optimizer: Any, parameter: Any, tensors: dict[str, Any]) -> None:
    type(optimizer)._set_main_param_and_optimizer_states(optimizer, parameter, {"step": None, **tensors})


def _upstream_keys_have_prefix(trainer: Any) -> bool:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from nemotron3_megatron.checkpoint import content

    model = content.sharded(trainer.model, None)
    state = trainer.optimizer.sharded_state_dict(model, metadata={"distrib_optim_sharding_type": ""})
    return any(getattr(item, "key", "").startswith("chained_1.") for item in nested_values(state))


@contextmanager
def _changed(changes: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, replacement in changes.items():
            stack.enter_context(mock.patch(f"nemotron3_megatron.checkpoint.{name}", replacement))
        yield


def _draws() -> list[float]:
    """The next number of every generator."""
    import numpy as np
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracked = []
    for name in sorted(get_cuda_rng_tracker().get_states()):
        with get_cuda_rng_tracker().fork(name):
            tracked.append(torch.rand(()).item())
    return [random.random(), float(np.random.rand()), torch.rand(()).item(), *tracked]
