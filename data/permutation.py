"""A permutation of 0 .. size-1 of which any piece is had at the cost of that piece: no array of the set's size.

A generalised Feistel cipher (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method 3). A
number is taken as left + a right on a grid of a x b places, a and b about the square root of the size. Each round adds
a keyed hash of one half to the other, modulo its side, which is undone by subtracting: so every round, and all of them,
are a permutation of the grid. The grid has less than a places more than are wanted; what lands there goes round again
until it does not (cycle walking, method 2), which is a permutation of the wanted ones.

16 rounds, where 4 of a strong cipher would do for large sets: with fewer, sets of a handful of samples see some orders
more often than others, which tests/data/test_sampling.py would tell.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ROUNDS = 16  # even, so that halves end where they began

# A round's hash: the golden ratio's fraction, and a multiplier with good spectra (Steele and Vigna, 2021), both odd.
_SPREAD, _MIX, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95), np.uint64(32)


def permuted(positions: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where the permutation of 0 .. size-1 by `keys` [ROUNDS] takes each of `positions` [B]: [B]."""
    assert 0 < size < 2**62 and len(keys) == ROUNDS
    across = math.isqrt(size - 1) + 1
    sides = np.uint64(across), np.uint64(-(-size // across))
    places = _encipher(positions.astype(np.uint64), sides, keys)
    while len(outside := np.flatnonzero(places >= size)):
        places[outside] = _encipher(places[outside], sides, keys)
    return places.astype(np.int64)


def _encipher(
    places: NDArray[np.uint64], sides: tuple[np.uint64, np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    across, other = sides
    left, right = places % across, places // across
    for key in keys:
        moved = hashed(right, key, across)
        moved += left
        moved %= across
        left, right, across, other = right, moved, other, across
    return left + across * right


def hashed(values: NDArray[np.uint64], key: np.uint64, below: np.uint64) -> NDArray[np.uint64]:
    """A keyed hash of each of `values`, in 0 .. below-1, where `below` is at most 2^32."""
    found = (values + key) * _SPREAD
    found ^= found >> _HALF
    found *= _MIX
    found >>= _HALF
    found *= below  # 32 random bits as a fraction, without a division
    found >>= _HALF
    return found
