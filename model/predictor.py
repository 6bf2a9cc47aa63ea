"""What turns queries into guesses of their keys (Chen et al. 2021, MoCo v3; Grill et al. 2020, BYOL).

Legend: B views, E embedding, T tensor-parallel size.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.blocks import Activation
from model.build import Build
from model.inputs import MicroBatch
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, gather_features


class Predictor(nn.Module):
    """fc1 [hidden, E], GELU, fc2 [E, hidden] of queries; keys pass as they are, and so does all in evaluation.

    Without the papers' batch norms.

    Args:
        embedding: E. hidden: features between. is_share: whether tensor ranks hold shares of what comes in.
    """

    def __init__(self, build: Build, *, embedding: int, hidden: int, is_share: bool) -> None:
        super().__init__()
        self.tp, self.embedding, self.is_share = build.tp, embedding, is_share
        self.fc1 = ColumnParallelLinear(embedding, (hidden,), tp=build.tp, split_input=False)
        self.activation = Activation(build, "gelu")
        self.fc2 = RowParallelLinear((hidden,), embedding, tp=build.tp, split_output=False)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, E] or [B, E/T] -> [B, E], on every tensor rank."""
        x = gather_features(x, self.tp, self.embedding) if self.is_share else x
        if batch.keys or not batch.training:
            return x
        y: Tensor = self.fc2(self.activation(self.fc1(x, add_bias=False), self.fc1.bias))
        return y
