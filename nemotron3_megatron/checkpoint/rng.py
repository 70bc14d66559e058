"""Random state of a rank.

Nemotron 3 training draws no random numbers once it is initialised (no dropout), apart from stochastic
rounding of gradients. For that, and for whatever a callback draws, each rank's generators are part of the
checkpoint and come back when it is resumed under the layout that saved it, so that a restart is bitwise.
Under another layout a rank has no predecessor: its generators stay as the seed left them.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def capture() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and Megatron's generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }


def restore(state: dict[str, Any]) -> None:
    """Put the generators back into a state made by :func:`capture`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
