"""Images and their texts, or two views of each image: what belongs together is to be alike, and all else not.

The loss is over all pairs of a step, whichever micro-batch and data rank they are on (parallel.contrastive).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.config import Config
from engine.config.contrastive import ContrastiveConfig
from engine.config.objectives import towers
from engine.config.tower_teachers import tower_teacher_of
from engine.objectives.alike import Alike
from engine.objectives.base import Evaluation, JointLoss, JointObjective, Keys, Outputs
from engine.objectives.local_crops import by_micro_batch, by_view, with_local_crops
from model import EMBEDDINGS, LayerSpec, MicroBatch
from parallel import comm
from parallel.comm import Axis
from parallel.contrastive import (
    Gradients,
    KeyQueue,
    affinity,
    info_nce,
    nt_xent,
    queued,
    sigmoid,
    supervised,
    supervised_views,
)
from parallel.contrastive import momentum as against_keys
from parallel.contrastive.tiles import ROWS, working_bytes
from parallel.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Contrastive(JointObjective):
    """The loss of `contrastive.loss`.

    Attributes:
        config: the keys of the objective. layers: of both towers, and of a teacher. passes, targets, at_depth: as of
            JointObjective. local_crops: of each sample, beside its two views.
    """

    config: ContrastiveConfig
    local_crops: int = 0
    layers: tuple[LayerSpec, ...]
    passes: int
    momentum: float | None
    targets: tuple[str, ...]
    at_depth = (EMBEDDINGS,)

    @classmethod
    def of(cls, config: Config) -> Self:
        """As Objective."""
        keys = config.contrastive
        teacher, asked = tower_teacher_of(config), _asked(keys)
        return cls(
            config=keys, momentum=keys.momentum, local_crops=(crops := config.data.local_crops),
            layers=tuple(towers(config.model, config.text, keys, teacher, local_crops=crops)),
            passes=1 if keys.passes == 1 else 2, targets=("pairs", *asked) if asked else (),
        )  # fmt: skip

    def reads_texts(self, layers: range) -> bool:
        """As Objective: the last layer's stage does, too, since equal texts are partners in evaluation."""
        return super().reads_texts(layers) or (self.config.has_texts and len(self.layers) - 1 in layers)

    def joint_loss(
        self, outputs: Sequence[Outputs], batches: Sequence[MicroBatch], grid: Grid, keys: Keys | None = None
    ) -> JointLoss:
        """As JointObjective."""
        lefts, rights, (scale, *_), (bias, *_), *more = zip(*outputs, strict=True)
        left, right, counts = torch.cat(lefts), torch.cat(rights), [len(left) for left in lefts]
        others: Sequence[Outputs] = [tuple(torch.zeros_like(x) for x in given[4:]) for given in outputs]
        if keys is None:
            labels = torch.cat([self._kin(batch)[: len(side)] for batch, side in zip(batches, lefts, strict=True)])
            found = self.pair_loss(left, right, scale, bias, labels, grid.data)
        else:
            first, second = (torch.cat([made[side] for made in keys.outputs]) for side in (0, 1))
            ways = [self._of_keys(*pair, keys.queue, scale, grid.data) for pair in ((left, second), (right, first))]
            found = both(*ways)
        parts = dict[str, Tensor]()
        if self.local_crops:
            sides = (left, right) if keys is None else (first, second)
            found, crops = with_local_crops(
                found, by_view(more[0], self.local_crops),
                lambda crop, side: self._search(crop, sides[side], keys, scale, grid.data),
            )  # fmt: skip
            others = [(grads,) for grads in by_micro_batch(crops, counts)]
        elif more:
            parts = {"pairs": found.loss}
        if "affinity" in self.targets:
            asked = self._affinity(left, right, scale, torch.cat(more[0]), grid.data)
            parts, found = parts | {"affinity": asked.loss}, together(found, asked)
        assert found.left is not None and found.right is not None
        # Of the scale the same on all data ranks, not each its own share: at its bound the sign decides (model.pair).
        of_scale = comm.all_reduce(found.scale.clone(), grid.data) / grid.data.size
        nothing = torch.zeros_like(scale)
        of_bias = nothing if found.bias is None else found.bias
        each = zip(found.left.split(counts), found.right.split(counts), others, strict=True)
        gradients = [
            (left, right, *((of_scale, of_bias) if m == 0 else (nothing, nothing)), *own)
            for m, (left, right, own) in enumerate(each)
        ]
        return JointLoss(found.loss, gradients, parts)

    def _affinity(self, left: Tensor, right: Tensor, scale: Tensor, taught: Tensor, axis: Axis) -> Gradients:
        """What a teacher asks of the pairs, whose embeddings are beside each other, with its weight."""
        one, other = taught.chunk(2, dim=1)
        found, weight = affinity(left, right, scale, (one, other), axis), self.config.affinity_weight
        assert found.left is not None and found.right is not None
        return Gradients(
            loss=found.loss * weight, left=found.left * weight, right=found.right * weight, scale=found.scale * weight
        )

    def _kin(self, batch: MicroBatch) -> Tensor:
        """What true partners have the same of, where there may be several."""
        if self.config.positives != "image":
            return batch.labels
        assert batch.indices is not None
        return batch.indices

    def _of_keys(self, queries: Tensor, own: Tensor, queue: KeyQueue | None, scale: Tensor, axis: Axis) -> Gradients:
        """Each query's own key among those of the batch, or among it and those of the queue."""
        if queue is None:
            return against_keys(queries, own, scale, axis)
        return queued(queries, own, queue.keys, scale, axis)

    def _search(self, crops: Tensor, side: Tensor, keys: Keys | None, scale: Tensor, axis: Axis) -> Gradients:
        """Local crops that look for their images' global views, or the keys of these."""
        if keys is None:
            return info_nce(crops, side, scale, axis, symmetric=False)
        return self._of_keys(crops, side, keys.queue, scale, axis)

    def key_queue(self, grid: Grid, seed: int, device: torch.device) -> KeyQueue | None:
        """As Objective."""
        keys = self.config
        return KeyQueue(keys.queue, keys.embedding, seed, grid.data, device) if keys.queue else None

    def pair_loss(
        self, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, labels: Tensor, axis: Axis
    ) -> Gradients:
        """The loss of the pairs of all ranks of an axis, and its gradients. Collective.

        Args:
            left, right: embeddings of length 1, [n, E]. scale, bias: [], of logits. labels: of the pairs, the same of
                true partners where there may be several, int64 [n].
        """
        views = not self.config.has_texts
        match self.config.loss:
            case "infonce":
                return nt_xent(left, right, scale, axis) if views else info_nce(left, right, scale, axis)
            case "sigmoid":
                return sigmoid(left, right, scale, bias, axis)
            case "supcon":
                loss = supervised_views if views else supervised
                return loss(left, right, labels, scale, axis)

    def describe(self) -> str:
        """As Objective."""
        keys = self.config
        what = "images and texts" if keys.has_texts else "two views of each image"
        what += f" and {self.local_crops} local crops against these" if self.local_crops else ""
        learned = "trained" if keys.learn_temperature else "fixed"
        bound = f", of an inverse of at most {keys.max_logit_scale:g}" if keys.max_logit_scale else ""
        bias = "" if keys.bias is None else f", bias from {keys.bias:g}"
        how = "two passes, forwards twice" if self.passes == 2 else "one pass, all forwards first"
        each = ", ".join(f"{name} x {weight:g}" for name, weight in _asked(keys).items())
        taught = f"; {each}, taught by {keys.teacher}" if each else ""
        return (
            f"contrastive: {keys.loss} of {what} in {keys.embedding} features, over the whole batch, true partners by "
            f"{keys.positives}; temperature {keys.temperature:g} {learned}{bound}{bias}{taught}; {how}"
        )

    def bytes_held(self, samples: int) -> int:
        """As Objective: embeddings of both sides as micro-batches have given them and side by side (of views once
        more, all in one), their gradients, and what the loss works in, as on several data ranks."""
        width, views = self.config.embedding, not self.config.has_texts
        tiles = 3 * 4 * ROWS**2 if self.config.loss == "supcon" else 0
        held = ((8 if views else 6) + 6 * self.local_crops + 4 * bool(self.local_crops)) * samples * 4 * width
        if self.targets:  # the teacher's rows and zeros in the place of their gradients, the two models' side by side
            theirs = next(of.output[1] for of in self.layers if of.kind == "pair" and of.is_frozen)
            held += 4 * samples * (3 * theirs + 2 * width + 36) + 7 * 4 * ROWS**2
        return held + tiles + working_bytes(2 * samples if views else samples, width, 2)

    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        """As Objective."""
        sides = ("image", "text") if self.config.has_texts else ("view_1", "view_2")
        return Alike(self.pair_loss, grid, device, by_label=self.config.positives == "label", sides=sides)


def _asked(keys: ContrastiveConfig) -> dict[str, float]:
    """Of what is to be as a teacher has it, if there is one, the weights, by target."""
    weights = {"affinity": keys.affinity_weight, EMBEDDINGS: keys.embeddings_weight}
    return {name: weight for name, weight in weights.items() if weight and keys.teacher is not None}


def together(one: Gradients, other: Gradients) -> Gradients:
    """The sum of two losses of the same pairs, of which the second has no bias."""
    assert one.left is not None and one.right is not None and other.left is not None and other.right is not None
    return Gradients(
        loss=one.loss + other.loss, left=one.left + other.left, right=one.right + other.right,
        scale=one.scale + other.scale, bias=one.bias,
    )  # fmt: skip


def both(first: Gradients, second: Gradients) -> Gradients:
    """The mean of two losses, of the first views as queries and of the second ones."""
    assert first.left is not None and second.left is not None
    return Gradients(
        loss=(first.loss + second.loss) / 2,
        left=first.left / 2,
        right=second.left / 2,
        scale=(first.scale + second.scale) / 2,
    )
