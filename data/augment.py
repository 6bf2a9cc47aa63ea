"""Random changes of images, keyed by (seed, draw); those of geometry are done in one bilinear resampling per image.

All changes of an image's geometry, the crop included, are multiplied into one 2x3 matrix. It maps pixels of the result
to places in the source, both measured in pixels from the image's centre (x to the right, y down). What lies outside of
the source is 0. The matrices are applied with elementwise products: a batched matrix product (as in F.affine_grid) may
round differently with the batch size, and pixels must not depend on the micro-batch.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.captions import Look
from data.config import DataConfig
from data.keyed import Purpose, Variant, keyed_generator, keyed_uniforms
from data.photometry import Photometry, apply_photometry
from data.rand_augment import RandAugment, draw_operations, rand_augment

_CROP_STRETCH = 4 / 3  # a random crop is up to this much wider or higher than the result (Szegedy et al., 2014)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to each image of a micro-batch: crop, flip, zoom, shear, rotate, shift, RandAugment, photometry, in
    order."""

    rotation: NDArray[np.float64]  # [B] radians, counter-clockwise
    shift: NDArray[np.float64]  # [B, 2] right and down, as fractions of width and height
    zoom: NDArray[np.float64]  # [B] above 1 enlarges
    shear: NDArray[np.float64]  # [B] tangent of the angle; moves the lower half to the right
    mirror: NDArray[np.bool_]  # [B] left to right
    crop: NDArray[np.float64]  # [B, 4] see crop_boxes
    photometry: Photometry

    def looks(self) -> list[Look]:
        """What each image looks like beside the one that evaluation sees."""
        turned, scale = np.degrees(self.rotation), self.zoom / np.sqrt(self.crop[:, 0])
        rows = zip(turned.tolist(), scale.tolist(), self.photometry.brightness.tolist(), strict=True)
        return [Look(turned=turned, scale=scale, brightness=brightness) for turned, scale, brightness in rows]


def draw_augmentation(
    config: DataConfig, seed: int, first_draw: int, count: int, variant: int = Variant.TRAINING,
    areas: tuple[float, float] | None = None,
) -> Augmentation:  # fmt: skip
    """The augmentations of the draws first_draw, ..., first_draw + count - 1.

    Args:
        areas: smallest and largest of crops, parts of the largest possible; None: from config.crop_min_area to all.
    """
    least, most = areas or (config.crop_min_area, 1.0)
    uniforms = keyed_uniforms(seed, Purpose.AUGMENT, first_draw, count, width=14, variant=variant)
    # Contiguous rows in float64, rounded to float32 at the end: NumPy may choose other code, with other last bits, for
    # other lengths and strides, and pixels must not depend on `count`.
    u = np.ascontiguousarray(uniforms.T, dtype=np.float64)
    signed = 2 * u - 1
    colours = keyed_uniforms(seed, Purpose.COLOUR, first_draw, count, width=3, variant=variant)
    c = np.ascontiguousarray(colours.T, dtype=np.float64)
    return Augmentation(
        rotation=np.radians(config.rotate * signed[0]),
        shift=config.shift * signed[1:3].T,
        zoom=(1 + config.scale) ** signed[3],
        shear=np.tan(np.radians(config.shear * signed[4])),
        mirror=(u[5] < 0.5) & config.flip,
        crop=np.stack([most - (most - least) * u[6], _CROP_STRETCH ** signed[7], u[8], u[9]], axis=-1),
        photometry=Photometry(
            brightness=(1 + config.brightness) ** signed[10],
            contrast=(1 + config.contrast) ** signed[11],
            saturation=(1 + config.saturation) ** (2 * c[0] - 1),
            hue=config.hue * (2 * c[1] - 1),
            grey=c[2] < config.grey,
            blur=config.blur * u[12],
            noise=config.noise * u[13],
            key=(seed, variant, first_draw),
        ),
    )


