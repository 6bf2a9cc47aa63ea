"""Positions of images of several sizes, out of tables for one: as model.resize has them for a single other size.

Legend: D width; g, h sides of the table's map, r_i, c_i those of image i.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from model.resize import resize_line


def waves(side: int, width: int) -> Tensor:
    """Sines, then cosines, of the places along a side at D/4 frequencies (Chen et al. 2021, MoCo v3): fp64
    [side, D/2]."""
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1)


def lines(table: Tensor, sides: Sequence[int]) -> Tensor:
    """A table of the places along a side [g, D], interpolated to each of these sides: [r_0 + r_1 + ..., D]."""
    return torch.cat([_weights(len(table), side) for side in sides]).to(table) @ table


def maps_of(table: Tensor, grid: tuple[int, int], maps: Sequence[tuple[int, int]]) -> Tensor:
    """A table of the places of a map [g * h, D], row by row, interpolated to each of these maps:
    [r_0 * c_0 + r_1 * c_1 + ..., D]."""
    whole = table.unflatten(0, grid)
    each = ((_weights(side, wanted).to(table) for side, wanted in zip(grid, sides, strict=True)) for sides in maps)
    return torch.cat([torch.einsum("rg,ch,ghd->rcd", by_row, by_col, whole).flatten(0, 1) for by_row, by_col in each])


@lru_cache(maxsize=1024)
def _weights(source: int, target: int) -> Tensor:
    """fp64 [target, source], which a table is interpolated by."""
    with torch.inference_mode(False):  # they are kept, and may be trained with later
        return resize_line(torch.eye(source, dtype=torch.float64), target)
