"""Every trained tensor is a piece of one logical tensor: what piece, of what, is kept beside it.

Initial values, optimizer groups, gradient reduction, checkpoints and comparisons between layouts need nothing else.

A fused tensor (q, k, v and fc1 in one matrix) is split segment by segment, so that each rank holds its heads of q, of
k, of v, and its part of the MLP. A segment that does not divide gives its first ranks one element more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn


def split_range(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` of `length` elements cut into `parts` as even as can be, larger parts first."""
    base, extra = divmod(length, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


class Piece(NamedTuple):
    """Elements [global_start, global_start + length) of the logical dim lie at [local_start, ...) of the local one."""

    global_start: int
    local_start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """The logical tensor, and the part of it that this rank holds.

    Attributes:
        shape: of the logical (unsharded) tensor.
        dim: along which it is split over the tensor axis; None if each rank holds all of it.
        segments: lengths along `dim` that are split one by one; they sum to shape[dim].
        units: per segment, the length that is never cut (a head), 1 if not given. Where units do not divide, some ranks
            hold one more.
        parts, index: number of ranks it is split over, and this one.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    parts: int = 1
    index: int = 0

    def __post_init__(self) -> None:
        assert self.dim is None or sum(self.segments) == self.shape[self.dim], self

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks of the tensor axis hold other parts."""
        return self.dim is not None and self.parts > 1

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """One contiguous run per segment, along `dim`; the whole tensor along dim 0 if it is not split."""
        return _pieces(self)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        if self.dim is None:
            return self.shape
        local = sum(piece.length for piece in self.pieces)
        return (*self.shape[: self.dim], local, *self.shape[self.dim + 1 :])

    def local(self, full: Tensor) -> Tensor:
        """This rank's part of the logical tensor `full` (a copy if it is sharded)."""
        if self.dim is None:
            return full
        return torch.cat([full.narrow(self.dim, p.global_start, p.length) for p in self.pieces], self.dim)

    def place(self, full: Tensor, local: Tensor) -> None:
        """Write this rank's part `local` into its place in `full`."""
        if self.dim is None:
            full.copy_(local)
            return
        for p in self.pieces:
            full.narrow(self.dim, p.global_start, p.length).copy_(local.narrow(self.dim, p.local_start, p.length))


@cache
def _pieces(layout: TensorLayout) -> tuple[Piece, ...]:
    """Asked for often, of few layouts: the parameters of all blocks have the same."""
    if layout.dim is None:
        return (Piece(0, 0, layout.shape[0] if layout.shape else 1),)
    out, offset, local = [], 0, 0
    for segment, unit in zip(layout.segments, layout.units or (1,) * len(layout.segments), strict=True):
        start, stop = (unit * i for i in split_range(segment // unit, layout.parts, layout.index))
        out.append(Piece(offset + start, local, stop - start))
        offset, local = offset + segment, local + stop - start
    return tuple(out)


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a parameter starts. `scales` has one entry per segment of the layout (or one for all).

    Kinds: `constant` (value = scale), `normal` (standard deviation = scale), `truncated_normal` (cut at 2 standard
    deviations), `uniform` (in [-scale, scale)).
    """

    kind: str
    scales: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What the engine knows of a parameter beside its values.

    Attributes:
        layout: which part of which logical tensor it is.
        init: how it starts.
        decay: weight-decay group: `body`, `head` or `none`.
        partial_over_tensor: a copy on each tensor rank whose gradient there covers only part of the rows or heads, so
            that gradients must be summed over the tensor axis.
    """

    layout: TensorLayout
    init: Init
    decay: str = "none"
    partial_over_tensor: bool = False


def make_parameter(info: ParameterInfo, device: torch.device | str = "meta") -> nn.Parameter:
    """A parameter of `info`'s local shape, uninitialised fp32; `initialise` fills it."""
    parameter = nn.Parameter(torch.empty(info.layout.local_shape, device=device))
    attach_info(parameter, info)
    return parameter


def attach_info(parameter: nn.Parameter, info: ParameterInfo) -> None:
    """Keep `info` beside `parameter`."""
    parameter.vitruvius_info = info  # type: ignore[attr-defined]


def info_of(parameter: nn.Parameter) -> ParameterInfo:
    """What `attach_info` kept."""
    info: ParameterInfo = parameter.vitruvius_info  # type: ignore[attr-defined]
    return info
