"""RandAugment (Cubuk et al., 2020), as timm defines and writes it (`rand-m9-n2-mstd0.5-inc1`): by Pillow, on 8 bits.

Of an image `n` operations are drawn, with replacement, and each is done with probability `p`, at magnitude `m`. Which
and how goes by a key, so that images depend on nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_FULL = 10.0  # the magnitude at which amounts are those of the paper
_UNIFORM = 100.0  # a larger deviation means: magnitudes from 0 to m, evenly
_MOST_OPERATIONS = 100
_USUAL = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
_THREE = ("Solarize", "Desaturate", "GaussianBlur")
_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d*)?|inf)|t(3a)")

Fill = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """What is drawn of an image.

    Attributes:
        magnitude: of operations, 10 as in the paper (m). deviation: of magnitudes, which are normally distributed; inf:
            they are between 0 and `magnitude`, evenly (mstd). most: magnitudes are cut off there (mmax).
        operations: per image (n). probability: of each (p). increasing: all grow stronger with the magnitude; else a
            few grow weaker, as in the paper (inc). names: among which is drawn (t3a: those of DeiT III's 3-Augment).
    """

    magnitude: float = 10.0
    deviation: float = 0.0
    most: float = _FULL
    operations: int = 2
    probability: float = 0.5
    increasing: bool = False
    names: tuple[str, ...] = _USUAL

    @staticmethod
    def of(text: str) -> RandAugment:
        """As timm writes it: `rand`, then sections such as m9. Raises ValueError for what is none."""
        first, *sections = text.split("-")
        found = [_SECTION.fullmatch(section) for section in sections]
        said = {match[1] or "t": match[2] for match in found if match is not None}
        if first != "rand" or None in found or len(said) < len(sections):
            raise ValueError(_refusal(text))
        three, values = "t" in said, {name: float(value) for name, value in said.items() if value is not None}
        deviation = values.get("mstd", 0.0)
        made = RandAugment(
            magnitude=values.get("m", _FULL),
            deviation=math.inf if deviation > _UNIFORM else deviation,
            most=values.get("mmax", _FULL),
            operations=int(values.get("n", 2)) if values.get("n", 2) <= _MOST_OPERATIONS else 0,
            probability=values.get("p", 0.5),
            increasing=three or values.get("inc", 0) == 1,
            names=_THREE if three else _USUAL,
        )
        whole = all(float(said.get(name) or 0).is_integer() for name in ("n", "inc"))
        finite = all(math.isfinite(value) for name, value in values.items() if name != "mstd")
        ok = finite and whole and made.operations > 0 and 0 < made.probability <= 1 and made.most > 0
        if not ok or values.get("inc", 0) > 1:
            raise ValueError(_refusal(text))
        return made


@dataclass(frozen=True)
class Operation:
    """One, drawn. Attributes: sign: of an amount that may be of either. bicubic: how pixels between others are made."""

    name: str
    magnitude: float
    sign: int
    bicubic: bool


def draw_operations(spec: RandAugment, random: np.random.Generator) -> list[Operation]:
    """Those of an image, in order."""
    drawn = []
    for _ in range(spec.operations):
        name = spec.names[int(random.integers(len(spec.names)))]
        done, negative, bicubic = random.random(3) < (spec.probability, 0.5, 0.5)
        magnitude = spec.magnitude
        if math.isinf(spec.deviation):
            magnitude *= random.random()
        elif spec.deviation:
            magnitude += spec.deviation * random.standard_normal()
        magnitude = max(0.0, min(magnitude, spec.most))
        if done:
            drawn.append(Operation(name, magnitude, -1 if negative else 1, bool(bicubic)))
    return drawn


def rand_augment(
    pixels: NDArray[np.float32], operations: list[Operation], fill: tuple[float, ...], *, increasing: bool
) -> NDArray[np.float32]:
    """An image [C, H, W] in 0..1, of one channel or three, after operations; in steps of 1/255 if there are any.

    `fill`, one number or one per channel, is the colour of what comes in from outside.
    """
    from PIL import Image

    if not operations:
        return pixels
    levels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    grey = len(levels) == 1
    image = Image.fromarray(levels[0] if grey else np.ascontiguousarray(levels.transpose(1, 2, 0)))
    outside = tuple(max(0, min(255, round(255 * value))) for value in fill)
    for operation in operations:
        image = _done(image, operation, outside[0] if grey else outside * (3 // len(outside)), increasing)
    done = np.asarray(image, dtype=np.float32) / np.float32(255)
    return done[None] if grey else np.ascontiguousarray(done.transpose(2, 0, 1))


def _done(image: Image, o: Operation, fill: Fill, increasing: bool) -> Image:
    """The image after an operation. Amounts are timm's, to the last bit."""
    from PIL import ImageEnhance, ImageFilter, ImageOps
    from PIL.Image import Resampling, Transform

    amount = o.magnitude / _FULL  # 0..1, beyond where mmax allows it
    enhanced = max(0.1, 1.0 + o.sign * (amount * 0.9)) if increasing else amount * 1.8 + 0.1
    resample = Resampling.BICUBIC if o.bicubic else Resampling.BILINEAR

    def mapped(x: float = 0.0, y: float = 0.0, *, right: float = 0.0, down: float = 0.0) -> Image:
        """Sheared and shifted."""
        matrix = (1, x, right, y, 1, down)
        return image.transform(image.size, Transform.AFFINE, matrix, resample=resample, fillcolor=fill)

    def looked_up(level_of: Callable[[int], int]) -> Image:
        return image.point([level_of(level) for level in range(256)] * len(image.getbands()))

    bits, threshold, added = int(amount * 4), min(256, int(amount * 256)), min(128, int(amount * 110))
    bits, threshold = (4 - bits, 256 - threshold) if increasing else (bits, threshold)
    ways: dict[str, Callable[[], Image]] = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(o.sign * (amount * 30), resample=resample, fillcolor=fill),
        "Posterize": lambda: looked_up(lambda level: level & ~(2 ** max(0, 8 - bits) - 1)),  # of 0 bits: black
        "Solarize": lambda: ImageOps.solarize(image, threshold),
        "SolarizeAdd": lambda: looked_up(lambda level: min(255, level + added) if level < 128 else level),
        "Color": lambda: ImageEnhance.Color(image).enhance(enhanced),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(enhanced),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(enhanced),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(enhanced),
        "ShearX": lambda: mapped(x=o.sign * (amount * 0.3)),
        "ShearY": lambda: mapped(y=o.sign * (amount * 0.3)),
        "TranslateX": lambda: mapped(right=o.sign * (amount * 0.45) * image.width),
        "TranslateY": lambda: mapped(down=o.sign * (amount * 0.45) * image.height),
        "Desaturate": lambda: ImageEnhance.Color(image).enhance(1.0 - min(1.0, 0.5 + 0.5 * amount)),
        "GaussianBlur": lambda: image.filter(ImageFilter.GaussianBlur(radius=min(2.0, 0.1 + (2.0 - 0.1) * amount))),
    }
    return ways[o.name]()


def _refusal(text: str) -> str:
    return (
        f"data.rand_augment is {text!r}: write it as timm does, rand-m9-n2-mstd0.5-inc1, of sections m (magnitude), n "
        f"(operations per image, 1 to {_MOST_OPERATIONS}), p (probability of each, to 1), mstd (deviation of "
        "magnitudes), mmax (where they are cut off), inc (1: all grow with the magnitude), t3a (3-Augment), each "
        "once at most"
    )
