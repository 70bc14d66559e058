"""A precision policy as data: a default format and ordered rules by role and global layer number.

Standard library only: the recipe's dataclasses hold these types, and planning never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["nvfp4", "mxfp8", "bf16"]
"""What a module's GEMMs read: NVFP4 (E2M1, blocks of 16), MXFP8 (E4M3, blocks of 32), or parameters as they are."""

Block = Literal["decoder", "mtp"]

Role = Literal[
    "attention.qkv",
    "attention.proj",
    "mamba.in_proj",
    "mamba.out_proj",
    "moe.latent_down",
    "moe.latent_up",
    "moe.experts.fc1",
    "moe.experts.fc2",
    "moe.shared.fc1",
    "moe.shared.fc2",
    "mlp.fc1",
    "mlp.fc2",
    "mtp.eh_proj",
]
"""What a GEMM does in its layer. MTP's inner layers have the roles of the decoder's, and ``block: mtp``."""

Rounding = Literal["even", "ceil", "floor", "nearest"]
"""How a share of the layers becomes a number of layers.

``even``, the default, is the nearest even number (whole Mamba-MoE pairs; a whole number stays, a share is never
rounded to nothing). It is the one rule that gives every published tail: 15 % of Super's 88 layers is 13.2 and
Megatron-Bridge and Megatron-LM's release test keep 14 in BF16; 15 % of Ultra's 108 is 16.2 and ultra.sh keeps 16.
The fractions being equal, neither ``ceil`` (17 for Ultra) nor ``nearest`` (13 for Super) gives both. Super's
super.sh keeps 16: write ``last 16``.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Modules that satisfy all selectors given, and their format."""

    format: Format
    layers: tuple[str, ...] | None = None
    """Decoder layers, any of: ``7``, ``3-9``, ``first 2``, ``last 14``, ``last 15%``."""
    role: tuple[Role, ...] | None = None
    block: Block | None = None
    rounding: Rounding | None = None
    """Of shares among ``layers``; None: ``even``."""
    optional: bool = False
    """True: the model may have nothing that this rule selects (Nano has neither MTP nor latent projections)."""
    why: str = ""

    @property
    def label(self) -> str:
        """The selectors, as a reader of the plan sees the rule."""
        layers = f"layers {', '.join(self.layers)}" if self.layers else ""
        block = f"block {self.block}" if self.block else ""
        role = f"role {', '.join(self.role)}" if self.role else ""
        return "; ".join(part for part in (layers, block, role) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """Random Hadamard transform of blocks along the reduction dimension before quantising."""

    size: int = 16
    on: Literal["wgrad_inputs"] = "wgrad_inputs"
    """Both operands of wgrad, as published: rotations cancel in the product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4:
    """NVFP4 as published (Super report, section on NVFP4 pretraining); each switch is one of its ablations."""

    weight_block: tuple[int, ...] = (16, 16)
    """Elements that share a scale in a weight (rows, columns): (16, 16), or (1, 16) as in activations."""
    hadamard: Hadamard | None = Hadamard()
    stochastic_rounding: Literal["gradients"] | None = "gradients"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """First matching rule wins; what no rule selects has the default format."""

    default: Format
    rules: tuple[Rule, ...] = ()
    nvfp4: Nvfp4 = Nvfp4()
