"""From an image file to pixels of a given shape, decoded by Pillow, and JPEGs by what is quicker (data.jpeg).

Images are shown as they were meant: turned as their EXIF orientation says; 16-bit grey by its full range; palettes and
CMYK in their colours; of several frames the first one. Transparency is left out, as torchvision, timm and big_vision
do. JPEGs are decoded at a half, quarter or eighth of their size where that still covers the crop.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.augment import crop_boxes
from data.errors import BadSampleError, UnreadableImageError
from data.jpeg import decoded, decoded_part
from data.scaling import Edges, Finish, Pixels, scaled
from data.work import reading_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # EXIF tag; 1: as stored, 5 to 8: width and height change places
_DEEPEST = 65535
Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of width and height

# None: a decoder refuses what is there. Others are of a disk, a network or a process that may do better the next time.
_OF_SAMPLES = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


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
    finish: Finish | None = None,
) -> NDArray[np.float32]:
    """The box that `crop` [4] (see augment.crop_boxes) cuts out, scaled to image_shape: [C, H, W] in 0..1, or finished.

    `name` tells what an open file is.

    Raises:
        UnreadableImageError: whatever the reason; BadSampleError where it is the file's.
    """
    from PIL import Image

    with _readable(name or (lambda: str(file))):
        with reading_bytes():
            content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        with Image.open(BytesIO(content)) as image:
            return _cut(image, content, crop, image_shape, finish)


def sides(file: str | BinaryIO, name: Callable[[], str] | None = None) -> tuple[int, int]:
    """Rows and columns of pixels of an image as it was meant, by its header (of a PNG, by all of it).

    Raises:
        UnreadableImageError: as decode.
    """
    from PIL import Image

    with _readable(name or (lambda: str(file))), Image.open(file) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


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
        is_unknown = type(error).__name__ == "UnidentifiedImageError"  # whose text is an address in memory
        cause = "of no known format" if is_unknown else " ".join(str(error).split()) or type(error).__name__
        message = f"{name()} cannot be decoded ({cause}): replace or remove this file"
        is_of_sample = not isinstance(error, MemoryError) and getattr(error, "errno", None) in _OF_SAMPLES
        raise (BadSampleError if is_of_sample else UnreadableImageError)(message) from error


def _cut(
    image: Image,
    content: bytes,
    crop: NDArray[np.float64],
    image_shape: tuple[int, int, int],
    finish: Finish | None,
) -> NDArray[np.float32]:
    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    orientation = _orientation(image)
    turned = orientation >= 5
    full_width, full_height = image.size[::-1] if turned else image.size
    box = crop_boxes(crop, full_height, full_width, width / height).tolist()
    # JPEG decodes straight to a half, quarter or eighth of its size, where that is still large enough.
    enough = math.ceil(full_width * width / box[2]), math.ceil(full_height * height / box[3])
    image.draft(mode, enough[::-1] if turned else enough)
    edges = box[0], box[1], min(box[0] + box[2], full_width), min(box[1] + box[3], full_height)  # rounding
    shares = edges[0] / full_width, edges[1] / full_height, edges[2] / full_width, edges[3] / full_height
    if np.array_equal(crop, CENTRE):
        shown, white = _as_mode(_upright(image, orientation), mode)
        found = channels_first(_with_surroundings(shown, shares, (width, height)), channels) / np.float32(white)
        return found if finish is None else finish(found)
    if orientation == 1:
        part = decoded_part(image, content, _edges(shares, image.height, image.width))
        if part is not None:
            return scaled(part, (0, part.shape[0], 0, part.shape[1]), image_shape, 255, finish)
    pixels, white = _pixels(image, content, orientation, mode)
    return scaled(pixels, _edges(shares, *pixels.shape[:2]), image_shape, white, finish)


def _pixels(image: Image, content: bytes, orientation: int, mode: str) -> tuple[Pixels, int]:
    """([H, W] or [H, W, 3], upright: bytes, or floats where these would not hold them; the value of white)."""
    from PIL import Image as pillow

    found = decoded(image, content)
    if found is not None and orientation == 1:
        return found, 255
    shown, white = _as_mode(_upright(image if found is None else pillow.fromarray(found), orientation), mode)
    return np.array(shown), white


def _with_surroundings(image: Image, shares: Box, size: tuple[int, int]) -> Image:
    """What a box cuts out, as if all of the image had been scaled before: its edges blend with what is beside them. So
    evaluation sees it elsewhere, too: the shorter side is scaled, then the centre cropped."""
    from PIL.Image import Resampling

    left, top, right, bottom = shares
    box = left * image.width, top * image.height, right * image.width, bottom * image.height
    return image.resize(size, Resampling.BILINEAR, box=box)


def _edges(shares: Box, rows: int, columns: int) -> Edges:
    """A box in whole pixels, one at least."""
    left, top = min(round(shares[0] * columns), columns - 1), min(round(shares[1] * rows), rows - 1)
    return top, max(round(shares[3] * rows), top + 1), left, max(round(shares[2] * columns), left + 1)


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
    if image.mode == "I" and image.format == "PPM":  # the one format whose 16 bits Pillow gives in 32
        return pillow.fromarray(np.asarray(image, dtype=np.float32)), _DEEPEST
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (Pillow's mode {image.mode}), of which nobody says what is white")
    return image.convert(mode), 255


def channels_first(image: Image, channels: int) -> NDArray[np.float32]:
    """[C, H, W]; grey repeated for every channel."""
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))
