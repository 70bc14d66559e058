"""Mamba-2's state-space duality (SSD) in pure torch: linear in sequence length, matrix products inside chunks.

The function is the recurrence, per head, of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, equation 2 with scalar A)

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] outer B[t]         h: (head_dim, state)
    y[t] = h[t] @ C[t] + D * x[t]

evaluated chunk by chunk (section 6 there): a masked attention-like product inside each chunk, one state per chunk,
and a short scan that carries the states from chunk to chunk.

Shape letters: b batch, s sequence, c chunks, q positions in a chunk, h heads, p head_dim, g groups (of B and C),
r heads per group, n state size. "decay" is always a number in [0, 1], the exponential of a sum of dt * A <= 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3_megatron.model.documents import document_runs


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    chunk_size: int,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
) -> Tensor: ...


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    chunk_size: int,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply the selective state space to a sequence of any length.

    Args:
        x: (b, s, h, p) input.
        dt: (b, s, h) time step, positive (after softplus).
        A: (h,) negative.
        B, C: (b, s, g, n) input and output projections; head i uses group i // (h / g).
        D: (h,) or (h, p) skip connection.
        chunk_size: positions per chunk. It changes cost and rounding, not the function.
        seq_idx: (b, s) integers; the state is reset wherever the value changes from one position to the next.
        initial_states: (b, h, p, n) state before the first position, seen by the first document only.
        return_final_states: also return the (b, h, p, n) state after the last position.

    Returns:
        y like x, computed in float32 (float64 when x is float64); with ``return_final_states`` also the state,
        in the type of the computation.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_shapes(x, dt, A, B, C, chunk_size)
    result_type, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    batch, seq, heads, head_dim = x.shape
    split, q = (B.shape[2], heads // B.shape[2]), min(chunk_size, seq)  # (g, r), positions in a chunk
    x = x.to(dtype)
    xdt = torch.unflatten(_chunked(x * dt.to(dtype).unsqueeze(-1), q), 3, split).transpose(2, 3)  # (b, c, g, q, r, p)
    b_chunks = _chunked(B.to(dtype), q).transpose(2, 3)  # (b, c, g, q, n)
    c_chunks = _chunked(C.to(dtype), q).transpose(2, 3)
    cum = _chunked(dt.double() * A.double(), q).transpose(2, 3).cumsum(-1)  # (b, c, h, q)
    seen = _visibility(seq_idx if seq_idx is not None else A.new_zeros(1, seq), q)
    # Inside the chunk: y[i] = sum over j <= i of (C[i] . B[j]) * decay(j -> i) * dt[j] * x[j].
    weights = (c_chunks @ b_chunks.mT).unsqueeze(3) * torch.unflatten(_pair_decay(cum, seen.pair, dtype), 2, split)
    y = (weights @ xdt.transpose(3, 4)).transpose(3, 4)  # (b, c, g, q, r, p)
    # What each chunk leaves behind, what therefore enters each chunk, and what that adds to the chunk's outputs.
    total = cum[..., -1:]
    left = b_chunks.mT @ (xdt * _boundary_decay(total - cum, seen.from_end, dtype, split)).flatten(4)
    through = _boundary_decay(total, seen.across, dtype, split).expand(-1, -1, -1, -1, -1, head_dim).flatten(4)
    states = _scan_chunks(left, through, _first_state(initial_states, left, split))  # (b, c + 1, g, n, r * p)
    carried = torch.unflatten(c_chunks @ states[:, :-1], -1, (-1, head_dim))
    y = y + carried * _boundary_decay(cum, seen.from_start, dtype, split)

    y = _skipped(y.transpose(2, 3).reshape(batch, -1, heads, head_dim)[:, :seq], x, D)
    if not return_final_states:
        return y.to(result_type)
    last = torch.unflatten(states[:, -1], -1, (-1, head_dim)).permute(0, 1, 3, 4, 2)  # (b, g, r, p, n)
    return y.to(result_type), last.flatten(1, 2)


def _skipped(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y + D x, both (b, s, h, p)."""
    return y if D is None else y + x * D.to(y.dtype).reshape(x.shape[2], -1)


def _check_shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> None:
    heads, groups = x.shape[2], B.shape[2]
    if dt.shape != x.shape[:3] or A.shape != (heads,):
        raise ValueError(f"dt {tuple(dt.shape)} and A {tuple(A.shape)} do not fit x {tuple(x.shape)}")
    if B.shape != C.shape or B.shape[:2] != x.shape[:2] or heads % groups:
        raise ValueError(f"B {tuple(B.shape)} and C {tuple(C.shape)} do not fit x {tuple(x.shape)}")
    if chunk_size < 1 or x.shape[1] < 1:
        raise ValueError(f"need chunk_size >= 1 and a non-empty sequence, got {chunk_size} and {x.shape[1]}")


def _chunked(t: Tensor, q: int) -> Tensor:
    """(b, s, ...) -> (b, c, q, ...), zeros at the end: a zero dt neither moves nor decays the state."""
    pad = -t.shape[1] % q
    if pad:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
    return torch.unflatten(t, 1, (-1, q))


@dataclass(frozen=True, slots=True)
class _Visibility:
    """Which parts of a chunk see each other, as booleans: past positions of the same document."""

    pair: Tensor
    """(b, c, 1, q, q) position i (row) sees position j (column)."""
    from_end: Tensor
    """(b, c, 1, q) the chunk's end sees the position."""
    from_start: Tensor
    """(b, c, 1, q) the position sees what enters the chunk."""
    across: Tensor
    """(b, c, 1, 1) the chunk's end sees what enters the chunk."""


