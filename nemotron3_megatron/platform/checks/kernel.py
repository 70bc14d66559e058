"""A kernel family forward and backward against a float64 reference, and how far apart they may be.

The bound. Rounding to a type whose numbers are eps apart at 1 (BF16: 2^-7) is off by at most eps / 2 of a number's
binade, uniformly: eps / 2 / sqrt(3) in the root mean square, and numbers lie up to a factor two above their binade's
start: 0.29 to 0.14 eps, so that eps / 4 stands for one rounding (BF16: 2^-9). Roundings on the way to a result are
independent: n of them add as squares. Products are summed in float32, whose n additions are a random walk of
sqrt(n) * 2^-25. Twice that is allowed: a rounding may be amplified on its way (a softmax, a norm, a gate), and
the root mean square is an expectation. A kernel that drops a factor, a block of the sum, a document boundary or an
accumulation is off by far more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemotron3_megatron.platform.checks.outcome import Comparison, Outcome, UnavailableError
from nemotron3_megatron.platform.doctor import PACKAGES, examine

BEFORE = 1.0
"""What kernels that add into ``main_grad`` find there."""

Inputs = Mapping[str, Any]


class Draw:
    """Random inputs, the same each time on one kind of device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(1)

    def size(self, whole: int, small: int) -> int:
        """A dimension: as in the published models, or small enough for a CPU."""
        return whole if self.device.type == "cuda" else small

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal times ``scale``, in the type of the check or in ``dtype``."""
        drawn = torch.randn(*shape, device=self.device, generator=self._generator)
        return (drawn * scale).to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """float32 between ``low`` and ``high``."""
        drawn = torch.rand(*shape, device=self.device, generator=self._generator)
        return low + (high - low) * drawn

    def integers(self, *shape: int, below: int) -> Tensor:
        """int64 from 0."""
        return torch.randint(0, below, shape, device=self.device, generator=self._generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFamily:
    """Kernels that compute one function, and that function in plain torch."""

    needs: tuple[str, ...]
    """Distributions (``doctor.PACKAGES``)."""
    inputs: Callable[[Draw], dict[str, Any]]
    """What differs from call to call; floating tensors take gradients."""
    kernel: Callable[..., Tensor]
    """Takes the inputs by name. Kernels that add into ``main_grad`` make it, filled with ``BEFORE``."""
    reference: Callable[..., Tensor]
    """Takes the inputs in float64."""
    forward: int
    """Roundings to the check's type on the way to the output."""
    backward: int
    """The same of the gradients, the output's own on the way included."""
    on_cpu: bool = False
    note: Callable[[], str] = str
    """Called after the kernel."""

    def __call__(self, device: torch.device, dtype: torch.dtype) -> Outcome:
        """Compare on ``device``.

        Raises:
            UnavailableError: a package is missing, or the kernels are for CUDA and the device is not.
        """
        require(*self.needs)
        if device.type == "cpu" and not self.on_cpu:
            raise UnavailableError("a CUDA kernel")
        inputs = self.inputs(Draw(device, dtype))
        found = forward_and_backward(self.kernel, inputs, dtype)
        exact = forward_and_backward(self.reference, {name: _wide(value) for name, value in inputs.items()}, dtype)
        terms = max(max(value.shape) for value in inputs.values() if isinstance(value, Tensor))
        return Outcome(
            tuple(
                Comparison(
                    name,
                    relative_distance(tensor, exact[name]),
                    bound(self.forward if name == "y" else self.backward, terms, dtype),
                )
                for name, tensor in found.items()
            ),
            note=self.note(),
        )


def require(*distributions: str) -> None:
    """Raises UnavailableError unless all of them can be imported."""
    packages = {package.distribution: package for package in PACKAGES}
    for name in distributions:
        finding = examine(packages[name])
        if finding.state in ("missing", "broken"):
            why = "not installed" if finding.state == "missing" else f"cannot be imported ({finding.consequence})"
            raise UnavailableError(f"{name} is {why}: {finding.install}")


def bound(roundings: int, terms: int, dtype: torch.dtype) -> float:
    """Largest relative distance of a result from the exact one (see above).

    Args:
        roundings: to ``dtype``.
        terms: of the longest float32 sum.
        dtype: of parameters and activations.
    """
    rounding, addition = torch.finfo(dtype).eps / 4, torch.finfo(torch.float32).eps / 4
    return 2 * math.sqrt(roundings * rounding**2 + terms * addition**2)


def relative_distance(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact|| in float64, or ||found|| where the exact one is zero; NaN where one is found."""
    wide = exact.double()
    distance, size = float((found.double() - wide).norm()), float(wide.norm())
    return distance / size if size else distance


def forward_and_backward(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output ``y`` and the gradient of each floating input, for a random gradient of the output in ``dtype``."""
    leaves = {name: _leaf(value) for name, value in inputs.items()}
    y = function(**leaves)
    generator = torch.Generator(y.device).manual_seed(2)
    gradient = torch.randn(y.shape, device=y.device, generator=generator).to(dtype)
    y.backward(gradient.to(y.dtype))
    parameters = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, nn.Parameter)}
    return {"y": y.detach()} | {f"d{name}": _gradient(name, parameter) for name, parameter in parameters.items()}


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if main_grad is None else main_grad - BEFORE
    if gradient is None:
        raise RuntimeError(f"no gradient of {name} came back")
    return gradient


def _leaf(value: Any) -> Any:
    return nn.Parameter(value.clone()) if isinstance(value, Tensor) and value.is_floating_point() else value


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
