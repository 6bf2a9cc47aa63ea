"""A module's weights as something that the formats of other libraries are written from, and filled from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.formats.base import Description
from model.formats.sources import Entry
from model.formats.weights import Weights


class ModuleWeights:
    """As model.formats.weights.Weights.

    Args:
        module: whose parameters have our names. description: of the model. carried: tensors for the way back.
    """

    kind, path = "a model in memory", Path()

    def __init__(self, module: nn.Module, description: Description, carried: Mapping[str, Tensor]) -> None:
        self.description, self._carried = description, carried
        self._parameters = dict(module.named_parameters())
        self.tensors: Mapping[str, Entry] = {n: Entry(tuple(p.shape), p.dtype) for n, p in self._parameters.items()}
        self.carried: Mapping[str, Entry] = {n: Entry(tuple(x.shape), x.dtype) for n, x in carried.items()}

    def read(self, name: str) -> Tensor:
        """As Weights."""
        return self._parameters[name].detach().cpu()

    def read_carried(self, name: str) -> Tensor:
        """As Weights."""
        return self._carried[name]

    def close(self) -> None:
        """As Weights."""


@torch.no_grad()
def fill(module: nn.Module, weights: Weights) -> None:
    """Copy weights into a module's parameters, one by one."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weights.read(name))
