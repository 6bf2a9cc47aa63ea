"""Maps in few shades, in few bytes, in a form that every browser reads by itself.

A map is stored as its smallest share, the range to its largest and, for each patch, one of n shades between them,
evenly spaced by the square root: eyes and methods look at what is large, but of most maps most is small. A shade is
noted by itself, or as the difference from that of the patch before, or of the query before, whichever is shorter;
several are one byte, and zlib does the rest. How many shades there are is decided by the room there is.

Legend: H heads, Q queries, P patches.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
SHADES = (256, 128, 64, 48, 32, 28, 24, 20, 18, 16, 14, 12, 10, 8, 7, 6, 5, 4, 3)
_USUAL = 12  # shades, by which it is decided how differences are taken
_OCTAVE = 128  # codes of shares, which are so 0.5 % apart
_PARTS = 8  # of what is rounded to a code
DIFFERENCES = {0: None, 1: 2, 2: 1}
"""By the first byte: along which axis of [H, Q, P] they are taken, from a patch to the next, or a query; or not."""


@dataclass(frozen=True)
class Rows:
    """Of one layer and image, in 256 shades.

    Attributes:
        codes: uint8 [H, Q, P]. least, range: uint16 [H, Q], codes of the smallest share, and of what the largest has
            more. beside: uint8 [H, Q], the share of what are no patches, in 255ths.
    """

    codes: Array
    least: Array
    range: Array
    beside: Array

    @staticmethod
    def of(rows: Tensor, beside: Tensor) -> Rows:
        """From shares [H, Q, P], and those that go elsewhere [H, Q]."""
        least = rows.amin(-1)
        span = rows.amax(-1) - least
        height = (rows - least[..., None]) / span.clamp(min=1e-30)[..., None]
        codes = (height.sqrt() * 255).round().to(torch.uint8).numpy()
        return Rows(codes, _log(least), _log(span), (beside.clamp(0, 1) * 255).round().to(torch.uint8).numpy())

    def way(self) -> int:
        """Of differences, the one that takes the fewest bytes."""
        return min(DIFFERENCES, key=lambda way: len(self.coded(_USUAL, way)))

    def coded(self, shades: int, way: int) -> bytes:
        """zlib of: the way of differences, least, range (little-endian), beside, and the differences, packed."""
        codes, axis = np.rint(np.arange(256) * (shades - 1) / 255).astype(np.int16)[self.codes], DIFFERENCES[way]
        if axis is not None:
            codes = np.diff(codes, axis=axis, prepend=0) % shades
        head = bytes([way]) + self.least.tobytes() + self.range.tobytes() + self.beside.tobytes()
        return zlib.compress(head + _packed(codes, shades))


def _log(share: Tensor) -> Array:
    """uint16: minus the logarithm, 65535 for 0."""
    return np.minimum(np.rint(-_OCTAVE * np.log2(np.maximum(share.numpy(), 1e-38))), 65535).astype("<u2")


def _packed(codes: Array, shades: int) -> bytes:
    """As many to a byte as there is room for, the first the least digit."""
    count = _to_a_byte(shades)
    digits = np.zeros(-(-codes.size // count) * count, np.int16)
    digits[: codes.size] = codes.reshape(-1)
    return (digits.reshape(-1, count) @ shades ** np.arange(count)).astype(np.uint8).tobytes()


def coded_bytes(rows: int, patches: int) -> int:
    """That `Rows.coded` makes of so many rows at most, in the fewest shades, where nothing can be compressed."""
    raw = 1 + 5 * rows + -(-rows * patches // _to_a_byte(SHADES[-1]))
    return raw + raw // 1000 + 64  # zlib's own: 5 bytes for some thousands


def _to_a_byte(shades: int) -> int:
    """Codes that one holds."""
    return next(n for n in range(8, 0, -1) if shades**n <= 256)


def fitted(layers: Sequence[Rows], room: int) -> tuple[int, list[bytes]]:
    """The most shades, alike for all, with which they take `room` bytes at most; 3 if none does."""
    ways = [rows.way() for rows in layers]
    low, high, found = 0, len(SHADES) - 1, list[bytes]()
    while low < high:
        middle = (low + high) // 2
        tried = [rows.coded(SHADES[middle], way) for rows, way in zip(layers, ways, strict=True)]
        if sum(map(len, tried)) <= room:
            high, found = middle, tried
        else:
            low = middle + 1
    return SHADES[high], found or [rows.coded(SHADES[high], way) for rows, way in zip(layers, ways, strict=True)]


def errors(layers: Sequence[Rows], shades: int) -> tuple[float, float]:
    """Of shares, between the least and the largest of their map: the mean error, and its 99th percentile.

    Those of equal codes are taken to be spread evenly over what rounds to them.
    """
    counts = sum((np.bincount(rows.codes.reshape(-1), minlength=256) for rows in layers), np.zeros(256))
    code = np.arange(256)[:, None]
    exact = ((code + (np.arange(_PARTS) + 0.5) / _PARTS - 0.5) / 255).clip(0, 1)
    wrong = np.abs(exact**2 - (np.rint(code * (shades - 1) / 255) / (shades - 1)) ** 2).reshape(-1)
    weights, order = np.repeat(counts / (_PARTS * counts.sum()), _PARTS), np.argsort(wrong)
    place = np.searchsorted(np.cumsum(weights[order]), 0.99)
    return float(wrong @ weights), float(wrong[order[place]])