def crop_boxes(crop: NDArray[np.float64], height: int, width: int, aspect: float) -> NDArray[np.float64]:
    """The boxes (left, top, width, height), in pixels, that crops cut out of a source of height x width pixels.

    `crop` is [4] or [B, 4]: area as a fraction of the largest box of that shape which fits, stretch (how much wider
    than `aspect` the box is), and the position in the room that is left, across and down, in 0..1.
    """
    area, stretch, across, down = crop.T
    box_aspect = aspect * stretch
    box_width = np.sqrt(area) * np.minimum(width, height * box_aspect)
    box_height = np.minimum(box_width / box_aspect, height)
    return np.array([across * (width - box_width), down * (height - box_height), box_width, box_height]).T


def augment(images: Tensor, augmentation: Augmentation, config: DataConfig, *, crop: bool) -> Tensor:
    """Augments [B, C, H, W] images; crop=False where none is wanted, or it was cut when the images were read."""
    if config.warps or crop:
        images = resample(images, sampling_matrices(augmentation, *images.shape[-2:], crop=crop))
    elif config.flip:  # mirroring alone needs no resampling
        pairs = zip(images, augmentation.mirror.tolist(), strict=True)
        images = torch.stack([image.flip(-1) if is_mirrored else image for image, is_mirrored in pairs])
    if config.rand_augment:
        images = _rand_augmented(images, augmentation, config)
    return apply_photometry(images, augmentation.photometry, config) if config.recolours else images


def only_mirrors(config: DataConfig) -> bool:
    """Whether mirroring is all that `augment` does to images that were cropped when they were read."""
    return not (config.warps or config.rand_augment or config.recolours)


def _rand_augmented(images: Tensor, a: Augmentation, config: DataConfig) -> Tensor:
    spec, (seed, variant, first_draw) = RandAugment.of(config.rand_augment or ""), a.photometry.key
    made = np.empty(images.shape, dtype=np.float32)
    for row, image in enumerate(images.numpy()):
        random = keyed_generator(seed, Purpose.RAND_AUGMENT, first_draw + row, variant)
        made[row] = rand_augment(image, draw_operations(spec, random), config.mean, increasing=spec.increasing)
    return torch.from_numpy(made)


def sampling_matrices(a: Augmentation, height: int, width: int, *, crop: bool) -> Tensor:
    """The [B, 2, 3] matrices from pixels of the result to places in the source, in pixels from the centre."""
    cos, sin = np.cos(a.rotation), np.sin(a.rotation)
    # The inverse of (rotate @ shear @ zoom), with rotate [[cos, sin], [-sin, cos]] as y points down.
    inverse = np.stack([cos - a.shear * sin, -sin - a.shear * cos, sin, cos], axis=-1) / a.zoom[:, None]
    linear = inverse.reshape(-1, 2, 2)
    linear[:, 0] *= np.where(a.mirror, -1, 1)[:, None]
    shift = a.shift * np.array([width, height])
    offset = -(linear * shift[:, None, :]).sum(-1)
    if crop:
        left, top, box_width, box_height = crop_boxes(a.crop, height, width, width / height).T
        ratio = np.stack([box_width / width, box_height / height], axis=-1)
        centre = np.stack([left + (box_width - width) / 2, top + (box_height - height) / 2], axis=-1)
        linear, offset = linear * ratio[:, :, None], offset * ratio + centre
    return torch.from_numpy(np.concatenate([linear, offset[:, :, None]], axis=-1).astype(np.float32))


def resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear resampling of [B, C, H, W] images at the places that [B, 2, 3] sampling matrices point to."""
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=images.dtype) - (width - 1) / 2  # [W]
    y = (torch.arange(height, dtype=images.dtype) - (height - 1) / 2)[:, None]  # [H, 1]
    m = matrices[:, :, :, None, None]  # [B, 2, 3, 1, 1]
    source = m[:, :, 0] * x + m[:, :, 1] * y + m[:, :, 2]  # [B, 2, H, W], pixels from the centre
    grid = torch.stack([source[:, 0] * (2 / width), source[:, 1] * (2 / height)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
