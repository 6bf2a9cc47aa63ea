"""Small checkpoints without a run, cut into pieces and files as a test wants them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import folder as folders
from parallel.checkpoint.manifest import Manifest, StoredPiece, StoredTensor
from parallel.checkpoint.write import Item, in_order, write_file
from parallel.sharding.boxes import Box, boxes_of_range

FACTS: dict[str, Any] = {"progress": {"samples": 8}, "config": {"train": {"steps": 2, "seed": 0}}, "about": {}}


def tensors() -> dict[str, Tensor]:
    """A few of each kind: a matrix, a vector, numbers."""
    return {
        "weights/a": torch.arange(30.0).view(5, 6),
        "optimizer.exp_avg/a": torch.arange(30.0).view(5, 6) / 7,
        "weights/b": torch.arange(5).to(torch.bfloat16),
        "optimizer.steps": torch.tensor(3.0, dtype=torch.float64),
    }


def cut(values: Tensor, parts: int) -> list[Box]:
    """Flat ranges of about equal length, as boxes."""
    ends = [values.numel() * part // parts for part in range(parts + 1)]
    return [box for ends in pairwise(ends) for box in boxes_of_range(tuple(values.shape), *ends)]


def make(folder: Path, step: int, values: dict[str, Tensor], files: int = 2, **facts: Any) -> Path:
    """The checkpoint of a step in the folder of all; every tensor is cut over all files, as flat ranges are."""
    return folders.commit(*write(folder, step, values, files, **facts))


def write(folder: Path, step: int, values: dict[str, Tensor], files: int = 2, **facts: Any) -> tuple[Path, Manifest]:
    """What `commit` is given."""
    temporary = folders.begin(folder, step)
    dealt: list[list[Item]] = [[] for _ in range(files)]
    for name, tensor in values.items():
        shape = tuple(tensor.shape)
        for number, box in enumerate(cut(tensor, min(files, tensor.numel()))):
            dealt[number % files].append(Item(name, shape, box, box.of(tensor, (0,) * len(shape)).contiguous()))
    return temporary, manifest_of(temporary, step, dealt, **facts)


def manifest_of(temporary: Path, step: int, dealt: Sequence[Sequence[Item]], **facts: Any) -> Manifest:
    """Write the files, too."""
    done = [
        write_file(temporary / f"rank-{number:05d}.safetensors", in_order(items), {"step": str(step)})
        for number, items in enumerate(dealt)
    ]
    kinds = {item.name: (item.values.dtype, item.shape) for items in dealt for item in items}
    pieces: dict[str, list[StoredPiece]] = {name: [] for name in kinds}
    for number, written in enumerate(done):
        for name, _, _, box, start, sums in written.entries:
            pieces[name].append(StoredPiece(number, box, start, sums))
    stored = {name: StoredTensor(*kinds[name], tuple(found)) for name, found in pieces.items()}
    return Manifest(step=step, files=tuple(written.file for written in done), tensors=stored, **FACTS | facts)


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a process of its own, that ends without tidying up; 0 if nothing is raised."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
