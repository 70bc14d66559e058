"""Random state survives a round trip through what torch may unpickle safely."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from nemotron3_megatron.checkpoint import rng


def _draw() -> tuple[float, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(()).item(),
    )


def test_every_generator_comes_back() -> None:
    random.gauss(0, 1)  # leaves a second normal number cached, as np.random.randn does
    np.random.randn()
    file = io.BytesIO()
    torch.save(rng.capture(), file)
    first = [_draw() for _ in range(3)]
    file.seek(0)
    rng.restore(torch.load(file, weights_only=True))
    assert [_draw() for _ in range(3)] == first
