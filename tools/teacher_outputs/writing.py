"""A teacher's outputs of the draws of a training stream, or of images, file by file, by ranks in any layout.

Legend: B images of a micro-batch, C classes, k classes kept, N rows of a file, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from data import Batch, Dataset, EvalStream, TrainStream
from engine.assembly import Assembly
from engine.errors import ConfigError
from engine.evaluation.extract import Extractor
from engine.run.sample_relay import sample_relay
from engine.teacher_outputs.meta import Meta, Part
from engine.teacher_outputs.shards import Rows
from model import LayerSpec, MicroBatch
from model.turns import number_of
from parallel import comm
from parallel.distillation import likeliest, tokens_of_all
from parallel.tensor import gather_features, gather_rows
from parallel.tensor.loss import own_classes


class Teaching:
    """Runs a teacher over images.

    Args:
        assembly: of his layers, with weights. sets: the data of the run, training and held out. seed: of the run.
    """

    def __init__(self, assembly: Assembly, meta: Meta, sets: tuple[Dataset, Dataset], seed: int) -> None:
        self._assembly, self._meta, self._seed = assembly, meta, seed
        self._sets: dict[Part, Dataset] = {"training": sets[0], "held_out": sets[1]}
        self._kept = meta.classes if meta.keeps_all else 2 * meta.kept + 1
        self._relay = sample_relay(assembly)
        each = [math.prod(shape) for shape in meta.blocks.values()]
        self._widths = [self._kept, meta.features, *each]
        self._extractor = Extractor(assembly, self._columns, sum(self._widths))
        named = {spec.name: spec for spec in assembly.layers}
        self._rides = [named[name] for name in assembly.layers[-1].rides]  # rows of blocks

    def rows(self, part: Part, span: range) -> Rows:
        """Rows of a part of the data, on every rank. Collective.

        Raises:
            ConfigError: on every rank, if one is not finite in the format that it is to be stored in.
        """
        what = f"{part} rows from {span.start} on"
        extracted = self._extractor.rows(self._batches(part, span), len(span), f"{what}, row")
        found = extracted.gather(np.arange(len(span))).numpy()
        rows, k = np.empty(len(span), self._meta.row), self._meta.kept
        with np.errstate(over="ignore"):
            _, features, *blocks = np.split(found, np.cumsum(self._widths)[:-1], axis=1)
            for name, values in zip(self._meta.blocks, blocks, strict=True):
                rows[name] = values.reshape(len(values), *self._meta.blocks[name])
            if self._meta.features:
                rows["features"] = features
            if self._meta.keeps_all:
                rows["logits"] = found[:, :k]
            else:
                rows["ids"], rows["logits"], rows["rest"] = found[:, :k], found[:, k : 2 * k], found[:, 2 * k]
        for name in (name for name in rows.dtype.names or () if name not in ("ids", "rest")):
            if not np.isfinite(rows[name]).all():
                raise ConfigError(f"{name} of {what} overflow in {self._meta.number_format}: use --number-format fp32")
        return rows

    def _batches(self, part: Part, span: range) -> Iterator[Batch]:
        """Of this data rank, in the order in which extraction deals micro-batches."""
        a, dataset = self._assembly, self._sets[part]
        micro, data = a.config.train.micro_batch_size, a.grid.data
        assert micro is not None
        if part == "held_out" or self._meta.key == "image":
            yield from EvalStream(
                dataset, config=a.config.data, micro_batch_size=micro, data_rank=data.index, data_size=data.size,
                with_images=a.holds_images, with_texts=False, span=span,
                leaves_out=True, relay=self._relay,
            )  # fmt: skip
            return
        stream = TrainStream(
            dataset, config=a.config.data, global_batch_size=micro * data.size, micro_batch_size=micro,
            data_rank=data.index, data_size=data.size, seed=self._seed, with_images=a.holds_images, with_texts=False,
            offset=span.start, relay=self._relay,
        )  # fmt: skip
        yield from islice(chain.from_iterable(stream.steps(0)), -(-len(span) // (micro * data.size)))

    def _columns(self, outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """Logits [B, C/T], features beside them, rows of blocks -> what is kept, side by side, fp32, alike on tensor
        and context ranks."""
        given, meta, axis = outputs[0].float(), self._meta, self._assembly.grid.tensor
        patches = {
            f"blocks.{number_of(spec)}": self._patches(spec, rows, batch.size)
            for spec, rows in zip(self._rides, outputs[1:], strict=True)
        }
        behind = [patches[name] for name in meta.blocks]
        logits, features = given.split([given.shape[1] - meta.features, meta.features], 1)
        if meta.keeps_all:
            whole = gather_features(logits.contiguous(), self._assembly.build.tp, meta.classes)
            return torch.cat([whole, features, *behind], 1)
        assert meta.temperature is not None
        kept = likeliest(logits, meta.kept, meta.classes, axis, meta.temperature)
        places, mine = own_classes(kept.ids, meta.classes, axis)
        exact = comm.all_reduce(torch.where(mine, logits.gather(1, places), 0), axis)
        rest = kept.rest + exact[:, 0] / meta.temperature - kept.values[:, 0]
        return torch.cat([kept.ids.float(), exact, rest[:, None], features, *behind], 1)

    def _patches(self, spec: LayerSpec, rows: Tensor, images: int) -> Tensor:
        """Of a block's rows on this rank: [B, P * D], fp32."""
        t = self._assembly.build.of(spec).tokens
        own = gather_rows(rows.float(), self._assembly.build.tp, images * t.count).unflatten(0, (images, t.count))
        return tokens_of_all(own[:, t.own_prefix :], replace(t, prefix=0).counts, t.context).flatten(1)
