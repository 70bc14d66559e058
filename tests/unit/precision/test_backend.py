"""Which backend is chosen, for machines described by plain values."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform.base import Spec
from nemotron3_megatron.precision.backend import Backend, Machine, choose_backend, probe
from nemotron3_megatron.precision.policy import Format

CPU = Machine(capability=None)
HOPPER = Machine(capability=(9, 0), te_version=(2, 20), unavailable={"nvfp4": "no", "mxfp8": "no"})
B200 = Machine(capability=(10, 0), te_version=(2, 20))
B300 = Machine(capability=(10, 3), te_version=(2, 21))
RTX_50 = Machine(capability=(12, 0), te_version=(2, 20), unavailable={"mxfp8": "no"})
MIXED: tuple[Format, ...] = ("nvfp4", "bf16", "mxfp8", "nvfp4")


@pytest.mark.parametrize(
    ("machine", "spec", "chosen"),
    [
        (CPU, "torch", "emulated"),
        (HOPPER, "torch", "emulated"),
        (HOPPER, "te", "emulated"),
        (B200, "te", "native"),
        (B300, "te", "native"),
        (B200, "torch", "emulated"),
        (RTX_50, "te", "emulated"),
    ],
)
def test_auto_is_native_where_it_exists(machine: Machine, spec: Spec, chosen: Backend) -> None:
    assert choose_backend("auto", MIXED, "bf16", spec, machine) == chosen
    assert choose_backend("auto", ("bf16",), "bf16", spec, machine) == "none"
    assert choose_backend("emulated", MIXED, "bf16", spec, machine) == "emulated"


def test_nothing_to_quantise_needs_no_backend() -> None:
    assert choose_backend("native", ("bf16", "bf16"), "bf16", "torch", CPU) == "none"
    assert choose_backend("emulated", (), "bf16", "te", HOPPER) == "none"


def test_auto_emulates_where_one_of_the_formats_is_missing() -> None:
    lame = Machine(capability=(10, 0), te_version=(2, 20), unavailable={"mxfp8": "cuBLAS is too old"})
    assert choose_backend("auto", ("nvfp4", "bf16"), "bf16", "te", lame) == "native"
    assert choose_backend("auto", MIXED, "bf16", "te", lame) == "emulated"
    with pytest.raises(UserError, match="native mxfp8 here: cuBLAS is too old"):
        choose_backend("native", MIXED, "bf16", "te", lame)


@pytest.mark.parametrize(
    ("machine", "spec", "why"),
    [
        (HOPPER, "te", r"mxfp8 and nvfp4 needs compute capability 10\.0 and 10\.3 \(Blackwell\), this GPU has 9\.0"),
        (CPU, "torch", "here is a CPU"),
        (B200, "torch", "model.spec=torch does not use it"),
        (Machine(capability=(10, 0), te_version=(2, 19)), "te", r"2\.20 or later, here is 2\.19"),
        (Machine(capability=(10, 0)), "te", "here is none"),
    ],
)
def test_impossible_native_names_the_reason_and_emulation(machine: Machine, spec: Spec, why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        choose_backend("native", MIXED, "bf16", spec, machine)
    assert refused.value.nearest == "precision.backend=emulated"


def test_native_kernels_quantise_bf16_only() -> None:
    assert choose_backend("auto", MIXED, "fp32", "te", B200) == "emulated"
    with pytest.raises(UserError, match=r"precision\.dtype=fp32"):
        choose_backend("native", MIXED, "fp32", "te", B200)


@pytest.mark.parametrize("requested", ["auto", "emulated"])
def test_emulation_in_te_needs_its_hybrid_quantisers(requested: str) -> None:
    old = Machine(capability=(9, 0), te_version=(2, 18))
    with pytest.raises(UserError, match=r"2\.19 or later, here is 2\.18") as refused:
        choose_backend(requested, MIXED, "bf16", "te", old)  # type: ignore[arg-type]
    assert refused.value.nearest == "model.spec=torch"
    assert choose_backend("emulated", MIXED, "bf16", "torch", old) == "emulated"


def test_probe_of_this_machine_decides() -> None:
    assert choose_backend("auto", MIXED, "bf16", "torch", probe("torch")) == "emulated"
