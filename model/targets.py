"""Shares of the loss that arise within the layers: differentiated where they arise, and noted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.inputs import MicroBatch


@dataclass(kw_only=True)
class Shares:
    """What the targets of a step have come to on this rank, by name. They add up over all ranks of the world.

    Attributes:
        scale: what a sum over images is multiplied by: the loss scale over the images of a step.
    """

    scale: float = 1.0
    found: dict[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, share: Tensor) -> None:
        """Add a micro-batch's."""
        share = share.detach()
        self.found[name] = self.found[name] + share if name in self.found else share


def attach(rows: Tensor, loss: Tensor, batch: MicroBatch, name: str, copies: int) -> Tensor:
    """The rows as they are, with a part of the loss that backward brings with their gradient.

    Args:
        loss: of the images of the micro-batch, added up, fp32 scalar. name: of the target. copies: how many ranks
            compute it alike.
    """
    scale = 1.0 if batch.shares is None else batch.shares.scale
    if batch.shares is not None:
        batch.shares.note(name, loss * (scale / copies))
    out: Tensor = _Attach.apply(rows, loss, scale)
    return out


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.scale, device=grads[0].device), None
