"""Pieces of logical tensors: every element is on exactly one rank, and goes back to where it came from."""

from itertools import product

import pytest
import torch
from torch import nn

from parallel.layout import Init, ParameterInfo, TensorLayout, attach_info, info_of, make_parameter, split_range

CASES = [  # shape, dim, segments
    ((7,), 0, (7,)),
    ((12, 5), 0, (12,)),
    ((22, 3), 0, (4, 4, 4, 10)),
    ((3, 19), 1, (8, 11)),
    ((2, 9, 3), 1, (4, 5)),
]


def layouts(shape: tuple[int, ...], dim: int, segments: tuple[int, ...], parts: int) -> list[TensorLayout]:
    return [TensorLayout(shape=shape, dim=dim, segments=segments, parts=parts, index=i) for i in range(parts)]


@pytest.mark.parametrize(("length", "parts"), list(product((0, 1, 5, 12, 13), (1, 2, 3, 4))))
def test_split_range(length: int, parts: int) -> None:
    ranges = [split_range(length, parts, index) for index in range(parts)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("case", "parts"), list(product(CASES, (1, 2, 3, 4))), ids=str)
def test_parts_make_up_the_whole(case: tuple[tuple[int, ...], int, tuple[int, ...]], parts: int) -> None:
    shape = case[0]
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    back = torch.full_like(full, -1)
    count = 0
    for layout in layouts(*case, parts):
        local = layout.local(full)
        assert local.shape == layout.local_shape
        assert layout.is_sharded == (parts > 1)
        layout.place(back, local)
        count += local.numel()
    assert torch.equal(back, full)
    assert count == full.numel()


def test_each_segment_is_split_by_itself() -> None:
    """q, k, v and fc1 in one matrix: rank 1 of 2 holds the second half of each."""
    layout = layouts((10,), 0, (2, 2, 2, 4), 2)[1]
    assert layout.local(torch.arange(10)).tolist() == [1, 3, 5, 8, 9]
    assert [tuple(piece) for piece in layout.pieces] == [(1, 0, 1), (3, 1, 1), (5, 2, 1), (8, 3, 2)]


HEADS = [  # lengths of segments, and what of each is never cut
    ((20, 20, 20, 13), (4, 4, 4, 1)),
    ((25 * 8,), (8,)),
    ((12, 9), (3, 3)),
    ((10, 20), (2, 4)),
]


@pytest.mark.parametrize(("segments", "units"), HEADS, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_units_stay_whole(segments: tuple[int, ...], units: tuple[int, ...], parts: int) -> None:
    """Heads that do not divide: every rank holds whole ones, the first ones one more, and together all of them."""
    total = sum(segments)
    made = [
        TensorLayout(shape=(2, total), dim=1, segments=segments, units=units, parts=parts, index=i)
        for i in range(parts)
    ]
    full, seen = torch.arange(2 * total).view(2, total), []
    back = torch.full_like(full, -1)
    for layout in made:
        local = 0
        assert len(layout.pieces) == len(segments)
        for piece, segment, unit, start in zip(
            layout.pieces, segments, units, [sum(segments[:i]) for i in range(len(segments))], strict=True
        ):
            assert (piece.global_start - start) % unit == piece.length % unit == 0
            assert piece.length // unit in (segment // unit // parts, segment // unit // parts + 1)
            assert piece.local_start == local
            local += piece.length
            seen += range(piece.global_start, piece.global_start + piece.length)
        assert layout.local_shape == (2, local) == layout.local(full).shape
        layout.place(back, layout.local(full))
    assert sorted(seen) == list(range(total))
    assert torch.equal(back, full)
    for segment in range(len(segments)):
        lengths = [layout.pieces[segment].length for layout in made]
        assert lengths == sorted(lengths, reverse=True)


def test_q_k_and_v_of_a_rank_are_of_the_same_heads() -> None:
    """5 heads of 2 on 3 ranks: 2, 2 and 1 of each."""
    layouts = [
        TensorLayout(shape=(30,), dim=0, segments=(10, 10, 10), units=(2, 2, 2), parts=3, index=i) for i in range(3)
    ]
    heads = [(layout.local(torch.arange(30)).view(3, -1) % 10).tolist() for layout in layouts]
    assert heads == [[[0, 1, 2, 3]] * 3, [[4, 5, 6, 7]] * 3, [[8, 9]] * 3]


def test_a_copy_is_the_whole() -> None:
    layout = TensorLayout(shape=(3, 2), parts=4, index=2)
    full, out = torch.arange(6).view(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    assert layout.local(full) is full
    assert not layout.is_sharded
    layout.place(out, full)
    assert torch.equal(out, full)


def test_segments_that_do_not_add_up() -> None:
    with pytest.raises(AssertionError):
        TensorLayout(shape=(8,), dim=0, segments=(3, 4))


def test_what_is_kept_beside_a_parameter() -> None:
    info = ParameterInfo(layout=layouts((6, 4), 0, (6,), 4)[3], init=Init(kind="constant", scales=(1.0,)), decay="head")
    parameter = make_parameter(info)
    assert parameter.shape == (1, 4)
    assert parameter.device.type == "meta"
    assert info_of(parameter) is info
    other = nn.Parameter(torch.zeros(1, 4))
    attach_info(other, info)
    assert info_of(other) is info
