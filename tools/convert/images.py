"""Real photographs, from packages that are installed anyway, prepared as a model wants them; and texts, in tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data import DataConfig
from data.decode import channels_first, whole
from data.showing import read_file, showing_of
from model.formats.base import Preprocessing
from model.formats.shown import is_exact, keys_of
from model.text import TextConfig

if TYPE_CHECKING:
    from PIL import Image

NAMES = ("china.jpg", "flower.jpg", "rocket.jpg", "ihc.png")
_SEEN = {"nearest": "NEAREST", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS", "box": "BOX"}


def photographs(channels: int, size: tuple[int, int], how: Preprocessing | None) -> Tensor:
    """[4, channels, rows, columns]: two of scikit-learn and two of scikit-image, as the model was trained to see them.

    Args:
        how: they are prepared; None: as by default.
    """
    how = how or Preprocessing()
    return torch.stack([prepared(path, channels, size, how) for path in _paths()])


def tokens(text: TextConfig) -> Tensor:
    """int64 [6, S]: texts of several lengths, of tokens from all over the vocabulary, each with its end, and then with
    what libraries fill up with: zeros, or end tokens. For who pools the last token, too, which is then one of these.

    Args:
        text: resolved.
    """
    length, count, end = text.context_length, text.vocabulary_size, text.end_token
    assert length is not None and count is not None and end is not None
    found = torch.randint(0, count, (6, length), generator=torch.Generator().manual_seed(0))
    found = torch.where(found == end, (end + 1) % count, found)
    for i, row in enumerate(found):
        stop = length - 1 if i == 0 else (i * length) // 7
        row[stop] = end
        row[stop + 1 :] = end if i % 2 else 0
    return found


def _paths() -> list[Path]:
    folders = [_installed("sklearn") / "datasets" / "images", _installed("skimage") / "data"]
    return [next(p for folder in folders if (p := folder / name).exists()) for name in NAMES]


def _installed(package: str) -> Path:
    """Its folder, without importing it."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations, package
    return Path(found.submodule_search_locations[0])


def prepared(path: Path, channels: int, size: tuple[int, int], how: Preprocessing) -> Tensor:
    """An image as the model is to see it [channels, rows, columns], as evaluation does.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    if is_exact(how):  # as evaluation shows it, bit by bit
        data = DataConfig(kind="image_folder", path="photographs", **keys_of(how))
        pixels = read_file(str(path), None, (channels, *size), showing_of(data))
    else:
        image, white = whole(str(path), "RGB" if channels == 3 else "L")
        pixels = channels_first(_resized(image, size, how), channels) / np.float32(white)
    x = torch.from_numpy(pixels)
    mean, std = statistics(how, channels)
    return (x - mean) / std


def statistics(how: Preprocessing, channels: int) -> tuple[Tensor, Tensor]:
    """(what is subtracted from pixels in 0..1, what they are then divided by), [channels, 1, 1] each."""
    mean, std = (torch.tensor(v if len(v) == channels else v[:1] * channels) for v in (how.mean, how.std))
    return mean[:, None, None], std[:, None, None]


def _resized(image: Image.Image, size: tuple[int, int], how: Preprocessing) -> Image.Image:
    from PIL import Image

    rows, cols = size
    resample = Image.Resampling[_SEEN[how.interpolation]]
    if how.squash:
        wide, high = round(cols / how.crop_fraction), round(rows / how.crop_fraction)
    else:
        scale = max(rows / image.height, cols / image.width) / how.crop_fraction
        wide, high = round(image.width * scale), round(image.height * scale)
    left, top = (wide - cols) // 2, (high - rows) // 2
    return image.resize((wide, high), resample).crop((left, top, left + cols, top + rows))
