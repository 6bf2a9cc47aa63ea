"""Boxes of flat ranges, of whatever shape and layout."""

from __future__ import annotations

from math import prod

import pytest
import torch

from parallel.layout import TensorLayout
from parallel.sharding.boxes import Box, boxes_of_range, placed_boxes, whole_box

SHAPES = [(), (1,), (7,), (4, 5), (3, 1, 4), (2, 3, 4), (1, 1), (2, 1, 3, 2)]
LAYOUTS = [
    TensorLayout(shape=()),
    TensorLayout(shape=(6,)),
    TensorLayout(shape=(4, 3, 2)),
    TensorLayout(shape=(13, 4), dim=0, segments=(6, 6, 1), units=(2, 2, 1), parts=2, index=0),
    TensorLayout(shape=(13, 4), dim=0, segments=(6, 6, 1), units=(2, 2, 1), parts=2, index=1),
    TensorLayout(shape=(3, 11), dim=1, segments=(6, 5), units=(3, 1), parts=2, index=1),
    TensorLayout(shape=(9,), dim=0, segments=(4, 5), parts=3, index=2),
    TensorLayout(shape=(3, 5, 2), dim=1, segments=(2, 3), parts=2, index=0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_cover_a_range_once_and_in_order(shape: tuple[int, ...]) -> None:
    full = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            found = list(boxes_of_range(shape, start, stop))
            met = [i for box in found for i in box.of(full, whole_box(shape).offset).flatten().tolist()]
            assert met == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_placed_boxes_are_the_logical_tensors_elements(layout: TensorLayout) -> None:
    full = torch.arange(prod(layout.shape)).view(layout.shape)
    flat = layout.local(full).flatten()
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            here, met = flat[start:stop], []
            boxes = placed_boxes(layout, start, stop)
            assert layout.is_sharded or len(boxes) <= max(1, 2 * len(layout.shape) - 1)
            for placed in boxes:
                assert torch.equal(placed.of(here), placed.box.of(full, whole_box(layout.shape).offset))
                met += placed.of(here).flatten().tolist()
            assert sorted(met) == sorted(here.tolist())


def test_what_boxes_have_in_common() -> None:
    box = Box((1, 2), (3, 4))
    assert box.common(Box((0, 0), (2, 3))) == Box((1, 2), (1, 1))
    assert box.common(Box((2, 3), (9, 1))) == Box((2, 3), (2, 1))
    assert box.common(Box((4, 2), (1, 1))) is None
    assert Box((), ()).common(Box((), ())) == Box((), ())
