"""Two towers and the two of a teacher as one ordered list: `teacher.image.embed` ... `teacher.pair`, `image.embed` ...
`pair`.

What the teacher makes of a pair, both embeddings in one tensor, rides along the student's layers to where his meet. No
layer is matched with another, so the models need not take turns: the pipeline cuts the list by cost.

Legend: B pairs, E embedding of the student, E' of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from model.build import Build, Tower
from model.config import ModelConfig
from model.inputs import MicroBatch
from model.layers import LayerSpec, measured
from model.pair import Pair
from model.projection import Projection
from model.teachers import TEACHER, Pixels, TeacherEmbedding
from model.text import TextConfig
from model.towers import IMAGE, PAIR, TEXT, image_tower, text_tower


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


class TaughtPair(Pair):
    """As Pair; what the teacher has made of the pairs comes out behind all else."""

    def forward(self, x: Tensor, batch: MicroBatch, rides: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The text's embedding, with the image's and the teacher's [B, 2E'] as rides -> as Pair, and the last."""
        *own, taught = rides
        return *super().forward(x, batch, tuple(own)), taught


def build_taught_towers(
    student: Sequence[LayerSpec], image: ModelConfig, text: TextConfig, teacher: TowersTeacher
) -> list[LayerSpec]:
    """The layers of both, in order, measured.

    Args:
        student: of `build_towers`, of an image and a text tower. image, text: these, resolved.
    """
    return list(_measured(tuple(student), image, text, teacher))


@cache
def _measured(
    student: tuple[LayerSpec, ...], image: ModelConfig, text: TextConfig, teacher: TowersTeacher
) -> tuple[LayerSpec, ...]:
    """Once in a process."""
    taught = f"{TEACHER}.{PAIR}"
    first, *layers = [replace(spec, rides=(*spec.rides, taught)) for spec in student]
    *layers, pair = [replace(first, begins=True), *layers]
    assert isinstance(pair.factory, partial)
    layers += [replace(pair, factory=partial(TaughtPair, **pair.factory.keywords))]
    assert text.context_length is not None
    images = torch.empty(1, image.sizes.channels, *image.sizes.image, device="meta")
    batch = MicroBatch.of(images, torch.zeros(1, text.context_length, dtype=torch.int64, device="meta"))
    return tuple(measured([*_teaching(teacher), *layers], Build(config=image), batch))


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
