"""From pooled features to a tower's embedding, where that is more than one matrix.

Legend: B images or texts, D width, E embedding, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from model.blocks import Activation
from model.build import Build
from model.heads import Head
from model.inputs import MicroBatch
from parallel.tensor import ColumnParallelLinear, RowParallelLinear

Projection = Literal["linear", "mlp", "none"]
"""linear: one matrix, its rows split over tensor ranks as classes are; mlp: two, and a GELU between them; none: the
pooled features are the embedding."""


class Projector(nn.Module):
    """fc1 [D, D], GELU, fc2 [E, D] (Chen et al. 2020, SimCLR, without its batch norms): whole vectors in and out."""

    def __init__(self, build: Build, features: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(features, (features,), tp=build.tp, split_input=False)
        self.activation = Activation(build, "gelu")
        self.fc2 = RowParallelLinear((features,), outputs, tp=build.tp, split_output=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, E], on every tensor rank."""
        y: Tensor = self.fc2(self.activation(self.fc1(x, add_bias=False), self.fc1.bias))
        return y


class ProjectedHead(Head):
    """A head without a classifier, then a Projector.

    Args:
        outputs: E.
    """

    def __init__(self, build: Build, *, outputs: int) -> None:
        super().__init__(build)
        self.project = Projector(build, self.features, outputs)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows) -> [B, E], on every tensor rank."""
        y: Tensor = self.project(super().forward(x, batch))
        return y
