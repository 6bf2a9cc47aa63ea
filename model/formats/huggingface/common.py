"""What the models of transformers share: blocks, activations, and how their images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.formats.base import ConversionError, Interpolation, Preprocessing

_ACTIVATIONS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "quick_gelu": "quick"}
_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def activation_of(config: Mapping[str, Any], default: str = "gelu") -> str:
    """Our `model.gelu`. Raises ConversionError for what is none."""
    name = config.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise ConversionError(f"hidden_act {name!r} is no activation of this model: it has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_name(gelu: str | None) -> str:
    """Theirs, of our `model.gelu`."""
    return {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}[gelu or "erf"]


def preprocessing_of(values: Mapping[str, Any]) -> Preprocessing | None:
    """Of a `preprocessor_config.json`; None if there is none."""
    if not values:
        return None
    size, crop = _sides(values.get("size")), _sides(values.get("crop_size"))
    mean, std = values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)
    cropped = bool(values.get("do_center_crop")) and size and crop
    return Preprocessing(
        mean=tuple(mean) if values.get("do_normalize", True) else (0.0,) * len(mean),
        std=tuple(std) if values.get("do_normalize", True) else (1.0,) * len(std),
        interpolation=_RESAMPLE.get(values.get("resample", 2), "bilinear"),
        crop_fraction=crop / size if cropped and size and crop else 1.0,
        squash="shortest_edge" not in (values.get("size") or {}) if isinstance(values.get("size"), dict) else True,
    )


def _sides(size: Any) -> float | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else float(size)


def preprocessor_config(name: str, image: tuple[int, int], found: Preprocessing | None) -> dict[str, Any]:
    """Their `preprocessor_config.json`.

    Args:
        name: of their class. image: rows and columns of the model's input.
    """
    p, (rows, cols) = found or Preprocessing(), image
    size: dict[str, int] = {"height": rows, "width": cols}
    if not p.squash:
        size = {"shortest_edge": round(min(image) / p.crop_fraction)}
    return {
        "image_processor_type": name,
        "do_resize": True,
        "size": size,
        "resample": {v: k for k, v in _RESAMPLE.items()}[p.interpolation],
        "do_center_crop": not p.squash,
        "crop_size": {"height": rows, "width": cols},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of classes in order."""
    names = config.get("id2label") or {}
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"id2label of config.json is no table of classes: {error}") from error


def side_of(value: Any) -> int | tuple[int, int]:
    """An image size of a config: one number or two."""
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else int(value)
