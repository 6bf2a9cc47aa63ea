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
