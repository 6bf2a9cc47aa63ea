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
        self.sizes = build.sizes
        for spec in specs:
            put_under(self, spec.name, spec.factory(build.at(spec.stage)))

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """Names and modules, in forward order."""
        return [(spec.name, self.get_submodule(spec.name)) for spec in self.specs]


class Stage(Layers):
    """Layers of one pipeline stage."""

    def forward(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """Rows of the boundary before (nothing for the first stage) -> those of the boundary after, or logits."""
        x = inputs[0] if inputs else None
        for name, layer in self.layers:
            x = self.run(name, layer, x, batch)
        assert isinstance(x, torch.Tensor)
        return (x,)

    def run(self, name: str, layer: nn.Module, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """One of the layers, on what the layer before gave out (None: the first layer of all), in its own format."""
        y: Tensor = layer(None if x is None else x.to(self.precision.of_layer(name)), batch)
        return y
