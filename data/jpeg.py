"""JPEGs decoded by libjpeg-turbo without what Pillow does around it: parts of them by the native module, whole ones by
simplejpeg, where these are installed.

Which of them a rank has must not be seen in a number. All go through libjpeg-turbo, whose accurate integer DCT is
exact, and what is asked of them is the same. So their pixels are equal, and before the first image a process sees that
they are: where they are not, and for whatever they do not take, or warn of, Pillow decodes.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.scaling import Edges, native

if TYPE_CHECKING:
    from PIL.Image import Image

_SPACES = {"L": "GRAY", "RGB": "RGB"}  # simplejpeg's names of Pillow's modes; CMYK is left to Pillow
_LEAST = 8  # pixels; of fewer, several scales have the same size, and that is how decoders are told the scale
_DRAFTS = [(mode, scale) for mode in _SPACES for scale in (1, 2, 4, 8)]  # modes and scales that `draft` may ask for
_ROOM = 64  # columns beside a part that are decoded with it, at most: a block and margins
_END = b"\xff\xd9"
# Of csrc/pixels/jpeg.h, in its order.
_FUNCTIONS = [
    *("std_error", "CreateDecompress", "mem_src", "read_header", "start_decompress"),
    *("crop_scanline", "skip_scanlines", "read_scanlines", "destroy_decompress"),
]
Decoder = Callable[..., NDArray[np.uint8]]
Addresses = tuple[int, ...]


def decoder_name() -> str:
    """Who decodes JPEGs in this process, for the start-up report."""
    whole = f"simplejpeg {_installed().__version__}" if _decoder() is not None else "Pillow"
    if _library() is not None:
        return f"{whole}, crops by libjpeg-turbo in parts"
    return whole if _decoder() is not None else f"{whole} (simplejpeg, where it is installed, is quicker)"


def decoded_part(image: Image, content: bytes, edges: Edges) -> NDArray[np.uint8] | None:
    """What edges cut out of what `decoded` gives, for less work than all of it takes.

    None: all of the image is to be decoded. So are files that may have been cut short or have segments behind their
    pixels: only then it is seen whether they are bad, which is no matter of where they are cut.
    """
    addresses = _library() if _suits(image) and content.endswith(_END) else None
    return None if addresses is None else _part_by(addresses, image, content, edges)


def _part_by(addresses: Addresses, image: Image, content: bytes, edges: Edges) -> NDArray[np.uint8] | None:
    module, (top, bottom, left, right) = native(), edges
    assert module is not None
    room = min(right - left + _ROOM, image.width)
    pixels = np.empty((bottom - top, room, len(image.getbands())), dtype=np.uint8)
    first = module.jpeg_part(addresses, content, (image.height, image.width), edges, pixels)
    if first < 0:
        return None
    part = pixels[:, left - first : right - first]
    return part if image.mode == "RGB" else part[:, :, 0]


@cache
def _library() -> Addresses | None:
    """Where the functions of Pillow's libjpeg-turbo are; None: it is another one, or there is no native module."""
    from PIL import _imaging

    if native() is None:
        return None
    try:
        library = ctypes.CDLL(_imaging.__file__)
        found = tuple(ctypes.cast(getattr(library, f"jpeg_{name}"), ctypes.c_void_p).value or 0 for name in _FUNCTIONS)
    except (OSError, AttributeError):
        return None
    agrees = all(_part_agrees(found, *drafted) for drafted in _DRAFTS)
    return found if agrees and _sees_damage(found) else None


def _sees_damage(addresses: Addresses) -> bool:
    """Whether it leaves a file alone that Pillow refuses for what lies below a part: what is bad must not depend on
    where it is cut. The module may be older than this file."""
    with _sample("RGB", 1) as (image, content):
        damaged = content.removesuffix(_END) + b"\xff\xc4\x00\x00" + _END  # a segment of less than its own length
        return _part_by(addresses, image, damaged, (0, 8, 0, 8)) is None


def _part_agrees(addresses: Addresses, mode: str, scale: int) -> bool:
    with _sample(mode, scale) as (image, content):
        edges = image.height // 3, image.height - 1, image.width // 2 - 1, image.width * 3 // 4
        found = _part_by(addresses, image, content, edges)
        top, bottom, left, right = edges
        return found is not None and np.array_equal(found, np.asarray(image)[top:bottom, left:right])


def decoded(image: Image, content: bytes) -> NDArray[np.uint8] | None:
    """The pixels, [H, W] or [H, W, 3], of a JPEG that Pillow has opened and not decoded yet, in the size and mode that
    `draft` has given it.

    None: it is for Pillow, which knows more kinds of files, and what is wrong with one.
    """
    decoder = _decoder() if _suits(image) else None
    return None if decoder is None else _by(decoder, image, content)


def _suits(image: Image) -> bool:
    """Whether it is one for others than Pillow."""
    return image.format == "JPEG" and image.mode in _SPACES and max(image.size) >= _LEAST


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
        return found if all(_agrees(found, *drafted) for drafted in _DRAFTS) else None
    except (ImportError, OSError):
        return None


def _installed() -> Any:
    return importlib.import_module("simplejpeg")


def _agrees(decoder: Decoder, mode: str, scale: int) -> bool:
    with _sample(mode, scale) as (image, content):
        found = _by(decoder, image, content)
        return found is not None and np.array_equal(found, np.asarray(image))


@contextmanager
def _sample(mode: str, scale: int) -> Iterator[tuple[Image, bytes]]:
    """A small picture of many frequencies, its colours at half the resolution, that Pillow has not decoded yet; its
    file. What decodes that to Pillow's very pixels will do."""
    from PIL import Image as pillow

    y, x, c = np.mgrid[0:48, 0:80, 0:3]
    waves = np.abs((x * y + 31 * c * (x - y)) % 511 - 255).astype(np.uint8)
    file = BytesIO()
    pillow.fromarray(waves).convert(mode).save(file, "JPEG", quality=90)
    with pillow.open(file) as image:
        image.draft(mode, (image.width // scale, image.height // scale))
        yield image, file.getvalue()
