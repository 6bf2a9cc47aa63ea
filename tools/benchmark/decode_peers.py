"""Loaders of other projects, as their pages show them with Pillow: random resized crop, flip, normalise, batches.

The augmentation is torchvision's, which has no build for every torch, written out: `RandomResizedCrop` draws a box,
Pillow cuts and scales it with its antialiasing bilinear filter, and `ToTensor` and `Normalize` follow.
"""

from __future__ import annotations

import importlib
import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Fn = Callable[[], object]


def pillow(content: bytes, box: tuple[int, int, int, int], side: int) -> Tensor:
    """What a box cuts out of an image, scaled: [3, side, side]."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return _to_tensor(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def augmented(content: bytes, side: int, least_area: float) -> Tensor:
    """As torchvision's training transforms."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    area = image.width * image.height
    for _ in range(10):
        target = area * random.uniform(least_area, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            break
    else:
        width = height = min(image.size)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_tensor(image).sub_(0.5).div_(0.5)


def webdataset(shards: str, side: int, least_area: float, batch: int) -> Fn | None:
    """A pass over tar files by webdataset and PyTorch's DataLoader, in this process; None: it is not installed."""
    if (library := _installed("webdataset")) is None:
        return None

    def run() -> None:
        samples = library.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(100).to_tuple("jpg", "cls")
        images = samples.map_tuple(lambda content: augmented(content, side, least_area), int)
        for _ in torch.utils.data.DataLoader(images, batch_size=batch, num_workers=0):
            pass

    return run


def grain(contents: Sequence[bytes], side: int, least_area: float, batch: int) -> Fn | None:
    """A pass over images in memory by grain, in this process; None: it is not installed."""
    if (library := _installed("grain")) is None:
        return None

    def run() -> None:
        images = library.MapDataset.source(contents).seed(0).shuffle()
        batches = images.map(lambda content: augmented(content, side, least_area).numpy()).batch(batch)
        for number in range(len(batches)):
            torch.from_numpy(batches[number])

    return run


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def tar_of(contents: Sequence[bytes]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the files of a tar file in webdataset's layout."""
    for number, content in enumerate(contents):
        yield f"{number:06d}.jpg", content
        yield f"{number:06d}.cls", str(number % 10).encode()
