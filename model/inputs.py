"""What every layer is told about the micro-batch it works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.packing import Packing

if TYPE_CHECKING:
    from model.targets import Shares


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch of B images, or of B images and their texts.

    Attributes:
        images: [B, C, H, W], or, packed, their patches [packing.patches, C * P * P]; None on ranks that do not hold a
            layer that reads them.
        labels: int64 [B]; -1: not known.
        sample_ids: int64 [B]; what drop-path is drawn from: the same image at the same place of the data order has the
            same id in every layout.
        weights: fp32 [B], 1 for an image, 0 for padding.
        training: whether drop-path is active.
        keys: whether what comes out are keys that queries are compared with, which pass no predictor.
        texts: tokens, int64 [B, S], filled up at the right; None where there are none, or no layer reads them.
        indices: int64 [B], the same for rows of one image; None where that is not known.
        other_labels: int64 [B], of the image that each is mixed with; None: none is. own_shares: fp32 [B], of the image
            itself in that.
        differentiated: whether losses that arise within the layers are wanted: not in a pass for outputs alone.
        teachers: what teachers have made of these images before, of each by name, rows [B, ...]; on ranks that have
            the loss.
        shares: where parts of the loss that arise within the layers are noted; None: nowhere.
        packing: whose the rows of tokens are, where images have several sizes; None: all have the model's.

    Of two views of each sample, B is twice the number of samples: first views, then second ones; with local crops more:
    then one of each sample after the other.
    """

    images: Tensor | None
    labels: Tensor
    sample_ids: Tensor
    weights: Tensor
    training: bool = True
    texts: Tensor | None = None
    keys: bool = False
    indices: Tensor | None = None
    other_labels: Tensor | None = None
    own_shares: Tensor | None = None
    differentiated: bool = True
    teachers: tuple[Mapping[str, Tensor], ...] = ()
    shares: Shares | None = None
    packing: Packing | None = None

    @property
    def size(self) -> int:
        """B."""
        return self.labels.shape[0]

    def rows(self, tokens: int) -> int:
        """Of tokens in all, where each image of the model's size has so many."""
        return self.size * tokens if self.packing is None else self.packing.rows

    @staticmethod
    def of_images(images: Tensor, *, training: bool = False) -> MicroBatch:
        """A micro-batch of images alone: labels 0, ids 0 to B - 1, or, in training, new ones of torch's generator."""
        return MicroBatch.of(images, None, training=training)

    @staticmethod
    def of(images: Tensor | None, texts: Tensor | None, *, training: bool = False) -> MicroBatch:
        """The same of images, of texts, or of both."""
        given = images if images is not None else texts
        assert given is not None
        ids = torch.arange(given.shape[0], device=given.device)
        if training:
            ids = torch.randint(2**62, ids.shape, device=given.device)
        weights = torch.ones(given.shape[0], device=given.device)
        return MicroBatch(
            images=images, labels=torch.zeros_like(ids), sample_ids=ids, weights=weights, training=training, texts=texts
        )
