"""Consecutive layers of the list as one module: a pipeline stage, or the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.build import Build
from model.inputs import MicroBatch
from model.layers import LayerSpec


def put_under(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Make a layer a module of `root` by its dotted name in the model."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.ModuleDict())
        root = root.get_submodule(part)
    root.add_module(leaf, layer)


class Layers(nn.Module):
    """Consecutive layers, their parameters on the meta device; names are those of the whole model."""

    def __init__(self, specs: Sequence[LayerSpec], build: Build) -> None:
        super().__init__()
        self.specs, self.precision, self.config = tuple(specs), build.precision, build.config
        self.sizes, self._build = build.sizes, build
        for spec in specs:
            put_under(self, spec.name, spec.factory(build.of(spec)))

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """Names and modules, in forward order."""
        return [(spec.name, self.get_submodule(spec.name)) for spec in self.specs]


class Stage(Layers):
    """Layers of one pipeline stage."""

    def forward(self, inputs: Sequence[Tensor], batch: MicroBatch) -> tuple[Tensor, ...]:
        """What flows over the boundary before (nothing, for the first stage) -> what flows over that after, or what the
        last layer gives: logits, or the embeddings of two towers.

        That is the rows of the layer before, then, in a later tower, what earlier towers have given. A list is emptied,
        so that what a layer was the last to read is gone when it is over.
        """
        flow = tuple(inputs)
        if isinstance(inputs, list):
            inputs.clear()
        for spec in self.specs:
            flow = self.run(spec, self.get_submodule(spec.name), flow, batch)
        return flow

    def run(self, spec: LayerSpec, layer: nn.Module, flow: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """One of the layers, in its own format, on its part of what flows: the rest rides on."""
        return self.give(spec, layer, *spec.parted(flow), batch)

    def give(
        self, spec: LayerSpec, layer: nn.Module, rows: Tensor | None, rides: tuple[Tensor, ...], batch: MicroBatch
    ) -> tuple[Tensor, ...]:
        """The same, of rows and rides."""
        dtype = self.precision.of_layer(spec.name)
        if spec.tower is not None and spec.tower.rests and not batch.training:
            shape = spec.boundary(batch.size // spec.per_sample, self._build)
            y = torch.zeros(shape, dtype=dtype, device=batch.labels.device)
            return (y,) if spec.joins else (y, *rides)
        x = None if rows is None else rows.to(dtype)
        y = layer(*spec.arguments(x, batch, rides))
        return y if spec.joins else (y, *rides)
