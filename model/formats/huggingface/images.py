"""How transformers prepares images: `preprocessor_config.json`, of today's image processors and of older ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model.formats.base import ConversionError, Interpolation, Preprocessing

FILE = "preprocessor_config.json"
_RESAMPLE: dict[int, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
}  # PIL's numbers
_HALF, _IMAGENET = (0.5, 0.5, 0.5), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_CROPPED = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "image_mean": _CLIP[0], "image_std": _CLIP[1],
}  # fmt: skip
_SQUASHED = {
    "do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "image_mean": _HALF, "image_std": _HALF,
}  # fmt: skip
_CLASSES: dict[str, dict[str, Any]] = {  # what a class does where a file does not say
    "ViT": _SQUASHED,
    "DeiT": _SQUASHED
    | {
        "size": {"height": 256, "width": 256}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224}, "image_mean": _IMAGENET[0], "image_std": _IMAGENET[1],
    },
    "Siglip": _SQUASHED | {"resample": 3},
    "Siglip2": _SQUASHED | {"patch_size": 16, "max_num_patches": 256},
    "CLIP": _CROPPED,
    "Bit": _CROPPED,
    "DINOv3ViT": _SQUASHED | {"image_mean": _IMAGENET[0], "image_std": _IMAGENET[1]},
}  # fmt: skip
_ALWAYS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_center_crop": False}
_FREE = frozenset(
    [
        "image_processor_type",
        "feature_extractor_type",
        "processor_class",
        "do_convert_rgb",
        "data_format",
        "input_data_format",
        "device",
        "return_tensors",
        "disable_grouping",
        "default_to_square",
        "auto_map",
        "_valid_processor_keys",
        "num_channels",
        "patch_size",
        "max_num_patches",
        "crop_size",
    ]
)


def preprocessing_of(values: Mapping[str, Any]) -> Preprocessing | None:
    """Of the file's values; None if there are none.

    Raises:
        ConversionError: by key, for what this program has no place for.
    """
    if not values:
        return None
    name = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "ViTImageProcessor")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    if name not in _CLASSES:
        raise ConversionError(f"{FILE}: {name}ImageProcessor is unknown: this program knows {', '.join(_CLASSES)}")
    v = {**_ALWAYS, **_CLASSES[name], **{k: x for k, x in values.items() if x is not None}}
    for key, value in v.items():
        if key not in _ALWAYS and key not in _CLASSES[name] and key not in _FREE and value:
            raise ConversionError(f"{FILE}: {key} is {value!r}, which this program does not know: remove it")
    _check_numbers(v)
    channels = len(v["image_mean"])
    normal = bool(v["do_normalize"])
    squash, fraction = (True, 1.0) if name == "Siglip2" else _crop(v, name in ("CLIP", "Bit"))
    return Preprocessing(
        mean=tuple(v["image_mean"]) if normal else (0.0,) * channels,
        std=tuple(v["image_std"]) if normal else (1.0,) * channels,
        interpolation=_RESAMPLE[v["resample"]],
        crop_fraction=fraction,
        squash=squash,
    )


def _check_numbers(v: Mapping[str, Any]) -> None:
    if not v["do_resize"]:
        raise ConversionError(f"{FILE}: do_resize is false: this program always resizes; remove the file")
    if not v["do_rescale"] or not math.isclose(v["rescale_factor"], 1 / 255, rel_tol=1e-6):
        raise ConversionError(
            f"{FILE}: do_rescale is {v['do_rescale']}, rescale_factor {v['rescale_factor']}: pixels are in 0..1 here"
        )
    if v["resample"] not in _RESAMPLE:
        raise ConversionError(f"{FILE}: resample is {v['resample']!r}: this program has {_RESAMPLE}")


def _crop(v: Mapping[str, Any], by_shortest: bool) -> tuple[bool, float]:
    """(whether the ratio of the sides is lost, the part of the resized image that is kept)."""
    size = v["size"]
    if not isinstance(size, Mapping):
        size = {"shortest_edge": size} if by_shortest else {"height": size, "width": size}
    crop = v.get("crop_size") if v["do_center_crop"] else None
    if crop is not None and not isinstance(crop, Mapping):
        crop = {"height": crop, "width": crop}
    if set(size) == {"shortest_edge"}:
        if crop is None:
            raise ConversionError(f"{FILE}: size is {size} without do_center_crop: images would differ in shape")
        return False, min(crop["height"], crop["width"]) / size["shortest_edge"]
    if set(size) != {"height", "width"}:
        raise ConversionError(f"{FILE}: size is {size}: this program has height and width, or shortest_edge")
    if crop is None:
        return True, 1.0
    parts = {crop[side] / size[side] for side in ("height", "width")}
    if len(parts) > 1 or max(parts) > 1:
        raise ConversionError(f"{FILE}: crop_size is {crop} of size {size}: both sides must be cut alike")
    return True, parts.pop()


def preprocessor_config(whole: str, cropped: str, image: tuple[int, int], p: Preprocessing) -> dict[str, Any]:
    """The file's values.

    Args:
        whole, cropped: names of their classes for images that are squashed, and that are cropped. image: rows and
            columns of the model's input. p: how they are prepared; the resized image is as large as in timm.
    """
    rows, cols = (math.floor(side / p.crop_fraction + 1e-6) for side in image)
    crops = not p.squash or p.crop_fraction != 1
    return {
        "image_processor_type": cropped if crops else whole,
        "do_resize": True,
        "size": {"height": rows, "width": cols} if p.squash else {"shortest_edge": min(rows, cols)},
        "resample": {v: k for k, v in _RESAMPLE.items()}[p.interpolation],
        "do_center_crop": crops,
        **({"crop_size": {"height": image[0], "width": image[1]}} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
