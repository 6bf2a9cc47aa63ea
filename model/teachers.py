"""A student and its teachers as one ordered list of layers: `teacher.embed`, `embed`, `teacher.blocks.0`, ... `head`.

Their rows flow side by side, and each layer acts on its own model's. A teacher's layers stand between the student's at
the same share of their depth, each right before the student's layer that it is matched with, so that a pipeline's stage
holds both. The student's layers have the names that they have without teachers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.beside import POOLED, attending
from model.build import Build, Tower
from model.config import ModelConfig
from model.embed import Embedding
from model.heads import Head
from model.inputs import MicroBatch
from model.layers import LayerSpec, block_layers, build_layers, head_gives, measured
from model.matching import EMBEDDINGS, FEATURES, MATCH, FeatureLoss, Match, MatchPooled, Target, Weights
from model.stored import StoredBlock, StoredHead, StoredTeacher
from model.turns import by_depth, number_of, taking_turns

TEACHER, KEEP = "teacher", "keep"


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How a teacher is shown the images of the student.

    Attributes:
        scale, shift: of each channel: what the student sees, times the one, plus the other. size: rows and columns.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    size: tuple[int, int]

    @staticmethod
    def between(
        seen: tuple[Sequence[float], Sequence[float]], wanted: tuple[Sequence[float], Sequence[float]],
        size: tuple[int, int], channels: int,
    ) -> Pixels:  # fmt: skip
        """From images normalised by one (mean, std), of one number or one per channel, to such as by another."""
        (m, s), (mean, std) = (tuple((tuple(x) * channels)[:channels] for x in pair) for pair in (seen, wanted))
        each = range(channels)
        return Pixels(
            scale=tuple(s[c] / std[c] for c in each), shift=tuple((m[c] - mean[c]) / std[c] for c in each), size=size
        )

    def of(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, *size]. Larger and smaller ones by bicubic interpolation, without aliasing."""
        if any(x != 1 for x in self.scale) or any(self.shift):
            scale, shift = (images.new_tensor(x)[:, None, None] for x in (self.scale, self.shift))
            images = images * scale + shift
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One of the models that a student learns from.

    Attributes:
        name: the prefix of its layers. model: resolved. pixels: how it is shown images. dtype: that it is kept and
            computed in. fp8: whether the matrix products of its blocks are in 8 bits.
    """

    name: str
    model: ModelConfig
    pixels: Pixels
    dtype: torch.dtype
    fp8: bool = False

    @property
    def format(self) -> str:
        """In words."""
        return "fp8" if self.fp8 else str(self.dtype).removeprefix("torch.")


class TeacherEmbedding(Embedding):
    """An embedding that is shown images otherwise than they are."""

    def __init__(self, build: Build, *, pixels: Pixels) -> None:
        super().__init__(build)
        self._pixels = pixels

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """As Embedding."""
        assert batch.images is not None
        return super().forward(x, replace(batch, images=self._pixels.of(batch.images)))


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Layers of the student that are to be like layers of its teachers.

    Attributes:
        pairs: of blocks, with each teacher, as many: (the student's, his), rising in both. shares: what of the target
            each teacher decides. loss: of features. weights: of the targets, which are means over pairs. heads: as of
            Target. standard: targets whose teachers' side is brought on one scale. pooled: whether heads give pooled
            features beside their logits.
    """

    pairs: tuple[tuple[tuple[int, int], ...], ...]
    shares: tuple[float, ...]
    loss: FeatureLoss
    weights: Weights
    heads: int | None = None
    standard: frozenset[str] = frozenset()
    pooled: bool = False


class Kept(nn.Module):
    """What a block has given, once more: it rides to where the last layer gives out all that rides past it."""

    def __init__(self, build: Build) -> None:
        super().__init__()

    def forward(self, x: None, batch: MicroBatch, seen: tuple[Tensor]) -> Tensor:
        """[R, D], or this rank's rows."""
        return seen[0]


def build_student(
    student: ModelConfig, teachers: Sequence[Teacher | StoredTeacher], matching: Matching | None = None
) -> list[LayerSpec]:
    """The layers of distillation, in order, measured as `build_layers` does.

    Args:
        student: resolved. matching: of blocks, with a layer for each pair right behind both; None: none.
    """
    return list(_measured(student, tuple(teachers), matching))


