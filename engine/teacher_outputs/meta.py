"""`meta.json`: what the rows of a folder of a teacher's outputs are of, so that they are taken for nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.errors import ConfigError
from parallel.checkpoint.manifest import checksum

FILE = "meta.json"
FORMAT, VERSION = "vitruvius-teacher-outputs", 1
Part = Literal["training", "held_out"]
PARTS: tuple[Part, ...] = ("training", "held_out")
_SAY_HOW_MUCH = ("rows", "rows_per_file")  # and nothing of what a row is


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What is stored, of what.

    Attributes:
        teacher: fingerprint of the weights, and of the order of their classes where that is changed. model: keys of it,
            resolved. shown: how the images were given to it, and its number format.
        classes: of its logits. kept: the likeliest so many of each image; classes: all, in their order.
        temperature: at which the mass of all classes that are not kept was added up; None: all are kept.
        features: pooled ones that are kept, too; 0: none. blocks: whose features of patches are, too, as `blocks.3`:
            how many patches and features. number_format: of logits and features.
        key: what rows are of: draws of the training stream, or, where images are not augmented, images by their
            numbers. images: keys of `data` and others that say what pixels are.
        sets: of each part of the data, how many images there are, and their fingerprint.
        rows: of the training part that are wanted; of the held-out part there are as many as images.
        rows_per_file: at most.
    """

    teacher: str
    model: Mapping[str, Any]
    shown: Mapping[str, Any]
    classes: int
    kept: int
    temperature: float | None
    features: int
    number_format: Literal["fp32", "fp16"]
    key: Literal["draw", "image"]
    images: Mapping[str, Any]
    sets: Mapping[str, str]
    held_out_rows: int
    rows: int
    rows_per_file: int
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of all but how many rows there are, and how they lie in files: a run may go on once more are written."""
        said = {key: value for key, value in asdict(self).items() if key not in _SAY_HOW_MUCH}
        if not self.blocks:  # as before there were any
            del said["blocks"]
        return f"outputs {checksum(json.dumps(said, sort_keys=True).encode())}"

    @property
    def keeps_all(self) -> bool:
        """Whether no class is left out."""
        return self.kept == self.classes

    @property
    def row(self) -> np.dtype[Any]:
        """Of a row: `logits` [k]; where not all are kept `ids` of their classes [k], and `rest`, the logarithm of the
        sum of exp(logit / temperature) over all others; `features`, where any are kept, and those of blocks [P, D]."""
        real = {"fp32": "<f4", "fp16": "<f2"}[self.number_format]
        form: list[tuple[Any, ...]] = [] if self.keeps_all else [("ids", "<i4", (self.kept,)), ("rest", "<f4")]
        form += [("logits", real, (self.kept,)), *[("features", real, (self.features,))] * (self.features > 0)]
        form += [(name, real, tuple(shape)) for name, shape in self.blocks.items()]
        return np.dtype(form)

    def rows_of(self, part: Part) -> int:
        """That are wanted."""
        return self.rows if part == "training" else self.held_out_rows

    def to_json(self) -> str:
        """As the file has it."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    def differences(self, other: Meta) -> list[str]:
        """What is otherwise there, as `what here, not there`, of all that decides what a row is."""
        found = []
        for name in (f.name for f in fields(self) if f.name not in _SAY_HOW_MUCH):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Mapping):
                keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
                found += [f"{key} {mine.get(key)}, not {theirs.get(key)}" for key in keys]
            elif mine != theirs:
                found.append(f"{name} {mine}, not {theirs}")
        return found


def is_outputs(path: str | Path) -> bool:
    """Whether there is a folder of a teacher's outputs, whole or not, and not a checkpoint."""
    try:
        return FORMAT in (Path(path) / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def read_meta(folder: Path) -> Meta:
    """Of a folder. Raises ConfigError if it cannot be read."""
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if (given := (said.pop("format"), said.pop("version"))) != (FORMAT, VERSION):
            raise ValueError(f"it is of format {given[0]} {given[1]}, this is {FORMAT} {VERSION}")
        return Meta(**said)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{folder / FILE} says nothing of a teacher's outputs ({error}): write them anew, with python -m "
            "tools.teacher_outputs, in another folder"
        ) from error
