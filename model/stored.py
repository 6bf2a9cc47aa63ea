"""The place of a teacher in a student's list whose outputs are read from the disk: a head that nothing comes before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.build import Build
from model.config import ModelConfig
from model.heads import pooled_features
from model.inputs import MicroBatch


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """One whose pooled features are stored.

    Attributes:
        name: the prefix of his layer. model: resolved. number: of his rows in `MicroBatch.teachers`.
    """

    name: str
    model: ModelConfig
    number: int


class StoredHead(nn.Module):
    """Pooled features where a teacher's head has them, behind zeros in the place of its logits, which a loss reads from
    the micro-batch itself.

    Args:
        number: as of StoredTeacher.
    """

    def __init__(self, build: Build, *, number: int) -> None:
        super().__init__()
        self.number, self.classes, self.width = number, build.part(build.sizes.classes), pooled_features(build)

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """[B, C/T + D]; zeros for those who plan, and read nothing."""
        zeros = torch.zeros(batch.size, self.classes + self.width, device=batch.labels.device)
        if not batch.teachers:
            return zeros
        return torch.cat([zeros[:, : self.classes], batch.teachers[self.number]["features"]], 1)
