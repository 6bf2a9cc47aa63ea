"""How a run of this program shows image files where none is cropped at random, as other libraries say it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.formats.base import Preprocessing

_WAYS: dict[str, Preprocessing] = {  # data.eval_transform
    "centre": Preprocessing(interpolation="bilinear"),
    "timm": Preprocessing(interpolation="bicubic"),
    "big_vision": Preprocessing(interpolation="box"),
    "big_vision_resize": Preprocessing(interpolation="bilinear", antialias=False, squash=True),
}
_CROP, _LEAST_PART = ("timm", "big_vision"), 0.1
_USUAL_PART = 0.875  # of the shorter side, that is seen where nobody says data.crop_pct


def shown_by(data: Mapping[str, Any]) -> Preprocessing:
    """What keys of `data` say, those that are missing as by default, as before there were these."""
    way = data.get("eval_transform") or "centre"
    part = (data.get("crop_pct") or _USUAL_PART) if way in _CROP else 1.0
    said: dict[str, Any] = {key: tuple(data[key]) for key in ("mean", "std") if key in data}
    return replace(_WAYS[way], crop_fraction=part, **said)


def keys_of(how: Preprocessing) -> dict[str, Any]:
    """`data.eval_transform` and `data.crop_pct` for images that are shown so, or (see `is_exact`) most nearly so."""
    alike = (how.interpolation, how.antialias, how.squash)
    for way, of in _WAYS.items():
        if (of.interpolation, of.antialias, of.squash) == alike and (way in _CROP or how.crop_fraction == 1):
            break
    else:
        way = "big_vision_resize" if how.squash else "timm"
    return {"eval_transform": way, "crop_pct": min(max(how.crop_fraction, _LEAST_PART), 1.0) if way in _CROP else None}


def is_exact(how: Preprocessing) -> bool:
    """Whether a run can show images so."""
    return replace(shown_by(keys_of(how)), mean=how.mean, std=how.std) == how


def describe(how: Preprocessing) -> str:
    """E.g. `bicubic, centre crop 0.875`."""
    part = f"centre crop {how.crop_fraction:.4g}"
    crop = ("both sides resized" + f", {part}" * (how.crop_fraction != 1)) if how.squash else part
    return f"{how.interpolation}{'' if how.antialias else ' without antialiasing'}, {crop}"