@cache
def _measured(
    student: ModelConfig, teachers: tuple[Teacher | StoredTeacher, ...], matching: Matching | None
) -> tuple[LayerSpec, ...]:
    """Once in a process."""
    # evaluation asks what all say of the student's classes, or nobody
    rests = not all(teacher.model.num_classes for teacher in teachers)
    own, models = build_layers(student), [_teaching(teacher, rests=rests) for teacher in teachers]
    pairs = matching.pairs if matching is not None else [()] * len(teachers)
    if matching is not None:
        own = _beside(own, {i for of in pairs for i, _ in of}, matching)
        models = [_beside(of, {j for _, j in matched}, matching) for of, matched in zip(models, pairs, strict=True)]
    depth, targets = student.sizes.depth, dict[str, str]()
    streams = [
        list(by_depth(of, {Fraction(j + 1, deep): Fraction(i + 1, depth) for i, j in matched}, deep))
        for deep, of, matched in zip((t.model.sizes.depth for t in teachers), models, pairs, strict=True)
    ]
    streams.append([])
    projection = student.sizes.projection
    for at, spec in by_depth(own, {}, depth):
        at = min(at, Fraction(1)) if spec.name == projection else at  # while there are rows that it is matched with
        streams[-1].append((at, spec))
        for match, target in _matches(spec, models, matching, student):
            targets[match.name] = target
            streams[-1].append((at, match))
    layers = [
        replace(spec, sees=spec.rides.index(targets[spec.name])) if spec.name in targets else spec
        for spec in taking_turns(streams)
    ]
    sizes = student.sizes
    batch = MicroBatch.of_images(torch.empty(1, sizes.channels, *sizes.image, device="meta"))
    return tuple(measured(layers, Build(config=student), batch))


def _beside(layers: Sequence[LayerSpec], blocks: Set[int], matching: Matching) -> list[LayerSpec]:
    """A model's layers, of which these blocks, and the head, give beside their outputs what of them is matched."""
    found, what = list[LayerSpec](), matching.weights.beside
    for spec in layers:
        if matching.pooled and spec.kind == "head":
            spec = spec if spec.beside else _pooling(spec)
        elif what and spec.kind == "blocks" and number_of(spec) in blocks:
            assert isinstance(spec.factory, partial)
            name, rate, kind = spec.factory.args
            factory = partial(attending, name, rate, kind, spec.factory.func, what)
            spec = replace(spec, factory=factory, beside=what)
        if found and found[-1].beside and found[-1].tower is not None:  # no layer that matches stands between
            spec = replace(spec, columns=found[-1].tower.config.sizes.stages[found[-1].stage].width)
        found.append(spec)
    return found


def _pooling(head: LayerSpec) -> LayerSpec:
    """The same, whose pooled features come out beside the logits."""
    return replace(head, factory=partial(Head, beside=True), beside=POOLED)


def build_teacher(
    teacher: Teacher, images: tuple[int, int], *, pooled: bool = False, blocks: Sequence[int] = ()
) -> list[LayerSpec]:
    """The layers of a teacher by himself, measured.

    Args:
        images: rows and columns of those that he is shown, as they are before. pooled: whether pooled features come out
            beside the logits. blocks: whose rows come out behind those, in the order of the last layer's rides, of
            which `teacher.keep.3` is of block 3.
    """
    batch = MicroBatch.of_images(torch.empty(1, teacher.model.sizes.channels, *images, device="meta"))
    *layers, head = _teaching(teacher)
    depth, layers = teacher.model.sizes.depth, [*layers, _pooling(head) if pooled else head]
    named, streams = {spec.name: spec for spec in layers}, [list(by_depth(layers, {}, depth))]
    for number in blocks:
        block = named[f"{teacher.name}.blocks.{number}"]
        kept = LayerSpec(name=f"{teacher.name}.{KEEP}.{number}", factory=Kept, stage=block.stage, tower=block.tower)
        streams.append([(Fraction(number + 1, depth), kept)])
    found = [
        replace(spec, sees=spec.rides.index(f"{teacher.name}.blocks.{number_of(spec)}")) if spec.kind == KEEP else spec
        for spec in taking_turns(streams)
    ]
    return measured(found, Build(config=teacher.model), batch)


