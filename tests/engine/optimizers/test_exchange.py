"""Rectangles of logical matrices in flat ranges, and matrices whole on one rank."""

from __future__ import annotations

from math import prod

import pytest
import torch

from engine.optimizers.chunks import chunks, own_chunks
from parallel.comm import single_axis
from parallel.grid import GridShape, make_grid
from parallel.layout import TensorLayout
from parallel.process_group import World
from parallel.sharding.exchange import Block, Exchange, Matrix, blocks, deal, matrix_shapes
from tests.distributed import run_ranks
from tests.engine.optimizers.fragmented import SPECS, Layout, logical, make_fragments, set_gradients
from tests.engine.optimizers.oracles import pieces

LAYOUTS = [
    TensorLayout(shape=(7, 5)),
    TensorLayout(shape=(6,)),
    TensorLayout(shape=()),
    TensorLayout(shape=(13, 4), dim=0, segments=(6, 6, 1), units=(2, 2, 1), parts=2, index=0),
    TensorLayout(shape=(13, 4), dim=0, segments=(6, 6, 1), units=(2, 2, 1), parts=2, index=1),
    TensorLayout(shape=(3, 11), dim=1, segments=(6, 5), units=(3, 1), parts=2, index=1),
    TensorLayout(shape=(9,), dim=0, segments=(4, 5), parts=3, index=2),
    TensorLayout(shape=(4, 3, 2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_of_any_range(layout: TensorLayout) -> None:
    full = torch.arange(prod(layout.shape)).view(layout.shape)
    flat = layout.local(full).flatten()
    parts = [full] if layout.dim is None else full.split(layout.segments, layout.dim)
    matrices = [part.reshape(shape) for part, shape in zip(parts, matrix_shapes(layout), strict=True)]
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            here, met = flat[start:stop], []
            for block in blocks(layout, start, stop):
                assert torch.equal(block.of(here), block.within(matrices[block.segment]))
                met += block.of(here).flatten().tolist()
            assert sorted(met) == sorted(here.tolist())


def test_chunks_cover_fragments_at_row_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.optimizers.chunks._SIZE", {"cpu": 100})
    for layout in (Layout(data=2), Layout(data=2, stage=1)):
        for fragment in make_fragments(SPECS, layout, 1, single_axis("all")).fragments:
            found = chunks(fragment)
            met = [i for chunk in found for i in range(chunk.elements.start, chunk.elements.stop)]
            assert met == list(range(fragment.stop - fragment.start))
            width = prod(fragment.info.layout.local_shape[1:])
            assert all((fragment.start + chunk.elements.start) % width == 0 for chunk in found[1:])
            assert all(sum(b.numel for b in c.blocks) == c.elements.stop - c.elements.start for c in found)
            own = [i for chunk in own_chunks(fragment) for i in range(chunk.elements.start, chunk.elements.stop)]
            assert own == list(range(fragment.own.start, fragment.own.stop))


def test_work_is_dealt_evenly() -> None:
    assert deal([3, 1, 1, 1, 6], 2) == [1, 1, 1, 1, 0]
    assert deal([], 3) == []


def exchange_once(world: World, layouts: list[Layout]) -> list[tuple[int, int]]:
    """(Matrices worked on by this rank, rounds), for each layout; checks what arrives and what comes back."""
    found = []
    for layout in layouts:
        grid = make_grid(GridShape(data=layout.data, tensor=layout.tensor), world)
        fragments = make_fragments(SPECS, layout, world.rank, grid.along("data", "context", "tensor"))
        set_gradients(fragments, SPECS, 1)
        values = [pieces(spec, logical(SPECS, 1)[spec.name]) for spec in SPECS]
        members = [i for i, spec in enumerate(SPECS) if len(spec.shape) == 2]
        exchange = Exchange(fragments, members, lambda rows, cols: rows * cols, torch.float32)
        arrived: list[torch.Tensor] = []

        def read(index: int, block: Block) -> torch.Tensor:
            return block.of(fragments.fragments[index].grad)  # noqa: B023

        def work(matrix: torch.Tensor) -> torch.Tensor:
            arrived.append(matrix)  # noqa: B023
            return matrix * 2

        def write(matrix: Matrix, block: Block, result: torch.Tensor) -> None:
            block.of(fragments.fragments[matrix.fragment].weight).copy_(result)  # noqa: B023

        exchange.run(read, work, write)
        mine = [turn.mine for turn in exchange.rounds if turn.mine is not None]
        for matrix, whole in zip(mine, arrived, strict=True):
            assert torch.equal(whole, values[matrix.fragment][matrix.segment].float())
        assert all(torch.equal(fragments.fragments[i].weight, 2 * fragments.fragments[i].grad) for i in members)
        found.append((len(mine), len(exchange.rounds)))
    return found


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_matrices_arrive_whole_and_results_come_back(ranks: int) -> None:
    shapes = [(ranks, 1), (1, ranks), *([(2, 2)] if ranks == 4 else [])]
    layouts = [Layout(data=data, tensor=tensor, stage=stage) for data, tensor in shapes for stage in (0, 1)]
    by_rank = run_ranks(ranks, exchange_once, layouts)
    total = sum(len(spec.segments) or 1 for spec in SPECS if len(spec.shape) == 2)
    for found in zip(*by_rank, strict=True):
        assert sum(count for count, _ in found) == total
        assert len({rounds for _, rounds in found}) == 1
