"""A layer of the student's that is to be like a layer of a teacher's: the loss arises, and is differentiated, here.

It stands right behind the two in the list, so it is given what both models make, and gives out the student's as it is.
Legend: B images, S tokens, P patches, R rows, D width of the student, E of the teacher, h heads that this tensor rank
holds, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.beside import Beside
from model.build import Build, Tower
from model.heads import pooled_features
from model.inputs import MicroBatch
from model.sizes import Tokens
from model.targets import attach
from parallel.comm import single_axis
from parallel.distillation import (
    Moments,
    cosine_distance,
    gram_difference,
    map_divergence,
    relation_divergence,
    resplit_heads,
    tokens_of_all,
)
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor import gather_rows, linear

FeatureLoss = Literal["mse", "cosine", "smooth_l1"]
FEATURES, GRAM, QUERIES, KEYS, VALUES, MAPS = "features", "gram", "queries", "keys", "values", "maps"
EMBEDDINGS = "embeddings"
RELATIONS = {GRAM: "", QUERIES: "q", KEYS: "k", VALUES: "v", MAPS: "qk"}
"""How the tokens of an image relate to each other: the kinds, and what of an attention layer each compares."""
MATCH = "match"
"""What the names of such layers begin with: what a student needs while it learns, and no part of it."""


class Weights(NamedTuple):
    """Of a pair of layers, in the loss, by target."""

    features: float = 0.0
    gram: float = 0.0
    queries: float = 0.0
    keys: float = 0.0
    values: float = 0.0
    maps: float = 0.0
    embeddings: float = 0.0

    @property
    def of_rows(self) -> Weights:
        """Of what is compared of a block's rows alone."""
        return Weights(features=self.features, gram=self.gram)

    @property
    def beside(self) -> str:
        """What of an attention layer is compared: some of `qkv`."""
        wanted = {letter for kind, letters in RELATIONS.items() if getattr(self, kind) for letter in letters}
        return "".join(letter for letter in "qkv" if letter in wanted)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a layer is to be like: a layer of a stage of a teacher's pyramid, and by what.

    Attributes:
        loss: of features. heads: that queries, keys and values are cut into anew; None: as many as the student's.
        standard: whether what is asked for is what the teacher gives on one scale (parallel.distillation.Moments).
        beside: what the teacher's block gives beside its rows. projected: whether the student's rows are his width's
            already, by a projection of the student's own.
        hands_on: whether what stands beside the student's rows goes on, for another teacher.
    """

    teacher: Tower
    stage: int
    loss: FeatureLoss
    heads: int | None = None
    standard: bool = False
    beside: str = ""
    projected: bool = False
    hands_on: bool = False

    def build(self, student: Build) -> Build:
        """That of the teacher's layer."""
        return replace(student, config=self.teacher.config, stage=self.stage)


def lifting(build: Build, width: int, wide: int, *, partial: bool) -> nn.Parameter:
    """A matrix that makes the teacher's features of the student's (Romero et al. 2015, FitNets)."""
    layout, init = TensorLayout(shape=(wide, width)), Init(kind="normal", scales=(1 / math.sqrt(width),))
    return make_parameter(ParameterInfo(layout=layout, init=init, decay="body", partial_over_tensor=partial))


