"""The teachers of a configuration: what their checkpoints say of them, and whether the student can be matched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.distillation import DistillationConfig, TeacherConfig
from engine.config.pairs import pairs_of
from engine.errors import ConfigError
from engine.precision.precision import DTYPES
from engine.teacher_outputs.meta import is_outputs
from engine.teacher_outputs.shards import stored_at
from model import TEACHER, Matching, ModelConfig, Pixels, StoredTeacher, Teacher, check_parallel
from model.formats.api import open_weights
from model.formats.base import Preprocessing
from model.formats.checkpoint import model_of
from model.formats.weights import StoredWeights, Which
from model.matching import Weights
from model.sizes import Sizes, Tokens
from parallel.checkpoint.manifest import CheckpointError
from parallel.checkpoint.place import newest
from parallel.comm import Axis
from parallel.grid import GridShape

if TYPE_CHECKING:
    from engine.config.config import Config


Teachers = tuple[Teacher | StoredTeacher, ...]


@dataclass(frozen=True)
class Found:
    """What a checkpoint says.

    Attributes:
        path: of the weights: of several steps the folder of the newest. which: of them. labels: names of its classes,
            if they are known. embeds: whether these are no classes but features of an embedding, as of an image tower.
            fingerprint: of the weights, wherever they lie.
    """

    path: Path
    which: Which
    model: ModelConfig
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    embeds: bool
    fingerprint: str

    def classifies(self, classes: int) -> bool:
        """Whether its logits are of so many classes."""
        return not self.embeds and self.model.sizes.classes == classes

    def of_classes(self, classes: int) -> ModelConfig:
        """The model, without a classifier that is of others: what that makes is nobody's target, and nobody's start."""
        if self.classifies(classes):
            return self.model
        return replace(self.model, num_classes=0, classifier_bias=None, head_bias=None)


def teachers_of(config: Config, student: ModelConfig | None = None) -> tuple[Teacher, ...]:
    """Those of a configuration whose objective is distillation, but for such as are stored outputs.

    Args:
        student: the model, resolved; None: the configuration is.

    Raises:
        ConfigError: a checkpoint cannot be read, or the student cannot be matched with its model.
    """
    student = student or config.model
    return tuple(_teacher(name, of, config, student) for name, of in computed(config).items())


def taught_by(config: Config, student: ModelConfig | None = None) -> Teachers:
    """All that have layers in the student's list: stored ones where features are compared, none where nothing is asked
    of them. Arguments and errors as of `teachers_of`."""
    keys, depth = config.distillation, (student or config.model).sizes.depth
    if not keys.asks_teachers:
        return ()
    beside, found = {of.name: of for of in teachers_of(config, student)}, list[Teacher | StoredTeacher]()
    number = 0
    for name, of in named(config).items():
        if name in beside:
            found.append(beside[name])
        elif keys.pools or keys.compares_rows:
            model = model_of(stored_at(of.path).meta.model)
            blocks = [j for _, j in pairs_of(keys, depth, model.sizes.depth)] if keys.compares_rows else []
            found.append(StoredTeacher(name=name, model=model, number=number, blocks=tuple(blocks)))
        number += name not in beside
    return tuple(found)


def named(config: Config) -> dict[str, TeacherConfig]:
    """All, by what the names of their layers begin with."""
    given = config.distillation.all_teachers
    names = [TEACHER] if len(given) == 1 else [f"{TEACHER}.{number}" for number in range(len(given))]
    return dict(zip(names, given, strict=True))


def computed(config: Config) -> dict[str, TeacherConfig]:
    """Teachers that are checkpoints, not outputs on the disk, by what the names of their layers begin with."""
    return {name: of for name, of in named(config).items() if not is_outputs(of.path)}


def _teacher(name: str, given: TeacherConfig, config: Config, student: ModelConfig) -> Teacher:
    found = found_of(given)
    size = found.model.image_size if given.image_size is None else given.image_size
    _check(given.path, found, config, student)
    try:
        model = replace(found.of_classes(student.sizes.classes), image_size=size, drop_path=0.0).resolve()
    except ValueError as error:
        raise ConfigError(f"the teacher {given.path} cannot be shown images of {size}: {error}") from error
    data, own = config.data, found.preprocessing
    mean = given.mean or (own.mean if own is not None else data.mean)
    std = given.std or (own.std if own is not None else data.std)
    channels = model.sizes.channels
    for what, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels) or min((*values, 1.0)) <= 0 < (what == "std"):
            raise ConfigError(
                f"the {what} of the pixels that the teacher {given.path} is shown is {list(values)}: give one number, "
                f"or one for each of {channels} channels" + (", above 0" if what == "std" else "")
            )
    pixels = Pixels.between((data.mean, data.std), (mean, std), model.sizes.image, channels)
    return Teacher(
        name=name, model=model, pixels=pixels, dtype=DTYPES[given.dtype or config.precision.dtype],
        fp8=given.dtype == "fp8",
    )  # fmt: skip


def _check(path: str, found: Found, config: Config, student: ModelConfig) -> None:
    """Raise ConfigError where logits that are compared, or images, are not of one shape."""
    own, there = student.sizes, found.model.sizes
    if config.distillation.response_weight and not found.classifies(own.classes):
        has = f"{there.classes} features of an embedding" if found.embeds else f"{there.classes} classes"
        cure = "" if found.embeds or not there.classes else f"set model.num_classes to {there.classes}, "
        raise ConfigError(
            f"the teacher {path} has {has} and the student {own.classes} classes, so their logits cannot be matched: "
            f"{cure}take a teacher of the student's classes, or set distillation.response_weight to 0 and match "
            "embeddings, features or relations, which need no classes"
        )
    if own.channels != there.channels:
        raise ConfigError(
            f"the teacher {path} takes images of {there.channels} channel(s) and the student of {own.channels}: set "
            f"model.in_channels to {there.channels}, or take another teacher"
        )


def matching_of(config: Config, teachers: Teachers, student: ModelConfig | None = None) -> Matching | None:
    """What layers are matched. Arguments, and what is raised, as of `teachers_of`."""
    keys, student = config.distillation, student or config.model
    at_depth = Weights(features=keys.features_weight, **keys.at_depth)
    weights = at_depth._replace(embeddings=keys.embeddings_weight)
    if not (any(weights) or keys.relates_images):
        return None
    depth = student.sizes.depth
    pairs = tuple(pairs_of(keys, depth, of.model.sizes.depth) if any(at_depth) else () for of in teachers)
    for teacher, given in zip(teachers, pairs, strict=True):
        for pair in given:
            _check_heads(pair, student.sizes, teacher, weights, keys.relation_heads)
    return Matching(
        pairs=pairs, shares=keys.shares, loss=keys.features, weights=weights, heads=keys.relation_heads,
        standard=frozenset(keys.standardise), pooled=keys.pools,
    )  # fmt: skip


def _check_heads(
    pair: tuple[int, int], student: Sizes, teacher: Teacher | StoredTeacher, weights: Weights, heads: int | None
) -> None:
    """Raise ConfigError where a pair of blocks has no relations of the same form."""
    both = list(zip((student, teacher.model.sizes), pair, strict=True))
    own, theirs = (of.stages[of.stage_of(block)] for of, block in both)
    named = f"distillation.pairs {list(pair)}: the student's block"
    if weights.maps and own.heads != theirs.heads:
        raise ConfigError(
            f"{named} has {own.heads} heads and the {teacher.name}'s {theirs.heads}, and maps are compared head by "
            f"head: use relations queries, keys or values, which are cut into heads anew, or {theirs.heads} heads"
        )
    kinds = [[kind for stage in of.stages for kind in stage.kinds][block] for of, block in both]
    if weights.maps and kinds != ["full", "full"]:
        raise ConfigError(
            f"{named} has {kinds[0]} attention and the {teacher.name}'s {kinds[1]}; maps are compared where each token "
            "sees all: use relations queries, keys or values, or pairs of blocks with full attention"
        )
    count = heads or own.heads
    widths = {"student": own.width, teacher.name: theirs.width}
    for whose, width in widths.items():
        if (weights.queries or weights.keys or weights.values) and width % count:
            raise ConfigError(
                f"distillation.pairs {list(pair)}: {width} features of the {whose}'s queries, keys or values cannot be "
                f"cut into {count} heads: set distillation.relation_heads to a divisor of {own.width} and "
                f"{theirs.width}, such as {gcd(own.width, theirs.width)}"
            )


def check_maps(student: ModelConfig, teachers: Teachers, matching: Matching, context_size: int) -> None:
    """Raise ConfigError where context ranks would have other patches of a student's block than of the teacher's."""
    axis = Axis(name="context", ranks=tuple(range(context_size)), index=0, planned=True)
    for teacher, pairs in zip(teachers, matching.pairs, strict=True):
        for pair in pairs:
            own, theirs = (
                replace(Tokens.of(sizes, sizes.stage_of(block), axis), prefix=0)
                for sizes, block in zip((student.sizes, teacher.model.sizes), pair, strict=True)
            )
            if own != theirs:
                raise ConfigError(
                    f"distillation.pairs {list(pair)}: the student's map is {own.rows} x {own.cols} patches and the "
                    f"{teacher.name}'s {theirs.rows} x {theirs.cols}, of which {context_size} context ranks hold other "
                    "parts: use context_parallel_size 1, a teacher_image_size that makes both maps alike, or other "
                    "pairs"
                )


def check_teachers(teachers: Teachers, shape: GridShape) -> None:
    """Raise ConfigError where one cannot be split over the ranks, as the student is."""
    for teacher in (of for of in teachers if isinstance(of, Teacher)):
        try:
            check_parallel(teacher.model, shape.tensor, shape.context)
        except ValueError as error:
            raise ConfigError(f"of the {teacher.name} {str(error).replace('model.', '')}") from error


def formats_of_teachers(config: Config) -> Iterator[tuple[str, str]]:
    """(path, format) of each teacher that is computed in one of his own."""
    keys = config.contrastive
    if config.objective == "contrastive" and keys.teacher is not None and keys.teacher_dtype is not None:
        yield keys.teacher, keys.teacher_dtype
    if config.objective == "distillation" and config.distillation.asks_teachers:
        yield from ((of.path, of.dtype) for of in computed(config).values() if of.dtype is not None)


def found_of(given: TeacherConfig) -> Found:
    """What a teacher's checkpoint says. Raises as `found_at`."""
    return found_at(given.path, given.load_weights)


