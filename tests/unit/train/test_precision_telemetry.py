"""Which steps are observed, and that their records reach ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.platform import select
from nemotron3_megatron.precision.observe import Observer
from nemotron3_megatron.precision.operands import gemms
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Nvfp4
from nemotron3_megatron.telemetry.jsonlines import JsonLines, read_steps
from nemotron3_megatron.train.callbacks.base import StepEvent
from nemotron3_megatron.train.callbacks.precision import PrecisionTelemetry
from nemotron3_megatron.train.callbacks.recording import Recording
from nemotron3_megatron.train.optimizer import Update
from nemotron3_megatron.train.step import StepResult

NAME = "mtp.layers.0.eh_proj"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


@pytest.fixture(autouse=True)
def _world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("every", "sampled"), [(3, [1, 3, 6]), (1, [1, 2, 3, 4, 5, 6, 7]), (100, [1])])
def test_sampled_steps_hold_what_was_observed(every: int, sampled: list[int], tmp_path: Path) -> None:
    recipe, origins = compose(["recipe=tiny", "max_steps=9"])
    run = resolve(recipe, 2, origins)
    row = PlanRow(
        module=NAME,
        layer=None,
        block="mtp",
        role="mtp.eh_proj",
        format="mxfp8",
        rule="default",
        gemms=gemms("mxfp8", Nvfp4()),
    )
    module = Linear()
    telemetry = PrecisionTelemetry(
        lambda step: step % every == 0, Observer(PrecisionPlan((row,)), {NAME: module}, torch.device("cpu"))
    )
    writer = JsonLines(tmp_path, None)
    callbacks = [telemetry, Recording(run, select("cpu"), [writer], operands=telemetry.records)]
    for step in range(1, 8):
        for callback in callbacks:
            callback.before_step(step)
        module(torch.full((32, 32), float(step)))[0].sum().backward()
        event = StepEvent(
            step=step,
            tokens=step,
            stage=run.stages[0],
            lr=1e-3,
            result=StepResult((1.0,), Update(True, 1.0)),
            step_time_s=1.0,
            last=False,
        )
        for callback in callbacks:
            callback.step_done(event)
    writer.close()
    records = read_steps(tmp_path)
    assert [record.step for record in records if record.precision] == sampled
    for record in records:
        for operand in record.precision:
            assert (operand.module, operand.layer, operand.role, operand.format) == (NAME, None, "mtp.eh_proj", "mxfp8")
        inputs = [operand for operand in record.precision if operand.tensor == "input"]
        assert [operand.direction for operand in inputs] == ["rows", "columns"] * bool(record.precision)
        # Powers of two cover 448 times their scale; an input of n's scale is the least 2^e with 448 * 2^e >= n.
        assert all(operand.amax == record.step for operand in inputs)
        assert all(448 * 2**operand.scale_max >= record.step > 224 * 2**operand.scale_max for operand in inputs)
