"""Where two towers meet: embeddings of unit length, and the temperature that their products are to be taken at.

Legend: B pairs, E embedding, T tensor-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.inputs import MicroBatch
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import gather_features


class _AtMost(torch.autograd.Function):
    """min(x, most); the gradient goes through but where a step against it would lead further beyond.

    So what has reached the bound comes back with the first gradient that says so, and no optimizer has to know of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x >= most)
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (reached,) = ctx.saved_tensors
        return torch.where(reached & (grads[0] < 0), 0, grads[0]), None


def _scalar(value: float, *, trains: bool = True) -> nn.Parameter:
    info = ParameterInfo(layout=TensorLayout(shape=(1,)), init=Init(kind="constant", scales=(value,)))
    parameter = make_parameter(info)
    parameter.requires_grad_(trains)
    return parameter


class Pair(nn.Module):
    """(image [B, E], text [B, E], scale [], bias []): embeddings divided by their length, fp32 at least, and what a
    logit is, scale * image . text + bias. Alike on tensor and context ranks.

    Of one tower, whose rows are first views, then second ones of the same samples, the two views; where K local crops
    of each sample follow, one after the other, their embeddings come last [K B, E].

    Args:
        embedding: E. shares: of image and text, or of both views, whether tensor ranks hold shares of their features.
            temperature: 1 / scale at the start. learns: whether it is trained. most: of the scale. bias: at the start;
            None: 0, for good. local_crops: K.
    """

    def __init__(
        self,
        build: Build,
        *,
        embedding: int,
        shares: Sequence[bool],
        temperature: float,
        learns: bool,
        most: float,
        bias: float | None,
        local_crops: int = 0,
    ) -> None:
        super().__init__()
        self.tp, self.embedding, self.shares, self.most = build.tp, embedding, tuple(shares), math.log(most)
        self.local_crops = local_crops
        self.logit_scale = _scalar(-math.log(temperature), trains=learns)
        self.logit_bias = None if bias is None else _scalar(bias)

    def forward(self, x: Tensor, batch: MicroBatch, rides: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The text's embedding [B, E] or [B, E/T] with the image's as a ride, or those of both views -> as above."""
        sides = [self._whole(side, own) for side, own in zip((*rides, x), self.shares, strict=True)]
        left, right, *crops = sides if rides else sides[0].chunk(2 + self.local_crops)
        scale = _AtMost.apply(self.logit_scale.to(left.dtype), self.most).squeeze(0).exp()
        # a copy: nobody may hold on to the memory of a parameter
        bias = left.new_zeros(()) if self.logit_bias is None else self.logit_bias.squeeze(0).to(left.dtype, copy=True)
        more = [F.normalize(torch.cat(crops), dim=1)] if crops else []
        return F.normalize(left, dim=1), F.normalize(right, dim=1), scale, bias, *more

    def _whole(self, x: Tensor, is_share: bool) -> Tensor:
        x = gather_features(x, self.tp, self.embedding) if is_share else x
        return x.to(torch.promote_types(x.dtype, torch.float32))
