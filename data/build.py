"""From the configuration to a pair of data sets."""

from __future__ import annotations

from data.config import DataConfig
from data.config_checks import check_channels
from data.datasets import Dataset, digits, synthetic
from data.few import few_of_each_class
from data.image_folder import image_folder
from data.image_text import image_text
from data.joined import joined
from data.jpeg import decoder_name
from data.mixing import has_empty_source, whole_shares
from data.normalise import Normalise
from data.resolution import Resolution
from data.scaling import scaler_name
from data.showing import showing_of
from data.templates import captions_of, class_prompts
from data.texts import TextShape, describe_texts, make_texts, tokenizer_of
from data.textures import textures
from data.webdataset import webdataset

_SYNTHETIC_CLASSES = 10  # for objectives without classes, which never look at the labels


def build_datasets(
    config: DataConfig,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    num_classes: int | None,
    seed: int,
    readers: int = 1,
    text: TextShape | None = None,
    patch_size: int | None = None,
) -> tuple[Dataset, Dataset]:
    """The data sets to train on and to evaluate on, of images [channels, height, width].

    `image_size` is in pixels, (height, width) or both at once. `num_classes` is what the model can tell apart; None:
    the model has no classes. `seed` decides synthetic images, the places of texture crops to train on, and which few
    images or labels are kept: every seed holds out the same real images. `readers` processes of this host build the
    same sets: what takes long, one of them does. `text` is what the model's text tower reads; None: it has none, and
    no texts are made.
    `patch_size` is the model's: images of several sizes are of whole patches; None: here all have one size.

    Raises:
        ValueError: for images that cannot be found, for a source that has a share and no image to train on, for more
            classes than the model has, for means and deviations of another number of channels, for a tokenizer or
            templates that do not fit, and for few images or labels of each class that leave all as it is.
    """
    if config.weights:
        whole_shares(config.weights)  # raises
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    Normalise(config, channels)  # raises
    check_channels(config, channels)
    texts = None if text is None else make_texts(tokenizer_of(config), text)
    resolution = Resolution.of(config, height, width, patch_size)
    train, held_out = _build(config, (channels, height, width), num_classes or _SYNTHETIC_CLASSES, seed, readers)
    if config.weights and has_empty_source(train):
        raise ValueError(
            f"data.path={config.path}: a source has no sample to train on: leave it out of data.weights, too"
        )
    if num_classes is not None and not train.num_classes:
        raise ValueError(
            f"data.kind={config.kind} has no classes, but the objective needs some: name the column, or "
            "the field of .json, that has them in data.label_column"
        )
    if num_classes is not None and num_classes < train.num_classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but data.kind={config.kind} has {train.num_classes} classes: "
            f"set model.num_classes to {train.num_classes} or more"
        )
    for part, path in ((train, config.path), (held_out, config.val_path or config.path)):
        if texts is not None and part.captions is None and not part.num_classes:
            raise ValueError(
                f"data.kind={config.kind}, {path}: nothing is said of the first image, and there are no classes to "
                "make captions of, but the model reads texts: see data.caption_column"
            )
        part.captions, part.texts = part.captions or captions_of(part, config), texts
        if resolution is not None and not part.tells_sides:
            raise ValueError(
                f"data.variable_resolution is {config.variable_resolution}, but data.kind={config.kind} does not tell "
                "how large its images are: set it to 0, or use a folder or tar files (image_folder, webdataset)"
            )
        part.resolution = resolution
        if texts is not None and part.captions.tell_looks and config.rand_augment:
            raise ValueError(
                f"data.rand_augment is {config.rand_augment!r}, which turns and brightens images, and captions of "
                "templates that tell it would not know: leave it out, or see data.templates"
            )
        part.show(showing_of(config))
    return few_of_each_class(train, config, seed), held_out


def describe_datasets(kind: str, train: Dataset, held_out: Dataset, num_classes: int | None) -> list[str]:
    """What the start-up report says of the data.

    How much there is, what was left out, what is said of it, what the model is too large for. `num_classes` is as for
    build_datasets.
    """
    known = "" if train.labelled is None else f" ({train.labelled} of them with labels)"
    lines = [f"data: {kind}, {len(train)} training{known} and {len(held_out)} held-out images"]
    lines += [f"  {source}" for source in dict.fromkeys((train.source, held_out.source)) if source is not None]
    if train.crops_when_read:
        lines.append(f"  JPEGs are decoded by {decoder_name()}, crops scaled by {scaler_name()}")
    if num_classes is not None and num_classes > train.num_classes:
        lines.append(
            f"  warning: the model tells {num_classes} classes apart, but there are images of {train.num_classes}: "
            f"model.num_classes {train.num_classes} would do"
        )
    lines += [train.resolution.describe()] if train.resolution is not None else []
    return lines + describe_texts(held_out)


def _build(
    config: DataConfig, image_shape: tuple[int, int, int], synthetic_classes: int, seed: int, readers: int
) -> tuple[Dataset, Dataset]:
    if config.is_joined:
        return joined(config, image_shape, readers)
    config = config.without_kinds
    match config.kind:
        case "digits":
            return digits(image_shape, config.fold)
        case "synthetic":
            return synthetic(config.size, image_shape, synthetic_classes, seed)
        case "image_folder":
            assert config.path is not None
            return image_folder(config.path, config.val_path, image_shape, config.fold, readers)
        case "image_text":
            return image_text(config, image_shape, class_prompts(config), readers)
        case "webdataset" | "parquet":
            return webdataset(config, image_shape, class_prompts(config), readers)
        case "textures":
            return textures(image_shape, config.crops_per_class, seed)
