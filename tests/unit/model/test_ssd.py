"""The chunked SSD against the recurrence that defines it, written out token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.model.ssd import ssd

ROUNDOFF = 2.0**-24
"""Unit roundoff of float32."""


def recurrence(
    x: Tensor,
    a: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h: Tensor,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another; a (b, s, h) is dt * A, kept apart so that it can vary alone.

    x (b, s, h, p), dt (b, s, h), B and C (b, s, g, n), D (h,), h (b, h, p, n) -> y (b, s, h, p), last state.
    """
    rep = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(rep, dim=2), C.repeat_interleave(rep, dim=2)
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        h = a[:, t].exp()[:, :, None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, dim=1), h


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    first: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def to(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves of this type."""
        return Inputs(*[t.detach().to(dtype).requires_grad_() for t in self.tensors()])


def draw(
    batch: int, seq: int, groups: int, rep: int, head_dim: int, state: int, *, rate: float = 1.0, seed: int = 0
) -> Inputs:
    """Random inputs whose values are float32 numbers; decays are exp(-rate * dt * U(1, 16)) as Mamba-2 starts."""
    generator = torch.Generator().manual_seed(seed)
    heads = groups * rep

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Inputs(
        x=normal(batch, seq, heads, head_dim),
        dt=torch.nn.functional.softplus(normal(batch, seq, heads) - 2),
        A=-rate * (1 + 15 * torch.rand(heads, generator=generator)),
        B=normal(batch, seq, groups, state),
        C=normal(batch, seq, groups, state),
        D=normal(heads),
        first=normal(batch, heads, head_dim, state),
    )


def documents(batch: int, seq: int, seed: int, chance: float = 0.15) -> Tensor:
    """Document numbers that change at random; numbers come back later, as 0, 1, 2, 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, seq, generator=generator) < chance).cumsum(1) % 3


