"""Teachers for the ladder: checkpoints of random weights, or what such a model makes of the ladder's images, written
once for all processes of a machine's user.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batch, Dataset, EvalStream, TrainStream
from engine.config import Config
from engine.config.contrastive import ContrastiveConfig
from engine.config.distillation import DistillationConfig, TeacherConfig
from engine.config.pairs import pairs_of
from engine.config.stored import meta_of
from engine.config.teachers import teachers_of
from engine.run.agreement import code_version
from engine.teacher_outputs.shards import begin, ranges, write_rows
from model import ImageText, ModelConfig, TextConfig, VisionTransformer
from model.formats.base import ConversionError
from tests.engine.objectives.plain_relations import pooled, rows_of

_PATIENCE = 30.0  # seconds
_MODELS: dict[str, ModelConfig] = {}
_STORED: dict[str, TeacherConfig] = {}
_TOWERS: dict[str, tuple[ModelConfig, TextConfig, int]] = {}


def teacher(model: ModelConfig, **keys: Any) -> TeacherConfig:
    """One of this model; its checkpoint is there once `with_teachers` has seen it."""
    name = blake2b(repr(model).encode(), digest_size=8).hexdigest()
    path = str(Path(tempfile.gettempdir()) / f"vitruvius-teachers-{os.getuid()}" / name)
    _MODELS[path] = model
    return TeacherConfig(path=path, **keys)


def towers(image: ModelConfig, text: TextConfig, embedding: int) -> str:
    """The path of two towers; their checkpoint is there once `with_towers` has seen it."""
    name = blake2b(repr((image, text, embedding)).encode(), digest_size=8).hexdigest()
    path = str(Path(tempfile.gettempdir()) / f"vitruvius-teachers-{os.getuid()}" / name)
    _TOWERS[path] = image, text, embedding
    return path


def with_towers(keys: ContrastiveConfig) -> ContrastiveConfig:
    """The keys, with a teacher, if there is one, whose checkpoint is there."""
    if keys.teacher is not None:
        _write_once(Path(keys.teacher), lambda: _pair(*_TOWERS[str(keys.teacher)]))
    return keys


def _pair(image: ModelConfig, text: TextConfig, embedding: int) -> ImageText:
    return ImageText(image, text, embedding=embedding, temperature=0.05, seed=7)


def stored(of: TeacherConfig) -> TeacherConfig:
    """What he makes of the images of a case; it is there once `write_outputs` has seen the case's configuration."""
    path = f"{of.path}-{blake2b(f'{of} {code_version()}'.encode(), digest_size=8).hexdigest()}"
    _STORED[path] = of
    return TeacherConfig(path=path, weight=of.weight)


def computed(of: TeacherConfig) -> TeacherConfig:
    """A teacher himself."""
    return _STORED.get(of.path, of)


def write_outputs(config: Config, draws: int) -> None:
    """All outputs that a configuration has for teachers, by plain forwards of one process."""
    from tests.parity.climb import digits  # which imports this

    config = replace(config, model=config.model.resolve())
    for path in (Path(of.path) for of in config.distillation.all_teachers if of.path in _STORED):
        if not path.exists():
            new = Path(tempfile.mkdtemp(dir=path.parent))
            keys = with_teachers(replace(config.distillation, teachers=None), (_STORED[str(path)],))
            _write(new, replace(config, distillation=keys), digits(config.model), draws)
            with suppress(OSError):  # another process was quicker
                new.rename(path)
            shutil.rmtree(new, ignore_errors=True)


@torch.no_grad()
def _write(folder: Path, config: Config, sets: tuple[Dataset, Dataset], draws: int) -> None:
    """Of a configuration of one teacher."""
    (teacher,), size = teachers_of(config), {"micro_batch_size": 20, "data_rank": 0, "data_size": 1}
    keys, sizes = config.distillation, teacher.model.sizes
    blocks = [j for _, j in pairs_of(keys, config.model.sizes.depth, sizes.depth)] if keys.compares_rows else []
    meta = meta_of(
        config, teacher, "his", sets, kept=None, features=sizes.last.width, rows=draws, number_format="fp32",
        rows_per_file=64, blocks=blocks,
    )  # fmt: skip
    begin(folder, meta)
    model, path = VisionTransformer(teacher.model), str(config.distillation.teacher)
    model.load(dict(VisionTransformer.from_pretrained(path).named_parameters()), _MODELS[path].resolve())
    stream = TrainStream(sets[0], config=config.data, global_batch_size=20, seed=config.train.seed, **size)
    training = islice(chain.from_iterable(stream.steps(0)), -(-draws // 20))
    streams: dict[Any, Iterable[Batch]] = {
        "training": training, "held_out": EvalStream(sets[1], config=config.data, **size)
    }  # fmt: skip
    for part, batches in streams.items():
        found: dict[str, list[Tensor]] = {name: [] for name in meta.row.names or ()}
        for images in (batch.images for batch in batches):
            assert images is not None
            with pooled(model) as features, rows_of(model) as after:
                found["logits"].append(model(teacher.pixels.of(images)))
            found["features"] += features
            for block in blocks:
                found[f"blocks.{block}"].append(after[block])
        whole = {name: torch.cat(parts) for name, parts in found.items()}
        for span in ranges(meta, part):
            rows = np.empty(len(span), meta.row)
            for name, values in whole.items():
                rows[name] = values[span.start : span.stop]
            write_rows(folder, part, span.start, rows)


def with_teachers(keys: DistillationConfig, teachers: tuple[TeacherConfig, ...]) -> DistillationConfig:
    """The keys, with teachers whose checkpoints are there."""
    for path in (Path(computed(of).path) for of in teachers):
        _write_once(path, lambda path=path: _made(_MODELS[str(path)]))  # type: ignore[misc]
    return replace(keys, teachers=teachers) if len(teachers) > 1 else _of_one(keys, teachers[0])


def _write_once(path: Path, make: Callable[[], VisionTransformer | ImageText]) -> None:
    """A checkpoint, by whichever process is first."""
    if path.exists():
        return
    try:
        make().save_pretrained(path)
    except (ValueError, ConversionError):  # another process was quicker
        until = time.monotonic() + _PATIENCE
        while not path.exists():
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _of_one(keys: DistillationConfig, of: TeacherConfig) -> DistillationConfig:
    return replace(
        keys, teacher=of.path, teacher_image_size=of.image_size, teacher_mean=of.mean, teacher_std=of.std,
        teacher_dtype=of.dtype,
    )  # fmt: skip


def _made(config: ModelConfig) -> VisionTransformer:
    """Of opinions: logits as large as those of a trained model."""
    model = VisionTransformer(config, seed=7)

    def louder(weight: Tensor) -> None:
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) / 4)

    with torch.no_grad():
        louder(model.get_parameter("head.fc.weight"))
    return model
