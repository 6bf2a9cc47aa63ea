"""From images to rows of tokens: patches, class tokens, registers, positions, and perhaps a norm.

Legend: B images, P patch side, N patches, S = prefix + N tokens (on this rank), D width, R = B * S rows.

The embedding of a patch is one linear over its unfolded pixels. Everything that depends on the place alone (position,
bias, class tokens, registers) is one table [S, D] added to it, so that a tensor rank that holds only some rows computes
just those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.inputs import MicroBatch
from model.norm import Norm
from model.packing import Packing
from model.positions import lines, maps_of, waves
from model.tables import WithTables
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import linear, slice_rows

_TABLE_STD = 0.02


def unfold(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * P * P], patches in row-major order, each flattened as a convolution kernel is.

    What does not fill a patch at the bottom or the right is filled up with zeros.
    """
    missing = [-side % patch for side in images.shape[2:]]
    if any(missing):
        images = F.pad(images, (0, missing[1], 0, missing[0]))
    b, c, h, w = images.shape
    tiles = images.view(b, c, h // patch, patch, w // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def sincos_table(rows: int, cols: int, width: int) -> Tensor:
    """Fixed 2D positions [rows * cols, D]: sines and cosines of x and y at D/4 frequencies (Chen et al. 2021,
    MoCo v3).
    """
    return torch.cat([waves(cols, width).repeat(rows, 1), waves(rows, width).repeat_interleave(cols, 0)], 1).float()


def add_in_turn(x: Tensor, table: Tensor, first: int) -> Tensor:
    """x [R, D] with row (first + r) mod S of `table` [S, D] added to row r.

    By broadcasting, whose gradient is a sum in fp32 whatever the type; that of `table[index]` is one in the table's.
    """
    (rows, width), period = x.shape, len(table)
    turned, whole = table.roll(-first, 0), rows // period
    images = x[: whole * period].view(whole, period, width) + turned
    return torch.cat([images.flatten(0, 1), x[whole * period :] + turned[: rows % period]])


class Embedding(WithTables):
    """Patch embedding, prefix tokens and positions; then a norm, where the model has one there."""

    pos_fixed: Tensor

    def __init__(self, build: Build) -> None:
        super().__init__()
        sizes, self.tp, self.tokens = build.sizes, build.tp, build.tokens
        self.patch, self.position, self.images = sizes.patch, build.config.position, (sizes.channels, *sizes.image)
        partial = build.tp.splits_rows
        width, rows, cols = build.here.width, build.here.rows, build.here.cols
        self.grid = rows, cols

        def table(*shape: int, std: float = _TABLE_STD, decay: str = "none") -> nn.Parameter:
            init = Init(kind="normal", scales=(std,)) if std else Init(kind="constant", scales=(0.0,))
            layout = TensorLayout(shape=shape)
            info = ParameterInfo(layout=layout, init=init, decay=decay, partial_over_tensor=partial)
            return make_parameter(info)

        self.class_rows = sizes.class_rows
        self.weight = table(width, sizes.patch_features, std=1 / math.sqrt(sizes.patch_features), decay="body")
        self.bias = table(width, std=0.0) if build.config.patch_bias else None
        self.cls = table(sizes.class_tokens, width) if sizes.class_tokens else None
        self.registers = table(sizes.registers, width) if sizes.registers else None
        self.global_tokens = table(sizes.global_tokens, width) if sizes.global_tokens else None
        if self.position == "learned_2d":
            self.pos_row = table(rows, width, std=_TABLE_STD / math.sqrt(2))
            self.pos_col = table(cols, width, std=_TABLE_STD / math.sqrt(2))
        elif self.position == "learned_1d":
            self.pos = table(sizes.class_rows + rows * cols, width)
        elif self.position == "sincos_2d":
            self.register_buffer("pos_fixed", sincos_table(rows, cols, width), persistent=False)
        self.norm = Norm.of(build, width) if build.config.pre_norm else None

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """Images of the micro-batch -> [R, D], or this rank's rows of it."""
        assert batch.images is not None
        if batch.packing is not None:
            return self._packed(batch.images, batch.packing)
        if batch.images.shape[1:] != self.images:
            given, wanted = (" x ".join(map(str, shape)) for shape in (batch.images.shape[1:], self.images))
            raise ValueError(
                f"images are {given}, but the model takes channels x rows x columns of {wanted}: resize them, set "
                "model.in_channels and model.image_size, or make VisionTransformer with dynamic_image_size=True"
            )
        t = self.tokens
        patches = unfold(batch.images, self.patch)[:, t.first * t.cols : t.stop * t.cols]
        b, _, features = patches.shape
        if t.own_prefix:
            patches = torch.cat([patches.new_zeros(b, t.own_prefix, features), patches], 1)
        rows = patches.shape[1] * b
        local = slice_rows(patches.reshape(rows, features), self.tp)
        y = linear(local.to(self.weight.dtype), self.weight, None)
        table = self._table(y.device).to(y.dtype)
        if self.tp.splits_rows:
            y = add_in_turn(y, table, self.tp.row_range(rows)[0])
        else:
            y = (y.view(b, -1, y.shape[1]) + table).flatten(0, 1)
        return y if self.norm is None else self.norm(y)

    def _table(self, device: torch.device) -> Tensor:
        """[S, D] of this rank's tokens: prefix tokens, then position + bias of each patch.

        Every parameter takes part, if only with none of its rows: a step expects a gradient of each on every rank.
        """
        t = self.tokens
        own, here = bool(t.own_prefix), slice(t.first * t.cols, t.stop * t.cols)
        prefix = [x[: len(x) * own] for x in (self.cls, self.registers, self.global_tokens) if x is not None]
        if self.position == "learned_2d":
            pos = (self.pos_row[t.first : t.stop, None] + self.pos_col).flatten(0, 1)
        elif self.position == "learned_1d":
            pos = self.pos[self.class_rows :][here]
            if self.class_rows:
                prefix[0] = prefix[0] + self.pos[: self.class_rows * own]
        elif self.position == "sincos_2d":
            pos = self.pos_fixed.to(device)[here]
        else:  # none, or rope_2d: queries and keys are rotated in each block
            pos = self.weight.new_zeros(t.patches, len(self.weight))
        return torch.cat([*prefix, pos if self.bias is None else pos + self.bias])

    def _packed(self, patches: Tensor, packing: Packing) -> Tensor:
        """Patches of images of several sizes [packing.patches, C * P * P] -> [R, D], or this rank's rows of it."""
        local = slice_rows(packing.with_prefix(patches), self.tp)
        y = linear(local.to(self.weight.dtype), self.weight, None)
        y = y + self._packed_table(packing, len(y)).to(y.dtype)
        return y if self.norm is None else self.norm(y)

    def _packed_table(self, packing: Packing, count: int) -> Tensor:
        """What depends on the place alone, of this rank's rows: [R, D], at least in fp32, in which gradients of places
        that many images have are added up. Filling gets zeros."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        token, row, col = (_rows_from(x, self.tp.row_range(packing.rows)[0], count) for x in packing.places)
        prefix = [x.to(wide) for x in (self.cls, self.registers, self.global_tokens) if x is not None]
        nothing = self.weight.new_zeros(1, len(self.weight), dtype=wide)
        bias = nothing[0] if self.bias is None else self.bias.to(wide)
        by_col: Tensor | None = None
        if self.position == "learned_1d":
            pos = maps_of(self.pos[self.class_rows :].to(wide), self.grid, packing.maps)
            if self.class_rows:
                prefix[0] = prefix[0] + self.pos[: self.class_rows].to(wide)
        elif self.position == "learned_2d":
            rows, cols = zip(*packing.maps, strict=True)
            pos, by_col = lines(self.pos_row.to(wide), rows), lines(self.pos_col.to(wide), cols)
        elif self.position == "sincos_2d":
            width, sides = len(self.weight), zip(*packing.maps, strict=True)
            pos, by_col = (torch.cat([waves(side, width) for side in each]).to(nothing) for each in sides)
            pos, by_col = F.pad(pos, (width // 2, 0)), F.pad(by_col, (0, width // 2))
        else:  # none, or rope_2d
            pos, row = nothing, row.clamp(max=1)
        if self.position != "learned_1d":
            token = torch.where(row > 0, packing.prefix + row, token)
        y = F.embedding(token, torch.cat([nothing, *prefix, pos + bias]))
        return y if by_col is None else y + F.embedding(col, torch.cat([nothing, by_col]))


def _rows_from(x: Tensor, first: int, count: int) -> Tensor:
    """`count` of the rows of x [R], from `first` on; behind the last, zeros."""
    own = x[first : first + count]
    return F.pad(own, (0, count - len(own)))
