"""What values of augmentation keys, and of those of evaluation's images, cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.rand_augment import RandAugment

if TYPE_CHECKING:
    from data.config import DataConfig

_LARGEST_BLUR = 20  # a filter three times as far to either side
_COLOURS = ("saturation", "hue", "grey")


def check_augmentation(config: DataConfig) -> None:
    """Raise ValueError for a value out of range, and for an option that would have no effect beside the others."""
    c = config
    ranges = {
        "rotate": (0 <= c.rotate <= 180, "from 0 to 180 degrees"),
        "shift": (0 <= c.shift <= 1, "a fraction of the image, from 0 to 1"),
        "scale": (0 <= c.scale <= 100, "a relative zoom from 0 to 100, such as 0.1"),
        "shear": (0 <= c.shear < 90, "from 0 to below 90 degrees"),
        "crop_min_area": (1e-4 <= c.crop_min_area <= 1, "from 0.0001 to 1 (1 switches cropping off)"),
        "brightness": (0 <= c.brightness <= 100, "a relative change from 0 to 100, such as 0.2"),
        "contrast": (0 <= c.contrast <= 100, "a relative change from 0 to 100, such as 0.2"),
        "saturation": (0 <= c.saturation <= 100, "a relative change from 0 to 100, such as 0.2"),
        "hue": (0 <= c.hue <= 0.5, "a fraction of the circle, from 0 to 0.5"),
        "grey": (0 <= c.grey <= 1, "a share of images, from 0 to 1"),
        "blur": (0 <= c.blur <= _LARGEST_BLUR, f"from 0 to {_LARGEST_BLUR} pixels"),
        "noise": (0 <= c.noise <= 1, "a standard deviation from 0 to 1, where pixels are in 0..1"),
        "erase": (0 <= c.erase <= 1, "a share of images, from 0 to 1"),
        "mixup": (c.mixup == 0 or 1e-3 <= c.mixup <= 1e3, "0 (off), or an alpha from 0.001 to 1000, such as 0.8"),
        "cutmix": (c.cutmix == 0 or 1e-3 <= c.cutmix <= 1e3, "0 (off), or an alpha from 0.001 to 1000, such as 1"),
        "mix_probability": (0 < c.mix_probability <= 1, "a share of images, above 0 and up to 1"),
        "cutmix_switch": (0 < c.cutmix_switch < 1, "a share of images, between 0 and 1"),
        "crop_pct": (c.crop_pct is None or 0.1 <= c.crop_pct <= 1, "a part of a side, from 0.1 to 1"),
    }
    for name, (ok, wanted) in ranges.items():
        if not ok:
            raise ValueError(f"data.{name} is {getattr(c, name)!r}: it must be {wanted}")
    if c.rand_augment is not None:
        RandAugment.of(c.rand_augment)  # raises
    _check_effects(c)


def _check_effects(c: DataConfig) -> None:
    if c.crop_pct is not None and c.eval_transform not in ("timm", "big_vision"):
        raise ValueError(
            f"data.crop_pct is {c.crop_pct}, but data.eval_transform {c.eval_transform} has none: leave it out, or use "
            "timm or big_vision"
        )
    if c.erase_fill != "pixel" and not c.erase:
        raise ValueError(f"data.erase_fill is {c.erase_fill}, but data.erase is 0: set it, or leave both out")
    if c.mix_probability != 1 and not c.mixes:
        raise ValueError(
            f"data.mix_probability is {c.mix_probability}, but neither data.mixup nor data.cutmix is set: set one, or "
            "leave it out"
        )
    if c.cutmix_switch != 0.5 and not (c.mixup and c.cutmix):
        raise ValueError(
            f"data.cutmix_switch is {c.cutmix_switch}, but data.mixup and data.cutmix are not both set: set them, or "
            "leave it out"
        )
    if c.labels_per_class is not None and c.mixes:
        raise ValueError(
            f"data.labels_per_class is {c.labels_per_class} and data.mixup {c.mixup}, data.cutmix {c.cutmix}: most "
            "images would be mixed with one that has no label, so leave out one or the other"
        )
    if c.views == 2 and c.mixes:
        raise ValueError(
            f"data.views is 2 and data.mixup {c.mixup}, data.cutmix {c.cutmix}: views of mixed images would be of no "
            "image, so leave out one or the other"
        )


def check_channels(config: DataConfig, channels: int) -> None:
    """Raise ValueError for augmentation that images of so many channels do not have."""
    for name in (name for name in _COLOURS if channels != 3 and getattr(config, name)):
        raise ValueError(
            f"data.{name} is {getattr(config, name)!r}, but images have {channels} channels, and colours are made of "
            "3: leave it out, or set model.in_channels to 3"
        )
    if config.rand_augment and channels not in (1, 3):
        raise ValueError(
            f"data.rand_augment is {config.rand_augment!r}, but images have {channels} channels, and its operations "
            "are of images with 1 (grey) or 3 (RGB): leave it out"
        )
