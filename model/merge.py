"""Between two stages: four neighbouring patches become one of another width (Liu et al. 2021, Swin), or all tokens are
projected to another width.

Legend: B images, S tokens that this rank holds, C width before, D after, T tensor-parallel size, R = B * S rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.inputs import MicroBatch
from model.norm import Norm
from model.regions import Regions
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter, split_range
from parallel.tensor import enter, leave, linear


class SharedLinear(nn.Module):
    """This tensor rank's share of y = x W': whole rows x come in, a term of the sum over ranks goes out."""

    def __init__(self, in_features: int, out_features: int, build: Build) -> None:
        super().__init__()
        axis = build.tp.axis
        shape, segments = (out_features, in_features), (in_features,)
        layout = TensorLayout(shape=shape, dim=1, segments=segments, parts=axis.size, index=axis.index)
        init = Init(kind="uniform", scales=(math.sqrt(6 / (in_features + out_features)),))
        self.weight = make_parameter(ParameterInfo(layout=layout, init=init, decay="body"))
        self.share = slice(*split_range(in_features, axis.size, axis.index))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, D]."""
        return linear(x[..., self.share].flatten(0, 1), self.weight, None).unflatten(0, x.shape[:2])


class _Between(nn.Module, ABC):
    """What both do: each tensor rank is given all tokens of its images, and projects a share of their features; the
    shares' sums make the output.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        self.regions = Regions(name, build.policy)
        self.tp, self.tokens = build.tp, build.at(build.stage - 1).tokens

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B * S, C] (or this rank's rows) -> [B * S', D] (or this rank's)."""
        return self.regions("merge", self._run, x, batch)

    def _run(self, x: Tensor, batch: MicroBatch) -> Tensor:
        b, s = batch.size, self.tokens.count
        x = enter(x, self.tp, b * s).unflatten(0, (b, s))
        return leave(self._project(x).flatten(0, 1), self.tp)

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """This rank's term of the sum: [B, S, C] -> [B, S', D]."""


class PatchMerge(_Between):
    """2 x 2 patches side by side, LayerNorm, projection [D, 4C]; prefix tokens have a projection [D, C] of their own.

    A map with an odd side is filled up with zeros at the bottom or the right. Arguments as of _Between.
    """

    def __init__(self, name: str, build: Build) -> None:
        super().__init__(name, build)
        self.kernels = build.kernels
        c, d = build.at(build.stage - 1).here.width, build.here.width
        self.norm = Norm(4 * c, bias=True, partial=build.tp.size > 1, kernels=build.kernels, eps=build.eps)
        self.proj = SharedLinear(4 * c, d, build)
        self.prefix = SharedLinear(c, d, build) if self.tokens.prefix else None

    def _project(self, x: Tensor) -> Tensor:
        t = self.tokens
        own, rows = t.own_prefix, t.stop - t.first
        maps = x[:, own:].reshape(x.shape[0], rows, t.cols, -1)
        if rows % 2 or t.cols % 2:
            maps = F.pad(maps, (0, 0, 0, t.cols % 2, 0, rows % 2))
        merged = self.kernels.patch_merge(maps, self.norm.weight, self.norm.bias, self.norm.eps)
        y = self.proj(merged.flatten(1, 2))
        return y if self.prefix is None else torch.cat([self.prefix(x[:, :own]), y], 1)


class Widening(_Between):
    """Every token projected [D, C]: the map stays. Arguments as of _Between."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__(name, build)
        self.proj = SharedLinear(build.at(build.stage - 1).here.width, build.here.width, build)

    def _project(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out
