"""What a configuration's objective asks of the other keys, and which keys are another objective's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.config.config import Config

_RELATED = {"distances": (2, "pair"), "angles": (3, "triplet")}  # images that are compared, what they are
ENOUGH_IMAGES = max(count for count, _ in _RELATED.values())
"""Of a step: every objective has something to compare then."""
_OF_TEXTS = ("tokenizer", "text_cleaning", "text_padding", "templates", "prompts")  # keys of data


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
