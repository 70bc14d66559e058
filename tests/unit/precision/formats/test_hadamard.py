"""The rotation against its definition."""

from __future__ import annotations

import pytest
import torch

from nemotron3_megatron.precision.formats.hadamard import MATRIX, SIGNS, rotate


def definition() -> torch.Tensor:
    """Kronecker powers of [[1, 1], [1, -1]], rows signed, over sqrt(16), in float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return torch.tensor(SIGNS, dtype=torch.float64)[:, None] * h / 4


def test_matrix() -> None:
    matrix = torch.tensor(MATRIX, dtype=torch.float64)
    assert torch.equal(matrix, definition())
    assert torch.equal(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotates_blocks_of_the_last_dimension(dtype: torch.dtype) -> None:
    """On small multiples of 1/8 every sum is exact in float32, so the only rounding is the last one."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randint(-100, 101, (2, 3, 48), generator=g) / 8).to(dtype)
    expected = (x.double().reshape(-1, 16) @ definition()).reshape(x.shape)
    found = rotate(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


def test_leaves_products_unchanged() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (5, 64), generator=g).float() for _ in range(2))  # exact throughout
    assert torch.equal(rotate(a) @ rotate(b).T, a @ b.T)


def test_refuses_an_incomplete_block() -> None:
    with pytest.raises(ValueError, match="divisible by 16"):
        rotate(torch.ones(2, 24))
