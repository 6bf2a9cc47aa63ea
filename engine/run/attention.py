"""Attention of held-out images while a model trains: maps to look at, and what tells early that it grows unstable.

Every `log.attention_interval` steps and after the last: `run_dir/attention/step-00000100.png`, the same picture in
TensorBoard, the arrays beside it as `.npz`, and an `attention` line of metrics.jsonl (docs/seeing.md).
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data import Dataset, chosen_batches, pixels_of, spread
from engine.assembly import Assembly
from engine.config import Config
from engine.device import synchronise
from engine.errors import ConfigError
from engine.run.metrics import MetricsWriter, fitting
from engine.run.run_dir import ATTENTION
from engine.seeing.sheet import sheet
from engine.seeing.watch import Watch
from model.seeing.summary import Summary
from model.towers import IMAGE, TEXT


def check_attention(config: Config, eval_set: Dataset) -> None:
    """Raise ConfigError where there are not as many held-out images as are to be looked at."""
    log = config.log
    if log.attention_interval and log.attention_images > len(eval_set):
        raise ConfigError(
            f"log.attention_images is {log.attention_images}, but there are {len(eval_set)} held-out images: set it to "
            f"at most {len(eval_set)}, or log.attention_interval to 0"
        )


class AttentionLog:
    """Looks at the same images, at even distances in the held-out set, whenever it is due. Collective, as is making it.

    Args:
        folder: of the run. writer: on the first rank alone.
    """

    def __init__(self, assembly: Assembly, eval_set: Dataset, folder: Path, writer: MetricsWriter | None) -> None:
        config, grid = assembly.config, assembly.grid
        assert config.train.micro_batch_size is not None
        self._every, self._device = config.log.attention_interval, assembly.device
        self._patch = config.model.sizes.patch
        self._folder, self._writer = folder / ATTENTION, writer
        chosen = spread(config.log.attention_images, len(eval_set))
        batches = chosen_batches(
            eval_set,
            chosen,
            config=config.data,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=grid.data.index,
            data_size=grid.data.size,
            with_images=assembly.holds_images,
            with_texts=assembly.holds_texts,
        )
        self._watch = Watch(assembly, batches, len(chosen))
        self._pixels = None if writer is None else pixels_of(eval_set, chosen, config.data)

    def is_due(self, step: int) -> bool:
        """After how many steps of training, but the last one."""
        return step % self._every == 0

    def look(self, step: int) -> None:
        """Write what the model attends to now. Collective."""
        synchronise(self._device)
        began = time.perf_counter()
        found = self._watch()
        if found is None or self._writer is None or self._pixels is None:
            return
        maps = {_title(name): of.maps.mean(1) for name, of in found.items() if not _text(name)}
        picture = sheet(self._pixels, maps, self._patch)
        self._store(f"step-{step:08d}", picture, found)
        entropies = {name: float(of.entropy.mean()) for name, of in found.items()}
        tops = {name: float(of.top.max()) for name, of in found.items() if of.top is not None}
        values = {f"entropy.{name}": value for name, value in entropies.items()}
        values |= {f"max_logit.{name}": value for name, value in tops.items()}
        self._writer.write("attention", step, values | {"attention_time": time.perf_counter() - began})
        self._writer.picture("attention/maps", step, picture)
        self._writer.say(_line(step, entropies, tops))

    def _store(self, name: str, picture: bytes, found: Mapping[str, Summary]) -> None:
        """The picture and the arrays; of a disk that refuses one line tells, and training goes on."""
        assert self._writer is not None and self._pixels is not None
        arrays: dict[str, Tensor] = {"images": self._pixels}
        for layer, of in found.items():
            arrays |= {f"{layer}.maps": of.maps, f"{layer}.entropy": of.entropy}
            arrays |= {} if of.top is None else {f"{layer}.max_logit": of.top}
        packed = io.BytesIO()
        plain: dict[str, Any] = {key: x.numpy() for key, x in arrays.items()}
        np.savez(packed, **plain)
        for ending, data in (("png", picture), ("npz", packed.getvalue())):
            path = self._folder / f"{name}.{ending}"
            unfinished = path.with_suffix(f".{ending}.part")
            try:
                self._folder.mkdir(exist_ok=True)
                unfinished.write_bytes(data)
                unfinished.rename(path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    unfinished.unlink()  # what there was room for
                self._writer.say(f"warning: {path} cannot be written: {error.strerror}; training goes on without it")


def _line(step: int, entropies: Mapping[str, float], tops: Mapping[str, float]) -> str:
    """For the console: the extremes, and where they are."""
    least = min(entropies, key=lambda name: entropies[name])
    parts = {"step": f"attention at step {step}", "entropy": f"least entropy {entropies[least]:.3g} ({least})"}
    if tops:
        most = max(tops, key=lambda name: tops[name])
        parts["logit"] = f"largest logit {tops[most]:.4g} ({most})"
    return fitting(parts, ("clock",))


def _text(name: str) -> bool:
    return name.startswith(f"{TEXT}.")


def _title(name: str) -> str:
    return name.removeprefix(f"{IMAGE}.")
