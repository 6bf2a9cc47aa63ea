"""What is asked of a method, and what it gives: maps to draw, arrays to store, lines to print.

Legend: B images.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says.

    Attributes:
        layers: numbers of blocks; None: all. heads: numbers, or None. query: row and column of a patch of the first
            stage; None: what is pooled. target: the class to be explained; None: that of the largest logit. masks,
            steps, clusters: how many.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    query: tuple[int, int] | None = None
    target: int | None = None
    masks: int = 1000
    steps: int = 50
    clusters: int = 5


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to draw, and to store.

    Attributes:
        maps: [B, rows, cols] by names of a line and a column of a sheet. colors: [B, rows, cols, 3] in 0..1, likewise.
        arrays: anything else to be stored, by name. says: lines to print. smooth: whether there is anything between the
            centres of patches; not of what has no order. compared: whether an image's maps are looked at together.
    """

    maps: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    colors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    says: list[str] = field(default_factory=list)
    smooth: bool = True
    compared: bool = False
