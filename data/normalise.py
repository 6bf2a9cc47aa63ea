"""Pixels as models want them."""

from __future__ import annotations

import torch
from torch import Tensor

from data.config import DataConfig


class Normalise:
    """(pixels - mean) / std, with one number for all channels or one per channel."""

    def __init__(self, config: DataConfig, channels: int) -> None:
        for name, values in (("mean", config.mean), ("std", config.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"data.{name} has {len(values)} numbers, but images have {channels} channels: "
                    f"give one number, or {channels}"
                )
        self._mean = torch.tensor(config.mean, dtype=torch.float32).reshape(-1, 1, 1)
        self._std = torch.tensor(config.std, dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self._mean).div_(self._std)

    def undo(self, images: Tensor) -> Tensor:
        """Pixels again."""
        return images * self._std + self._mean
