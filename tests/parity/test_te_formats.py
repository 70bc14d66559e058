"""NVFP4 against Transformer Engine's own Python reference, bit by bit: codes, scales, amax.

``transformer_engine/pytorch/custom_recipes/reference_nvfp4.py`` is what TE's tests hold its kernels to with zero
tolerance. It is plain torch, but TE as a whole imports with CUDA only: this loads that file with empty stand-ins for
the classes it derives from. The file comes with the ``cuda`` extra; without a GPU, unpack the ``transformer_engine``
wheel (which nothing else here can import) and run

    TRANSFORMER_ENGINE_SOURCES=FOLDER python -m pytest tests/parity/test_te_formats.py

The definition written out is the oracle of tests/unit/precision/formats, which always runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.precision.formats import nvfp4

TE = "transformer_engine"
INSTALLED = importlib.util.find_spec(TE)
FOLDER = os.environ.get("TRANSFORMER_ENGINE_SOURCES") or (
    str(Path(INSTALLED.origin).parents[1]) if INSTALLED and INSTALLED.origin else None
)
pytestmark = pytest.mark.skipif(FOLDER is None, reason="Transformer Engine comes with the cuda extra only")

Quantize = Callable[..., Any]


@pytest.fixture(scope="module")
def reference() -> Iterator[Quantize]:
    """``reference(x, **NVFP4QuantizerRef's arguments)``: TE's result."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == TE]:
            patch.delitem(sys.modules, name)
        for package in (TE, f"{TE}.pytorch", f"{TE}.pytorch.custom_recipes", f"{TE}.pytorch.tensor"):
            _stand_in(patch, package, __path__=[str(Path(FOLDER, *package.split(".")))])
        _stand_in(patch, f"{TE}.pytorch.tensor.utils", is_custom=None)
        _stand_in(patch, f"{TE}.pytorch.quantized_tensor", Quantizer=_Quantizer, QuantizedTensorStorage=object)
        module = importlib.import_module(f"{TE}.pytorch.custom_recipes.reference_nvfp4")
        fp4 = module.reference_utils.Fp4Formats.E2M1
        yield lambda x, **arguments: module.NVFP4QuantizerRef(fp4, **arguments).quantize(x)
        for name in [name for name in sys.modules if name.split(".")[0] == TE]:
            del sys.modules[name]


class _Quantizer:
    """What the reference asks of TE's base class."""

    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


def _stand_in(patch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    patch.setitem(sys.modules, name, module)


def normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def lognormal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Spans so many binades that block scales underflow."""
    return normal(shape, g) * torch.exp(4 * normal(shape, g))


def zeros(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return normal(shape, g).sign() * 0.0


def mostly_zeros(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return normal(shape, g) * (torch.rand(shape, generator=g) > 0.95)


def ties(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Multiples of 1/4 up to 6, where 6 is in most blocks: after scaling, many are halfway between two codes."""
    x = torch.randint(-24, 25, shape, generator=g) / 4
    return torch.where(torch.rand(shape, generator=g) > 0.9, 6.0, x)


def denormal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Subnormal in float32 and bfloat16; in float16 it rounds to zero, or with the factor below to its subnormals."""
    factor = torch.randint(0, 2, (1,), generator=g) * 2.0**110 + 1
    return normal(shape, g) * 2.0**-131 * factor


def huge(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Up to the largest float32; infinite in float16."""
    return (torch.rand(shape, generator=g) * 2 - 1) * torch.finfo(torch.float32).max


def special(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Every kind of edge beside each other, without infinity and NaN."""
    pool = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 6e-8, 0.25, -0.75, 1.0, 448.0, 2688.0, 6e4, -1e9, 3e38])
    return pool[torch.randint(0, len(pool), shape, generator=g)]


def infinite(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(shape, generator=g) > 0.97, normal(shape, g).sign() * torch.inf, normal(shape, g))


def nan(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(shape, generator=g) > 0.97, torch.nan, infinite(shape, g))


KINDS = st.sampled_from([normal, lognormal, zeros, mostly_zeros, ties, denormal, huge, special, infinite, nan])
SEEDS = st.integers(0, 2**32)


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def assert_equal(ours: nvfp4.NVFP4Tensor, codes: Tensor, scales: Tensor, amax: Tensor) -> None:
    """``scales`` as TE stores them: one a row even for 16x16 blocks, with rows that complete the last block.

    Amaxes and scales are not negative, so equal numbers are equal bits; NaN's sign is whatever the CPU's lane made it.
    """
    exact = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.amax.reshape(1), amax, **exact)
    rows = ours.scales.reshape(-1, ours.scales.shape[-1]).repeat_interleave(ours.block[0], 0)
    assert rows.dtype == scales.dtype
    torch.testing.assert_close(rows.float(), scales.float(), **exact)
    theirs = unpack(codes)
    # TE packs pairs, and drops the last code of an odd row.
    assert torch.equal(ours.codes.reshape(len(theirs), -1)[:, : theirs.shape[1]], theirs), "codes"


@settings(max_examples=200)
@given(
    seed=SEEDS,
    kind=KINDS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from([(1, 16), (16, 16)]),
    shape=st.lists(st.integers(1, 5), max_size=1).flatmap(
        lambda lead: st.tuples(*map(st.just, lead), st.integers(1, 40), st.integers(2, 70))
    ),
)
def test_quantises_like_transformer_engine(
    reference: Quantize, seed: int, kind: Any, dtype: torch.dtype, block: tuple[int, int], shape: tuple[int, ...]
) -> None:
    x = kind(shape, torch.Generator().manual_seed(seed)).to(dtype)
    theirs = reference(x, columnwise=False, quant_tile_shape=block)
    assert_equal(nvfp4.quantize(x, block=block), theirs.data, theirs.scale, theirs.global_amax_row)


@settings(max_examples=100)
@given(
    seed=SEEDS,
    case=st.tuples(KINDS, st.just(torch.float32))
    | st.tuples(st.sampled_from([normal, zeros, mostly_zeros, ties, infinite, nan]), st.just(torch.bfloat16)),
    blocks=st.integers(1, 4),
    columns=st.integers(1, 40),
)
def test_rotates_like_transformer_engine(
    reference: Quantize, seed: int, case: tuple[Any, torch.dtype], blocks: int, columns: int
) -> None:
    """In float32, on anything: both are the same matrix product. In bfloat16, where the order of sums and flushing of
    subnormals are the CPU's, on values whose sums are exact in float32 (but for about one block in a million)."""
    kind, dtype = case
    x = kind((16 * blocks, columns), torch.Generator().manual_seed(seed)).to(dtype)
    theirs = reference(x, with_rht=True)
    ours = nvfp4.quantize(x.T, hadamard=True)
    assert_equal(ours, theirs.data_t, theirs.scale_t, theirs.global_amax_col)
