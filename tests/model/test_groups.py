"""Windows and grids against their definitions, and the way of patches into groups and back, on one rank and several."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from model.groups import GroupPlan, Groups, grid, windows
from model.sizes import Tokens
from parallel.layout import split_range
from tests.model.small import context_axis

GROUPED = ("window", "shifted_window", "grid")
SIZES = [  # rows, cols, side: maps that fill whole windows, and maps that do not
    (6, 6, 3), (4, 8, 2), (4, 4, 4), (8, 4, 1),
    (5, 7, 3), (7, 5, 4), (9, 1, 2), (1, 9, 4), (3, 5, 7), (6, 9, 5), (5, 6, 2),
]  # fmt: skip


def groups_of(kind: str, rows: int, cols: int, side: int) -> Groups:
    if kind == "grid":
        return grid(rows, cols, side)
    return windows(rows, cols, side, shifted=kind == "shifted_window")


def neighbourhood(kind: str, row: int, col: int, rows: int, cols: int, side: int) -> tuple[int, int]:
    """Patches with the same one see each other."""
    if kind == "grid":
        return row % math.ceil(rows / side), col % math.ceil(cols / side)
    down, right = (side // 2 if kind == "shifted_window" and length > side else 0 for length in (rows, cols))
    return math.floor((row - down) / side), math.floor((col - right) / side)


def expected(kind: str, rows: int, cols: int, side: int) -> Tensor:
    """Bool [N, N]: who sees whom."""
    places = [neighbourhood(kind, row, col, rows, cols, side) for row in range(rows) for col in range(cols)]
    return torch.tensor([[a == b for b in places] for a in places])


def found(groups: Groups, count: int) -> Tensor:
    """Bool [N, N]: who sees whom through a slot."""
    mask, sees = groups.mask(), torch.zeros(count, count, dtype=torch.bool)
    for g, slots in enumerate(groups.patches.tolist()):
        for (i, a), (j, b) in product(enumerate(slots), repeat=2):
            if a >= 0 and b >= 0 and (mask is None or mask[g, i, j]):
                sees[a, b] = True
    return sees


# -- who sees whom -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", GROUPED)
def test_who_sees_whom(kind: str, size: tuple[int, int, int]) -> None:
    rows, cols, side = size
    groups = groups_of(kind, rows, cols, side)
    length = min(side, rows) * min(side, cols)  # no group is larger than the map
    assert groups.patches.shape == groups.region.shape == (math.ceil(rows / side) * math.ceil(cols / side), length)
    filled = groups.patches[groups.patches >= 0]
    assert filled.sort().values.tolist() == list(range(rows * cols))  # each patch in exactly one slot
    assert torch.equal(found(groups, rows * cols), expected(kind, rows, cols, side))
    mask, fits = groups.mask(), all(length < side or length % side == 0 for length in (rows, cols))
    shifts = kind == "shifted_window" and side > 1 and max(rows, cols) > side
    assert (mask is None) == (fits and not shifts)
    if mask is not None:
        empty = groups.patches < 0
        assert mask.shape == (*groups.patches.shape, length)
        assert not (mask & empty[:, None, :]).any()  # nobody sees an empty slot
        assert mask.any(-1).all()  # and no softmax is empty, not even that of an empty slot


def test_every_small_map() -> None:
    for rows, cols, side in product(range(1, 8), (1, 4, 5, 6), range(1, 5)):
        for kind in GROUPED:
            groups = groups_of(kind, rows, cols, side)
            assert sorted(groups.patches[groups.patches >= 0].tolist()) == list(range(rows * cols)), (kind, rows, cols)
            slot = {patch: (g, i) for g, row in enumerate(groups.patches.tolist()) for i, patch in enumerate(row)}
            by_region: dict[tuple[int, int], set[int]] = {}
            by_place: dict[tuple[int, int], set[int]] = {}
            for patch in range(rows * cols):
                g, i = slot[patch]
                by_region.setdefault((g, int(groups.region[g, i])), set()).add(patch)
                place = neighbourhood(kind, *divmod(patch, cols), rows, cols, side)
                by_place.setdefault(place, set()).add(patch)
            assert set(map(frozenset, by_region.values())) == set(map(frozenset, by_place.values())), (kind, rows, cols)


def test_a_shifted_window_does_not_go_round_the_edge() -> None:
    """The four corners share a group, packed side by side, and none sees another."""
    groups = windows(4, 4, 2, shifted=True)
    corners = [0, 3, 12, 15]
    assert sorted(groups.patches[-1].tolist()) == corners
    sees = found(groups, 16)[corners][:, corners]
    assert torch.equal(sees, torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("kind", GROUPED)
def test_a_dimension_that_one_group_covers_is_whole(kind: str) -> None:
    """As in Swin: neither cut nor shifted there, and no larger than the map, whatever was asked for."""
    for side in (7, 8, 10**9):
        groups = groups_of(kind, 7, 7, side)
        assert groups.patches.flatten().tolist() == list(range(49)) and groups.mask() is None
    if kind == "shifted_window":  # along the longer dimension alone
        sees = found(groups_of(kind, 7, 14, 7), 98).view(7, 14, 7, 14)
        assert [int(sees[3, col, :, 5].sum()) for col in (2, 3, 9, 10)] == [0, 7, 7, 0]


def test_a_grid_spreads_over_the_map() -> None:
    """Patches of one group lie as far apart as they can, evenly."""
    sees = found(grid(6, 8, 2), 48).view(6, 8, 6, 8)
    assert sees[1, 2].nonzero().tolist() == [[1, 2], [1, 6], [4, 2], [4, 6]]


# -- patches into groups and back --------------------------------------------------------------------------------------


def tokens(rows: int, cols: int, ranks: int = 1, index: int = 0) -> Tokens:
    """Of a rank that is given the rows of a map with the others; nothing is sent."""
    shares = tuple(split_range(rows, ranks, i) for i in range(ranks))
    return Tokens(rows=rows, cols=cols, prefix=0, rows_of_ranks=shares, context=context_axis(ranks, index))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", GROUPED)
def test_gather_and_scatter(kind: str, size: tuple[int, int, int]) -> None:
    rows, cols, _ = size
    groups = groups_of(kind, *size)
    plan, slots = GroupPlan(groups, tokens(rows, cols)), groups.patches.flatten()
    filled = slots >= 0
    x = torch.randn(2, rows * cols, 3, dtype=torch.float64)
    gathered = plan.gather(x)
    assert gathered.shape == (2, plan.count * plan.length, 3)
    assert torch.equal(gathered[:, filled], x[:, slots[filled]])
    assert torch.equal(plan.scatter(gathered), x)


@pytest.mark.parametrize("size", [(4, 4, 2), (3, 4, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", GROUPED)
def test_their_gradients(kind: str, size: tuple[int, int, int]) -> None:
    """With and without empty slots, whose values are never used."""
    rows, cols, _ = size
    groups = groups_of(kind, *size)
    plan, filled = GroupPlan(groups, tokens(rows, cols)), (groups.patches.flatten() >= 0)[:, None]
    patches = torch.randn(2, rows * cols, 2, dtype=torch.float64, requires_grad=True)
    slots = torch.randn(2, plan.count * plan.length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plan.gather(x) * filled, patches)
    assert torch.autograd.gradcheck(plan.scatter, slots)
    assert torch.autograd.gradcheck(lambda x: plan.scatter(plan.gather(x).sin()), patches)
    plan.scatter(slots).sum().backward()
    assert slots.grad is not None
    assert torch.equal(slots.grad, filled.expand_as(slots).double())  # 0 at empty slots


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8, 2), (5, 7, 3), (4, 3, 4), (9, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", GROUPED)
def test_groups_over_ranks(kind: str, size: tuple[int, int, int], ranks: int) -> None:
    """What would be sent, by hand: every group comes whole to one rank, and every patch back to where it was."""
    rows, cols, _ = size
    groups, whole = groups_of(kind, *size), torch.arange(rows * cols)
    places = [tokens(rows, cols, ranks, i) for i in range(ranks)]
    plans = [GroupPlan(groups, place) for place in places]
    own = [whole[t.first * cols : t.stop * cols] for t in places]
    assert sum(plan.count for plan in plans) == len(groups.patches)
    leaving = [patches[plan.depart].split(plan.send) for plan, patches in zip(plans, own, strict=True)]
    start = 0
    for i, plan in enumerate(plans):
        assert plan.receive == [other.send[i] for other in plans]
        arrived, slots = (
            torch.cat([parts[i] for parts in leaving]),
            groups.patches[start : start + plan.count].flatten(),
        )
        start += plan.count
        assert torch.equal(arrived[plan.fill][slots >= 0], slots[slots >= 0])
        assert torch.equal(arrived[plan.fill][plan.filled], arrived)
        assert torch.equal(own[i][plan.depart][plan.home], own[i])


@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (8, 4), (12, 3)])
def test_windows_within_the_rows_of_a_rank_stay_there(rows: int, ranks: int) -> None:
    for i in range(ranks):
        place = tokens(rows, 6, ranks, i)
        plan = GroupPlan(windows(rows, 6, 2), place)
        assert plan.send == plan.receive == [place.patches if other == i else 0 for other in range(ranks)]
