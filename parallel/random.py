"""Random numbers that depend on (seed, name, global index) alone, so that every layout draws the same ones.

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the value at an index is
a hash of the key and that index, so a rank draws just the part of a tensor it holds, on any device. The hash is
SplitMix64's finaliser (Steele et al. 2014), in wrapping int64 arithmetic.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from parallel.layout import Init, TensorLayout, info_of

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_CHUNK = 1 << 22  # elements hashed at a time: bounds the int64 temporaries


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def key(seed: int, name: str) -> int:
    """A 64-bit key for the stream of random numbers called `name`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(stream: int, index: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), fp32, at each int64 `index` of the stream with key `stream`; shape of `index`.

    23 bits each, at the centre of their interval: with the half added, the most that fp32 holds exactly, so neither 0
    nor 1 occurs.
    """
    z = index * _signed(_GOLDEN) + _signed(stream)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift(z, 31)
    return (_shift(z, 41).to(torch.float32) + 0.5) * 2.0**-23


def _draw(kind: str, scale: float, u: Tensor) -> Tensor:
    if kind == "uniform":
        return (2 * u - 1) * scale
    if kind == "truncated_normal":
        edge = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))
        u = edge + (1 - 2 * edge) * u
    elif kind != "normal":
        raise ValueError(f"unknown kind of initial values {kind!r}")
    return torch.erfinv(2 * u - 1) * (math.sqrt(2) * scale)


def fill(local: Tensor, layout: TensorLayout, init: Init, stream: int) -> None:
    """Fill `local`, this rank's part of a logical tensor, with its initial values, in place."""
    dim = layout.dim or 0
    pieces = layout.pieces
    scales = init.scales * len(pieces) if len(init.scales) == 1 else init.scales
    assert len(scales) == len(pieces), (layout, init)
    for piece, scale in zip(pieces, scales, strict=True):
        target = local.narrow(dim, piece.local_start, piece.length) if local.dim() else local
        if init.kind == "constant":
            target.fill_(scale)
        else:
            _fill_piece(target, layout.shape, dim, piece.global_start, init.kind, scale, stream)


def _fill_piece(
    target: Tensor, shape: tuple[int, ...], dim: int, offset: int, kind: str, scale: float, stream: int
) -> None:
    """Fill one box of the logical tensor, a chunk of rows at a time."""
    if target.numel() == 0:
        return
    inner = torch.zeros((), dtype=torch.int64, device=target.device)  # global index within one row (dim 0)
    for d in range(1, target.dim()):
        place = torch.arange(target.shape[d], device=target.device) + (offset if d == dim else 0)
        inner = inner[..., None] + place * math.prod(shape[d + 1 :])
    rows_at_once = max(1, _CHUNK // max(1, inner.numel()))
    for start in range(0, target.shape[0], rows_at_once):
        stop = min(start + rows_at_once, target.shape[0])
        rows = torch.arange(start, stop, device=target.device) + (offset if dim == 0 else 0)
        index = (rows * math.prod(shape[1:])).view(-1, *[1] * inner.dim()) + inner
        target[start:stop].copy_(_draw(kind, scale, uniform(stream, index)))


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` from (seed, its name, its global index)."""
    for name, parameter in module.named_parameters():
        info = info_of(parameter)
        fill(parameter, info.layout, info.init, key(seed, name))
