"""What every layer is told about the micro-batch it works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch of B images.

    Attributes:
        images: [B, C, H, W]; None on ranks that do not hold the embedding.
        labels: int64 [B].
        sample_ids: int64 [B]; what drop-path is drawn from: the same image at the same place of the data order has the
        same
            id in every layout.
        weights: fp32 [B], 1 for an image, 0 for padding.
        training: whether drop-path is active.
    """

    images: Tensor | None
    labels: Tensor
    sample_ids: Tensor
    weights: Tensor
    training: bool = True

    @property
    def size(self) -> int:
        """B."""
        return self.labels.shape[0]

    @staticmethod
    def of_images(images: Tensor, *, training: bool = False) -> MicroBatch:
        """A micro-batch of images alone: labels 0, ids 0 to B - 1, or, in training, new ones of torch's generator."""
        ids = torch.arange(images.shape[0], device=images.device)
        if training:
            ids = torch.randint(2**62, ids.shape, device=images.device)
        weights = torch.ones(images.shape[0], device=images.device)
        return MicroBatch(
            images=images, labels=torch.zeros_like(ids), sample_ids=ids, weights=weights, training=training
        )
