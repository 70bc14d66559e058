"""A keyed pseudo-random permutation of ``range(n)`` that needs no table.

A balanced Feistel network over pairs (left, right) in Z_a x Z_a, a = ceil(sqrt(n)), permutes range(a * a); results
>= n are permuted again until they fall below n ("cycle walking", Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002), which keeps the map a bijection of range(n). As a * a - n <= 2 * sqrt(n), hardly any walk.
This shuffles trillions of tokens reproducibly: any position is found without the ones before it.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

# Four rounds already give a strong pseudo-random permutation for ideal round functions (Luby and Rackoff 1988);
# twice as many leave room for the small domains and the fast mixing function used here.
_ROUNDS = 8

# Multipliers and shifts of the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A bijection of ``range(n)`` chosen by ``key``; the same key and n give the same one everywhere."""

    def __init__(self, n: int, *key: int | str) -> None:
        """Choose the permutation.

        Args:
            n: size of the domain, at least 1.
            key: any ints and strings, such as (seed, source, epoch).
        """
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, got {n}")
        self._n = n
        self._side = np.uint64(math.isqrt(n - 1) + 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        """Where ``index`` goes."""
        return int(self.of(np.array([index]))[0])

    def of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of ``indices`` (int64, any shape, within [0, n)) goes; same shape, int64.

        Raises:
            IndexError: an index is outside the domain.
        """
        if indices.size and not (indices.min() >= 0 and indices.max() < self._n):
            raise IndexError(f"an index is outside [0, {self._n})")
        values = self._encrypt(indices.astype(np.uint64))
        while (outside := values >= self._n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def all(self) -> NDArray[np.int64]:
        """The whole permutation, (n,) int64."""
        return self.of(np.arange(self._n, dtype=np.int64))

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(values, self._side)
        for key in self._round_keys:
            left, right = right, (left + _mix(right ^ key) % self._side) % self._side
        encrypted: NDArray[np.uint64] = left * self._side + right
        return encrypted


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser: every input bit changes every output bit about half the time."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
