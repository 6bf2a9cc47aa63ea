"""Positions as the one learned table that every other library has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from model.embed import sincos_table
from model.formats.sources import Entry
from model.formats.weights import Weights
from model.towers import IMAGE

_TABLE = "embed.pos"
_PARTS = ("embed.pos_row", "embed.pos_col")  # of two towers after `image.`


def with_table(weights: Weights) -> Weights:
    """The same model with position `learned_1d`, where it has `learned_2d` or `sincos_2d`: the same sums, bit for bit,
    are added to its patches. Any other as it is.
    """
    if weights.description.model.position not in ("learned_2d", "sincos_2d"):
        return weights
    return _WithTable(weights)


class _WithTable:
    """As Weights."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.path, self.kind = weights, weights.path, weights.kind
        before, self.carried = weights.description.model, weights.carried
        here = before.sizes.stages[0]
        self._rows, self._cols = here.rows, here.cols
        own = False if before.sizes.class_tokens else None  # which class tokens have none of
        start = "" if weights.description.pairing is None else f"{IMAGE}."
        self._table, self._parts = start + _TABLE, tuple(start + part for part in _PARTS)
        model = replace(before, position="learned_1d", class_position=own).resolve()
        self.description = replace(weights.description, model=model)
        first = next(iter(weights.tensors.values()))
        table = Entry((here.rows * here.cols, here.width), first.dtype)
        kept = {name: entry for name, entry in weights.tensors.items() if name not in self._parts}
        self.tensors: Mapping[str, Entry] = kept | {self._table: table}

    def read(self, name: str) -> Tensor:
        """As Weights."""
        if name != self._table:
            return self._weights.read(name)
        if self._weights.description.model.position == "sincos_2d":
            return sincos_table(self._rows, self._cols, self.tensors[name].shape[1]).to(self.tensors[name].dtype)
        row, col = (self._weights.read(part) for part in self._parts)
        return (row[:, None] + col).flatten(0, 1)

    def read_carried(self, name: str) -> Tensor:
        """As Weights."""
        return self._weights.read_carried(name)

    def close(self) -> None:
        """As Weights."""
        self._weights.close()
