"""Who holds which stage: the one value that everything asks which has to do with stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline.actions import Schedule


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Stages by number, from the first layers of the model to the last. A rank may hold several of them.

    Attributes:
        ranks: of each stage, the rank on the pipeline axis that holds it.
        layers: of each stage, its layers in the model's list.
    """

    ranks: tuple[int, ...]
    layers: tuple[range, ...]

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(self.layers), self

    @staticmethod
    def of(schedule: Schedule, layers: Sequence[range]) -> Placement:
        """Where a schedule puts its stages, which have these layers."""
        return Placement(ranks=schedule.stage_to_rank, layers=tuple(layers))

    @property
    def last(self) -> int:
        """The number of the stage that ends in the loss."""
        return len(self.ranks) - 1

    def on(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, ascending."""
        return tuple(stage for stage, holder in enumerate(self.ranks) if holder == rank)
