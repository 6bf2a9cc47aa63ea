"""The table of docs/recompute.md is what autograd keeps, counted on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.autograd.graph import get_gradient_edge

from engine.plan import META, LiveBytes
from engine.recompute import Recompute, save_set
from engine.recompute.save_sets import LADDER
from model import Build, MicroBatch, ModelConfig, build_layers
from model.kernels import Kernels
from parallel.grid import GridShape, planned_grid
from parallel.tensor import TensorParallel

PAGE = Path(__file__).parents[3] / "docs" / "recompute.md"
MODELS = (ModelConfig(preset="vit_b16", qk_norm=True).resolve(), ModelConfig(preset="vit_22b").resolve())
RANKS, IMAGES = 4, 8
PLACES = 2


def kept(config: ModelConfig, name: str, ranks: int) -> float:
    """Of the second block, beside its input, in units of its whole rows."""
    tp = TensorParallel(axis=planned_grid(GridShape(tensor=ranks), 0).tensor, sequence_parallel=ranks > 1)
    spec = build_layers(config)[2]
    build = Build(config=config, tp=tp, kernels=Kernels("native"), policy=Recompute({spec.name: save_set(name)}))
    x = torch.empty(spec.boundary(IMAGES, build), device=META, requires_grad=True)
    batch = MicroBatch.of_images(torch.empty(IMAGES, 3, *config.image, device=META), training=True)
    layer = spec.factory(build)
    with LiveBytes() as counter:
        edge = get_gradient_edge(layer(x, batch))
        found = counter.now
    del edge
    return found / (x.nbytes * ranks)


def table() -> dict[str, list[float]]:
    """The numbers of the page, of each save set."""
    rows = (line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    return {cells[0].strip(" `"): [float(cell) for cell in cells[2:6]] for cells in rows if len(cells) == 6}


def test_the_table_of_what_is_kept() -> None:
    written = table()
    assert list(written) == [*LADDER, "norm+gather", "input+gather"]
    found = {name: [kept(config, name, ranks) for ranks in (1, RANKS) for config in MODELS] for name in written}
    rounded = {name: [round(number, PLACES) for number in numbers] for name, numbers in found.items()}
    assert rounded == written
