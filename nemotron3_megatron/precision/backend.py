"""Which backend carries out a precision plan on the machine at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform.base import Spec
from nemotron3_megatron.precision.policy import Format

Backend = Literal["none", "native", "emulated"]
"""none: the plan quantises nothing; native: quantised operands go into quantised GEMMs; emulated: operands are
quantised and dequantised around ordinary GEMMs."""

NATIVE_CAPABILITIES = ((10, 0), (10, 3))
"""B200 and B300, with which TE 2.20 tests NVFP4 training. Its stochastic rounding instruction needs sm_100a or sm_103a
(``common/util/ptx.cuh``), and its kernel that fuses rotation and cast an sm of 100 to 110 (``csrc/quantizer.cpp``)."""

NATIVE_TE = (2, 20)
"""Read and tested against: earlier versions name the recipes' options differently."""

EMULATION_TE = (2, 19)
"""The first with ``IdentityQuantizer`` and ``HybridQuantizer``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the choice depends on."""

    capability: tuple[int, int] | None
    """Compute capability of this rank's GPU; None: CPU."""
    te_version: tuple[int, int] | None = None
    """Transformer Engine's; None: not installed."""
    unavailable: Mapping[Format, str] = field(default_factory=dict)
    """Formats whose native kernels Transformer Engine says it cannot run here, and why."""


def choose_backend(
    requested: Literal["auto", "native", "emulated"],
    formats: Iterable[Format],
    dtype: Literal["bf16", "fp32"],
    spec: Spec,
    machine: Machine,
) -> Backend:
    """Decide for the whole run.

    Args:
        requested: ``precision.backend``.
        formats: of the plan's rows.
        dtype: ``precision.dtype``.
        spec: module implementation in use.
        machine: this rank's, see :func:`probe`.

    Raises:
        UserError: what was asked for is impossible here.
    """
    quantised = sorted(set(formats) - {"bf16"})
    if not quantised:
        return "none"
    obstacle = _native_obstacle(quantised, dtype, spec, machine)
    if requested == "native" and obstacle:
        raise UserError("precision.backend=native", why=obstacle, nearest="precision.backend=emulated")
    if requested != "emulated" and not obstacle:
        return "native"
    if spec == "te" and (machine.te_version or (0, 0)) < EMULATION_TE:
        raise UserError(
            f"precision.backend={requested} with model.spec=te",
            why=f"emulation needs Transformer Engine {_dotted(EMULATION_TE)} or later, here is {_te(machine)}",
            nearest="model.spec=torch",
        )
    return "emulated"


def probe(spec: Spec) -> Machine:
    """Look at this rank's device, and at Transformer Engine if ``spec`` uses it."""
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if spec != "te":
        return Machine(capability=capability)
    # Torch first: Transformer Engine finds CUDA's libraries through it.
    import transformer_engine
    from transformer_engine.pytorch import is_mxfp8_available, is_nvfp4_available

    major, minor, *_ = transformer_engine.__version__.split(".")
    checks = {
        "nvfp4": is_nvfp4_available(return_reason=True),
        "mxfp8": is_mxfp8_available(return_reason=True),
    }
    unavailable: dict[Format, str] = {name: why for name, (works, why) in checks.items() if not works}  # type: ignore[misc]
    return Machine(capability=capability, te_version=(int(major), int(minor)), unavailable=unavailable)


def _native_obstacle(formats: list[Format], dtype: str, spec: Spec, machine: Machine) -> str | None:
    """Why the formats' own GEMMs cannot run, or None."""
    needed = " and ".join(_dotted(capability) for capability in NATIVE_CAPABILITIES)
    wanted = " and ".join(formats)
    if machine.capability is None:
        return f"native {wanted} needs a GPU of compute capability {needed} (Blackwell), here is a CPU"
    if machine.capability not in NATIVE_CAPABILITIES:
        here = _dotted(machine.capability)
        return f"native {wanted} needs compute capability {needed} (Blackwell), this GPU has {here}"
    if spec != "te":
        return f"native {wanted} is Transformer Engine's, and model.spec=torch does not use it"
    if dtype != "bf16":
        return f"native kernels quantise BF16, and precision.dtype={dtype}"
    if machine.te_version is None or machine.te_version < NATIVE_TE:
        return f"native {wanted} needs Transformer Engine {_dotted(NATIVE_TE)} or later, here is {_te(machine)}"
    for name in formats:
        if name in machine.unavailable:
            return f"Transformer Engine cannot run native {name} here: {machine.unavailable[name]}"
    return None


def _te(machine: Machine) -> str:
    return "none" if machine.te_version is None else _dotted(machine.te_version)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
