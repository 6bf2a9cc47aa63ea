"""What no value of the configuration may be, and arithmetic that stays quick for the largest numbers."""

from __future__ import annotations

import math
from typing import Any

_FP32_MAX = (2 - 2**-23) * 2.0**127


def check_values(value: Any, key: str = "") -> None:
    """Raise ValueError for a number that neither fp32 nor 64 bits hold, or a text that no file can, naming its key."""
    if isinstance(value, dict):
        for name, part in value.items():
            check_values(part, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            check_values(part, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: it must be a finite number")
    elif isinstance(value, float) and abs(value) > _FP32_MAX:
        raise ValueError(f"{key} is {value}: it must be at most {_FP32_MAX:.1e}, the largest number of fp32")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{key} is {value}: it must be an integer of at most 64 bits, below 2^63")
    elif isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
        raise ValueError(
            f"{key} is {value!r}: it must be text in UTF-8, as it is written to files: rename what it names"
        )


def divisors(number: int) -> list[int]:
    """All that divide a positive number, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
