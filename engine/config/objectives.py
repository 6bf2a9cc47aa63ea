"""What a configuration's objective asks of the other keys, and which keys are another objective's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data import TextShape
from engine.config.contrastive import ContrastiveConfig
from engine.config.inheritance import inheritance_of
from engine.config.lifting import with_projection
from engine.config.pipeline import Pipeline
from engine.config.stored import check_stored
from engine.config.teachers import at_steps, check_maps, check_teachers, matching_of, taught_by
from engine.config.tower_teachers import tower_teacher_of, with_step
from engine.errors import ConfigError
from model import (
    LayerSpec,
    ModelConfig,
    TextConfig,
    TowersTeacher,
    build_student,
    build_taught_towers,
    build_towers,
    check_parallel,
    check_towers,
    student_layers,
)
from parallel.grid import GridShape
from parallel.pipeline import Schedule
from parallel.pipeline.actions import ActionKind

if TYPE_CHECKING:
    from engine.config.config import Config

Passes = Literal["auto", 1, 2]
_RELATED = {"distances": (2, "pair"), "angles": (3, "triplet")}  # images that are compared, what they are
ENOUGH_IMAGES = max(count for count, _ in _RELATED.values())
"""Of a step: every objective has something to compare then."""
_OF_TEXTS = ("tokenizer", "text_cleaning", "text_padding", "templates", "prompts")  # keys of data
_FIRST_BACKWARDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


def check_objective(config: Config) -> None:
    """Raise ConfigError where a key of another objective is set, or the batch is none for this one."""
    texts = {**set_keys("text", config.text), **set_keys("data", config.data, _OF_TEXTS)}
    views = set_keys("data", config.data, ("views", "local_crops", "local_crop_area"))
    _check_few(config)
    if config.objective != "distillation":
        keys = set_keys("distillation", config.distillation)
        _refuse(keys, "objective distillation", f"objective is {config.objective}")
    if config.objective != "contrastive":
        keys = set_keys("contrastive", config.contrastive) | texts | views
        _refuse(keys, "objective contrastive", f"objective is {config.objective}")
        if config.objective == "distillation":
            config.distillation.check()
            _check_batch(config)
            if config.train.label_smoothing and not config.distillation.label_weight:
                raise ConfigError(
                    f"train.label_smoothing is {config.train.label_smoothing}, but distillation.label_weight is 0, so "
                    "that labels are no target: leave it out, or give them a weight"
                )
        return
    classes = set_keys("model", config.model, ("num_classes", "head_bias"))
    classes = {key: value for key, value in classes.items() if value}
    _refuse(classes | set_keys("train", config.train, ("loss",)), "objective supervised", "objective is contrastive")
    soft = set_keys("train", config.train, ("label_smoothing",)) | set_keys("data", config.data, ("mixup", "cutmix"))
    _refuse(soft, "objectives supervised and distillation", "objective is contrastive")
    if config.contrastive.has_texts:
        _refuse(views, "contrastive.pairs views", "contrastive.pairs is image_text")
    else:
        _refuse(texts, "contrastive.pairs image_text", "contrastive.pairs is views")
    if config.data.local_crops and config.contrastive.loss != "infonce":
        raise ConfigError(
            f"data.local_crops is {config.data.local_crops}, but contrastive.loss {config.contrastive.loss} compares "
            "all views alike: set it to 0, or use loss infonce"
        )
    if config.train.global_batch_size < 2:
        raise ConfigError(
            f"train.global_batch_size is {config.train.global_batch_size}: a pair is told from the others of its "
            "batch, so use 2 or more"
        )


def _check_few(config: Config) -> None:
    """Raise ConfigError where few images or labels of each class are asked for in vain."""
    keys = set_keys("data", config.data, ("images_per_class", "labels_per_class"))
    if config.objective == "contrastive":
        _refuse(keys, "objectives supervised and distillation", "objective is contrastive")
    labels = config.data.labels_per_class
    if labels is not None and config.objective == "supervised":
        raise ConfigError(
            f"data.labels_per_class is {labels}, but objective supervised learns from labels alone: use "
            "data.images_per_class, which leaves images without a label out, or objective distillation"
        )
    if labels is not None and not config.distillation.label_weight:
        raise ConfigError(
            f"data.labels_per_class is {labels}, but distillation.label_weight is 0, so that no label is looked at: "
            "leave it out, or give the labels a weight"
        )


def _check_batch(config: Config) -> None:
    """Raise ConfigError where a batch has no pair or triplet to be compared with a teacher's."""
    size, kinds = config.train.global_batch_size, config.distillation.relation_weights
    for kind, (least, of) in _RELATED.items():
        if kind in kinds and size < least:
            raise ConfigError(
                f"train.global_batch_size is {size}, in which there is no {of} of images for distillation.relations "
                f"{kind}: use {least} or more"
            )