@cache
def found_at(path: str, which: Which = "weights") -> Found:
    """What lies there. Read once in a run (`pretrain` forgets what was read before it), so that all of the run goes by
    the same weights, though the teacher's own run may go on meanwhile.

    Raises:
        ConfigError: nothing does that can be read.
    """
    try:
        with open_weights(Path(path), only_model=True, which=which) as weights:
            d = weights.description
            fingerprint = fingerprint_of(weights, which)
            return Found(weights.path, which, d.model, d.preprocessing, d.labels, d.embeds, fingerprint)
    except (OSError, ValueError) as error:
        raise ConfigError(f"distillation.teacher: {error}") from error


def fingerprint_of(weights: StoredWeights, which: Which) -> str:
    """Of weights, wherever they lie."""
    said = weights.identity.removeprefix(str(weights.path)).strip(" ()")
    return said if which == "weights" else f"{said}, {which}"


def at_steps(keys: DistillationConfig) -> DistillationConfig:
    """The keys, with the folder of the step that is read where a teacher is a folder of several: a run that goes on
    has the same teacher then, whatever his own run has saved meanwhile."""
    return keys.at([at_step(of.path) for of in keys.all_teachers])


def at_step(path: str) -> str:
    """The folder of the newest step of one of several; else the path."""
    try:
        return str(newest(Path(path)))
    except CheckpointError:
        return path  # of another library, or outputs