def _teaching(teacher: Teacher | StoredTeacher, *, rests: bool = False) -> list[LayerSpec]:
    name, model = teacher.name, teacher.model
    if isinstance(teacher, StoredTeacher):
        block, head = partial(StoredBlock, number=teacher.number), partial(StoredHead, number=teacher.number)
        tower = Tower(name=name, config=model, frozen=True, dtype=torch.float32)
        blocks = [
            LayerSpec(
                name=f"{name}.blocks.{n}", factory=partial(block, f"blocks.{n}"), stage=model.sizes.stage_of(n),
                reads=("outputs",), tower=tower,
            )
            for n in teacher.blocks
        ]  # fmt: skip
        return [
            *blocks,
            LayerSpec(
                name=f"{name}.head", factory=head, stage=model.sizes.last.index, gives=head_gives(model),
                beside=POOLED, reads=("outputs",), tower=tower,
            ),
        ]  # fmt: skip
    tower = Tower(name=name, config=model, frozen=True, rests=rests, dtype=teacher.dtype, fp8=teacher.fp8)
    embed = partial(TeacherEmbedding, pixels=teacher.pixels)
    layers = [
        LayerSpec(name=f"{name}.embed", factory=embed, reads=("images",)),
        *block_layers(model, f"{name}."),
        LayerSpec(name=f"{name}.head", factory=Head, stage=model.sizes.last.index, gives=head_gives(model)),
    ]
    return [replace(spec, tower=tower) for spec in layers]


def _matches(
    layer: LayerSpec, teachers: Sequence[Sequence[LayerSpec]], matching: Matching | None, student: ModelConfig
) -> Iterator[tuple[LayerSpec, str]]:
    """Layers that match a layer of the student, each with the name of what it is matched with."""
    if matching is None:
        return
    for teacher, (layers, pairs, share) in enumerate(zip(teachers, matching.pairs, matching.shares, strict=True)):
        for place, (own, other, asked) in enumerate(_matched(pairs, matching.weights, student)):
            if own == layer.name and any(asked):
                there = next(of for of in layers if of.name.endswith(f".{other}"))
                assert there.tower is not None
                name, is_head = f"{MATCH}.{place * len(teachers) + teacher}", own == "head"
                weights = Weights(*(weight * share for weight in asked))
                later = (f"blocks.{i}" for other in matching.pairs[teacher + 1 :] for i, _ in other)
                target = Target(
                    teacher=there.tower, stage=there.stage, loss=matching.loss, heads=matching.heads,
                    standard=(EMBEDDINGS if is_head else FEATURES) in matching.standard, beside=there.beside,
                    projected=layer.name == student.sizes.projection, hands_on=own in later,
                )  # fmt: skip
                factory = partial(MatchPooled if is_head else Match, name, weights, target)
                beside = layer.beside if is_head or target.hands_on else ""
                spec = LayerSpec(name=name, factory=factory, stage=layer.stage, gives=layer.gives, beside=beside)
                yield spec, there.name


def _matched(
    pairs: Sequence[tuple[int, int]], weights: Weights, student: ModelConfig
) -> Iterator[tuple[str, str, Weights]]:
    """A layer of the student, one of a teacher, and by what they are matched. What is compared of the rows of the last
    block is compared behind the projection that stands between it and the head, if there is one."""
    sizes, own = student.sizes, weights._replace(embeddings=0.0)
    each = Weights(*(weight / len(pairs) for weight in own)) if pairs else own
    for i, j in pairs:
        projects = sizes.projection is not None and i == sizes.depth - 1
        yield f"blocks.{i}", f"blocks.{j}", each._replace(features=0.0, gram=0.0) if projects else each
    if weights.embeddings:
        yield "head", "head", Weights(embeddings=weights.embeddings)
    for i, j in pairs[-1:]:
        if sizes.projection is not None and i == sizes.depth - 1:
            yield sizes.projection, f"blocks.{j}", each.of_rows


def student_layers(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Those of a list that are trained."""
    return [layer for layer in layers if not layer.is_frozen]
