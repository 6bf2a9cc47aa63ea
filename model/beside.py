"""What a layer gives beside its rows, in one tensor with them: what a loss behind it compares with another model's.

What flows between layers is one tensor of each, so that boundaries, rides, messages and plans know no more. Queries,
keys and values of a block, or the pooled features of a head, go in columns behind those of its output. The next layer
of the same model is given the first columns alone.

Legend: R rows of B images and S tokens that this rank holds, T tensor ranks, h heads on this one, K head dim, D width,
n how many of q, k and v there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.build import Build
from model.taps import Tapped
from parallel.tensor import TensorParallel
from parallel.tensor.rows import pad_rows

POOLED = "pooled"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Queries, keys and values behind a block's rows.

    Under sequence parallelism a rank has some of the rows and all of its heads: these are cut into as many parts as
    there are tensor ranks, one behind another in a row, so they are T times as many columns.

    Attributes:
        what: which of `q`, `k`, `v`, in this order; none: rows alone. heads: h. head_dim: K. tokens: S. width: D.
    """

    what: str
    heads: int
    head_dim: int
    tokens: int
    width: int
    tp: TensorParallel

    @staticmethod
    def of(build: Build, what: str) -> Beside:
        """Of a block that is built so."""
        here = build.here
        return Beside(
            what=what, heads=build.part(here.heads), head_dim=here.head_dim, tokens=build.tokens.count,
            width=here.width, tp=build.tp,
        )  # fmt: skip

    @property
    def columns(self) -> int:
        """Of all that is given: D, and those behind it."""
        parts = self.tp.size if self.tp.splits_rows else 1
        return self.width + len(self.what) * self.heads * self.head_dim * parts

    def join(self, rows: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """[R, D] (or this rank's rows), and [B, S, h, K] of each -> [R, columns]."""
        if not self.what:
            return rows
        flat = [parts[name].flatten(0, 1).flatten(1) for name in self.what]
        if self.tp.splits_rows:
            flat = [pad_rows(torch.cat(flat, 1), rows.shape[0] * self.tp.size).view(rows.shape[0], -1)]
        return torch.cat([rows, *flat], 1)

    def split(self, joined: Tensor, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The way back."""
        if not self.what:
            return joined, {}
        each = self.heads * self.head_dim
        rows, others = joined.split([self.width, joined.shape[1] - self.width], 1)
        if self.tp.splits_rows:
            others = others.reshape(-1, len(self.what) * each)[: images * self.tokens]
        parts = others.unflatten(0, (images, self.tokens)).split(each, 2)
        return rows.contiguous(), {
            name: part.unflatten(2, (self.heads, self.head_dim)) for name, part in zip(self.what, parts, strict=True)
        }


def attending(
    name: str, rate: float, kind: str, block: Callable[[str, float, str, Build], nn.Module], what: str, build: Build
) -> nn.Module:
    """A block that gives what it attends with beside its rows: after QK norm and rotation, before any kernel.

    Args:
        name, rate, kind: of the block. what: as of Beside.
    """
    layer, beside = block(name, rate, kind, build), Beside.of(build, what)
    (attention,) = (part for part in layer.modules() if isinstance(part, Tapped))
    taken = dict[str, Tensor]()

    def take(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taken.update(q=q, k=k, v=v)
        return q, k, v

    def give(_: nn.Module, args: Any, rows: Tensor) -> Tensor:
        joined = beside.join(rows, taken)
        taken.clear()
        return joined

    attention.tap = take
    layer.register_forward_hook(give)
    return layer
