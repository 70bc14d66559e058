"""Which tensors hooks look at, on small linears with the interface of Megatron-Core's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron3_megatron.model.layers import rms_norm
from nemotron3_megatron.precision.observe import Observer, reads
from nemotron3_megatron.precision.operands import Operand, gemms
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Format, Nvfp4
from nemotron3_megatron.precision.statistics import Along, Summary, operand_statistics, summary

PLAIN = Nvfp4(stochastic_rounding=None, hadamard=None)
CPU = torch.device("cpu")


class Linear(nn.Module):
    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))
        if norm:
            self.layer_norm_weight = nn.Parameter(torch.rand(32) * 8)
            self.eps = 1e-5

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        normed = rms_norm(x, self.layer_norm_weight, self.eps) if hasattr(self, "eps") else x
        return F.linear(normed, self.weight), None


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_gemms = count
        for i in range(count):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(64, 32) * 4.0**i))

    def forward(self, x: Tensor, counts: list[int] | Tensor) -> tuple[Tensor, None]:
        sizes = counts.tolist() if isinstance(counts, Tensor) else counts
        parts = zip(x.split(sizes), self.parameters(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts]), None


class LocalExperts(Experts):
    """Told where each expert's tokens end."""

    takes_ends = True

    def forward(self, x: Tensor, ends: list[int] | Tensor) -> tuple[Tensor, None]:
        assert isinstance(ends, Tensor)
        return super().forward(x, ends.diff(prepend=ends.new_zeros(1)))


@pytest.fixture(autouse=True)
def _world_of_one() -> Iterator[None]:
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plan(number_format: Format = "nvfp4", options: Nvfp4 = PLAIN) -> PrecisionPlan:
    row = PlanRow(
        module="m",
        layer=0,
        block="decoder",
        role="mamba.in_proj",
        format=number_format,
        rule="default",
        gemms=gemms(number_format, options),
    )
    return PrecisionPlan((row,))


def collected(observer: Observer) -> dict[tuple[str, Along], Summary]:
    return {(reading.operand.tensor, reading.along): found for reading, found in observer.collect()}


def expected(parts: list[Tensor], along: Along = "rows", *, square: bool = False) -> Summary:
    operand = Operand(tensor="input", format="nvfp4", block=(16, 16) if square else (1, 16))
    found = operand_statistics(parts, operand, along)
    return summary(found.sums.tolist(), found.maxima.tolist())


@pytest.mark.parametrize("norm", [False, True])
def test_input_weight_and_gradient(norm: bool) -> None:
    module = Linear(norm=norm)
    observer = Observer(plan(), {"m": module}, CPU)
    observer.arm(1)
    x, dy = torch.randn(16, 2, 32, requires_grad=True), torch.randn(16, 2, 64)
    module(x)[0].backward(dy)
    found = collected(observer)
    read = rms_norm(x, module.layer_norm_weight, 1e-5) if norm else x
    for along in ("rows", "columns"):
        assert found["input", along] == expected([read.detach().view(32, 32)], along)
        assert found["gradient", along] == expected([dy.view(32, 64)], along)
    assert found["weight", "rows"] == expected([module.weight], square=True)
    assert len(found) == 5


def test_experts_have_an_amax_each() -> None:
    x, dy = torch.randn(48, 32), torch.randn(48, 64)
    calls: list[tuple[Experts, list[int] | Tensor]] = [
        (Experts(3), [16, 0, 32]),
        (Experts(3), torch.tensor([16, 0, 32])),
        (LocalExperts(3), torch.tensor([16, 16, 48], dtype=torch.int32)),
    ]
    for module, counts in calls:
        observer = Observer(plan(), {"m": module}, CPU)
        observer.arm(1)
        module(x, counts)[0].backward(dy)
        found = collected(observer)
        assert found["input", "columns"] == expected([x[:16], x[16:]], "columns")
        assert found["gradient", "rows"] == expected([dy[:16], dy[16:]])
        assert found["weight", "rows"] == expected(list(module.parameters()), square=True)
        assert found["input", "rows"] != expected([x])


def test_forward_passes_without_gradient_or_beyond_the_limit_are_not_observed() -> None:
    module = Linear()
    observer = Observer(plan(), {"m": module}, CPU, calls=2)
    observer.arm(1)
    first, second, rest = torch.randn(32, 32), torch.randn(32, 32), torch.randn(32, 32) * 1e3
    with torch.no_grad():
        module(rest)
    for x in (first, second, rest):
        module(x)[0].sum().backward()
    found = collected(observer)["input", "rows"]
    assert found.amax == max(first.abs().max(), second.abs().max())
    apart = [operand_statistics([x], reads(plan().rows[0].gemms)[0][0], "rows") for x in (first, second)]
    assert found.flush_to_zero == (apart[0].sums[1] + apart[1].sums[1]) / (apart[0].sums[0] + apart[1].sums[0])


def test_nothing_stays_behind() -> None:
    module = Linear()
    observer = Observer(plan(), {"m": module}, CPU)
    observer.arm(1)
    module(torch.ones(32, 32))[0].sum().backward()
    assert collected(observer)
    assert not module._forward_hooks
    module(torch.ones(32, 32))[0].sum().backward()
    assert observer.collect() == []


def test_a_step_is_observed_alike_each_time_and_draws_its_own_numbers() -> None:
    module = Linear()
    observer = Observer(plan(options=Nvfp4()), {"m": module}, CPU)
    x, state, found = torch.randn(32, 32), torch.get_rng_state(), []
    for step in (5, 5, 6):
        observer.arm(step)
        (module(x)[0] ** 2).sum().backward()
        found.append(collected(observer)["gradient", "rows"])
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_of_zeros_and_modules_elsewhere_have_no_summary() -> None:
    module = Linear()
    observer = Observer(plan(), {"m": module}, CPU)
    observer.arm(1)
    (module(torch.randn(32, 32))[0] * 0).sum().backward()
    assert {tensor for tensor, _ in collected(observer)} == {"input", "weight"}
    elsewhere = Observer(plan(), {}, CPU)
    elsewhere.arm(1)
    assert elsewhere.collect() == []


@pytest.mark.parametrize(
    ("number_format", "options", "square"),
    [("nvfp4", Nvfp4(), True), ("nvfp4", Nvfp4(weight_block=(1, 16)), False), ("mxfp8", Nvfp4(), False)],
)
def test_weights_are_read_twice_where_their_blocks_are_not_square(
    number_format: Format, options: Nvfp4, square: bool
) -> None:
    ways = [(operand.tensor, along) for operand, along in reads(gemms(number_format, options))]
    assert len(ways) == len(set(ways)) == (5 if square else 6)
    assert (("weight", "columns") in ways) is not square


def test_unquantised_modules_are_left_alone() -> None:
    module = Linear()
    observer = Observer(plan("bf16"), {"m": module}, CPU)
    observer.arm(1)
    assert not module._forward_hooks
    assert observer.collect() == []
