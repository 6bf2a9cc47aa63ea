"""What values of the configuration's keys cannot be, by themselves and beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.held_out import FOLDS
from data.rand_augment import RandAugment

if TYPE_CHECKING:
    from data.config import DataConfig

# Far beyond what is of use, and short of what no machine holds.
_MOST_WORKERS, _MOST_IMAGES = 1024, 10_000_000
_LARGEST_PIXEL = 1e6  # means and deviations are meant for pixels in 0..1
_LARGEST_BLUR = 20  # a filter three times as far to either side
_MOST_CROPS = 1000  # far fewer than ids of views have room for (data.batch)
_COLOURS = ("saturation", "hue", "grey")


def check_values(config: DataConfig) -> None:
    """Raise ValueError for a value out of range, and for an option that would have no effect beside the others."""
    c, some, least_std = config, f"from 1 to {_MOST_IMAGES}", 1 / _LARGEST_PIXEL
    ranges = {
        "max_bad_share": (0 <= c.max_bad_share <= 1, "a share of all samples, from 0 to 1, such as 0.01"),
        "workers": (0 <= c.workers <= _MOST_WORKERS, f"from 0 to {_MOST_WORKERS}"),
        "fold": (0 <= c.fold < FOLDS, f"from 0 to {FOLDS - 1}"),
        "shuffle_window": (0 <= c.shuffle_window <= _MOST_IMAGES, f"from 0 to {_MOST_IMAGES}"),
        "size": (1 <= c.size <= _MOST_IMAGES, some),
        "crops_per_class": (1 <= c.crops_per_class <= _MOST_IMAGES, some),
        "repeats": (1 <= c.repeats <= _MOST_IMAGES, some),
        "images_per_class": (c.images_per_class is None or 1 <= c.images_per_class <= _MOST_IMAGES, some),
        "labels_per_class": (c.labels_per_class is None or 1 <= c.labels_per_class <= _MOST_IMAGES, some),
        "mean": (_are_numbers(c.mean, -_LARGEST_PIXEL), _numbers(-_LARGEST_PIXEL)),
        "std": (_are_numbers(c.std, least_std), _numbers(least_std)),
        "variable_resolution": (0 <= c.variable_resolution < 1, "a part of an image's patches, from 0 to below 1"),
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
        "views": (c.views in (1, 2), "1, or 2 for objectives that compare views of an image"),
        "local_crops": (0 <= c.local_crops <= _MOST_CROPS, f"a number of views from 0 to {_MOST_CROPS}"),
        "local_crop_area": (
            len(c.local_crop_area) == 2 and 1e-4 <= c.local_crop_area[0] <= c.local_crop_area[1] <= 1,
            "the smallest and the largest part of an area, from 0.0001 to 1, such as [0.05, 0.4]",
        ),
    }
    for name, (ok, wanted) in ranges.items():
        if not ok:
            raise ValueError(f"data.{name} is {getattr(c, name)!r}: it must be {wanted}")
    if c.rand_augment is not None:
        RandAugment.of(c.rand_augment)  # raises
    _check_effects(c)


def _are_numbers(values: tuple[float, ...], least: float) -> bool:
    """One or several, in range; NaN is not."""
    return len(values) > 0 and all(least <= value <= _LARGEST_PIXEL for value in values)


def _numbers(least: float) -> str:
    return f"one number from {least:g} to {_LARGEST_PIXEL:g}, or one such per channel"


def _check_effects(c: DataConfig) -> None:
    images, labels = c.images_per_class, c.labels_per_class
    if images is not None and labels is not None and labels >= images:
        raise ValueError(
            f"data.labels_per_class is {labels}, but data.images_per_class {images} leaves no more images, all of "
            "which have labels then: leave labels_per_class out, or use fewer"
        )
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
    if not c.local_crops and c.local_crop_area != type(c).local_crop_area:
        raise ValueError(
            f"data.local_crop_area is {list(c.local_crop_area)}, but data.local_crops is 0: set it, or leave both out"
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
