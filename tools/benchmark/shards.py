r"""`python -m tools.benchmark shards`: how soon large sets are opened, and whether reading them keeps memory.

Indexes of empty shards (no tar file is read when a set is opened) are opened; a set of as many samples is drawn from;
and tar files of small images are read for so many draws in this process, memory noted after each tenth.

    python -m tools.benchmark shards --samples 10000000 --shards 10000 --draws 1000000 --json shards.json
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
from PIL import Image

from data import DataConfig, TrainStream, build_datasets
from data.sampling import SampleOrder
from data.shards.catalogue import Catalogue, in_processes, open_shards
from data.shards.formats import RECORD, Content, Format
from data.shards.index import make_index, place
from data.shards.store import Store
from data.shards.tar import TarFormat
from parallel.process_group import World
from tools.benchmark.resident import resident_bytes
from tools.benchmark.table import Row, show
from tools.options import add_json

_TENTHS = 10
_BATCH = 64
_IMAGES, _SHARDS_READ = 100_000, 100  # of the set that is read again and again
_SIDE = 8  # pixels


@dataclass(frozen=True)
class _Empty(Format):
    """Shards of `count` samples each, of which there is nothing but an index."""

    count: int
    texts_in: ClassVar[Mapping[str, str]] = {}

    @property
    def ending(self) -> str:
        """As Format."""
        return ".index"

    @property
    def said_by(self) -> tuple[object, ...]:
        """As Format."""
        return ()

    def content(self, file: Path, opened: BinaryIO) -> Content:
        """As Format."""
        records = np.zeros(self.count, dtype=RECORD)
        keys = [b"%09d" % row for row in range(self.count)]
        records["key_end"] = np.cumsum([len(key) for key in keys])
        labels = [str(row % 1000) for row in range(self.count)]
        return Content(records=records, keys=b"".join(keys), labels=labels, left_out={})

    def store(self, catalogue: Catalogue) -> Store:
        """As Format."""
        raise NotImplementedError("there is nothing to be read")


def main(argv: Sequence[str], world: World) -> None:
    """Measure, and print a row for each figure."""
    parser = argparse.ArgumentParser(prog="tools.benchmark shards", description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000, help="of the set that is opened")
    parser.add_argument("--shards", type=int, default=10_000, help="that they lie in")
    parser.add_argument("--draws", type=int, default=1_000_000, help="that are read; 0: none")
    parser.add_argument("--repeats", type=int, default=5, help="times that the set is opened")
    add_json(parser)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = _opened(Path(folder), options.samples, options.shards, options.repeats)
        rows += _read(Path(folder), options.draws) if options.draws else []
    show(rows, options.json)


def _row(what: str, value: float, unit: str) -> Row:
    return {"what": what, "value": value, "unit": unit}


def _opened(folder: Path, samples: int, shards: int, repeats: int) -> list[Row]:
    form = _Empty(samples // shards)

    def make(number: int) -> None:
        tar = folder / f"{number:06d}.tar"
        tar.write_bytes(bytes(1024))
        make_index(str(tar), place(str(tar), None, form), form)

    in_processes(make, range(shards), None)
    path, times = f"{folder}/{{{0:06d}..{shards - 1:06d}}}.tar", []
    for _ in range(repeats):
        began = time.perf_counter()
        catalogue = open_shards(path, "--shards", form=form, folder=None)
        times.append(time.perf_counter() - began)
    assert catalogue.made == 0
    began = time.perf_counter()
    indices = SampleOrder(len(catalogue), 0).indices(np.arange(_BATCH))
    drawn = time.perf_counter() - began
    assert len(set(indices.tolist())) == _BATCH
    what = f"{len(catalogue)} samples in {shards} indexed shards opened, median of {repeats}"
    return [
        _row(what, float(np.median(times)), "s"),
        _row("the same, slowest", max(times), "s"),
        _row(f"first {_BATCH} draws of it", 1000 * drawn, "ms"),
    ]


def _read(folder: Path, draws: int) -> list[Row]:
    _write_images(folder)
    path = f"{folder}/read-{{{0:03d}..{_SHARDS_READ - 1:03d}}}.tar"
    config = DataConfig(kind="webdataset", path=path, val_path=f"{folder}/read-000.tar")
    dataset, _ = build_datasets(config, image_size=_SIDE, channels=3, num_classes=10, seed=0)
    stream = TrainStream(
        dataset, config=config, global_batch_size=_BATCH, micro_batch_size=_BATCH, data_rank=0, data_size=1, seed=0
    )
    steps, resident, began = stream.steps(0), [], time.perf_counter()
    for _ in range(_TENTHS):
        for step in islice(steps, draws // _TENTHS // _BATCH):
            assert step[0].images is not None
        resident.append(resident_bytes() / 2**20)
    seconds = time.perf_counter() - began
    return [
        _row(f"resident after a tenth of {draws} draws", resident[0], "MiB"),
        _row("resident after all", resident[-1], "MiB"),
        _row("most beyond the first tenth", max(resident) - resident[0], "MiB"),
        _row("images read", draws / seconds, "1/s"),
    ]


def _write_images(folder: Path) -> None:
    def write(shard: int) -> None:
        rng = np.random.default_rng(shard)
        with tarfile.open(folder / f"read-{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(_IMAGES // _SHARDS_READ):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)).save(image, "PNG")
                for name, content in (("png", image.getvalue()), ("cls", b"%d" % (number % 10))):
                    member = tarfile.TarInfo(f"{number:06d}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        tar = str(folder / f"read-{shard:03d}.tar")
        make_index(tar, place(tar, None, TarFormat()), TarFormat())

    in_processes(write, range(_SHARDS_READ), None)
