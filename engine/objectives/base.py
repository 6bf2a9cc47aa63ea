"""The seam between goals of training and the engine: step, loop, plan and report know a goal by this alone.

Two kinds of goals. Of an *additive* one each micro-batch has a share of the loss, and is differentiated by itself. The
loss of a *joint* one is a function of what the last layer gives for all micro-batches of all data ranks at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from data import Batch
from engine.config import Config
from model import LayerSpec, MicroBatch
from parallel import comm
from parallel.contrastive import KeyQueue
from parallel.grid import Grid

Outputs = tuple[Tensor, ...]


class Evaluation(ABC):
    """One look at the held-out set: what is noted of each micro-batch, and what that says in the end."""

    @abstractmethod
    def look(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """What is to be noted of a micro-batch, on ranks that hold the last layer."""

    @abstractmethod
    def add(self, found: Sequence[Tensor]) -> None:
        """What `look` gave for some micro-batches, on ranks that hold the last layer; elsewhere nothing."""

    @abstractmethod
    def figures(self, *, holds_loss: bool) -> dict[str, float]:
        """What all of it says, by the names that metrics give it: `loss`, `images` (each counted once), and what else
        there is. The same on every rank. Collective over the world.

        Args:
            holds_loss: whether this rank has the last layer.
        """


class Objective(ABC):
    """What a run trains towards. Has no state: what is trained is in the layers.

    Attributes:
        layers: the ordered list of named layers of all that is trained, which the pipeline cuts.
        passes: over the pipeline that a step takes, those that make keys apart. momentum: decay of a moving average of
            the weights, which makes keys that the last layer's outputs are compared with; None: there are none.
        targets: names of the parts of the loss that are told one by one. at_depth: those of them that arise within the
            layers, and are not in `loss_share`.
    """

    layers: tuple[LayerSpec, ...]
    passes: int = 1
    momentum: float | None = None
    targets: tuple[str, ...] = ()
    at_depth: tuple[str, ...] = ()

    @property
    def forward_passes(self) -> int:
        """How many passes without backwards a step takes before the one that has them."""
        return self.passes - 1 + (self.momentum is not None)

    @classmethod
    @abstractmethod
    def of(cls, config: Config) -> Self:
        """That of a resolved configuration."""

    def reads_images(self, layers: range) -> bool:
        """Whether a stage of these layers (places in the list) reads the images of a micro-batch."""
        return any("images" in self.layers[place].reads for place in layers)

    def reads_outputs(self, layers: range) -> bool:
        """Whether a stage of these layers reads stored outputs of teachers."""
        return any("outputs" in self.layers[place].reads for place in layers)

    def reads_texts(self, layers: range) -> bool:
        """Whether a stage of these layers reads the texts of a micro-batch."""
        return any("texts" in self.layers[place].reads for place in layers)

    @abstractmethod
    def loss_share(self, outputs: Outputs, batch: MicroBatch, grid: Grid, scale: float) -> Tensor:
        """A micro-batch's share of the loss of the global batch, times `scale`; the last layer's outputs -> a scalar.

        Shares are added up over micro-batches, data and context ranks. Tensor ranks have the same one each.
        """

    @abstractmethod
    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        """A new look at the held-out set."""

    def key_queue(self, grid: Grid, seed: int, device: torch.device) -> KeyQueue | None:
        """A new queue of keys of earlier steps, on a rank that has the last layer, if there is to be one."""
        return None

    def stored(self, batch: Batch, *, training: bool) -> tuple[Mapping[str, Tensor], ...]:
        """What the loss reads from the disk of these images: `teachers` of a MicroBatch, on the host."""
        return ()

    def describe(self) -> str | None:
        """A line for the start-up report, where there is more to tell than the model and the batch."""
        return None

    def bytes_held(self, samples: int) -> int:
        """What a rank that has the last layer holds between forward and backward of a step, beside activations.

        Args:
            samples: of a step, on a data rank.
        """
        return 0


class AdditiveObjective(Objective):
    """A loss that is added up over images.

    Attributes:
        counted: what evaluation adds up, by name.
    """

    counted: ClassVar[tuple[str, ...]]

    @abstractmethod
    def counts(self, outputs: Outputs, batch: MicroBatch, grid: Grid) -> Tensor:
        """A micro-batch's part of each of `counted`: float64, alike on tensor and context ranks."""

    @abstractmethod
    def figures(self, totals: Sequence[float]) -> dict[str, float]:
        """What the sums over the held-out set say, by name, as of Evaluation."""

    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        """As Objective."""
        return _Sums(self, grid, device)


