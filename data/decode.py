"""From an image file to pixels of a given shape, decoded by Pillow.

Images are shown as they were meant: turned as their EXIF orientation says; 16-bit grey by its full range; of several
frames the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.augment import crop_boxes
from data.errors import UnreadableImageError

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # EXIF tag; 1: as stored, 5 to 8: width and height change places
_DEEPEST = 65535


CENTRE = np.array([1.0, 1.0, 0.5, 0.5])
"""The crop that is the largest box of the result's shape, in the middle."""


def check_channels(channels: int) -> None:
    """Raise ValueError for what image files are not read with."""
    if channels not in (1, 3):
        raise ValueError(f"image files are read with 1 channel (grey) or 3 (RGB), not {channels}")


def decode(
    file: str | BinaryIO,
    crop: NDArray[np.float64],
    image_shape: tuple[int, int, int],
    name: Callable[[], str] | None = None,
) -> NDArray[np.float32]:
    """The box that `crop` [4] (see augment.crop_boxes) cuts out, scaled to image_shape: [C, H, W] in 0..1.

    `name` tells what an open file is.

    Raises:
        UnreadableImageError: whatever the reason.
    """
    from PIL import Image

    with _readable(name or (lambda: str(file))), Image.open(file) as image:
        return _cut(image, crop, image_shape)


def whole(file: str | BinaryIO, mode: str, name: Callable[[], str] | None = None) -> tuple[Image, int]:
    """All of an image as it was meant: (it in Pillow's `mode`, `L` or `RGB`, or in grey floats where 8 bits would not
    hold it; the value of white).

    Raises:
        UnreadableImageError: whatever the reason.
    """
    from PIL import Image

    with _readable(name or (lambda: str(file))), Image.open(file) as image:
        return _as_mode(_upright(image, _orientation(image)), mode)


@contextmanager
def _readable(name: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, struct.error, ...
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{name()} cannot be decoded ({cause}): replace or remove this file") from error


def _cut(image: Image, crop: NDArray[np.float64], image_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    from PIL.Image import Resampling

    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    orientation = _orientation(image)
    turned = orientation >= 5
    full_width, full_height = image.size[::-1] if turned else image.size
    left, top, box_width, box_height = crop_boxes(crop, full_height, full_width, width / height).tolist()
    # JPEG decodes straight to a half, quarter or eighth of its size, where that is still large enough.
    enough = math.ceil(full_width * width / box_width), math.ceil(full_height * height / box_height)
    image.draft(mode, enough[::-1] if turned else enough)
    pixels, white = _as_mode(_upright(image, orientation), mode)
    x, y = pixels.width / full_width, pixels.height / full_height
    right, bottom = min(left + box_width, full_width), min(top + box_height, full_height)  # rounding
    scaled = pixels.resize((width, height), Resampling.BILINEAR, box=(left * x, top * y, right * x, bottom * y))
    return channels_first(scaled, channels) / np.float32(white)


def _orientation(image: Image) -> int:
    """How stored pixels must be turned, 1 to 8. TIFF is turned by Pillow itself; what cannot be understood is not."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged entry beside good pixels; parsers raise many types
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _as_mode(image: Image, mode: str) -> tuple[Image, int]:
    """(the image in `mode`, or in grey floats where 8 bits would not hold it; the value of white)."""
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        return pillow.fromarray(np.asarray(image, dtype=np.float32)), _DEEPEST
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (Pillow's mode {image.mode}), of which nobody says what is white")
    return image.convert(mode), 255


def channels_first(image: Image, channels: int) -> NDArray[np.float32]:
    """[C, H, W]; grey repeated for every channel."""
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))
