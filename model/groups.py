"""Windows and grids: which patches attend to each other, as index tables made once per layer.

A group is a row of L slots, each filled by one patch or by none (where the map does not fill whole windows). Attention
folds the groups into the batch dimension, so no N x N mask is ever built: a mask [G, L, L] exists only where slots are
empty or a shifted window wraps around the edge.

Legend: G groups, L slots of each, N patches of an image, C ranks of the context axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.sizes import StageSizes, Tokens
from parallel.context import exchange
from parallel.layout import split_range


@dataclass(frozen=True)
class Groups:
    """The groups of one image.

    Attributes:
        patches: int64 [G, L], the patch in each slot, row-major on the map; -1 for none.
        region: int64 [G, L]; slots see each other where this is equal.
    """

    patches: Tensor
    region: Tensor

    def mask(self) -> Tensor | None:
        """Bool [G, L, L], which slot (row) sees which; None if all see all. An empty slot sees all patches, so that no
        softmax is empty."""
        filled = self.patches >= 0
        sees = filled[:, None, :] & ((self.region[:, :, None] == self.region[:, None, :]) | ~filled[:, :, None])
        return None if bool(sees.all()) else sees


def _slots(row_of: Tensor, col_of: Tensor, rows: int, cols: int) -> Tensor:
    """Patches at the given rows and columns of the map (broadcast), -1 outside."""
    inside = (row_of >= 0) & (row_of < rows) & (col_of >= 0) & (col_of < cols)
    return torch.where(inside, row_of * cols + col_of, -1)


def _cut(length: int, side: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Windows along one dimension of the map, none longer than it: where one covers it, nothing is shifted.

    Returns:
        (place of each slot, perhaps past the edge; whether it went round the padded edge to get there), both
        [windows, side].
    """
    side = min(side, length)
    count = -(-length // side)
    slots = torch.arange(count * side).view(count, side) + (side // 2 if shifted and count > 1 else 0)
    return slots % (count * side), slots >= count * side


def windows(rows: int, cols: int, side: int, *, shifted: bool = False) -> Groups:
    """Windows of side x side patches; shifted ones have their edges at side // 2 modulo `side` (Liu et al. 2021, Swin).

    A dimension of the map that one window covers is not shifted, as in timm's and torchvision's Swin. Windows cut by
    the map's edge are packed into one group where they fit, apart by their region.
    """
    (row_of, row_round), (col_of, col_round) = (_cut(length, side, shifted=shifted) for length in (rows, cols))
    row_of, row_round = (x[:, None, :, None] for x in (row_of, row_round))
    col_of, col_round = (x[None, :, None, :] for x in (col_of, col_round))
    patches, region = _slots(row_of, col_of, rows, cols), row_round * 2 + col_round
    return Groups(patches.flatten(2).flatten(0, 1), region.flatten(2).flatten(0, 1))


def grid(rows: int, cols: int, side: int) -> Groups:
    """Patches spread evenly over the map, side x side of them to a group (Tu et al. 2022, MaxViT), or as many as the
    map has along a shorter dimension."""
    high, wide = min(side, rows), min(side, cols)
    down, across = -(-rows // high), -(-cols // wide)  # distance between patches of one group
    row_of = (torch.arange(down)[:, None] + torch.arange(high) * down)[:, None, :, None]
    col_of = (torch.arange(across)[:, None] + torch.arange(wide) * across)[None, :, None, :]
    patches = _slots(row_of, col_of, rows, cols).flatten(2).flatten(0, 1)
    return Groups(patches, torch.zeros_like(patches))


def groups_of(kind: str, here: StageSizes) -> Groups:
    """Those of a kind of attention in which patches see their group (model.attention.GroupedAttention), in a stage."""
    if kind == "grid":
        return grid(here.rows, here.cols, here.grid)
    return windows(here.rows, here.cols, here.window, shifted=kind == "shifted_window")


class _Rearrange(torch.autograd.Function):
    """x[index] along dim 1, where all but the surplus entries of index are one-to-one: backward is a gather as well."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(1, inverse), None, None


class GroupPlan(nn.Module):
    """How this rank's patches come into groups and back; each rank of the context axis works on a share of the groups.

    A patch travels only if its group is worked on elsewhere: windows that lie within a rank's rows cost nothing.

    Args:
        groups: of the whole image. tokens: which patches this rank holds.

    Attributes:
        count, length: groups on this rank, and their slots. mask: bool [count, L, L], or None.
    """

    depart: Tensor
    home: Tensor
    fill: Tensor
    filled: Tensor
    mask: Tensor | None

    def __init__(self, groups: Groups, tokens: Tokens) -> None:
        super().__init__()
        axis = self.axis = tokens.context
        shares = [split_range(len(groups.patches), axis.size, i) for i in range(axis.size)]
        own = slice(*shares[axis.index])
        mine = Groups(groups.patches[own], groups.region[own])
        self.count, self.length = mine.patches.shape
        held = [(a * tokens.cols, b * tokens.cols) for a, b in tokens.rows_of_ranks]  # (first, stop) patch of each rank
        home = torch.zeros(tokens.rows * tokens.cols, dtype=torch.int64)  # the rank that works on each patch's group
        for i, (start, stop) in enumerate(shares):
            part = groups.patches[start:stop]
            home[part[part >= 0]] = i
        first, last = held[axis.index]
        order = torch.argsort(home[first:last], stable=True)  # own patches, by destination
        self.send = [int((home[first:last] == i).sum()) for i in range(axis.size)]
        self.receive = [int((home[a:b] == axis.index).sum()) for a, b in held]
        arrived = torch.nonzero(home == axis.index).flatten()  # in order of source, which is that of the patches
        flat = mine.patches.flatten()
        place = torch.zeros(len(home), dtype=torch.int64)
        place[arrived] = torch.arange(len(arrived))
        slot = torch.zeros(len(home), dtype=torch.int64)
        slot[flat[flat >= 0]] = torch.nonzero(flat >= 0).flatten()
        tables = {
            "depart": order, "home": torch.argsort(order),  # own patches <-> by destination
            "fill": place[flat.clamp(min=0)], "filled": slot[arrived],  # arrived <-> slots
            "mask": mine.mask(),
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def gather(self, x: Tensor) -> Tensor:
        """This rank's patches [B, N_c, F] -> slots [B, G * L, F]; an empty slot holds some patch's values."""
        if self.axis.size > 1:
            x = _Rearrange.apply(x, self.depart.to(x.device), self.home.to(x.device))
            x = self._move(x, self.send, self.receive)
        return _Rearrange.apply(x, self.fill.to(x.device), self.filled.to(x.device))

    def scatter(self, x: Tensor) -> Tensor:
        """Slots [B, G * L, F] -> this rank's patches [B, N_c, F]."""
        if len(self.filled) == len(self.fill):
            x = _Rearrange.apply(x, self.filled.to(x.device), self.fill.to(x.device))
        else:  # empty slots have no gradient
            x = x.index_select(1, self.filled.to(x.device))
        if self.axis.size == 1:
            return x
        x = self._move(x, self.receive, self.send)
        return _Rearrange.apply(x, self.home.to(x.device), self.depart.to(x.device))

    def _move(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return exchange(x.transpose(0, 1), send, receive, self.axis).transpose(0, 1)
