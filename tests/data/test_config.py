from __future__ import annotations

from dataclasses import fields
from typing import Any

import docstring_parser
import pytest

from data import DataConfig, build_datasets

NOT_PIXELS = (float("nan"), float("inf"), -float("inf"), 1e39, -1e39)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, r"data\.workers is -1: it must be from 0 to 1024"),
        ({"workers": 10**9}, r"data\.workers is 1000000000"),
        ({"fold": 5}, r"data\.fold is 5: it must be from 0 to 4"),
        ({"kind": "synthetic", "size": 0}, r"data\.size is 0: it must be from 1"),
        ({"kind": "synthetic", "size": 2**63}, r"data\.size is 9223372036854775808"),
        ({"kind": "textures", "crops_per_class": 10**12}, r"data\.crops_per_class is 1000000000000"),
        ({"labels_per_class": 0}, r"data\.labels_per_class is 0: it must be from 1"),
        ({"images_per_class": 5, "labels_per_class": 5}, r"labels_per_class is 5, but data\.images_per_class 5 leaves"),
        ({"mean": ()}, r"data\.mean is \(\)"),
        *(({"mean": (0.5, bad)}, r"data\.mean is \(0\.5, .*one number from -1e\+06") for bad in NOT_PIXELS),
        *(({"std": (bad,)}, r"data\.std is .*one number from 1e-06") for bad in (*NOT_PIXELS, -0.5, 1e-45)),
        ({"std": (0.0,)}, r"data\.std is \(0\.0,\).* from 1e-06"),
        ({"rotate": -3.0}, r"data\.rotate is -3\.0.* 0 to 180"),
        ({"rotate": float("nan")}, r"data\.rotate is nan"),
        ({"shift": 1.5}, r"data\.shift is 1\.5"),
        ({"scale": -0.1}, r"data\.scale is -0\.1"),
        ({"scale": 1e308}, r"data\.scale is 1e\+308"),
        ({"crop_min_area": 1e-300}, r"data\.crop_min_area is 1e-300"),
        ({"kind": "image_folder", "path": "x", "val_path": ""}, r"data\.val_path is empty"),
        ({"brightness": -0.1}, r"data\.brightness is -0\.1"),
        ({"contrast": float("nan")}, r"data\.contrast is nan"),
        ({"blur": 21.0}, r"data\.blur is 21\.0: it must be from 0 to 20 pixels"),
        ({"noise": 1.5}, r"data\.noise is 1\.5"),
        ({"views": 3}, r"data\.views is 3: it must be 1, or 2 for"),
        ({"hue": 0.6}, r"data\.hue is 0\.6: it must be a fraction of the circle, from 0 to 0\.5"),
        ({"rand_augment": "rand-x9"}, r"data\.rand_augment is 'rand-x9': write it as timm does"),
        ({"erase_fill": "const"}, r"data\.erase_fill is const, but data\.erase is 0"),
        ({"mixup": 1e-9}, r"data\.mixup is 1e-09: it must be 0 \(off\), or an alpha from 0\.001"),
        ({"mix_probability": 0.5}, r"data\.mix_probability is 0\.5, but neither data\.mixup nor data\.cutmix is set"),
        ({"cutmix": 1.0, "cutmix_switch": 0.3}, r"data\.cutmix_switch is 0\.3, but .* are not both set"),
        ({"mixup": 0.8, "labels_per_class": 9}, r"data\.labels_per_class is 9 and data\.mixup 0\.8, .* has no label"),
        ({"mixup": 0.8, "views": 2}, r"data\.views is 2 and data\.mixup 0\.8, data\.cutmix 0\.0: views of mixed"),
        ({"shear": 90.0}, r"data\.shear is 90\.0"),
        ({"crop_min_area": 0.0}, r"data\.crop_min_area is 0\.0.* .1 switches cropping off"),
        (
            {"path": "x"},
            r"data\.path is 'x', but has no effect with data\.kind=digits.* set data\.kind to image_folder",
        ),
        ({"kind": "synthetic", "val_path": "x"}, r"data\.val_path is 'x', but has no effect"),
        ({"kind": "synthetic", "fold": 1}, r"data\.fold is 1, but has no effect .*digits or image_folder"),
        ({"size": 10}, r"data\.size is 10, but has no effect with data\.kind=digits"),
        ({"kind": "image_folder"}, r"data\.path is not set"),
        ({"kind": "image_folder", "path": "x", "val_path": "y", "fold": 1}, r"data\.fold is 1.* data\.val_path='y'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        ({"saturation": 0.4}, 1, r"data\.saturation is 0\.4, but images have 1 channels"),
        ({"rand_augment": "rand-m9"}, 4, r"data\.rand_augment is 'rand-m9', but images have 4 channels"),
    ],
)
def test_augmentation_that_images_do_not_have_is_refused(options: dict[str, Any], channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_datasets(DataConfig(kind="synthetic", **options), image_size=8, channels=channels, num_classes=10, seed=0)


def test_every_field_has_a_line_of_help() -> None:
    described = {p.arg_name for p in docstring_parser.parse_from_object(DataConfig).params if p.description}
    assert described == {field.name for field in fields(DataConfig)}
