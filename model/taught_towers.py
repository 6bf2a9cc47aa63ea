"""Two towers and the two of a teacher as one ordered list: `teacher.image.embed` ... `teacher.pair`, `image.embed` ...
`pair`.

What the teacher makes of a pair, both embeddings in one tensor, rides along the student's layers to where his meet. No
block is matched with another, so the models need not take turns: the pipeline cuts the list by cost. Where embeddings
are matched, a layer for that stands behind each of the student's towers.

Legend: B pairs, E embedding of the student, E' of the teacher, T tensor-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from model.build import Build, Tower
from model.config import ModelConfig
from model.inputs import MicroBatch
from model.layers import LayerSpec, measured
from model.matching import EMBEDDINGS, MATCH, lifting
from model.pair import Pair
from model.projection import Projection
from model.targets import attach
from model.teachers import TEACHER, Pixels, TeacherEmbedding
from model.text import TextConfig
from model.towers import IMAGE, PAIR, TEXT, TOWERS, image_tower, text_tower
from parallel.comm import single_axis
from parallel.distillation import cosine_distance
from parallel.tensor import gather_features, linear


@dataclass(frozen=True, kw_only=True)
class TowersTeacher:
    """Two towers that a student of two learns from.

    Attributes:
        image, text: resolved. embedding, projection, projection_bias: as of `model.build_towers`. max_logit_scale:
            bound of 1 / his temperature. pixels: how he is shown images. dtype, fp8: as of Tower.
    """

    image: ModelConfig
    text: TextConfig
    embedding: int
    projection: Projection
    projection_bias: bool
    max_logit_scale: float
    pixels: Pixels
    dtype: torch.dtype
    fp8: bool = False


class TeacherPair(Pair):
    """Where a teacher's towers meet: both embeddings of unit length, the image's times his logit scale."""

    def forward(self, x: Tensor, batch: MicroBatch, rides: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As Pair -> [B, 2E'], fp32 at least."""
        left, right, scale, _ = super().forward(x, batch, rides)
        return (torch.cat([left * scale, right], 1),)


class MatchEmbedding(nn.Module):
    """1 less the cosine of a tower's embedding and the teacher's, which the student's is projected to if his is of
    another width.

    Args:
        name: of the layer. weight: of the target. side: 0, the image's, or 1. is_share: whether tensor ranks hold
            shares of the student's embedding. width, wide: E, E'.
    """

    def __init__(
        self, name: str, weight: float, side: int, is_share: bool, width: int, wide: int, build: Build
    ) -> None:
        super().__init__()
        self.weight, self.side, self.is_share, self.width = weight, side, is_share, width
        self.tp, self.context = build.tp, build.context
        self.lift = lifting(build, width, wide, partial=False) if width != wide else None

    def forward(self, x: Tensor, batch: MicroBatch, seen: tuple[Tensor]) -> Tensor:
        """[B, E] or [B, E/T], and what the teacher has made of the pairs [B, 2E'] -> the first as it is."""
        if not (batch.training and batch.differentiated):
            return x
        whole = gather_features(x, self.tp, self.width) if self.is_share else x
        own = whole if self.lift is None else linear(whole, self.lift, None)
        theirs = seen[0].chunk(2, dim=1)[self.side]
        losses = cosine_distance(own, theirs, single_axis("features")) * (self.weight / self.context.size)
        return attach(x, (losses * batch.weights).sum(), batch, EMBEDDINGS, copies=self.tp.size)


class TaughtPair(Pair):
    """As Pair; what the teacher has made of the pairs comes out behind all else."""

    def forward(self, x: Tensor, batch: MicroBatch, rides: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The text's embedding, with the image's and the teacher's [B, 2E'] as rides -> as Pair, and the last."""
        *own, taught = rides
        return *super().forward(x, batch, tuple(own)), taught


def build_taught_towers(
    student: Sequence[LayerSpec], image: ModelConfig, text: TextConfig, teacher: TowersTeacher, embeddings: float = 0.0
) -> list[LayerSpec]:
    """The layers of both, in order, measured.

    Args:
        student: of `build_towers`, of an image and a text tower. image, text: these, resolved. embeddings: weight of
            what both towers' embeddings differ from the teacher's by, their mean; 0: they are not matched.
    """
    return list(_measured(tuple(student), image, text, teacher, embeddings))


@cache
def _measured(
    student: tuple[LayerSpec, ...], image: ModelConfig, text: TextConfig, teacher: TowersTeacher, embeddings: float
) -> tuple[LayerSpec, ...]:
    """Once in a process."""
    taught = f"{TEACHER}.{PAIR}"
    own = _matched(student, teacher.embedding, embeddings / len(TOWERS)) if embeddings else student
    first, *layers = [replace(spec, rides=(*spec.rides, taught)) for spec in own]
    *layers, pair = [replace(first, begins=True), *layers]
    assert isinstance(pair.factory, partial)
    layers += [replace(pair, factory=partial(TaughtPair, **pair.factory.keywords))]
    assert text.context_length is not None
    images = torch.empty(1, image.sizes.channels, *image.sizes.image, device="meta")
    batch = MicroBatch.of(images, torch.zeros(1, text.context_length, dtype=torch.int64, device="meta"))
    return tuple(measured([*_teaching(teacher), *layers], Build(config=image), batch))


def _matched(student: Sequence[LayerSpec], wide: int, weight: float) -> list[LayerSpec]:
    """The student's layers, with one behind each tower's head that matches its embedding with the teacher's, and gives
    it on in the head's place."""
    found, stand_in = list[LayerSpec](), dict[str, str]()
    for spec in student:
        spec = replace(spec, rides=tuple(stand_in.get(name, name) for name in spec.rides))
        found.append(spec)
        if spec.kind == "head":
            side = len(stand_in)
            name = stand_in[spec.name] = f"{MATCH}.{side}"
            match = partial(MatchEmbedding, name, weight, side, spec.gives == "shares", spec.output[1], wide)
            found.append(LayerSpec(name=name, factory=match, gives=spec.gives, rides=spec.rides, sees=len(spec.rides)))
    return found


def _teaching(teacher: TowersTeacher) -> list[LayerSpec]:
    """The layers of the teacher, not measured."""
    image = image_tower(
        replace(teacher.image, drop_path=0.0), teacher.embedding, teacher.projection,
        projection_bias=teacher.projection_bias, name=f"{TEACHER}.{IMAGE}",
    )  # fmt: skip
    image[0] = replace(image[0], factory=partial(TeacherEmbedding, pixels=teacher.pixels))
    rides = (image[-1].name,)
    text = text_tower(
        replace(teacher.text, drop_path=0.0), teacher.embedding, teacher.projection, rides=rides,
        name=f"{TEACHER}.{TEXT}",
    )  # fmt: skip
    pair = partial(
        TeacherPair, embedding=teacher.embedding, shares=tuple(end.gives == "shares" for end in (image[-1], text[-1])),
        temperature=1.0, learns=False, most=teacher.max_logit_scale or math.inf, bias=None,
    )  # fmt: skip
    meet = LayerSpec(
        name=f"{TEACHER}.{PAIR}", factory=pair, gives="vectors", rides=rides, joins=True,
        tower=Tower(name=f"{TEACHER}.{PAIR}", config=teacher.image, frozen=True, rests=True),
    )  # fmt: skip

    def frozen(spec: LayerSpec) -> LayerSpec:
        assert spec.tower is not None
        return replace(spec, tower=replace(spec.tower, frozen=True, rests=True, dtype=teacher.dtype, fp8=teacher.fp8))

    return [*map(frozen, [*image, *text]), meet]
