"""What is in a checkpoint, looked at tensor by tensor in little memory: damage, figures, and how two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.checkpoint.manifest import CheckpointError
from parallel.checkpoint.read import Damaged, Reader, Target
from parallel.sharding.boxes import Box, boxes_of_range, whole_box

BLOCK_BYTES = 128 << 20  # of a tensor, that are compared at once; some chunks at both ends are read twice
_AT_ONCE = 1 << 20  # elements, in float64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Figures:
    """Of a tensor's elements, those that are not finite left out but counted. least, most: None if none is finite."""

    squares: float = 0.0
    least: float | None = None
    most: float | None = None
    not_finite: int = 0

    @property
    def norm(self) -> float:
        """Frobenius."""
        return math.sqrt(self.squares)

    @classmethod
    def of(cls, values: Tensor) -> Figures:
        """Of flat elements, in float64."""
        found = cls()
        for part in values.split(_AT_ONCE):
            finite = part.double()
            squares = float(finite.dot(finite))
            if not math.isfinite(squares):
                finite = finite[finite.isfinite()]
                squares = float(finite.dot(finite))
                found.not_finite += part.numel() - finite.numel()
            if finite.numel():
                least, most = (float(value) for value in torch.aminmax(finite))
                found.add(cls(squares, least, most))
        return found

    def add(self, other: Figures) -> None:
        """Those of other elements."""
        self.squares += other.squares
        self.not_finite += other.not_finite
        if other.least is not None and other.most is not None:
            self.least = other.least if self.least is None else min(self.least, other.least)
            self.most = other.most if self.most is None else max(self.most, other.most)


@dataclass
class Examined:
    """A tensor, read to its end. figures: of what of it is not damaged, zeros if they were not asked for."""

    figures: Figures = field(default_factory=Figures)
    damage: list[Damaged] = field(default_factory=list)


def examine(reader: Reader, name: str, *, figures: bool = False) -> Examined:
    """Read all of a tensor, compare every checksum."""
    found = Examined()
    for part in reader.scan(name, Figures.of if figures else lambda _: Figures()):
        if isinstance(part, Damaged):
            found.damage.append(part)
        else:
            found.figures.add(part)
    return found


def damaged_files(reader: Reader, *, headers: bool) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of each file that is missing, has another length, or, with `headers`, another header."""
    for number, file in enumerate(reader.manifest.files):
        try:
            reader.files.check(number)
            if headers:
                reader.files.check_header(number)
        except CheckpointError as error:
            yield file.name, str(error)


@dataclass
class Differences:
    """Of elements that are given in parts: how many differ, by how much at most, which first. See `Different`."""

    count: int = 0
    largest: float | None = None
    first: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None

    def add(self, left: Tensor, right: Tensor, box: Box, start: int = 0) -> None:
        """Compare flat elements, of a box of the tensor, those from `start` on."""
        for at in range(0, left.numel(), _AT_ONCE):
            x, y = left[at : at + _AT_ONCE], right[at : at + _AT_ONCE]
            where = _differing(x, y)
            if not where.numel():
                continue
            x, y = x[where].double(), y[where].double()
            if self.first is None:
                within = np.unravel_index(start + at + int(where[0]), box.shape) if box.shape else ()
                self.first = tuple(int(i) + offset for i, offset in zip(within, box.offset, strict=True))
                self.values = float(x[0]), float(y[0])
            apart = (x - y).abs()
            apart = apart[apart.isfinite()]
            self.count += where.numel()
            if apart.numel():
                self.largest = max(self.largest or 0.0, float(apart.max()))


class Different(NamedTuple):
    """How a tensor's elements differ in two checkpoints.

    Attributes:
        differing: elements whose bits do, where the types are one; else whose values do. largest: difference,
            None if each is of something that is not finite. first: index of the first. values: there, in either.
    """

    differing: int
    largest: float | None
    first: tuple[int, ...] | None
    values: tuple[float, float] | None


def compare(one: Reader, other: Reader, name: str) -> Different:
    """A tensor that both have, in one shape.

    Raises:
        CheckpointError: it is damaged in one.
    """
    a, b = one.manifest.tensors[name], other.manifest.tensors[name]
    total, length = math.prod(a.shape), BLOCK_BYTES // max(a.dtype.itemsize, b.dtype.itemsize)
    found = Differences()
    for start in range(0, total, length):
        stop = min(start + length, total)
        left, right = (_block(reader, name, start, stop) for reader in (one, other))
        found.add(left, right, whole_box(a.shape), start)
    return Different(found.count, found.largest, found.first, found.values)


def _block(reader: Reader, name: str, start: int, stop: int) -> Tensor:
    """Elements of a flattened tensor."""
    stored = reader.manifest.tensors[name]
    flat, at, targets = torch.empty(stop - start, dtype=stored.dtype), 0, []
    for box in boxes_of_range(stored.shape, start, stop):
        targets.append(Target(box, flat[at : at + box.numel].view(box.shape)))
        at += box.numel
    reader.read({name: targets})
    return flat


def _differing(x: Tensor, y: Tensor) -> Tensor:
    """Where they do: numbers of elements."""
    if x.dtype == y.dtype:
        x, y = (values.view(_BITS[values.dtype.itemsize]) for values in (x, y))
        return torch.empty(0) if torch.equal(x, y) else (x != y).nonzero().flatten()
    x, y = x.double(), y.double()
    return ((x != y) & ~(x.isnan() & y.isnan())).nonzero().flatten()