def few_images(micro_batch: int) -> int:
    """Of a step that tells what layers cost: two micro-batches or more, as many on each of two data ranks, enough for
    any objective.
    """
    return 2 * max(micro_batch, -(-ENOUGH_IMAGES // 2))


def _refuse(keys: Mapping[str, Any], own: str, here: str) -> None:
    for key, value in keys.items():
        raise ConfigError(f"{key} is {value}, a key of {own}, but {here}: leave it out, or use {own}")


def set_keys(group: str, values: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Keys of a group of the configuration that are not at their defaults, and their values.

    Args:
        values: the group. names: to look at; none: all.
    """

    def found() -> Iterator[tuple[str, Any]]:
        usual = asdict(type(values)())
        for field in fields(values):
            value = getattr(values, field.name)
            if (not names or field.name in names) and value != usual[field.name]:
                yield f"{group}.{field.name}", value

    return dict(found())


def runs_forwards_first(schedule: Schedule) -> bool:
    """Whether the last stage runs the forwards of all micro-batches before the first of its backwards.

    By readiness, too: there no backward runs ahead of a forward (parallel.pipeline.readiness).
    """
    last = schedule.num_stages - 1
    own = [a.kind for a in schedule.ranks[schedule.stage_to_rank[last]] if a.stage == last and a.kind.is_compute]
    first = next((n for n, kind in enumerate(own) if kind in _FIRST_BACKWARDS), len(own))
    return ActionKind.FORWARD not in own[first:]


def passes_of(objective: str, given: Passes, pipeline: Pipeline, micro_batches: int) -> Passes:
    """The key `passes` of an objective with a joint loss, as far as it can be known before memory is: `auto` where that
    decides, of a contrastive one.

    Raises:
        ConfigError: one pass, with a schedule that cannot keep all forwards.
    """
    alone = pipeline.ranks == 1
    if micro_batches == 1:
        return given if given != "auto" else 1
    able = alone or runs_forwards_first(pipeline.schedule(micro_batches))
    if given == 1 and not able:
        name = pipeline.parallel.schedule
        raise ConfigError(
            f"{objective}.passes is 1, which needs the outputs of all {micro_batches} micro-batches before the first "
            f"backward, but parallel.schedule {name} runs backwards in between: use gpipe, one micro-batch per step (a "
            "larger train.micro_batch_size), or passes auto or 2"
        )
    if given == "auto" and alone:
        return "auto" if objective == "contrastive" else 2
    if given == "auto":
        return 1 if able else 2
    return given


class Built(NamedTuple):
    """What of a configuration the model is. groups: of keys, resolved, by name. layers, blocks: how many there are.
    what: the layers in words.
    """

    groups: dict[str, Any]
    layers: int
    blocks: int
    what: str


def resolve_model(config: Config, shape: GridShape) -> Built:
    """The groups of keys that say what is trained, resolved for ranks of this shape.

    Raises:
        ValueError: values that cannot be, alone or together or on so many ranks.
    """
    if config.objective == "contrastive":
        return _towers(config, shape)
    model = with_projection(config, config.model.resolve())
    check_parallel(model, shape.tensor, shape.context)
    if not model.num_classes:
        raise ValueError(
            f"model.num_classes is 0, so the model has no classifier, but objective {config.objective} trains one: set "
            "model.num_classes to the number of classes of the data"
        )
    if model.head_bias is None and model.classifier_bias:
        model = replace(model, head_bias=-10.0 if config.train.loss == "sigmoid" else 0.0)
    depth, merges = model.sizes.depth, len(model.sizes.stages) - 1
    layers, what = depth + merges + 2, f"the model ({_inner('embedding', depth, merges, 'head')})"
    if config.objective == "distillation":
        check_stored(config, model)
        teachers = taught_by(config, model)
        check_teachers(teachers, shape)
        inheritance_of(config, model)  # what it refuses is refused here
        if (matching := matching_of(config, teachers, model)) is not None and shape.context > 1:
            check_maps(model, teachers, matching, shape.context)
        layers, several = len(build_student(model, teachers, matching)), "s" * (len(teachers) > 1)
        what = f"the student and its teacher{several}" if teachers else "the student"
        return Built({"model": model, "distillation": at_steps(config.distillation)}, layers, depth, what)
    return Built({"model": model}, layers, depth, what)


def blocks_of(config: Config) -> int:
    """How many blocks a resolved configuration has, of all towers, those of teachers apart."""
    if config.objective != "contrastive":
        return config.model.sizes.depth
    return _count(towers(config.model, config.text, config.contrastive), "blocks")


def _count(layers: Sequence[LayerSpec], kind: str) -> int:
    return sum(layer.kind == kind for layer in layers)


def _towers(config: Config, shape: GridShape) -> Built:
    keys = config.contrastive.resolve()
    model = replace(config.model, num_classes=0).resolve()
    text = config.text.resolve() if keys.has_texts else config.text
    config = with_step(replace(config, contrastive=keys))
    keys, teacher = config.contrastive, tower_teacher_of(config, model, text)
    layers = towers(model, text, keys, teacher, local_crops=config.data.local_crops)
    check_towers(layers, shape.tensor, shape.context)
    if 0 < keys.queue < shape.data:
        raise ValueError(
            f"contrastive.queue is {keys.queue}, fewer keys than the {shape.data} data-parallel ranks that share them: "
            f"use {shape.data} or more"
        )
    own = student_layers(layers)
    blocks, merges = _count(own, "blocks"), _count(own, "merges")
    inner = (
        _inner("embeddings", blocks, merges, "heads") if keys.has_texts else _inner("embedding", blocks, merges, "head")
    )
    what = f"{'both towers' if keys.has_texts else 'the tower'} ({inner}, pair){' and their teacher' * bool(teacher)}"
    data = config.data if keys.has_texts else replace(config.data, views=2)
    return Built({"model": model, "text": text, "contrastive": keys, "data": data}, len(layers), blocks, what)


def _inner(first: str, blocks: int, merges: int, last: str) -> str:
    of_merges = f"{merges} patch merge{'s' * (merges > 1)}, " if merges else ""
    return f"{first}, {blocks} blocks, {of_merges}{last}"


def towers(
    model: ModelConfig, text: TextConfig, keys: ContrastiveConfig, teacher: TowersTeacher | None = None, *,
    local_crops: int = 0,
) -> list[LayerSpec]:  # fmt: skip
    """The layers of objective contrastive, of resolved groups: of both towers, or of one, and the pair; before them
    those of a teacher. local_crops: of each image, beside two views.

    Raises:
        ValueError: towers that cannot be projected to one embedding.
    """
    assert keys.temperature is not None and keys.learn_temperature is not None
    layers = build_towers(
        model,
        text if keys.has_texts else None,
        embedding=keys.embedding,
        projection=keys.projection,
        projection_bias=keys.projection_bias,
        temperature=keys.temperature,
        learn_temperature=keys.learn_temperature,
        max_logit_scale=keys.max_logit_scale or math.inf,
        bias=keys.bias,
        predictor=keys.predictor,
        local_crops=local_crops,
    )
    return layers if teacher is None else build_taught_towers(layers, model, text, teacher, keys.embeddings_weight)


def check_labels(config: Config, classes: int) -> None:
    """Raise ConfigError where a resolved configuration goes by labels, and the data have so many classes: none."""
    if config.objective == "contrastive" and config.contrastive.positives == "label" and not classes:
        raise ConfigError(
            f"contrastive.loss {config.contrastive.loss} has all of one class belong together, but data.kind "
            f"{config.data.kind} has no classes here: name the column that has them in data.label_column, or use "
            "infonce or sigmoid"
        )


def check_repeats(config: Config) -> None:
    """Raise ConfigError where a resolved configuration repeats images in vain, or against what it trains."""
    repeats, batch = config.data.repeats, config.train.global_batch_size
    if batch % repeats:
        raise ConfigError(
            f"data.repeats is {repeats}, of which train.global_batch_size {batch} is no multiple, so that steps would "
            f"part the rows of an image: use a batch of {max(1, batch // repeats) * repeats}, or other repeats"
        )
    if config.objective != "contrastive":
        return
    positives, loss = config.contrastive.positives, config.contrastive.loss
    if positives == "image" and repeats == 1:
        raise ConfigError(
            "contrastive.positives is image, but data.repeats is 1, so that each image has one row: set data.repeats "
            "to 2 or more"
        )
    if positives == "pair" and repeats > 1:
        raise ConfigError(
            f"data.repeats is {repeats}, but contrastive.loss {loss} has one true partner, so that rows of one image "
            "would be told from each other: leave it out, or use loss supcon with positives image"
        )


def text_shape(config: Config) -> TextShape | None:
    """What the text tower of a resolved configuration reads; None: there is none."""
    if config.objective != "contrastive" or not config.contrastive.has_texts:
        return None
    text = config.text
    assert text.context_length is not None and text.vocabulary_size is not None
    return TextShape(length=text.context_length, vocabulary_size=text.vocabulary_size, end_token=text.end_token)
