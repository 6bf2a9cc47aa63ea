"""Random numbers that depend on a key and a row number alone, never on what was drawn before.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is counter-based: any row of numbers is had
at the cost of that row. So any process can work out the randomness of any image, in whatever order images are read.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_FLOATS_PER_COUNT = 8  # Philox gives 4 words of 64 bits per count, and a float32 takes half a word
_VARIANT = 256  # more than there are purposes


class Purpose(IntEnum):
    """Second half of the key: keeps the uses of one seed apart."""

    ORDER = 1
    AUGMENT = 2
    SYNTHETIC_IMAGES = 3
    SYNTHETIC_LABELS = 4
    SPLIT = 5
    TEXTURE_PLACES = 6
    CAPTION = 7
    NOISE = 8
    SHARDS = 9
    WINDOW = 10
    FEW = 11
    SUBSTITUTE = 12
    COLOUR = 13
    RAND_AUGMENT = 14
    ERASE = 15
    BLEND = 16
    RESOLUTION = 17


class Variant(IntEnum):
    """What an image is drawn for: keeps apart the numbers that one purpose has of one row."""

    TRAINING = 0
    TRAINING_OTHER_VIEW = 1
    HELD_OUT = 2
    HELD_OUT_OTHER_VIEW = 3


def of_local_crop(number: int) -> int:
    """The variant of a training image's local crops, each by its number."""
    return len(Variant) + number


def keyed_uniforms(
    seed: int, purpose: Purpose, first: int, count: int, width: int, variant: int = Variant.TRAINING
) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) of shape [count, width].

    Row i depends on (seed, purpose, variant, first + i, width) alone.
    """
    counts_per_row = math.ceil(width / _FLOATS_PER_COUNT)
    generator = _generator(seed, purpose + _VARIANT * variant, counter=first * counts_per_row)
    return generator.random((count, counts_per_row * _FLOATS_PER_COUNT), dtype=np.float32)[:, :width]


def keyed_permutation(seed: int, purpose: Purpose, epoch: int, size: int) -> NDArray[np.int64]:
    """A permutation of 0 .. size-1 that depends on (seed, purpose, epoch, size) alone."""
    return _generator(seed, purpose, counter=epoch << 128).permutation(size)


def keyed_words(seed: int, purpose: Purpose, epoch: int, count: int, window: int = 0) -> NDArray[np.uint64]:
    """`count` random words of 64 bits that depend on (seed, purpose, epoch, window) alone, the same with any NumPy."""
    return _philox(seed, purpose, counter=epoch << 128 | window << 64).random_raw(count)


def keyed_generator(seed: int, purpose: Purpose, row: int, variant: int = Variant.TRAINING) -> np.random.Generator:
    """Where as many numbers are drawn as it takes: a generator that depends on (seed, purpose, variant, row) alone."""
    return _generator(seed, purpose + _VARIANT * variant, counter=row << 64)


def _generator(seed: int, purpose: int, counter: int) -> np.random.Generator:
    return np.random.Generator(_philox(seed, purpose, counter))


def _philox(seed: int, purpose: int, counter: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)
