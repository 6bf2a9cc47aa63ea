"""The seam between goals of training and the engine: step, loop, plan and report know a goal by this alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Tensor

from engine.config import Config
from model import LayerSpec, MicroBatch
from parallel.grid import Grid


class Objective(ABC):
    """What a run trains towards. Has no state: what is trained is in the layers.

    Attributes:
        layers: the ordered list of named layers of all that is trained, which the pipeline cuts.
        counted: what evaluation adds up, by name.
    """

    layers: tuple[LayerSpec, ...]
    counted: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def of(cls, config: Config) -> Self:
        """That of a resolved configuration."""

    @abstractmethod
    def reads_images(self, layers: range) -> bool:
        """Whether a stage of these layers (places in the list) reads the images of a micro-batch."""

    @abstractmethod
    def loss_share(self, outputs: tuple[Tensor, ...], batch: MicroBatch, grid: Grid, scale: float) -> Tensor:
        """A micro-batch's share of the loss of the global batch, times `scale`; the last layer's outputs -> a scalar.

        Shares are added up over micro-batches, data and context ranks. Tensor ranks have the same one each.
        """

    @abstractmethod
    def counts(self, outputs: tuple[Tensor, ...], batch: MicroBatch, grid: Grid) -> Tensor:
        """A micro-batch's part of each of `counted`: float64, alike on tensor and context ranks."""

    @abstractmethod
    def figures(self, totals: Sequence[float]) -> dict[str, float]:
        """What the sums over the held-out set say, by the names that metrics give it: `loss`, `images` (each counted
        once), and what else there is.
        """
