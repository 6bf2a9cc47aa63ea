r"""`python -m tools.benchmark augmentations`: what augmentations, and ways to show held-out images, take per image.

One thread; colour images of --size pixels, crops of the photograph that scikit-learn brings. Ways take turns; medians
of --rounds micro-batches of 16. Augmentations are told beyond an image that is only normalised, and are made of images
in memory; the crop of a file's image is part of its decoding. Held-out images are JPEGs of 500 x 400 pixels, decoding
included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.config import DataConfig
from data.datasets import ArrayDataset, installed_folder
from data.loader import TrainStream
from data.showing import read_file, showing_of
from parallel.process_group import World
from tools.benchmark.table import Row, show
from tools.benchmark.timing import interleaved
from tools.options import add_json

_BATCH = 16
_AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "flip": {"flip": True},
    "random crop, of an image in memory": {"crop_min_area": 0.25},
    "brightness, contrast": {"brightness": 0.4, "contrast": 0.4},
    "saturation, grey": {"saturation": 0.4, "grey": 0.2},
    "hue": {"hue": 0.1},
    "blur": {"blur": 2.0},
    "noise": {"noise": 0.1},
    "RandAugment rand-m9-n2-mstd0.5-inc1": {"rand_augment": "rand-m9-n2-mstd0.5-inc1"},
    "3-Augment rand-n1-p1-t3a": {"rand_augment": "rand-n1-p1-t3a"},
    "random erasing, 25 %, pixel": {"erase": 0.25},
    "Mixup": {"mixup": 0.8},
    "CutMix": {"cutmix": 1.0},
}
_WAYS = ("centre", "timm", "big_vision", "big_vision_resize")


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark augmentations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, usual in (("size", 224), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"(default {usual})")
    add_json(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    show(rows(options.size, options.rounds), options.json)


def rows(size: int, rounds: int) -> list[Row]:
    """A row for each augmentation, then for each way to show a held-out image."""
    photo = Image.open(
        installed_folder("sklearn", "datasets/images/china.jpg", kind="augmentations", package="sklearn")
    )
    made = {
        "nothing": _taken(photo, size, {}),
        **{name: _taken(photo, size, of) for name, of in _AUGMENTATIONS.items()},
    }
    times = interleaved(made, rounds, torch.device("cpu"))
    beyond = {
        name: statistics.median(a - b for a, b in zip(times[name], times["nothing"], strict=True)) / _BATCH
        for name in _AUGMENTATIONS
    }
    file = BytesIO()
    photo.resize((500, 400)).save(file, "JPEG", quality=90)
    shown = {f"held out, {way}": _shown(file.getvalue(), way, size) for way in _WAYS}
    whole = {name: statistics.median(found) for name, found in interleaved(shown, rounds, torch.device("cpu")).items()}
    return [{"what": name, "ms_per_image": 1e3 * seconds} for name, seconds in (beyond | whole).items()]


def _taken(photo: Image.Image, size: int, keys: dict[str, Any]) -> Callable[[], object]:
    """Takes the next micro-batch of a stream of crops of a photograph."""
    places = np.random.default_rng(0).integers(0, (photo.width - size, photo.height - size), (4 * _BATCH, 2)).tolist()
    crops = [np.asarray(photo.crop((x, y, x + size, y + size)), dtype=np.float32) / 255 for x, y in places]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    stream = TrainStream(
        ArrayDataset(images, np.zeros(len(images), dtype=np.int64), 1), config=DataConfig(**keys), seed=0,
        global_batch_size=_BATCH, micro_batch_size=_BATCH, data_rank=0, data_size=1,
    )  # fmt: skip
    steps = stream.steps(0)
    return lambda: next(steps)[0]


def _shown(content: bytes, way: Any, size: int) -> Callable[[], object]:
    showing = showing_of(DataConfig(kind="image_folder", path="photographs", eval_transform=way))
    return lambda: read_file(BytesIO(content), None, (3, size, size), showing)
