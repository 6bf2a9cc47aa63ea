"""What flows between two stages: shapes that are static for a run, and the routes that tensors take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from parallel.pipeline.actions import Action


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at a stage boundary.

    Attributes:
        carries_gradient: whether the stage behind sends back a gradient of it. Labels, masks and what a frozen part of
            the model gives out carry none: nothing is sent for them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    carries_gradient: bool = True

    def __post_init__(self) -> None:
        if self.carries_gradient and not self.dtype.is_floating_point:
            raise ValueError(
                f"a boundary tensor of {self.dtype} cannot carry a gradient: set carries_gradient to False"
            )


Specs = tuple[TensorSpec, ...]


class Route(NamedTuple):
    """From a stage to its neighbour: outputs if that is the next one, gradients of its own inputs if the one before."""

    source: int
    target: int

    @classmethod
    def of(cls, message: Action) -> Route:
        """That of a send or receive."""
        send = message if message.kind.is_send else message.counterpart
        return cls(send.stage, send.counterpart.stage)

    def __str__(self) -> str:
        if self.source < self.target:
            return f"outputs of stage {self.source}"
        return f"gradients of the inputs of stage {self.source}"


def routes_between_ranks(stage_to_rank: Sequence[int], boundaries: Sequence[Specs]) -> dict[Route, Specs]:
    """Every route whose stages are on different ranks, with the tensors of one of its messages, in a fixed order.

    Args:
        boundaries: entry s describes the inputs of stage s.
    """
    routes = {}
    for stage in range(1, len(stage_to_rank)):
        if stage_to_rank[stage - 1] != stage_to_rank[stage]:
            specs = boundaries[stage]
            routes[Route(stage - 1, stage)] = specs
            routes[Route(stage, stage - 1)] = tuple(spec for spec in specs if spec.carries_gradient)
    return routes
