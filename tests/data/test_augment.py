from __future__ import annotations

import colorsys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from data import DataConfig
from data.augment import Augmentation, augment, crop_boxes, draw_augmentation
from data.keyed import Variant
from data.photometry import Photometry, apply_photometry

EVERYTHING = DataConfig(
    rotate=15,
    shift=0.1,
    scale=0.2,
    shear=10,
    flip=True,
    crop_min_area=0.5,
    brightness=0.3,
    contrast=0.4,
    saturation=0.5,
    hue=0.2,
    grey=0.3,
    rand_augment="rand-m9-n3-p0.8-mstd0.5-inc1",
    blur=1.0,
    noise=0.1,
)
UNCHANGED = Photometry(
    brightness=np.ones(1),
    contrast=np.ones(1),
    saturation=np.ones(1),
    hue=np.zeros(1),
    grey=np.zeros(1, dtype=bool),
    blur=np.zeros(1),
    noise=np.zeros(1),
    key=(0, Variant.TRAINING, 0),
)
WARPS = DataConfig(rotate=1)  # switches resampling on; what is done is given by hand below


def by_hand(**values: Any) -> Augmentation:
    """An augmentation of one image: nothing but what is given."""
    nothing = Augmentation(
        rotation=np.zeros(1),
        shift=np.zeros((1, 2)),
        zoom=np.ones(1),
        shear=np.zeros(1),
        mirror=np.zeros(1, dtype=bool),
        crop=np.array([[1.0, 1.0, 0.5, 0.5]]),
        photometry=UNCHANGED,
    )
    return replace(nothing, **{name: np.array([value]) for name, value in values.items()})


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_nothing_configured_changes_nothing(image: torch.Tensor) -> None:
    config = DataConfig()
    assert augment(image, draw_augmentation(config, 0, 0, 1), config, crop=False) is image


def test_identity_resamples_to_itself(image: torch.Tensor) -> None:
    torch.testing.assert_close(augment(image, by_hand(), WARPS, crop=False), image)


def test_quarter_turn_is_counter_clockwise(image: torch.Tensor) -> None:
    turned = augment(image, by_hand(rotation=np.pi / 2), WARPS, crop=False)
    torch.testing.assert_close(turned, torch.rot90(image, 1, dims=(2, 3)))


def test_shift_by_whole_pixels_fills_with_zeros(image: torch.Tensor) -> None:
    shifted = augment(image, by_hand(shift=[2 / 8, -1 / 8]), WARPS, crop=False)  # right by 2, up by 1
    expected = torch.zeros_like(image)
    expected[:, :, :-1, 2:] = image[:, :, 1:, :-2]
    torch.testing.assert_close(shifted, expected)


def test_arbitrary_warp_against_scipy() -> None:
    from scipy import ndimage

    image = np.random.default_rng(0).random((12, 16))
    image[[0, -1]], image[:, [0, -1]] = 0, 0  # the two treat the border differently
    angle, shift, zoom, shear = 0.4, np.array([0.05, -0.1]), 1.3, 0.2
    rotate = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    forward = rotate @ np.array([[1, shear], [0, 1]]) * zoom  # of (x, y), y down
    swapped = np.linalg.inv(forward)[::-1, ::-1]  # scipy speaks of (row, column), and of result -> source
    centre = np.array([5.5, 7.5])
    offset = centre - swapped @ (centre + shift[::-1] * image.shape)
    expected = ndimage.affine_transform(image, swapped, offset, order=1)
    done = by_hand(rotation=angle, shift=shift, zoom=zoom, shear=shear)
    result = augment(torch.tensor(image, dtype=torch.float32)[None, None], done, WARPS, crop=False)
    np.testing.assert_allclose(result[0, 0].numpy(), expected, atol=1e-5)


def test_mirror_alone_is_exact_and_in_a_warp_the_same(image: torch.Tensor) -> None:
    mirrored = augment(image, by_hand(mirror=True), DataConfig(flip=True), crop=False)
    assert torch.equal(mirrored, image.flip(-1))
    torch.testing.assert_close(augment(image, by_hand(mirror=True), WARPS, crop=False), mirrored)


def test_crop_in_the_matrix(image: torch.Tensor) -> None:
    done = by_hand(
        crop=[0.25, 1.0, 1.0, 0.0]
    )  # a quarter of the area: the 4 x 4 pixels at the top right, enlarged twice
    cropped = augment(image, done, DataConfig(crop_min_area=0.2), crop=True)
    expected = torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear")[:, :, :8, 8:]
    torch.testing.assert_close(cropped[..., 1:, :-1], expected[..., 1:, :-1])  # at the image's border it fades to 0