class Match(nn.Module):
    """What the student's patches differ from the teacher's by, each token normalised over its features; what the
    cosines between the patches of an image differ by (Simeoni et al. 2025, DINOv3's Gram matrices); what relations
    within queries, keys and values do (Wang et al. 2021, MiniLMv2), and maps of attention (Wang et al. 2020, MiniLM).

    For features of other widths, and for such on one scale, the student's rows are projected to the teacher's, by a
    matrix that is trained with it; where maps of patches differ the teacher's is resampled to the student's. Class
    tokens take part in relations of queries, keys and values, and in maps of attention, if both models have as many of
    them.

    Args:
        name: of the layer. weights: of this pair.
    """

    def __init__(self, name: str, weights: Weights, target: Target, build: Build) -> None:
        super().__init__()
        there = target.build(build)
        self.tp, self.tokens, self.weights, self.target = build.tp, build.tokens, weights, target
        self.theirs = there.tokens
        self.own_beside, self.their_beside = Beside.of(build, weights.beside), Beside.of(there, target.beside)
        self.heads, self.their_heads = build.here.heads, there.here.heads
        classes = {of.sizes.class_tokens for of in (build, there)}
        self.classes = classes.pop() if len(classes) == 1 else 0
        width, wide = build.here.width, there.here.width
        self.moments = Moments(wide) if weights.features and target.standard else None
        lifts = weights.features and (width != wide or (self.moments is not None and not target.projected))
        self.lift = lifting(build, width, wide, partial=build.tp.splits_rows) if lifts else None

    def forward(self, x: Tensor, batch: MicroBatch, seen: tuple[Tensor]) -> Tensor:
        """The student's rows [R, D] (with others beside them), and the teacher's -> the same rows."""
        rows, own = self.own_beside.split(x, batch.size)
        out = x if self.target.hands_on else rows
        if not (batch.training and batch.differentiated):
            return out
        there, theirs = self.their_beside.split(seen[0].detach(), batch.size)
        found = self._of_rows(rows, there, batch.size) | self._of_attention(own, theirs)
        for name, (losses, copies) in found.items():
            loss = (losses * batch.weights).sum() * getattr(self.weights, name)
            out = attach(out, loss, batch, name, copies=copies)
        return out

    def _of_rows(self, rows: Tensor, there: Tensor, images: int) -> dict[str, tuple[Tensor, int]]:
        """By target, this context rank's share of each image's [B], which all tensor ranks have alike."""
        found = dict[str, tuple[Tensor, int]]()
        if not (self.weights.features or self.weights.gram):
            return found
        given = self._patches(there, self.theirs, images)
        theirs = resampled(given, self.theirs, self.tokens)
        if self.weights.features:
            z = self._patches(rows if self.lift is None else linear(rows, self.lift, None), self.tokens, images)
            if self.moments is None:
                each = token_loss(z, theirs, self.target.loss)
            else:
                self.moments.note(given.flatten(0, 1))
                asked = self.moments.standardise(theirs)
                each = token_loss(z, asked, self.target.loss, normal=True) * self.moments.counts
            found[FEATURES] = each.sum(1) / (self.tokens.rows * self.tokens.cols), self.tp.size
        if self.weights.gram:
            own = self._patches(rows, self.tokens, images)
            keys, others = (self._of_all(of, classes=0) for of in (own, theirs))
            found[GRAM] = gram_difference(own, theirs, keys=keys, teacher_keys=others), self.tp.size
        return found

    def _of_attention(self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        """By target, this rank's share of each image's [B]: of its heads, and of the queries that it holds."""
        pairs = {
            name: (_tokens(own[name], self.tokens, self.tokens, self.classes),
                   _tokens(theirs[name], self.theirs, self.tokens, self.classes))
            for name in own
        }  # fmt: skip
        total, found = sum(replace(self.tokens, prefix=self.classes).counts), dict[str, tuple[Tensor, int]]()
        for kind, letter in ((QUERIES, "q"), (KEYS, "k"), (VALUES, "v")):
            if getattr(self.weights, kind):
                count = self.target.heads or self.heads
                mine, his = (
                    resplit_heads(of, heads, count, self.tp.axis)
                    for of, heads in zip(pairs[letter], (self.heads, self.their_heads), strict=True)
                )
                keys, others = self._of_all(mine), self._of_all(his)
                each = relation_divergence(mine, his, count, keys=keys, teacher_keys=others, queries=total)
                found[kind] = each, 1
        if self.weights.maps:
            (q, their_q), (k, their_k) = pairs["q"], pairs["k"]
            each = map_divergence(q, self._of_all(k), their_q, self._of_all(their_k), total, self.heads)
            found[MAPS] = each, 1
        return found

    def _of_all(self, x: Tensor, classes: int | None = None) -> Tensor:
        """Those tokens of all context ranks: [B, S, ...] -> [B, N, ...]."""
        prefix = self.classes if classes is None else classes
        return tokens_of_all(x, replace(self.tokens, prefix=prefix).counts, self.tokens.context)

    def _patches(self, x: Tensor, tokens: Tokens, images: int) -> Tensor:
        """[R, E], or this tensor rank's rows -> those of this context rank's patches, fp32 [B, P, E]."""
        whole = gather_rows(x, self.tp, images * tokens.count).unflatten(0, (images, tokens.count))
        return whole[:, tokens.own_prefix :].float()


class MatchPooled(nn.Module):
    """1 less the cosine of the student's pooled features and the teacher's, which stand beside their logits.

    Features of another width are projected to the teacher's, as those of patches.

    Args:
        name: of the layer. weights: of this pair. target: the teacher's head.
    """

    def __init__(self, name: str, weights: Weights, target: Target, build: Build) -> None:
        super().__init__()
        self.weight, self.tp, self.context = weights.embeddings, build.tp, build.context
        self.width, self.wide = (pooled_features(of) for of in (build, target.build(build)))
        lifts = self.width != self.wide
        self.lift = lifting(build, self.width, self.wide, partial=False) if lifts else None
        self.moments = Moments(self.wide) if target.standard else None

    def forward(self, x: Tensor, batch: MicroBatch, seen: tuple[Tensor]) -> Tensor:
        """[B, C/T + D], and the teacher's [B, C/T + E] -> the first as it is."""
        if not (batch.training and batch.differentiated):
            return x
        own, theirs = x[:, -self.width :], seen[0][:, -self.wide :]
        own = own if self.lift is None else linear(own, self.lift, None)
        share: float | Tensor = self.weight / self.context.size
        if self.moments is not None:
            self.moments.note(theirs[: 0 if self.context.index else None])  # context ranks have all the same
            theirs, share = self.moments.standardise(theirs), self.moments.counts * share
        losses = cosine_distance(own, theirs, single_axis("features")) * share
        return attach(x, (losses * batch.weights).sum(), batch, EMBEDDINGS, copies=self.tp.size)


def token_loss(own: Tensor, theirs: Tensor, loss: FeatureLoss, *, normal: bool = False) -> Tensor:
    """Of each token, [B, P, E] -> [B, P]: mean over the features of tokens of mean 0 and variance 1, or 1 - cosine.

    Args:
        normal: whether features are compared as they are, since what is asked for is on one scale already.
    """
    if loss == "cosine":
        return 1 - F.cosine_similarity(own, theirs, dim=2)
    a, b = (x if normal else F.layer_norm(x, x.shape[-1:]) for x in (own, theirs))
    different = F.mse_loss if loss == "mse" else F.smooth_l1_loss
    return different(a, b, reduction="none").mean(2)


def resampled(x: Tensor, there: Tokens, here: Tokens) -> Tensor:
    """A map of patches as one of other rows and columns: [B, P, E] -> [B, P', E], bilinear, without aliasing."""
    if (there.rows, there.cols) == (here.rows, here.cols):
        return x
    grid = x.float().transpose(1, 2).unflatten(2, (there.rows, there.cols))
    return F.interpolate(grid, (here.rows, here.cols), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def _tokens(x: Tensor, there: Tokens, here: Tokens, classes: int) -> Tensor:
    """Of a layer's tokens the first, which are class tokens, and the patches, on the map of another: [B, S, h, K]."""
    patches = resampled(x[:, there.own_prefix :].flatten(2), there, here).unflatten(2, x.shape[2:])
    own = min(classes, there.own_prefix)
    return torch.cat([x[:, :own], patches], 1) if own else patches
