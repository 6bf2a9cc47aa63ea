"""A layer of the student's that is to be like a layer of a teacher's: the loss arises, and is differentiated, here.

It stands right behind the two in the list, so it is given both models' rows, and gives out the student's as they are.
Legend: B images, S tokens, P patches, R rows, D width of the student, E of the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build, Tower
from model.inputs import MicroBatch
from model.sizes import Tokens
from model.targets import attach
from parallel.distillation import gram_difference, tokens_of_all
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import gather_rows, linear

FeatureLoss = Literal["mse", "cosine", "smooth_l1"]
FEATURES, RELATIONS = "features", "relations"
MATCH = "match"
"""What the names of such layers begin with: what a student needs while it learns, and no part of it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a layer is to be like: the rows of a stage of a teacher's pyramid, and by which loss."""

    teacher: Tower
    stage: int
    loss: FeatureLoss


class Weights(NamedTuple):
    """Of a pair of blocks, in the loss: what features differ by, and what their relations differ by."""

    features: float
    relations: float


class Match(nn.Module):
    """What the student's patches differ from the teacher's by, each token normalised over its features; and what the
    cosines between the patches of an image differ by (Simeoni et al. 2025, DINOv3's Gram matrices).

    For features of other widths the student's rows are projected to the teacher's (Romero et al. 2015, FitNets), by a
    matrix that is trained with it; where maps of patches differ the teacher's is resampled to the student's.

    Args:
        name: of the layer. weights: of this pair.
    """

    def __init__(self, name: str, weights: Weights, target: Target, build: Build) -> None:
        super().__init__()
        self.tp, self.tokens, self.weights = build.tp, build.tokens, weights
        self.loss, sizes = target.loss, target.teacher.config.sizes
        self.theirs = Tokens.of(sizes, target.stage, build.context)
        width, wide = build.here.width, sizes.stages[target.stage].width
        self.lift: nn.Parameter | None = None
        if width != wide and weights.features:
            layout = TensorLayout(shape=(wide, width))
            init = Init(kind="normal", scales=(1 / math.sqrt(width),))
            self.lift = make_parameter(
                ParameterInfo(layout=layout, init=init, decay="body", partial_over_tensor=build.tp.splits_rows)
            )

    def forward(self, x: Tensor, batch: MicroBatch, seen: tuple[Tensor]) -> Tensor:
        """The student's rows [R, D], and the teacher's -> the same rows."""
        if not batch.training:
            return x
        theirs = self._patches(seen[0], self.theirs, batch.size).detach()
        theirs = resampled(theirs, self.theirs, self.tokens)
        if self.weights.features:
            z = x if self.lift is None else linear(x, self.lift, None)
            each = token_loss(self._patches(z, self.tokens, batch.size), theirs, self.loss).sum(1)  # [B]
            each = each * (self.weights.features / (self.tokens.rows * self.tokens.cols))
            x = attach(x, (each * batch.weights).sum(), batch, FEATURES, copies=self.tp.size)
        if self.weights.relations:
            own, counts = self._patches(x, self.tokens, batch.size), replace(self.tokens, prefix=0).counts
            keys, others = (tokens_of_all(of, counts, self.tokens.context) for of in (own, theirs))
            each = gram_difference(own, theirs, keys=keys, teacher_keys=others) * self.weights.relations
            x = attach(x, (each * batch.weights).sum(), batch, RELATIONS, copies=self.tp.size)
        return x

    def _patches(self, x: Tensor, tokens: Tokens, images: int) -> Tensor:
        """[R, E], or this tensor rank's rows -> those of this context rank's patches, fp32 [B, P, E]."""
        whole = gather_rows(x, self.tp, images * tokens.count).unflatten(0, (images, tokens.count))
        return whole[:, tokens.own_prefix :].float()


def token_loss(own: Tensor, theirs: Tensor, loss: FeatureLoss) -> Tensor:
    """Of each token, [B, P, E] -> [B, P]: mean over the features of tokens of mean 0 and variance 1, or 1 - cosine."""
    if loss == "cosine":
        return 1 - F.cosine_similarity(own, theirs, dim=2)
    a, b = (F.layer_norm(x, x.shape[-1:]) for x in (own, theirs))
    different = F.mse_loss if loss == "mse" else F.smooth_l1_loss
    return different(a, b, reduction="none").mean(2)


def resampled(x: Tensor, there: Tokens, here: Tokens) -> Tensor:
    """A map of patches as one of other rows and columns: [B, P, E] -> [B, P', E], bilinear, without aliasing."""
    if (there.rows, there.cols) == (here.rows, here.cols):
        return x
    grid = x.transpose(1, 2).unflatten(2, (there.rows, there.cols))
    return F.interpolate(grid, (here.rows, here.cols), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
