"""Pixels as models want them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.scaling import Finish


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
        self._channels = channels

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self._mean).div_(self._std)

    def when_read(self, mirrored: NDArray[np.bool_]) -> Finish:
        """The same, done to images when they are read, some of which [B] are mirrored."""
        mean, std = (values.flatten().repeat(self._channels)[: self._channels] for values in (self._mean, self._std))
        return Finish(mirrored, mean.numpy(), std.numpy())

    def undo(self, images: Tensor) -> Tensor:
        """Pixels again."""
        return images * self._std + self._mean
