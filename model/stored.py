"""The place of a teacher in a student's list whose outputs are read from the disk: a head, and before it what of his
blocks is stored, each of which computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.config import ModelConfig
from model.heads import pooled_features
from model.inputs import MicroBatch
from parallel.tensor import slice_rows


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """One whose features are stored.

    Attributes:
        name: the prefix of his layers. model: resolved. number: of his rows in `MicroBatch.teachers`. blocks: whose
            features of patches are wanted.
    """

    name: str
    model: ModelConfig
    number: int
    blocks: tuple[int, ...] = ()


class StoredBlock(nn.Module):
    """The rows of patches that a block has given, where it would give them; zeros in the place of prefix tokens, which
    nobody compares.

    Args:
        name: of the rows: `blocks.3`. number: as of StoredTeacher.
    """

    def __init__(self, name: str, build: Build, *, number: int) -> None:
        super().__init__()
        self.name, self.number, self.width = name, number, build.here.width
        self.tokens, self.tp = build.tokens, build.tp

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """[R, D] (or this rank's rows); zeros for those who plan, and read nothing."""
        t = self.tokens
        if not batch.teachers:
            return torch.zeros(self.tp.local_rows(batch.size * t.count), self.width, device=batch.labels.device)
        patches = batch.teachers[self.number][self.name][:, t.first * t.cols : t.stop * t.cols]
        return slice_rows(F.pad(patches, (0, 0, t.own_prefix, 0)).flatten(0, 1), self.tp)


class StoredHead(nn.Module):
    """Pooled features, if they are stored, where a teacher's head has them, behind zeros in the place of its logits,
    which a loss reads from the micro-batch itself.

    Args:
        number: as of StoredTeacher.
    """

    def __init__(self, build: Build, *, number: int) -> None:
        super().__init__()
        self.number, self.classes, self.width = number, build.part(build.sizes.classes), pooled_features(build)

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """[B, C/T + D]; zeros for those who plan, and read nothing."""
        zeros = torch.zeros(batch.size, self.classes + self.width, device=batch.labels.device)
        features = batch.teachers[self.number].get("features") if batch.teachers else None
        return zeros if features is None else torch.cat([zeros[:, : self.classes], features], 1)
