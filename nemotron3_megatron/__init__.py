"""Train Nemotron 3 hybrid models (Mamba-2, attention, LatentMoE, multi-token prediction) with Megatron-Core.

Importing this package imports neither torch nor Megatron-Core; it only makes sure that Megatron-Core, when it
is imported later, also runs on a machine without CUDA (:mod:`nemotron3_megatron.platform.bootstrap`).
"""

from __future__ import annotations

from nemotron3_megatron.platform import bootstrap

__version__ = "0.1.0"

bootstrap.install()
