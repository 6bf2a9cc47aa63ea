"""Packs samples into tar files of equal counts, each whole or not at all, so that the same command goes on.

The same source gives the same bytes: members have no times and no owners.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from data.decode import whole
from data.errors import UnreadableImageError
from data.sampling import SampleOrder
from data.shards.catalogue import in_processes
from data.shards.classes import CLASS_MAP
from data.shards.index import make_index, place, read_head, write_whole
from data.shards.members import ShardError
from data.shards.tar import TarFormat
from tools.prepare_data.sources import Source, key_of

_PLAN, _FORMAT = "pack.json", TarFormat()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a folder of shards is to hold.

    Attributes:
        source: its fingerprint. images: in all. shuffle: the seed of their order; None: as in the source.
        shorter_side: pixels that larger images are made smaller to, then written as JPEG; None: bytes stay as they are.
    """

    source: str
    images: int
    images_per_shard: int
    shuffle: int | None
    shorter_side: int | None

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.images // self.images_per_shard)

    def name(self, shard: int) -> str:
        """Of a tar file."""
        return f"{shard:06d}.tar"

    def samples(self, shard: int) -> range:
        """Which of the samples, in the order of the plan, a shard has."""
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.images))


def pack(
    source: Source, folder: Path, plan: Plan, *, part: tuple[int, int], workers: int | None, told: Callable[[], object]
) -> list[str]:
    """Write the shards of a part that are not there yet; says what is there.

    Raises:
        ValueError: the folder has shards of another plan, or an image cannot be read.
    """
    _begin(folder, plan, source.classes)
    todo = [shard for shard in range(part[0], plan.shards, part[1]) if not _is_there(folder, plan, shard)]
    in_processes(partial(_write, source, folder, plan), todo, workers, told)
    missing = [shard for shard in range(plan.shards) if not _is_there(folder, plan, shard)]
    found = f"{plan.shards - len(missing)} of {plan.shards} shards are there"
    if missing:
        return [f"{len(todo)} shards written, {found}; the next that is missing is {plan.name(missing[0])}"]
    paths = f"{folder}/{{{0:06d}..{plan.shards - 1:06d}}}.tar" if plan.shards > 1 else f"{folder}/{plan.name(0)}"
    return [f"{len(todo)} shards written, {found}, with {plan.images} images", f"data.path: {paths}"]


def _begin(folder: Path, plan: Plan, classes: tuple[str, ...]) -> None:
    """Tasks of an array come at the same time: each writes what all of them would, whole, the plan last."""
    file = folder / _PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} - {CLASS_MAP}
        if not file.exists():
            if others:
                raise ValueError(f"{folder} is not empty, and nothing was packed there: give another folder")
            if classes:
                write_whole(folder / CLASS_MAP, "".join(f"{name}\n" for name in classes).encode())
            write_whole(file, json.dumps(asdict(plan), indent=1).encode())
        there = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give another folder") from error
    differ = ", ".join(f"{k} {there.get(k)} there, {v} now" for k, v in asdict(plan).items() if there.get(k) != v)
    if differ:
        raise ValueError(f"{folder} holds shards that were packed otherwise ({differ}): give another folder")


def _is_there(folder: Path, plan: Plan, shard: int) -> bool:
    tar = folder / plan.name(shard)
    head = read_head(place(str(tar), None, _FORMAT))
    return (
        head is not None
        and tar.exists()
        and head.file_size == tar.stat().st_size
        and head.count == len(plan.samples(shard))
    )


def _write(source: Source, folder: Path, plan: Plan, shard: int) -> None:
    numbers = plan.samples(shard)
    indices = np.arange(numbers.start, numbers.stop)
    if plan.shuffle is not None:
        indices = SampleOrder(plan.images, plan.shuffle).indices(indices)
    tar, part = folder / plan.name(shard), folder / f".{plan.name(shard)}.part"
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, index in zip(numbers, indices.tolist(), strict=True):
                name, parts = source.sample(index)
                key = key_of(number, name)
                for ending, content in _smaller(parts, plan.shorter_side, name).items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        part.replace(tar)
    except OSError as error:
        raise ShardError(f"{tar} cannot be packed ({error}): see to that, and start again: it goes on") from error
    finally:
        part.unlink(missing_ok=True)
    make_index(str(tar), place(str(tar), None, _FORMAT), _FORMAT)
    if not _is_there(folder, plan, shard):
        raise ShardError(f"{tar} has not the {len(numbers)} samples that were written: start again")


def _smaller(parts: Mapping[str, bytes], shorter_side: int | None, name: str) -> Mapping[str, bytes]:
    if shorter_side is None:
        return parts
    (_, content), *others = parts.items()
    image, white = whole(BytesIO(content), "RGB", lambda: name)
    if white != 255:
        raise UnreadableImageError(f"{name} has 16 bits, which JPEG has not: pack it without --shorter-side")
    if min(image.size) > shorter_side:
        scale = shorter_side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), reducing_gap=3.0)
    written = BytesIO()
    image.save(written, "JPEG", quality=95)
    return {"jpg": written.getvalue(), **dict(others)}
