"""Small tar files in the layout of webdataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

Sample = tuple[str, Mapping[str, bytes]]


def picture(number: int, ending: str = "png") -> bytes:
    """An image of one grey, `number`."""
    file = io.BytesIO()
    Image.fromarray(np.full((6, 9, 3), number, dtype=np.uint8)).save(file, "JPEG" if ending == "jpg" else ending)
    return file.getvalue()


def sample(number: int, **parts: object) -> Sample:
    """Sample `number`, whose image is as grey."""
    encoded = {name: value if isinstance(value, bytes) else str(value).encode() for name, value in parts.items()}
    return f"part/{number:05d}", {"png": picture(number)} | encoded


def write_tar(path: Path, samples: Iterable[Sample], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for key, parts in samples:
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def shards(folder: Path, sizes: Iterable[int] = (7, 5, 9), classes: int = 3) -> str:
    """Tar files of so many samples, with .cls and .json; returns their pattern."""
    first, count = 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        samples = [
            sample(
                i, cls=i % classes, json=json.dumps({"kind": "abc"[i % 3], "caption": f"grey {i}", "many": ["x", "y"]})
            )
            for i in range(first, first + size)
        ]
        write_tar(folder / f"{number:02d}.tar", samples)
        first, count = first + size, number
    return f"{folder}/{{00..{count:02d}}}.tar"
