"""From images to rows of tokens: patches, class token, registers, positions.

Legend: B images, P patch side, N patches, S = prefix + N tokens, D width, R = B * S rows.

The embedding of a patch is one linear over its unfolded pixels. Everything that depends on the place alone (position,
bias, class token, registers) is one table [S, D] added to it, so that a tensor rank that holds only some rows computes
just those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.build import Build
from model.inputs import MicroBatch
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import linear, slice_rows

_TABLE_STD = 0.02


def unfold(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * P * P], patches in row-major order, each flattened as a convolution kernel is."""
    b, c, h, w = images.shape
    tiles = images.view(b, c, h // patch, patch, w // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def sincos_table(grid: int, width: int) -> Tensor:
    """Fixed 2D positions [grid * grid, D]: sines and cosines of x and y at D/4 frequencies (Chen et al. 2021,
    MoCo v3).
    """
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # [grid, D/4]
    y, x = angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()


class Embedding(nn.Module):
    """Patch embedding, prefix tokens and positions."""

    pos_fixed: Tensor

    def __init__(self, build: Build) -> None:
        super().__init__()
        sizes, self.tp = build.sizes, build.tp
        self.sizes, self.position = sizes, build.config.position
        partial = build.tp.splits_rows
        width = sizes.width

        def table(*shape: int, std: float = _TABLE_STD, decay: str = "none") -> nn.Parameter:
            init = Init(kind="normal", scales=(std,)) if std else Init(kind="constant", scales=(0.0,))
            layout = TensorLayout(shape=shape)
            info = ParameterInfo(layout=layout, init=init, decay=decay, partial_over_tensor=partial)
            return make_parameter(info)

        self.weight = table(width, sizes.patch_features, std=1 / math.sqrt(sizes.patch_features), decay="body")
        self.bias = table(width, std=0.0)
        self.cls = table(1, width) if sizes.has_class_token else None
        self.registers = table(sizes.registers, width) if sizes.registers else None
        if self.position == "learned_2d":
            self.pos_row = table(sizes.grid, width, std=_TABLE_STD / math.sqrt(2))
            self.pos_col = table(sizes.grid, width, std=_TABLE_STD / math.sqrt(2))
        elif self.position == "learned_1d":
            self.pos = table(sizes.has_class_token + sizes.grid**2, width)
        else:
            self.register_buffer("pos_fixed", sincos_table(sizes.grid, width), persistent=False)

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """Images of the micro-batch -> [R, D], or this rank's rows of it."""
        assert batch.images is not None
        patches = unfold(batch.images, self.sizes.patch)
        b, _, features = patches.shape
        if self.sizes.prefix:
            patches = torch.cat([patches.new_zeros(b, self.sizes.prefix, features), patches], 1)
        rows = patches.shape[1] * b
        local = slice_rows(patches.reshape(rows, features), self.tp)
        y = linear(local, self.weight, None)
        table = self._table(y.device)
        if not self.tp.splits_rows:
            return (y.view(b, -1, y.shape[1]) + table).flatten(0, 1)
        start, stop = self.tp.row_range(rows)
        return y + table[torch.arange(start, stop, device=y.device) % self.sizes.tokens]

    def _table(self, device: torch.device) -> Tensor:
        """[S, D]: prefix tokens, then position + bias of each patch."""
        prefix = []
        if self.position == "learned_2d":
            pos = (self.pos_row[:, None] + self.pos_col).flatten(0, 1)
        elif self.position == "learned_1d":
            pos = self.pos[self.sizes.has_class_token :]
        else:
            pos = self.pos_fixed.to(device)
        if self.cls is not None:
            prefix.append(self.cls + self.pos[:1] if self.position == "learned_1d" else self.cls)
        if self.registers is not None:
            prefix.append(self.registers)
        return torch.cat([*prefix, pos + self.bias])
