"""Images a second on one core: `python -m tools.benchmark decode [--peers FOLDER] [--json FILE]`.

JPEGs of 500 x 400 pixels, cut out of scikit-image's photographs, become tensors of 224 x 224. *centre*: the largest
square in the middle of each, as in evaluation; *crop*: one of 300 x 300, as in training; *load*: training batches of
tar files, cropped, mirrored and normalised, by this project, by webdataset with PyTorch's DataLoader and Pillow, and by
grain (which is given the files in memory). All run in one process with one thread, in turn, and CPU seconds count.
Others' loaders are looked for in FOLDER, too:

    pip install --no-deps --target FOLDER --requirement tools/benchmark/loaders-requirements.txt
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data import DataConfig, TrainStream, build_datasets, jpeg, scaling
from data.decode import CENTRE, decode
from data.textures import photographs
from model.kernels import tune_allocator
from parallel.process_group import World
from tools.benchmark import decode_peers
from tools.benchmark.table import Row, show
from tools.benchmark.timing import Fn, interleaved, quartiles
from tools.options import add_json

_SIZE, _SIDE, _BATCH = (500, 400), 224, 32
_LEAST_AREA = 0.25  # of random crops
_CROP = np.array([0.5625, 1.0, 0.25, 0.4])  # see data.augment.crop_boxes


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96, help="a multiple of 32 (default 96)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds (default 10)")
    parser.add_argument("--peers", type=Path, help="folder where other projects' loaders are")
    add_json(parser)
    options = parser.parse_args(argv)
    if options.peers is not None:
        sys.path.append(str(options.peers))
    torch.set_num_threads(1)
    tune_allocator()  # as runs do it
    contents, found = list(_pictures(options.images)), list[Row]()
    with tempfile.TemporaryDirectory(prefix="decode-") as folder:
        tar = Path(folder) / "images.tar"
        _write(tar, contents)
        centre, crop = decoders(contents, CENTRE, (50, 0, 450, 400)), decoders(contents, _CROP, (50, 40, 350, 340))
        for name, ways in {"centre": centre, "crop": crop, "load": loaders(tar, contents)}.items():
            there = {way: fn for way, fn in ways.items() if fn is not None}
            times = interleaved(there, options.repeats, torch.device("cpu"))
            found += [_row(name, way, times[way], times[next(iter(there))], len(contents)) for way in there]
            for way in ways.keys() - there.keys():
                print(f"{way} is not installed: see --peers")
    show(found, options.json)


def decoders(
    contents: Sequence[bytes], crop: NDArray[np.float64], box: tuple[int, int, int, int]
) -> dict[str, Fn | None]:
    """Ways to decode all of them, and cut out the same: `box` in pixels."""

    def ours() -> None:
        for content in contents:
            decode(BytesIO(content), crop, (3, _SIDE, _SIDE))

    def theirs() -> None:
        for content in contents:
            decode_peers.pillow(content, box, _SIDE)

    return {"Pillow": theirs, **_ways(ours)}


def _ways(ours: Fn) -> dict[str, Fn | None]:
    """By more and more of what makes it quick, each named by what is at work then: what is not there makes no row."""
    finders = ("jpeg._library", "scaling.native", "jpeg._decoder")
    ways = [partial(_without, finders[:count]) for count in (3, 2, 1, 0)]
    return {str(way(_at_work)): partial(way, ours) for way in ways}


def _at_work() -> str:
    decoder = "Pillow" if jpeg._decoder() is None else "simplejpeg"
    parts = "" if jpeg._library() is None else ", crops in parts"
    scaler = "" if scaling.native() is None else ", scaled by the module"
    return f"vitruvius, by {decoder}{parts}{scaler}"


def _without(finders: Sequence[str], run: Fn) -> object:
    """What it gives where these functions of `data` find nothing: a decoder, the native module."""
    with ExitStack() as stack:
        for name in finders:
            stack.enter_context(patch(f"data.{name}", lambda: None))
        return run()


def loaders(tar: Path, contents: Sequence[bytes]) -> dict[str, Fn | None]:
    """Ways to load an epoch of them."""
    config = DataConfig(kind="webdataset", path=str(tar), val_path=str(tar), crop_min_area=_LEAST_AREA, flip=True)
    dataset, _ = build_datasets(config, image_size=_SIDE, channels=3, num_classes=None, seed=0)
    size = len(contents)
    stream = TrainStream(
        dataset, config=config, global_batch_size=size, micro_batch_size=_BATCH, data_rank=0, data_size=1, seed=0
    )
    steps = stream.steps(0)

    def ours() -> None:
        for _ in next(steps):
            pass

    return {
        "webdataset + DataLoader + Pillow": decode_peers.webdataset(str(tar), _SIDE, _LEAST_AREA, _BATCH),
        "grain + Pillow": decode_peers.grain(contents, _SIDE, _LEAST_AREA, _BATCH),
        **_ways(ours),
    }


def _row(what: str, way: str, seconds: Sequence[float], base: Sequence[float], images: int) -> Row:
    low, high = quartiles([images / s for s in seconds])
    return {
        "what": what,
        "way": way,
        "images_per_s": statistics.median(images / s for s in seconds),
        "lower_quartile": low,
        "upper_quartile": high,
        "speedup": statistics.median(b / s for b, s in zip(base, seconds, strict=True)),
    }


def _pictures(count: int) -> Iterator[bytes]:
    """JPEGs of pieces of photographs, enlarged where these are smaller."""
    files = photographs()
    for number in range(count):
        with Image.open(files[number % len(files)]) as photograph:
            picture = photograph.convert("RGB")
        zoom = max(1.0, *(wanted / side for wanted, side in zip(_SIZE, picture.size, strict=True)))
        picture = picture.resize((int(picture.width * zoom + 0.5), int(picture.height * zoom + 0.5)))
        left, top = (number * 37 % (side - wanted + 1) for wanted, side in zip(_SIZE, picture.size, strict=True))
        file = io.BytesIO()
        picture.crop((left, top, left + _SIZE[0], top + _SIZE[1])).save(file, "JPEG", quality=90)
        yield file.getvalue()


def _write(path: Path, contents: Sequence[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in decode_peers.tar_of(contents):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
