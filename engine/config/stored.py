"""Teachers of a configuration that are outputs on the disk: whether they are of its images, and say what it asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data import DataConfig, Dataset
from data.datasets import fingerprint
from data.mixing import sample_order
from engine.config.distillation import SHOWN_BY, DistillationConfig, TeacherConfig
from engine.config.pairs import pairs_of
from engine.errors import ConfigError
from engine.teacher_outputs.meta import Meta, is_outputs
from engine.teacher_outputs.shards import StoredOutputs, stored_at
from model import ModelConfig, Teacher
from model.formats.checkpoint import model_of

if TYPE_CHECKING:
    from engine.config.config import Config

# Keys of data that say nothing of pixels or of which image a draw is: files are compared themselves.
_SAY_NOTHING = (
    "path", "val_path", "image_column", "caption_column", "label_column", "tokenizer", "text_cleaning", "text_padding",
    "templates", "prompts", "workers", "views", "index_dir", "max_bad_share", "share_decoding",
)  # fmt: skip
_ORDER = ("data.repeats", "data.weights", "data.shuffle_window")  # keys of which image a draw is
_DRAWN = ("synthetic", "textures")  # kinds whose images follow from the seed
_LOOKED_AT = 1024  # draws


def key_of(data: DataConfig) -> Literal["draw", "image"]:
    """What a row is of: an image that is never augmented is the same in every draw."""
    return "draw" if data.varies else "image"


def images_said(config: Config, student: ModelConfig) -> dict[str, Any]:
    """What decides the pixels of a row, by name, as JSON has it."""
    data, by_draw = config.data, key_of(config.data) == "draw"
    said = {f"data.{name}": value for name, value in asdict(data).items() if name not in _SAY_NOTHING}
    said |= {"the images' rows and columns": student.sizes.image, "their channels": student.sizes.channels}
    said["train.seed"] = config.train.seed if by_draw or data.kind in _DRAWN else None
    for name in () if by_draw else _ORDER:
        del said[name]
    return _as_json(said)


def with_later_keys(there: Meta, here: Mapping[str, Any]) -> Meta:
    """What a folder says, and of keys of `here` that were not yet when it was written what they have meant since: their
    defaults, which leave all as it was."""
    usual = _as_json({f"data.{name}": value for name, value in asdict(DataConfig()).items()})
    later = {name: usual[name] for name in here if name in usual and name not in there.images}
    return replace(there, images={**there.images, **later})


def sets_said(config: Config, train: Dataset, held_out: Dataset) -> dict[str, str]:
    """How many images there are, and which; and in which order they are drawn, where rows are of draws."""
    said = {"training images": train, "held-out images": held_out}
    found = {name: f"{len(of)} of {of.fingerprint}" for name, of in said.items()}
    if key_of(config.data) == "draw":  # by the version of this program, too
        order = sample_order(train, config.train.seed, config.data)
        found["order of draws"] = fingerprint(order.indices(np.arange(_LOOKED_AT)).tobytes())
    return found


def meta_of(
    config: Config, teacher: Teacher, weights: str, sets: tuple[Dataset, Dataset], *, kept: int | None, rows: int,
    features: int, number_format: Literal["fp32", "fp16"], rows_per_file: int, blocks: Sequence[int] = (),
) -> Meta:  # fmt: skip
    """Of outputs of a teacher for the run that a resolved configuration is.

    Args:
        weights: their fingerprint, and that of the order of their classes. sets: training, and held out. kept: classes;
            None: all. rows: of the training part, where it is of draws. features: pooled ones that are kept. blocks:
            whose features of patches are kept.
    """
    sizes = teacher.model.sizes
    classes, stages = sizes.classes, {f"blocks.{n}": sizes.stages[sizes.stage_of(n)] for n in blocks}
    return Meta(
        teacher=weights,
        model=_as_json(asdict(teacher.model)),
        features=features,
        shown=_as_json(asdict(teacher.pixels)) | {"dtype": teacher.format},
        classes=classes,
        kept=classes if kept is None else kept,
        temperature=None if kept in (None, classes) else config.distillation.temperature,
        number_format=number_format,
        key=key_of(config.data),
        images=images_said(config, config.model),
        sets=sets_said(config, *sets),
        held_out_rows=len(sets[1]),
        rows=rows if key_of(config.data) == "draw" else len(sets[0]),
        rows_per_file=rows_per_file,
        blocks={name: [stage.rows * stage.cols, stage.width] for name, stage in stages.items()},
    )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are when they have been written and read."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def stored_of(config: Config) -> tuple[StoredOutputs | None, ...]:
    """Of each teacher: its outputs, if it is a folder of them.

    Raises:
        ConfigError: that cannot be read.
    """
    return tuple(stored_at(of.path) if is_outputs(of.path) else None for of in config.distillation.all_teachers)


def check_stored(config: Config, student: ModelConfig) -> None:
    """Raise ConfigError where stored outputs are of other images or classes, or do not say what is asked of them.

    Args:
        student: resolved.
    """
    for place, (given, of) in enumerate(zip(config.distillation.all_teachers, stored_of(config), strict=True)):
        if of is not None:
            _check_asked(config, given, of.meta, is_first=place == 0)
            _check_blocks(config.distillation, given.path, of.meta, student)
            _check_same(given.path, of.meta, student, images_said(config, student))


def _check_asked(config: Config, given: TeacherConfig, meta: Meta, *, is_first: bool) -> None:
    """That nothing is asked of a teacher that was not kept."""
    keys, path = config.distillation, given.path
    for name in SHOWN_BY:
        if (value := getattr(given, name)) != getattr(TeacherConfig, name):
            raise ConfigError(
                f"the teacher {path} is stored outputs, so its {name} {value} comes too late: leave it out, or give it "
                "to tools.teacher_outputs"
            )
    asked: dict[str, object] = {"relations": [kind for kind in keys.at_depth if kind != "gram"]}
    asked |= {"start_from": keys.start_from} if is_first else {}  # which means the first
    for name, value in asked.items():
        if value:
            raise ConfigError(
                f"distillation.{name} is {value}, but the teacher {path} is stored outputs, and has neither layers nor "
                "weights: leave it out, or give the checkpoint as the teacher"
            )
    if keys.pools and not meta.features:
        raise ConfigError(
            f"distillation asks for pooled features (embeddings_weight, relations distances, angles), and {path} has "
            "logits alone: write both (tools.teacher_outputs --features, in another folder)"
        )
    if meta.keeps_all or not keys.response_weight:
        return
    if "logits" in keys.standardise:
        raise ConfigError(
            f"distillation.standardise has logits, which asks of each class, but {path} has the likeliest {meta.kept} "
            f"of {meta.classes} classes: write all of them (leave --top-k out), or leave it out"
        )
    if keys.response == "sigmoid":
        raise ConfigError(
            f"distillation.response is sigmoid, which asks of each class by itself, but {path} has the likeliest "
            f"{meta.kept} of {meta.classes} classes: write all of them (leave --top-k out), or use response kl"
        )
    if keys.response == "kl" and keys.temperature != meta.temperature:
        raise ConfigError(
            f"distillation.temperature is {keys.temperature}, but {path} has the mass of all but the likeliest "
            f"{meta.kept} classes at temperature {meta.temperature}: use that, or write outputs at this one"
        )


def _check_blocks(keys: DistillationConfig, path: str, meta: Meta, student: ModelConfig) -> None:
    """That blocks whose features are compared are stored."""
    if not keys.compares_rows:
        return
    pairs = pairs_of(keys, student.sizes.depth, model_of(meta.model).sizes.depth)
    wanted, there = [block for _, block in pairs], [int(name.partition(".")[2]) for name in meta.blocks]
    if not set(wanted) <= set(there):
        raise ConfigError(
            f"distillation compares features of the teacher's blocks {wanted} (features_weight, relations gram, pairs) "
            f"and {path} has {f'those of {there} alone' if there else 'no features of blocks'}: write them "
            f"(tools.teacher_outputs --blocks {' '.join(map(str, wanted))}, in another folder), or give other pairs"
        )


def _check_same(path: str, meta: Meta, student: ModelConfig, here: Mapping[str, Any]) -> None:
    if meta.classes != (own := student.sizes.classes):
        raise ConfigError(
            f"the teacher {path} has outputs of {meta.classes} classes and the student {own}: set model.num_classes to "
            f"{meta.classes}, or take outputs of a teacher of the student's classes"
        )
    there = with_later_keys(meta, here).images
    differ = [
        f"{name} is {here.get(name)}, there {there.get(name)}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]
    if differ:
        raise ConfigError(
            f"the teacher {path} has outputs of other images: {'; '.join(differ)}. Train as they were written, or "
            "write outputs of these images with tools.teacher_outputs, in another folder"
        )


def check_rows(config: Config, train: Dataset, held_out: Dataset, draws: int) -> None:
    """Raise ConfigError where stored outputs are of other data sets, or not of all draws of the run."""
    if config.objective != "distillation":
        return
    here = sets_said(config, train, held_out)
    for of in (of for of in stored_of(config) if of is not None):
        for name, images in here.items():
            if images != (there := of.meta.sets.get(name)):
                raise ConfigError(
                    f"the teacher {of.folder} has outputs of other {name}: {there} there, {images} here: "
                    "train with those, or write outputs of these with tools.teacher_outputs, in another folder"
                )
        of.check(draws if of.meta.key == "draw" else len(train))
