"""RandAugment and random erasing against timm's, which are given our random numbers."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

from data import DataConfig, TextShape, build_datasets
from data.erasing import Fill, erase
from data.keyed import Purpose, Variant, keyed_generator
from data.rand_augment import Operation, RandAugment, draw_operations, rand_augment
from tools.convert.libraries import library

_GROW = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
SPECS = ("rand-m9-n2-mstd0.5-inc1", "rand-m15-n3-p1-mmax20", "rand-p1-mstd101", "rand-n1-p1-t3a")
FILL = (0.485, 0.456, 0.406)


def timms(module: str) -> Any:
    library("timm")
    return importlib.import_module(f"timm.data.{module}")


def by_timm(image: Image.Image, o: Operation, spec: RandAugment) -> Image.Image:
    name = o.name + ("Rel" if o.name.startswith("Translate") else "")
    name += "Increasing" if spec.increasing and o.name in _GROW else ""
    fill = tuple(round(255 * value) for value in FILL)
    keys = {
        "img_mean": fill if image.mode == "RGB" else fill[0],
        "interpolation": Resampling.BICUBIC if o.bicubic else Resampling.BILINEAR,
        "magnitude_max": spec.most,
    }
    module = timms("auto_augment")
    bits = int(o.magnitude / 10 * 4)
    if o.name == "Posterize" and (4 - bits if spec.increasing else bits) <= 0:  # which Pillow refuses from 12 on
        return Image.new(image.mode, image.size)
    with patch.object(module.random, "random", lambda: 0.7 if o.sign < 0 else 0.3):
        return module.AugmentOp(name, prob=1.0, magnitude=o.magnitude, hparams=keys)(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("spec", [RandAugment.of(text) for text in SPECS], ids=SPECS)
def test_each_operation_is_timms(spec: RandAugment, channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (channels, 17, 23), dtype=np.uint8)
    levels[:, 4:9, 5:12] //= 4  # something to sharpen and equalise
    pixels = levels.astype(np.float32) / np.float32(255)
    image = Image.fromarray(levels[0] if channels == 1 else levels.transpose(1, 2, 0))
    magnitudes = (0.0, 3.3, 9.0, spec.most)
    for name in spec.names:
        for place, magnitude in enumerate(magnitudes):
            o = Operation(name, magnitude, (-1, 1)[place % 2], bool(place // 2))
            found = rand_augment(pixels, [o], FILL, increasing=spec.increasing)
            expected = np.asarray(by_timm(image, o, spec)).reshape(17, 23, channels).transpose(2, 0, 1)
            np.testing.assert_array_equal(np.rint(found * 255), expected, err_msg=str(o))
    assert rand_augment(pixels, [], FILL, increasing=True) is pixels


@pytest.mark.parametrize("text", SPECS)
def test_specifications_are_timms(text: str) -> None:
    ours, theirs = RandAugment.of(text), timms("auto_augment").rand_augment_transform(text, {})
    first, names = theirs.ops[0], [op.name.removesuffix("Increasing").removesuffix("Rel") for op in theirs.ops]
    assert list(ours.names) == names
    assert ours.increasing == any(op.name.endswith("Increasing") for op in theirs.ops)
    assert (ours.operations, ours.magnitude, ours.probability) == (theirs.num_layers, first.magnitude, first.prob)
    assert (ours.deviation, ours.most) == (first.magnitude_std, first.magnitude_max or 10)


NONE = ("m9", "rand-m", "rand-m9-m8", "rand-n0", "rand-n1.5", "rand-p0", "rand-inc2", "rand-minf", "")


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_specification_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.rand_augment is '{text}': write it as timm does, rand-m9"):
        RandAugment.of(text)


def test_captions_that_would_not_know_are_refused(tmp_path: Path) -> None:
    text, keys = TextShape(length=40, vocabulary_size=259, end_token=257), {"rand_augment": "rand-m9"}
    shape: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 10, "seed": 0, "text": text}
    with pytest.raises(ValueError, match=r"'rand-m9', which turns and brightens images, and captions of temp"):
        build_datasets(DataConfig(**keys), **shape)
    (tmp_path / "templates").write_text("the digit {class}")
    build_datasets(DataConfig(templates=str(tmp_path / "templates"), **keys), **shape)


def test_operations_are_drawn_evenly() -> None:
    spec = RandAugment.of("rand-m8-n2-p0.5-mstd1")
    drawn = [draw_operations(spec, keyed_generator(0, Purpose.RAND_AUGMENT, draw)) for draw in range(3000)]
    every = [o for operations in drawn for o in operations]
    counts = Counter(o.name for o in every)
    assert set(counts) == set(spec.names) and all(150 < count < 250 for count in counts.values())  # 200 each
    magnitudes = np.array([o.magnitude for o in every])
    assert abs(magnitudes.mean() - 8) < 0.1 and abs(magnitudes.std() - 1) < 0.1 and magnitudes.max() <= 10
    assert abs(np.mean([o.sign for o in every])) < 0.06 and abs(np.mean([o.bicubic for o in every]) - 0.5) < 0.03
    uniform = RandAugment.of("rand-m8-p1-mstdinf")
    assert math.isinf(uniform.deviation)
    evenly = [o.magnitude for n in range(500) for o in draw_operations(uniform, keyed_generator(0, Purpose.BLEND, n))]
    assert abs(np.mean(evenly) - 4) < 0.3 and max(evenly) > 7.8


@pytest.mark.parametrize("fill", ["pixel", "rand", "const"])
def test_erasing_is_timms(fill: Fill) -> None:
    module, key = timms("random_erasing"), (5, Variant.TRAINING_OTHER_VIEW, 70)
    images = torch.randn(60, 3, 11, 19, generator=torch.Generator().manual_seed(0))
    found = erase(images.clone(), 0.5, fill, key)
    theirs, changed = module.RandomErasing(0.5, mode=fill, device="cpu"), 0
    for row, image in enumerate(images):
        ours = keyed_generator(key[0], Purpose.ERASE, key[2] + row, key[1])
        fed = SimpleNamespace(
            random=ours.random, uniform=ours.uniform, randint=lambda a, b, ours=ours: int(ours.integers(a, b + 1))
        )

        def noise(per_pixel: bool, colour: bool, size: Any, ours: Any = ours, **_: Any) -> torch.Tensor:
            shape = size if per_pixel else (size[0], 1, 1)
            normal = ours.standard_normal(shape, dtype=np.float32) if per_pixel or colour else np.zeros(shape, "f4")
            return torch.from_numpy(normal)

        with patch.object(module, "random", fed), patch.object(module, "_get_pixels", noise):
            expected = theirs(image.clone())
        assert torch.equal(found[row], expected)
        changed += not torch.equal(expected, image)
    assert 20 < changed < 40


def test_erasing_goes_by_the_draw_alone() -> None:
    images = torch.zeros(12, 1, 9, 9)
    together = erase(images.clone(), 1.0, "pixel", (0, Variant.TRAINING, 3))
    alone = [erase(images[:1].clone(), 1.0, "pixel", (0, Variant.TRAINING, 3 + n)) for n in range(12)]
    assert torch.equal(torch.cat(alone), together)
    assert len(torch.unique(together.flatten(1), dim=0)) == 12
