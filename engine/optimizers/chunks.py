"""Fragments in chunks: scratch is bounded, and on a CPU stays in its cache."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import NamedTuple

from parallel.sharding.exchange import Block, blocks
from parallel.sharding.fragments import Fragment

# Elements. Scratch of a chunk is a few times this, in fp32.
_SIZE = {"cpu": 1 << 17}
_SIZE_ELSEWHERE = 1 << 23


class Chunk(NamedTuple):
    """Some elements of a fragment, and which rectangles of which logical matrices they are (offsets from the first)."""

    elements: slice
    blocks: list[Block]


def chunks(fragment: Fragment, start: int = 0, stop: int | None = None) -> list[Chunk]:
    """Elements [start, stop) of a fragment (default: all), cut where rows of the local part begin.

    Cuts depend on the local part alone, so what is summed chunk by chunk is summed alike at every ZeRO stage.
    """
    layout, base = fragment.info.layout, fragment.start
    begin, end = base + start, fragment.stop if stop is None else base + stop
    width = max(1, prod(layout.local_shape[1:]))
    size = max(1, _SIZE.get(fragment.weight.device.type, _SIZE_ELSEWHERE) // width) * width
    cuts = [begin, *range((begin // size + 1) * size, end, size), end]
    return [
        Chunk(slice(first - base, last - base), blocks(layout, first, last))
        for first, last in pairwise(cuts)
        if first < last
    ]


def own_chunks(fragment: Fragment) -> list[Chunk]:
    """The elements that this rank accounts for."""
    start, stop, _ = fragment.own.indices(fragment.stop - fragment.start)
    return chunks(fragment, start, stop)