class _Sums(Evaluation):
    """Of an additive objective."""

    def __init__(self, objective: AdditiveObjective, grid: Grid, device: torch.device) -> None:
        self._objective, self._grid = objective, grid
        self._totals = torch.zeros(len(objective.counted), dtype=torch.float64, device=device)

    def look(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """As Evaluation."""
        return self._objective.counts(outputs, batch, self._grid)

    def add(self, found: Sequence[Tensor]) -> None:
        """As Evaluation."""
        for counts in found:
            self._totals += counts

    def figures(self, *, holds_loss: bool) -> dict[str, float]:
        """As Evaluation."""
        if not holds_loss or self._grid.tensor.index or self._grid.context.index:
            self._totals.zero_()
        return self._objective.figures(comm.all_reduce(self._totals, self._grid.world).tolist())


@dataclass(frozen=True)
class JointLoss:
    """The loss of all that the last layer has given in a step, and its gradients.

    Attributes:
        loss: this data rank's share of it, fp32 scalar: shares add up over data ranks.
        gradients: of each micro-batch's outputs, as many as there are; sums over data ranks are the gradients of what
            these ranks hold copies of. parts: of the loss, by the names of targets, where these are told.
    """

    loss: Tensor
    gradients: Sequence[Outputs]
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Keys(NamedTuple):
    """What outputs are compared with. Attributes: outputs: of each micro-batch, by the average of the weights,
    detached. queue: of earlier steps.
    """

    outputs: Sequence[Outputs]
    queue: KeyQueue | None

    def in_order(self) -> Tensor:
        """Of all views: both of the first sample, then of the next, whatever micro-batches they are in: [2n, E]."""
        sides = [torch.cat([made[side] for made in self.outputs]) for side in (0, 1)]
        return torch.stack(sides, 1).flatten(0, 1)


class JointObjective(Objective):
    """A loss over all micro-batches and data ranks at once.

    Attributes:
        passes: over the pipeline that a step takes: 2, a forward one for what the last layer gives, then one with the
            gradients of that; or 1, whose schedule runs all forwards of the last stage first.
    """

    passes: int

    @abstractmethod
    def joint_loss(
        self, outputs: Sequence[Outputs], batches: Sequence[MicroBatch], grid: Grid, keys: Keys | None = None
    ) -> JointLoss:
        """Of this data rank's micro-batches, together with those of the others. Collective over data ranks; alike on
        tensor and context ranks.

        Args:
            outputs: of the last layer, detached. batches: without images. keys: what there are, where the weights'
                average makes any.
        """

    def loss_share(self, outputs: Outputs, batch: MicroBatch, grid: Grid, scale: float) -> Tensor:
        """As Objective, for those who plan: something to differentiate that takes no time, and hands out gradients of
        the outputs' shapes."""
        forms = [(x.shape, x.dtype, x.device) for x in outputs]
        return inject(lambda: tuple(torch.zeros(s, dtype=d, device=at) for s, d, at in forms), outputs)


class _Inject(torch.autograd.Function):
    """A zero whose gradients with respect to some tensors are given."""

    @staticmethod
    def forward(ctx: Any, gradients: Any, *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.gradients()


def inject(gradients: Any, outputs: Outputs) -> Tensor:
    """A scalar, 0, to be differentiated: its backward gives `outputs` the gradients that `gradients()` returns then.

    It keeps nothing of the outputs.
    """
    zero: Tensor = _Inject.apply(gradients, *outputs)
    return zero