def _visibility(seq_idx: Tensor, q: int) -> _Visibility:
    runs = document_runs(seq_idx)
    pad = -runs.shape[1] % q
    runs = torch.unflatten(torch.cat([runs, runs[:, -1:].expand(-1, pad)], dim=1), 1, (-1, q)).unsqueeze(2)
    end = runs[..., -1:]
    entering = torch.cat([runs[:, :1, :, :1], end[:, :-1]], dim=1)  # initial states belong to the first document
    causal = torch.ones(q, q, dtype=torch.bool, device=runs.device).tril()
    return _Visibility(
        pair=causal & (runs.unsqueeze(-1) == runs.unsqueeze(-2)),
        from_end=runs == end,
        from_start=runs == entering,
        across=end == entering,
    )


def _first_state(initial_states: Tensor | None, like: Tensor, split: tuple[int, int]) -> Tensor:
    """(b, h, p, n) or None -> (b, g, n, r * p), the layout of ``like`` without its chunks."""
    if initial_states is None:
        return torch.zeros_like(like[:, 0])
    return torch.unflatten(initial_states.to(like.dtype), 1, split).permute(0, 1, 4, 2, 3).flatten(3)


def _boundary_decay(exponent: Tensor, seen: Tensor, dtype: torch.dtype, split: tuple[int, int]) -> Tensor:
    """(b, c, h, q) float64 exponents -> (b, c, g, q, r, 1) decays, 0 where not seen."""
    decay = _exp(exponent.masked_fill(~seen, -math.inf).to(dtype))
    return torch.unflatten(decay, 2, split).transpose(3, 4).unsqueeze(-1)


def _pair_decay(cum: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, c, h, q) float64 running sums -> (b, c, h, q, q) decay from position j (column) to i (row)."""
    decay: Tensor = _PairDecay.apply(cum, seen, dtype)  # type: ignore[no-untyped-call]
    return decay


class _PairDecay(torch.autograd.Function):
    """exp(cum[i] - cum[j]) where i sees j, else 0, exact to about one rounding.

    From float32 running sums the difference would lose digits where it matters most: for neighbours deep in a chunk
    it is small and the sums are large (|cum| = 1000 costs 6e-5 relative). The float64 sum is therefore split into
    two float32 numbers; the high parts cancel with at most one rounding of the *difference*, so the decay's error is
    about |difference| * exp(-|difference|) * eps < eps / 2 whatever the chunk's length. Exponents that are not seen
    are -inf before exp, so nothing above the diagonal overflows; the gradient decay * grad is 0 there, never NaN.
    """

    @staticmethod
    def forward(ctx: Any, cum: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
        high = cum.to(dtype)
        difference = high.unsqueeze(-1) - high.unsqueeze(-2)
        if dtype != cum.dtype:
            low = (cum - high).to(dtype)
            difference += low.unsqueeze(-1)
            difference -= low.unsqueeze(-2)
        decay = _exp(difference.masked_fill_(~seen, -math.inf), inplace=True)
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """A pair's gradient raises cum[i] and lowers cum[j].

        What reaches one step's dt * A is a small rest of these sums (the pairs around it). They are therefore taken
        over the same rounded products in float64, so what should cancel does; the diagonal, all cancelling, is left
        out. In float32 the gradient of A loses up to 4 digits.
        """
        (decay,) = ctx.saved_tensors
        grad = grad * decay
        grad.diagonal(dim1=-2, dim2=-1).zero_()
        return grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64), None, None


def _exp(exponent: Tensor, inplace: bool = False) -> Tensor:
    """exp with decays below tiny ** 0.8 (8e-31 in float32) taken as 0.

    They and their products would be denormal numbers, which slow CPUs down several times.
    """
    cutoff = 0.8 * math.log(torch.finfo(exponent.dtype).tiny)
    return F.threshold(exponent, cutoff, -math.inf, inplace).exp_()


def _scan_chunks(left: Tensor, through: Tensor, first: Tensor) -> Tensor:
    """State that enters each chunk, and the last one: (b, c, g, n, m) -> (b, c + 1, g, n, m), m = r * p."""
    states: Tensor = _ChunkScan.apply(left, through, first)  # type: ignore[no-untyped-call]
    return states


class _ChunkScan(torch.autograd.Function):
    """state[k + 1] = state[k] * through[k] + left[k] over the chunk dimension, one fused operation a chunk.

    Work and memory stay linear in the number of chunks (the published matrix form is quadratic in it), and the
    states are written once, into the tensor the outputs need anyway.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, through: Tensor, first: Tensor) -> Tensor:
        """left (b, c, g, n, m), through (b, c, g, 1, m), first (b, g, n, m) -> states (b, c + 1, g, n, m)."""
        batch, chunks, *rest = left.shape
        states = left.new_empty(batch, chunks + 1, *rest)
        states[:, 0] = first
        for k in range(chunks):
            torch.addcmul(left[:, k], states[:, k], through[:, k], out=states[:, k + 1])
        ctx.save_for_backward(states, through)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient (b, c + 1, g, n, m) of the states -> gradients of left, through, first."""
        states, through = ctx.saved_tensors
        total = torch.empty_like(grad)  # gradient of state[k], later chunks included
        total[:, -1] = grad[:, -1]
        for k in reversed(range(through.shape[1])):
            torch.addcmul(grad[:, k], total[:, k + 1], through[:, k], out=total[:, k])
        grad_through = (total[:, 1:] * states[:, :-1]).sum(-2, keepdim=True)
        return total[:, 1:], grad_through, total[:, 0]