def chunked(i: Inputs, chunk_size: int, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    return ssd(
        i.x,
        i.dt,
        i.A,
        i.B,
        i.C,
        D=i.D,
        chunk_size=chunk_size,
        seq_idx=seq_idx,
        initial_states=i.first,
        return_final_states=True,
    )


def defined(i: Inputs, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    return recurrence(i.x, i.dt * i.A, i.dt, i.B, i.C, i.D, i.first, seq_idx)


def results(outputs: tuple[Tensor, Tensor], i: Inputs) -> list[Tensor]:
    """y, final state, and the gradients of a random weighting of both."""
    loss = torch.stack([(o * w).sum() for o, w in zip(outputs, loss_weights(outputs), strict=True)]).sum()
    return [*outputs, *torch.autograd.grad(loss, i.tensors())]


def loss_weights(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


NAMES = ["y", "final_state", *(f"grad_{f.name}" for f in fields(Inputs))]


def assert_float64(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, f, e in zip(NAMES, found, expected, strict=True):
        error = (f - e).abs().max() / e.abs().max().clamp_min(1e-30)
        assert error < 1e-10, f"{name}: {error:.1e}"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_recurrence_float64(data: st.DataObject) -> None:
    """Outputs, final state and every gradient, over shapes, chunkings, lengths, groups and document boundaries."""
    size = st.integers(1, 3)
    batch, groups, rep = (data.draw(size, label=name) for name in ("batch", "groups", "heads per group"))
    seq = data.draw(st.integers(1, 33), label="seq")
    head_dim, state = data.draw(st.integers(1, 4), label="head_dim"), data.draw(st.integers(1, 4), label="state")
    chunk_size = data.draw(st.integers(1, 16), label="chunk_size")
    seed = data.draw(st.integers(0, 1000), label="seed")
    seq_idx = documents(batch, seq, seed) if data.draw(st.booleans(), label="documents") else None
    i = draw(batch, seq, groups, rep, head_dim, state, seed=seed).to(torch.float64)
    assert_float64(results(chunked(i, chunk_size, seq_idx), i), results(defined(i, seq_idx), i))


def bounds(i: Inputs, chunk_size: int, seq_idx: Tensor | None) -> list[Tensor]:
    """Elementwise bounds on the float32 errors of everything ``results`` returns, in its order.

    Every result is a sum of products, so its error is at most K roundings times the sum of the products' absolute
    values, K being the roundings on the longest path (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1). That sum comes from the recurrence itself on absolute inputs (its decays are positive already).

    K counts: dot products over n, over the chunk's q positions, over p in the backward pass, over r heads where a
    group's gradient gathers; 2 for each of the c steps of the scan over chunks; 2 (one ulp) for the exp of each of
    the c + 2 decays on a path; 4 for dt, D and the final additions. A decay's exponent s is itself rounded, by at
    most 3 u |s| (three operations in _PairDecay, one elsewhere), and carries that into the product: these are the
    same sums with weights |s|, minus their derivative along the exponents' scale (in which the gradient of the
    exponents has one more factor, whence 3 more). A gradient multiplies something computed forward with something
    computed backward: twice the bound.
    """
    chunks = -(-i.x.shape[1] // chunk_size)
    (heads, head_dim), (groups, state) = i.x.shape[2:], i.B.shape[2:]
    k = state + chunk_size + head_dim + heads // groups + 2 * chunks + 2 * (chunks + 2) + 4
    x, dt, A, B, C, D, first = (t.detach().double().abs() for t in i.tensors())

    def outputs(leaves: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, B, C, D, first, exponents = leaves
        return recurrence(x, exponents * scale, dt, B, C, D, first, seq_idx)

    def weighted(leaves: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        return torch.stack([(o * w).sum() for o, w in zip(outputs(leaves, scale), weights, strict=True)]).sum()

    leaves = (x, dt, B, C, D, first, -dt * A)
    one = torch.ones((), dtype=torch.float64)
    sums, slopes = torch.func.jvp(lambda scale: outputs(leaves, scale), (one,), (one,))
    forward = [k * total - 3 * slope for total, slope in zip(sums, slopes, strict=True)]
    weights = [w.double().abs() for w in loss_weights(sums)]
    gradient = torch.func.grad(weighted)
    sums_of_grads, slopes = torch.func.jvp(lambda scale: gradient(leaves, scale), (one,), (one,))
    of_x, of_dt, of_b, of_c, of_d, of_first, of_exponents = (
        2 * ((k + 3) * total - 3 * slope) for total, slope in zip(sums_of_grads, slopes, strict=True)
    )
    of_dt, of_a = of_dt + A * of_exponents, (dt * of_exponents).sum((0, 1))
    return [ROUNDOFF * bound for bound in (*forward, of_x, of_dt, of_a, of_b, of_c, of_d, of_first)]


FLOAT32_CASES = {
    "one chunk": (dict(batch=2, seq=64, groups=2, rep=2, head_dim=8, state=16), 64, False),
    "many chunks": (dict(batch=1, seq=250, groups=1, rep=4, head_dim=8, state=16), 16, False),
    "documents": (dict(batch=2, seq=130, groups=4, rep=1, head_dim=4, state=8), 32, True),
    "strong decay": (dict(batch=1, seq=128, groups=1, rep=2, head_dim=4, state=8, rate=30.0), 64, True),
    "weak decay": (dict(batch=1, seq=128, groups=1, rep=2, head_dim=4, state=8, rate=1e-3), 32, False),
}


@pytest.mark.parametrize("case", FLOAT32_CASES)
def test_float32_within_derived_bound(case: str) -> None:
    shape, chunk_size, packed = FLOAT32_CASES[case]
    i = draw(**shape)
    seq_idx = documents(i.x.shape[0], i.x.shape[1], seed=3, chance=0.05) if packed else None
    single, double = i.to(torch.float32), i.to(torch.float64)
    found = results(chunked(single, chunk_size, seq_idx), single)
    expected = results(defined(double, seq_idx), double)
    for name, f, e, bound in zip(NAMES, found, expected, bounds(i, chunk_size, seq_idx), strict=True):
        share = ((f.double() - e).abs() / (bound + 1e-25)).max()  # decays below 8e-31 count as zero
        assert share <= 1, f"{name}: {share:.2f} of the bound"


def test_neighbours_deep_in_a_chunk_keep_their_digits() -> None:
    """One input 500 positions into a chunk whose running decay is exp(-2500): one rounding per operation remains.

    The result is one product of five factors and one decay: 5 + 1 ulp of exp (2) + 3 |s| with s = -5 make 22 u.
    Differences of float32 running sums would be off by about 2500 u.
    """
    seq, at = 512, 500
    x = torch.zeros(1, seq, 1, 1)
    x[0, at] = 1.7
    dt, A = torch.full((1, seq, 1), 0.31), torch.tensor([-16.3])
    B, C = torch.full((1, seq, 1, 1), 0.77), torch.full((1, seq, 1, 1), 1.3)
    y = ssd(x, dt, A, B, C, chunk_size=seq)[0, at + 1].double()
    expected = C[0, 0] * B[0, 0].double() * dt[0, 0].double() * x[0, at] * (dt[0, 0].double() * A.double()).exp()
    assert ((y - expected).abs() / expected) < 22 * ROUNDOFF


def test_gradcheck() -> None:
    """Analytic gradients against finite differences."""
    i = draw(2, 7, 2, 2, 2, 3).to(torch.float64)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4]])

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(Inputs(*tensors), 3, seq_idx)

    assert torch.autograd.gradcheck(run, i.tensors())


@pytest.mark.parametrize("rate", [1e4, 1e-9])
def test_extreme_decays_stay_finite(rate: float) -> None:
    """Decays that underflow at once (their inverses above the diagonal overflow) and decays of one."""
    i = draw(1, 40, 1, 2, 3, 4, rate=rate)
    single, double = i.to(torch.float32), i.to(torch.float64)
    found = results(chunked(single, 16, documents(1, 40, 0)), single)
    expected = results(defined(double, documents(1, 40, 0)), double)
    for name, f, e in zip(NAMES, found, expected, strict=True):
        assert f.isfinite().all(), name
        # Any finite mistake is of order one; 200 roundings bound these sums of at most 40 terms in 5 products.
        assert (f - e).abs().max() <= 200 * ROUNDOFF * e.abs().max() + 1e-20, name


def test_documents_equal_separate_sequences() -> None:
    """A packed sequence gives what its documents give alone, and the last state is the last document's."""
    i = draw(1, 50, 2, 2, 4, 8).to(torch.float64)
    cuts = [0, 1, 18, 37, 50]
    seq_idx = torch.repeat_interleave(torch.tensor([7, 0, 7, 3]), torch.tensor(cuts).diff()).unsqueeze(0)
    packed, last = ssd(i.x, i.dt, i.A, i.B, i.C, chunk_size=8, seq_idx=seq_idx, return_final_states=True)
    parts = [
        ssd(i.x[:, s], i.dt[:, s], i.A, i.B[:, s], i.C[:, s], chunk_size=8, return_final_states=True)
        for s in (slice(*cut) for cut in pairwise(cuts))
    ]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in parts], dim=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last, parts[-1][1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [4, 16, 64])
def test_no_document_sees_another(chunk_size: int) -> None:
    """Changing one document moves no bit of its neighbours, nor does their loss give it a gradient."""
    i = draw(1, 48, 1, 2, 4, 8).to(torch.float32)
    seq_idx = torch.repeat_interleave(torch.arange(3), 16).unsqueeze(0)
    middle = slice(16, 32)
    y, _ = chunked(i, chunk_size, seq_idx)
    other = i.x.detach().clone()
    other[:, middle] += 1.0
    y_other, _ = chunked(replace(i, x=other), chunk_size, seq_idx)
    moved = (y != y_other).flatten(2).any(-1)[0]
    assert moved[middle].all()
    assert moved.sum() == 16
    (grad,) = torch.autograd.grad(y[:, 32:].sum() + y[:, :16].sum(), i.x)
    assert (grad[:, middle] == 0).all()


def test_states_continue_a_sequence() -> None:
    """Two halves, the second started with the first's final state, are the whole."""
    i = draw(2, 40, 2, 1, 3, 5).to(torch.float64)
    whole, last = chunked(i, 8, None)
    one, two = slice(0, 23), slice(23, 40)
    halves, state = [], i.first
    for s in (one, two):
        half = Inputs(i.x[:, s], i.dt[:, s], i.A, i.B[:, s], i.C[:, s], i.D, state)
        y, state = chunked(half, 8, None)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, dim=1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_the_float32_result_rounded() -> None:
    i = draw(1, 20, 2, 2, 4, 4)
    args = [t.bfloat16() for t in (i.x, i.dt, i.A, i.B, i.C)]
    low = ssd(*args, D=i.D, chunk_size=8)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, ssd(*[t.float() for t in args], D=i.D, chunk_size=8).bfloat16())


def test_memory_is_linear_in_sequence_length() -> None:
    """Bytes kept for the backward pass grow with the sequence, not with its square."""

    def kept(seq: int) -> int:
        storages: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        i = draw(1, seq, 1, 2, 4, 8).to(torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = ssd(i.x, i.dt, i.A, i.B, i.C, D=i.D, chunk_size=16)
            assert y.requires_grad
        return sum(storages.values())

    assert kept(1024) < 2.05 * kept(512)


@pytest.mark.parametrize(
    "change",
    [
        dict(dt=torch.ones(1, 4, 3)),
        dict(A=torch.ones(3)),
        dict(B=torch.ones(1, 4, 3, 2)),
        dict(C=torch.ones(1, 4, 1, 3)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor]) -> None:
    i = draw(1, 4, 1, 2, 2, 2)
    tensors = dict(x=i.x, dt=i.dt, A=i.A, B=i.B, C=i.C) | change
    with pytest.raises(ValueError, match="fit"):
        ssd(**tensors, chunk_size=2)


def test_empty_sequence_and_chunk_are_refused() -> None:
    i = draw(1, 4, 1, 2, 2, 2)
    with pytest.raises(ValueError, match="chunk_size"):
        ssd(i.x, i.dt, i.A, i.B, i.C, chunk_size=0)
