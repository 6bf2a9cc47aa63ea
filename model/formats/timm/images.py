"""How images are prepared for timm's models, and what their classes are called: the `pretrained_cfg` of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.formats.base import ConversionError, Description, Interpolation, Preprocessing
from model.formats.timm.arguments import Constructor, pretrained_cfg_of
from model.formats.timm.common import image_of

_SEEN: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos", "box")
_USUAL: dict[str, Any] = {  # of timm, where config.json is silent
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.875,
    "crop_mode": "center",
}  # fmt: skip


def preprocessing_of(config: Mapping[str, Any], made: Constructor) -> Preprocessing | None:
    """None if a config.json does not say. Raises ConversionError for a way of preparing images that is none of ours."""
    found = {k: v for k, v in pretrained_cfg_of(config).items() if k in _USUAL and v is not None} if config else {}
    if not found:
        return None
    values = _USUAL | found
    if values["interpolation"] not in _SEEN:
        raise ConversionError(f"interpolation {values['interpolation']}: images are resized by {', '.join(_SEEN)} here")
    if values["crop_mode"] not in ("center", "squash"):
        raise ConversionError(f"crop_mode {values['crop_mode']}: images are cropped by center or squash here")
    seen = image_of(made) if "patch_size" in made.arguments else made["img_size"]
    first, kept = (x if isinstance(x, int) else x[0] for x in (made["img_size"], seen))
    return Preprocessing(
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        interpolation=values["interpolation"],
        crop_fraction=values["crop_pct"] * kept / first,  # without what the last whole patch leaves
        squash=values["crop_mode"] == "squash",
    )


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of classes in order, where there are names of all."""
    names = config.get("label_names") or pretrained_cfg_of(config).get("label_names") if config else ()
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)] if all(str(k).isdigit() for k in names) else ()
    return tuple(map(str, names or ()))


def pretrained_cfg(made: Constructor, description: Description, before: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs. Of what the model came with, licence and papers are kept."""
    p, size = description.preprocessing or Preprocessing(), made["img_size"]
    kept = {k: before[k] for k in ("license", "description", "origin_url", "paper_name", "paper_ids") if k in before}
    two = made.name.endswith("Distilled")
    return kept | {
        "tag": "",
        "custom_load": False,
        "input_size": [made["in_chans"], *((size, size) if isinstance(size, int) else size)],
        "fixed_input_size": True,
        "interpolation": p.interpolation,
        "crop_pct": p.crop_fraction,
        "crop_mode": "squash" if p.squash else "center",
        "mean": list(p.mean),
        "std": list(p.std),
        "num_classes": made["num_classes"],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if two else "head.fc" if "depths" in made.arguments else "head",
    }
