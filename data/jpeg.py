"""JPEGs decoded by simplejpeg where it is installed: libjpeg-turbo without what Pillow does around it.

Which of the two a rank has must not be seen in a number. Both go through libjpeg-turbo, whose accurate integer DCT is
exact, and what is asked of both is the same. So their pixels are equal, and before the first image a process sees that
they are: where they are not, and for whatever simplejpeg does not take, or warns of, Pillow decodes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_SPACES = {"L": "GRAY", "RGB": "RGB"}  # simplejpeg's names of Pillow's modes; CMYK is left to Pillow
_LEAST = 8  # pixels; of fewer, several scales have the same size, and that is how simplejpeg is told the scale
Decoder = Callable[..., NDArray[np.uint8]]


def decoder_name() -> str:
    """Who decodes JPEGs in this process, for the start-up report."""
    if _decoder() is not None:
        return f"simplejpeg {_installed().__version__}"
    return "Pillow (simplejpeg, where it is installed, is quicker)"


def decoded(image: Image, content: bytes) -> NDArray[np.uint8] | None:
    """The pixels, [H, W] or [H, W, 3], of a JPEG that Pillow has opened and not decoded yet, in the size and mode that
    `draft` has given it.

    None: it is for Pillow, which knows more kinds of files, and what is wrong with one.
    """
    suits = image.format == "JPEG" and image.mode in _SPACES and max(image.size) >= _LEAST
    decoder = _decoder() if suits else None
    return None if decoder is None else _by(decoder, image, content)


def _by(decoder: Decoder, image: Image, content: bytes) -> NDArray[np.uint8] | None:
    try:
        pixels = decoder(content, _SPACES[image.mode], min_height=image.height, min_width=image.width)
    except (ValueError, RuntimeError):  # also of what libjpeg only warns of
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    return pixels if image.mode == "RGB" else pixels[:, :, 0]


@cache
def _decoder() -> Decoder | None:
    """None: there is none, or one of other pixels than Pillow's."""
    try:
        found: Decoder = _installed().decode_jpeg
        return found if all(_agrees(found, mode, scale) for mode in _SPACES for scale in (1, 2, 4, 8)) else None
    except (ImportError, OSError):
        return None


def _installed() -> Any:
    return importlib.import_module("simplejpeg")


def _agrees(decoder: Decoder, mode: str, scale: int) -> bool:
    """Whether a small picture of many frequencies, its colours at half the resolution, has Pillow's very pixels."""
    from PIL import Image as pillow

    y, x, c = np.mgrid[0:48, 0:80, 0:3]
    waves = np.abs((x * y + 31 * c * (x - y)) % 511 - 255).astype(np.uint8)
    file = BytesIO()
    pillow.fromarray(waves).convert(mode).save(file, "JPEG", quality=90)
    with pillow.open(file) as image:
        image.draft(mode, (image.width // scale, image.height // scale))
        found = _by(decoder, image, file.getvalue())
        return found is not None and np.array_equal(found, np.asarray(image))
