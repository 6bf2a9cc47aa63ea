"""What a checkpoint says of its model, beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.projection import Projection
    from model.text import TextConfig

Shape = tuple[int, ...]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]


class Entry(NamedTuple):
    """A tensor of a source."""

    shape: Shape
    dtype: torch.dtype


class ConversionError(ValueError):
    """A checkpoint cannot be converted: it is of another kind, damaged, or has what the other side cannot express."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a photograph to the model's input.

    Attributes:
        mean, std: subtracted from pixels in 0..1, then divided by; one number per channel.
        interpolation: with which it is resized (box: means of areas). crop_fraction: the central part of the resized
            photograph that is the input. squash: both sides are resized to the input's, else the shorter side is, and
            the ratio kept. antialias: each pixel is of all those that it covers, not of those around its middle alone,
            which other libraries' files cannot say.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    crop_fraction: float = 1.0
    squash: bool = False
    antialias: bool = True


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from, so that what says nothing of its weights (names of classes, rates of dropout) is not
    lost on the way back.

    Attributes:
        kind: of format. variant: of it, as that format has them (the class whose weights they are).
        config, preprocessor: its `config.json` and `preprocessor_config.json`, as they were.
    """

    kind: str
    variant: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What makes an image tower one of two: the keys of the groups `text` and `contrastive` that say what the model is.

    Attributes:
        text: the other tower, resolved. loss: that it was trained by, of `contrastive.loss`.
        embedding, projection, projection_bias, temperature, max_logit_scale, bias: as of `build_towers`; without a
            bound of the scale 0. others: keys of `contrastive` that say how a run trained it, of one that was.
    """

    text: TextConfig
    loss: str
    embedding: int
    projection: Projection
    projection_bias: bool = False
    temperature: float
    max_logit_scale: float
    bias: float | None
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is to be known of a model beside its tensors.

    Attributes:
        model: resolved; of two towers, that of images, without classes. preprocessing: of its images, if that is known.
        origin: where it came from, if elsewhere. labels: names of its classes in order, if known. pairing: of two
            towers. embeds: whether the classifier is the projection of a tower by itself.
    """

    model: ModelConfig
    preprocessing: Preprocessing | None = None
    origin: Origin | None = None
    labels: tuple[str, ...] = ()
    pairing: Pairing | None = None
    embeds: bool = False
