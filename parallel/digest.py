"""A hash of a tensor's bits, computed where the tensor is: for telling whether copies are copies, not against malice.

Words of 32 bits (or of the elements, if they are narrower) are each multiplied by an odd 64-bit number that hangs on
their place, and added up, modulo 2^64 (multilinear hashing, Carter and Wegman 1979); chunks are folded together by a
power of another odd number. So a single word that differs always shows, and several do but for a chance of 2^-32 or
less. Integers have no rounding: any order of adding up, on any device, gives the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Elements hashed at once: on a CPU a MiB of scratch, on a GPU kernels that are worth their launch.
_CHUNK = {"cpu": 1 << 17}
_CHUNK_ELSEWHERE = 1 << 22
_FOLD = 0x5851F42D4C957F2D  # odd: Knuth's MMIX multiplier
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@cache
def _factors(length: int, device: torch.device) -> Tensor:
    """Odd numbers by place, [length] int64: splitmix64's mixing of it (Steele et al. 2014), in wrapping products."""
    x = torch.arange(1, length + 1, dtype=torch.int64, device=device) * signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return x | 1


def signed(x: int) -> int:
    """The int64 of the same bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


@torch.no_grad()
def digest(values: Tensor) -> Tensor:
    """The hash of a flat, contiguous tensor of any type: int64 [], on its device. Nothing is copied but a chunk."""
    words = values.view(_WORDS[values.element_size()])
    chunk = _CHUNK.get(words.device.type, _CHUNK_ELSEWHERE)
    factors = _factors(chunk, words.device)
    total = torch.full((), values.numel(), dtype=torch.int64, device=words.device)
    scratch = torch.empty(min(chunk, words.numel()), dtype=torch.int64, device=words.device)
    for part in words.split(chunk):
        n = part.numel()
        total.mul_(_FOLD).add_(scratch[:n].copy_(part).mul_(factors[:n]).sum())
    return total
