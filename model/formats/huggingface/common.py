"""What the models of transformers share: their configurations, activations, and how their images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Origin, Preprocessing
from model.formats.expressible import whole_patches
from model.formats.huggingface.images import preprocessing_of, preprocessor_config
from model.formats.huggingface.keys import TOWERS, check_known
from model.formats.sources import Source

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
PLAIN = "-"
"""The variant of an origin whose names begin with nothing; '' is the usual one."""
_ACTIVATIONS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "quick_gelu": "quick"}


def config_of(source: Source, known: frozenset[str]) -> Mapping[str, Any]:
    """Their `config.json`. Raises ConversionError if there is none, or if it sets a key that is not known."""
    if not (config := source.files.get(CONFIG)):
        raise ConversionError(f"{source.path} has no {CONFIG} beside it: give it with --source_config FILE")
    found: Mapping[str, Any] = config
    check_known(found, known)
    return found


def tower_of(source: Source, known: frozenset[str], *, has_dicts: bool = False) -> Mapping[str, Any]:
    """The same of the image tower, of a `config.json` of two towers or of it alone.

    Args:
        has_dicts: as of `part_of`.
    """
    found = config_of(source, known | TOWERS)
    is_of_two = "vision_config" in found or "vision_config_dict" in found
    return part_of(found, "vision_config", known, has_dicts=has_dicts) if is_of_two else found


def part_of(config: Mapping[str, Any], key: str, known: frozenset[str], *, has_dicts: bool) -> Mapping[str, Any]:
    """What a `config.json` of two towers says of one. Raises ConversionError for a key that is not known.

    Args:
        key: `text_config` or `vision_config`. has_dicts: whether `text_config_dict`, where it is there, says all, and
            what it leaves out is as usual, whatever `text_config` has (CLIPConfig; SiglipConfig looks at no such key).
    """
    names = [key, *([f"{key}_dict"] if has_dicts and config.get(f"{key}_dict") is not None else [])]
    parts: list[Mapping[str, Any]] = [config.get(name) or {} for name in names]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, Mapping):
            raise ConversionError(f"{name} of {CONFIG} is {part!r:.80}, and no JSON object")
        check_known(part, known, f"{CONFIG}, {name}")
    return parts[-1]


def check_neutral(config: Mapping[str, Any], **neutral: Any) -> None:
    """Raise ConversionError where a key that our model has not is other than what it would be without."""
    for key, wanted in neutral.items():
        if (value := config.get(key, wanted)) != wanted:
            raise ConversionError(f"{key} of {CONFIG} is {value!r}: this model has that only as {wanted!r}")


def activation_of(config: Mapping[str, Any], default: str = "gelu") -> str:
    """Our `model.gelu`. Raises ConversionError for what is none."""
    name = config.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise ConversionError(f"hidden_act {name!r} is no activation of this model: it has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_name(gelu: str | None) -> str:
    """Theirs, of our `model.gelu`."""
    return {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}[gelu or "erf"]


def image_of(config: Mapping[str, Any], patch: int) -> int | tuple[int, int]:
    """Our `model.image_size`.

    Args:
        patch: its side, where the config leaves it out.
    """
    size = config.get("image_size", 224)
    sides = [int(side) for side in (size if isinstance(size, list | tuple) else (size, size))]
    return whole_patches(sides, patch_of(config.get("patch_size", patch)))


def patch_of(value: Any) -> int:
    """A patch size. Raises ConversionError unless it is square."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ConversionError(f"patch_size of {CONFIG} is {value}: patches of this model are square")
    return int(sides.pop())


def square(model: ModelConfig, title: str) -> int:
    """The side of square images. Raises ConversionError where they are not."""
    rows, cols = model.image
    if rows != cols:
        raise ConversionError(f"model.image_size is {[rows, cols]}: {title} has square images alone")
    return rows


def sizes_of(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Keys of our model for what all kinds call alike.

    Args:
        defaults: theirs, where `config.json` leaves a key out.
    """

    def value(key: str) -> Any:
        return config.get(key, defaults[key])

    return {
        "patch_size": patch_of(value("patch_size")),
        "in_channels": value("num_channels"),
        "width": value("hidden_size"),
        "depth": value("num_hidden_layers"),
        "num_heads": value("num_attention_heads"),
        "norm_eps": float(value("layer_norm_eps")),
        "block": "sequential",
    }


def config_keys(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `sizes_of`, with the image's size and the activation."""
    rows, cols = model.image
    return {
        "image_size": rows if rows == cols else [rows, cols],
        "patch_size": model.patch_size,
        "num_channels": model.in_channels,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": activation_name(model.gelu),
    }


def described(source: Source, kind: str, model: ModelConfig, start: str) -> Description:
    """What is known beside the model.

    Args:
        start: what the names of tensors begin with.
    """
    config, images = source.files.get(CONFIG, {}), source.files.get(IMAGES, {})
    origin = Origin(kind=kind, variant=start or PLAIN, config=config, preprocessor=images)
    labels = labels_of(config, model.num_classes) if "classifier.weight" in source.tensors else ()
    return Description(model=model, preprocessing=preprocessing_of(images), origin=origin, labels=labels)


def origin_of(description: Description, kind: str) -> Origin | None:
    """Where the model came from, if it was of this kind."""
    origin = description.origin
    return origin if origin is not None and origin.kind == kind else None


def start_of(description: Description, kind: str, usual: str) -> str:
    """What the names of tensors begin with: as they came, or as usual."""
    origin = origin_of(description, kind)
    if origin is None or not origin.variant:
        return usual
    return "" if origin.variant == PLAIN else origin.variant


def start_in(source: Source, suffix: str) -> str:
    """What stands before the first name that ends so."""
    return next(name.removesuffix(suffix) for name in source.tensors if name.endswith(suffix))


# -- names of classes --------------------------------------------------------------------------------------------------


def labels_of(config: Mapping[str, Any], count: int | None) -> tuple[str, ...]:
    """Names of classes in order. Raises ConversionError where they are no table, or do not fit the classifier."""
    names = config.get("id2label") or {}
    try:
        found = tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"id2label of {CONFIG} is no table of classes: {error}") from error
    if found and len(found) != count:
        raise ConversionError(f"id2label of {CONFIG} names {len(found)} classes, and the classifier has {count}")
    return found


def label_keys(description: Description) -> dict[str, Any]:
    """Their tables of classes; nothing without a classifier."""
    count = description.model.num_classes or 0
    names = description.labels or tuple(f"LABEL_{i}" for i in range(count))
    tables = {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
    return tables if count else {}


# -- images ------------------------------------------------------------------------------------------------------------


def images_file(description: Description, kind: str, processor: str) -> dict[str, Any]:
    """Their `preprocessor_config.json`: as it was, where it says the same.

    Args:
        processor: their class, if it is to be made.
    """
    found, origin, (rows, cols) = description.preprocessing, origin_of(description, kind), description.model.image
    before = origin.preprocessor if origin else {}
    if before and preprocessing_of(before) == found and _input(before) in (None, (rows, cols)):
        return dict(before)
    p = found or Preprocessing()
    return preprocessor_config(processor, "CLIPImageProcessor", (rows, cols), p)


def _input(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that a processor gives, if it says."""
    size = values.get("size")
    size = values.get("crop_size") if isinstance(size, dict) and "shortest_edge" in size else size
    if isinstance(size, int):
        return size, size
    return (size["height"], size["width"]) if isinstance(size, dict) and "height" in size else None
