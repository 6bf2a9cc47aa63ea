"""The order of samples, written a second time, on Python's integers."""

from __future__ import annotations

import numpy as np


def oracle(seed: int, epoch: int, position: int, size: int) -> int:
    """Black and Rogaway's cipher on integers, as they write it: no arrays, no piece of the code under test."""
    philox = np.random.Philox(key=np.array([seed, 1], dtype=np.uint64), counter=epoch << 128)
    keys = [int(word) for word in philox.random_raw(16)]
    a = 1
    while a * a < size:
        a += 1
    b = (size + a - 1) // a
    while True:
        left, right = position % a, position // a
        for number, key in enumerate(keys):
            modulus = (a, b)[number % 2]
            word = (right + key) * 0x9E3779B97F4A7C15 % 2**64
            word = (word ^ word >> 32) * 0xD1342543DE82EF95 % 2**64
            left, right = right, (left + (word >> 32) * modulus // 2**32) % modulus
        position = a * right + left
        if position < size:
            return position
