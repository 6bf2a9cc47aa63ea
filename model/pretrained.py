"""Modules whose weights are read from checkpoints and written as such, of this program and of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from model.formats.api import save_weights
from model.formats.base import Description, Preprocessing
from model.formats.sources import Entry
from model.formats.weights import Weights
from parallel.layout import attach_info, info_of
from parallel.random import initialise


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


class Pretrained(nn.Module):
    """A base of whole models on one process. They set `_description` and call `_materialise`."""

    _description: Description
    _carried: Mapping[str, Tensor] = {}

    def _materialise(self, seed: int | None, device: torch.device | str) -> None:
        """Parameters that are meta so far get memory, and their initial values (seed None: whatever is in it)."""
        for name, meta in list(self.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(torch.empty(meta.shape, device=device), requires_grad=meta.requires_grad)
            attach_info(parameter, info_of(meta))
            setattr(self.get_submodule(owner), leaf, parameter)
        if seed is not None:
            initialise(self, seed)
        self.to(device)

    @torch.no_grad()
    def _filled(self, weights: Weights) -> Self:
        """This model with such weights, copied one by one, and what is known of them; to be evaluated."""
        for name, parameter in self.named_parameters():
            parameter.copy_(weights.read(name))
        self._description = weights.description
        self._carried = {name: weights.read_carried(name) for name in weights.carried}
        return self.eval()

    def save_pretrained(
        self,
        path: str | Path,
        kind: str = "vitruvius",
        *,
        dtype: torch.dtype | None = None,
        leave_out: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Write the weights as a checkpoint of this program, or for another library.

        What came from elsewhere and has no part in this model (the text tower of a lone image tower) goes back to where
        it came from.

        Args:
            path: of a folder (big_vision: a file) that does not exist yet. kind: one of `tools.convert`. dtype: of the
                tensors (default: that of the weights). leave_out: patterns of what may be dropped.
            preprocessing: of images (default: `self.preprocessing`).

        Raises:
            ValueError: the place is taken, or the kind cannot express this model; by name. Nothing is written then.
        """
        description = replace(self._description, preprocessing=preprocessing or self.preprocessing)
        save_weights(
            ModuleWeights(self, description, self._carried), Path(path), kind, dtype=dtype, leave_out=leave_out
        )

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images are prepared, if where the weights came from has said so."""
        return self._description.preprocessing