def test_crop_boxes_lie_inside_and_have_the_area() -> None:
    crop = draw_augmentation(DataConfig(crop_min_area=0.1), 0, 0, 500).crop
    left, top, width, height = crop_boxes(crop, height=40, width=100, aspect=2.0).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 100 + 1e-9).all() and (top + height <= 40 + 1e-9).all()
    np.testing.assert_allclose(width / height, 2.0 * crop[:, 1])
    assert 0.1 <= crop[:, 0].min() < 0.15 < 0.95 < crop[:, 0].max() <= 1


def test_draws_fill_their_ranges_and_depend_on_seed_and_draw_alone() -> None:
    drawn = draw_augmentation(EVERYTHING, 5, 0, 1000)
    assert 0.24 < drawn.rotation.max() <= np.radians(15) and drawn.rotation.min() < -0.24
    assert 0.09 < drawn.shift.max() <= 0.1
    assert 1.19 < drawn.zoom.max() <= 1.2 and drawn.zoom.min() >= 1 / 1.2
    assert 0.45 < drawn.mirror.mean() < 0.55
    later = draw_augmentation(EVERYTHING, 5, 640, 3)
    other = draw_augmentation(EVERYTHING, 6, 640, 3)
    for ours, all_of_them in ((later, drawn), (later.photometry, drawn.photometry)):
        for field in fields(ours):
            if field.name not in ("photometry", "key"):
                np.testing.assert_array_equal(getattr(ours, field.name), getattr(all_of_them, field.name)[640:643])
    assert not np.array_equal(later.rotation, other.rotation)


def test_pixels_do_not_depend_on_the_micro_batch() -> None:
    images = torch.rand(48, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    together = augment(images, draw_augmentation(EVERYTHING, 0, 0, 48), EVERYTHING, crop=True)
    assert not torch.equal(together, images)
    for size in (1, 3, 16):
        pieces = [
            augment(images[i : i + size], draw_augmentation(EVERYTHING, 0, i, size), EVERYTHING, crop=True)
            for i in range(0, 48, size)
        ]
        assert torch.equal(torch.cat(pieces), together)


def photometry(**values: float) -> Photometry:
    """Of one image."""
    return replace(UNCHANGED, **{name: np.array([value]) for name, value in values.items()})


def test_brightness_and_contrast(image: torch.Tensor) -> None:
    config = DataConfig(brightness=1, contrast=1)
    changed = apply_photometry(image, photometry(brightness=0.5, contrast=0.25), config)
    half = image / 2
    torch.testing.assert_close(changed, half.mean() + (half - half.mean()) / 4)
    assert apply_photometry(image, photometry(brightness=2), config).max() == 1
    torch.testing.assert_close(apply_photometry(image, UNCHANGED, config), image)


def test_saturation_grey_and_hue() -> None:
    image = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    image[..., 0], image[:, 1, 0], image[:, 2, 1] = 0.25, image[:, 0, 0], image[:, 1, 1]  # grey; ties of two
    luma = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).expand_as(image)
    colours = DataConfig(saturation=1, hue=0.5)
    duller = apply_photometry(image, photometry(saturation=0.5), DataConfig(saturation=1))
    torch.testing.assert_close(duller, (image + luma) / 2)
    greyed = apply_photometry(image, replace(UNCHANGED, grey=np.ones(1, dtype=bool)), DataConfig(grey=0.5))
    torch.testing.assert_close(greyed, luma)
    for turn in (0.0, 0.13, 0.5, -0.37):
        turned = apply_photometry(image, photometry(hue=turn), colours)
        for ours, pixel in zip(turned[0].flatten(1).T.tolist(), image[0].flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            assert ours == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), abs=1e-5)


@pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0])
def test_blur_is_scipys(image: torch.Tensor, deviation: float) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    blurred = apply_photometry(image, photometry(blur=deviation), DataConfig(blur=2.0))
    expected = ndimage.gaussian_filter(image[0].double().numpy(), (0, deviation, deviation), mode="nearest", radius=6)
    np.testing.assert_allclose(blurred[0].numpy(), expected, atol=1e-6)


def test_noise_is_normal_and_keyed() -> None:
    config = DataConfig(noise=0.1)
    grey = torch.full((40, 1, 31, 33), 0.5)
    many = replace(UNCHANGED, noise=np.full(40, 0.1))
    noise = (apply_photometry(grey, many, config) - 0.5) / 0.1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and abs((noise**4).mean() - 3) < 0.15
    assert len(torch.unique(noise.flatten(1), dim=0)) == 40
    others = [replace(many, key=key) for key in ((1, Variant.TRAINING, 0), (0, Variant.TRAINING_OTHER_VIEW, 0))]
    assert all(not torch.equal(apply_photometry(grey, other, config), noise * 0.1 + 0.5) for other in others)
    later = replace(many, key=(0, Variant.TRAINING, 1), noise=np.full(1, 0.1))
    assert torch.equal(apply_photometry(grey[:1], later, config)[0], apply_photometry(grey, many, config)[1])
