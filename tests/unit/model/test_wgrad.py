"""When several tensors can be taken for one."""

from __future__ import annotations

import numpy as np
import torch

from nemotron3_megatron.model.wgrad import spacing


def test_parts_of_one_buffer() -> None:
    buffer = torch.zeros(40)
    parts = [buffer[start : start + 6].view(2, 3) for start in (0, 16, 32)]
    assert spacing(parts) == 16
    assert spacing(parts[::-1]) == -16
    assert spacing(parts[:1]) == 0
    assert spacing([parts[0], parts[1], buffer[20:26].view(2, 3)]) is None


def test_neighbours_by_chance() -> None:
    """A view over all three would end beyond the first one's storage."""
    memory = np.zeros(18, np.float32)
    parts = [torch.from_numpy(memory[start : start + 6]).view(2, 3) for start in (0, 6, 12)]
    assert parts[1].data_ptr() - parts[0].data_ptr() == 24
    assert spacing(parts) is None
