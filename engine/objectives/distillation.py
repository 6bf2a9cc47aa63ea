"""A student that learns what its teachers make of an image, beside its label.

The teachers' layers are in the student's list (model.teachers), frozen; what the last layer gives are the student's
logits, then theirs, the last teacher's first; behind them, in the same tensor, pooled features, where these are
compared. What a teacher has made of the images before is read from the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import Batch
from engine.config import Config
from engine.config.distillation import DistillationConfig
from engine.config.stored import stored_of
from engine.config.teachers import matching_of, taught_by
from engine.objectives.answers import Answer, response, stored_answer, top
from engine.objectives.base import AdditiveObjective, Outputs
from engine.objectives.supervised import Supervised
from engine.teacher_outputs.meta import Part
from engine.teacher_outputs.shards import StoredOutputs
from model import EMBEDDINGS, FEATURES, MATCH, RELATIONS, LayerSpec, MicroBatch, build_student
from parallel.grid import Grid
from parallel.layout import split_range


@dataclass(frozen=True, kw_only=True)
class Distillation(AdditiveObjective):
    """The loss of the labels and that of the teachers' responses, each with its weight.

    Attributes:
        config: the keys of the objective. labels: the ordinary loss. layers: of student and teachers.
        outputs: of each teacher, those that are read from the disk; None: his layers are among ours; empty: nothing is
            asked of any. classified: whether any is asked in evaluation, too, since all tell the student's classes.
        targets: as of Objective.
    """

    counted = ("loss", "right", "teacher_right", "images")

    config: DistillationConfig
    labels: Supervised
    layers: tuple[LayerSpec, ...]
    outputs: tuple[StoredOutputs | None, ...]
    classified: bool
    targets: tuple[str, ...]
    at_depth = (FEATURES, *RELATIONS, EMBEDDINGS)

    @classmethod
    def of(cls, config: Config) -> Self:
        """As Objective."""
        teachers = taught_by(config)
        layers = tuple(build_student(config.model, teachers, matching_of(config, teachers)))
        keys = config.distillation
        return cls(
            config=keys, labels=Supervised.of(config), layers=layers, targets=tuple(keys.weights),
            outputs=stored_of(config) if keys.asks_teachers else (),
            classified=keys.asks_teachers and not any(of.tower is not None and of.tower.rests for of in layers),
        )  # fmt: skip

    def stored(self, batch: Batch, *, training: bool) -> tuple[Mapping[str, Tensor], ...]:
        """As Objective."""
        part: Part = "training" if training else "held_out"

        def numbers(by: Literal["draw", "image"]) -> NDArray[np.int64]:
            found = batch.indices if training and by == "image" else batch.sample_ids
            assert found is not None
            return found.numpy()

        return tuple(of.read(part, numbers(of.meta.key)) for of in self.outputs if of is not None)

    def loss_share(self, outputs: Outputs, batch: MicroBatch, grid: Grid, scale: float) -> Tensor:
        """As Objective; in equal parts on the context ranks, which all compute it."""
        found = self.losses(outputs, batch, grid)
        share = scale / (self.labels.global_batch_size * grid.context.size)
        if batch.shares is not None:
            for name, losses in found.items():
                batch.shares.note(name, losses.sum() * (share / grid.tensor.size))
        return self._whole(found, outputs).sum() * share

    def counts(self, outputs: Outputs, batch: MicroBatch, grid: Grid) -> Tensor:
        """As AdditiveObjective; of several teachers the right ones, by their shares."""
        own, *theirs = self._logits(outputs, grid)
        classes, taught = self.labels.classes, torch.zeros((), dtype=torch.float64, device=own.device)
        if self.classified:
            for share, answer in zip(self.config.shares, self._answers(theirs, batch, grid), strict=True):
                taught += share * ((top(answer, classes, grid.tensor) == batch.labels) * batch.weights).sum().double()
        loss = self._whole(self.losses(outputs, batch, grid), outputs).sum().double()
        right = self.labels.right(own, batch, grid).double()
        return torch.stack([loss, right, taught, batch.weights.sum().double()])

    def figures(self, totals: Sequence[float]) -> dict[str, float]:
        """As AdditiveObjective: the mean loss, and how often the student is right, and teachers who know classes."""
        loss, right, taught, images = totals
        accuracy = {"accuracy": right / images} | ({"teacher_accuracy": taught / images} if self.classified else {})
        return {"loss": loss / images, **accuracy, "images": int(images)}

    def describe(self) -> str:
        """As Objective."""
        keys = self.config
        softened = "" if keys.response == "hard" else f" at temperature {keys.temperature:g}"
        how = {"response": f" ({keys.response}{softened})", FEATURES: f" ({keys.features})"}
        scaled = f"; on one scale: {', '.join(keys.standardise)}" if keys.standardise else ""
        what = ", ".join(f"{name}{how.get(name, '')} x {weight:g}" for name, weight in keys.weights.items())
        if pairs := sum(layer.kind == MATCH for layer in self.layers):
            what += f"; {pairs} pair{'s' * (pairs > 1)} of layers"
        what += scaled
        if not self.outputs:
            return f"distillation: {what}; of {keys.all_teachers[0].path} weights alone, from which the student starts"
        rows = ("" if of is None else f" ({of.meta.rows} {of.meta.key}s, stored)" for of in self.outputs)
        each = zip(keys.all_teachers, rows, keys.shares, strict=True)
        paths = ", ".join(f"{of.path}{how} x {share:.3g}" for of, how, share in each)
        return f"distillation: {what}; taught by {paths}"

    def pooled(self, outputs: Outputs, grid: Grid) -> Outputs:
        """What stands beside the logits: [B, D], and of each teacher [B, E]."""
        heads = [layer for layer in self.layers if layer.kind == "head"][::-1]  # whose outputs are handed on so
        widths = [of.output[1] - (of.tower.config.sizes.classes if of.tower else self.labels.classes) for of in heads]
        return tuple([x[:, x.shape[1] - width :] for x, width in zip(outputs, widths, strict=True)])

    def _logits(self, outputs: Outputs, grid: Grid) -> Outputs:
        """Without what stands beside them: [B, C/T] each."""
        held = self._held(grid)
        return tuple([x if x.shape[1] == held else x[:, :held] for x in outputs])

    def _held(self, grid: Grid) -> int:
        """How many classes this tensor rank has logits of."""
        start, stop = split_range(self.labels.classes, grid.tensor.size, grid.tensor.index)
        return stop - start

    def losses(self, outputs: Outputs, batch: MicroBatch, grid: Grid) -> dict[str, Tensor]:
        """By target, with its weight, the loss of each image: [B]; 0 for padding, of labels where none is known."""
        own, *theirs = self._logits(outputs, grid)
        keys, found = self.config, dict[str, Tensor]()
        if keys.response_weight:
            classes = self.labels.classes
            each = [
                share * response(own, answer, keys, classes, grid.tensor)
                for share, answer in zip(keys.shares, self._answers(theirs, batch, grid), strict=True)
            ]
            found["response"] = keys.response_weight * torch.stack(each).sum(0) * batch.weights
        if keys.label_weight:
            known = batch.labels >= 0
            found["labels"] = keys.label_weight * self.labels.losses((own,), batch, grid) * known
        return found

    def _answers(self, theirs: Sequence[Tensor], batch: MicroBatch, grid: Grid) -> list[Answer]:
        """What each teacher says of a micro-batch. Args: theirs: logits of those in our list, the last first."""
        computed, read, answers = iter(theirs[::-1]), iter(batch.teachers), list[Answer]()
        for of in self.outputs:
            if of is None:
                answers.append(next(computed))
                continue
            if len(theirs) == len(self.outputs):
                next(computed)  # of a head that has features alone
            answers.append(stored_answer(next(read, of.blank(batch.labels)), of.meta, grid.tensor))
        return answers

    def _whole(self, losses: Mapping[str, Tensor], outputs: Outputs) -> Tensor:
        """Of the last layer's targets together, [B]; where all are at depth nothing, but to be differentiated."""
        return torch.stack([*losses.values()] or [0 * outputs[0].sum(1, dtype=torch.float32)]).sum(0)
