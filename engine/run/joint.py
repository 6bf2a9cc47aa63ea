"""A step whose loss is over all micro-batches and data ranks at once (an engine.objectives.JointObjective).

*Two passes* (the idea: Gao et al. 2021, "GradCache"): a forward one over all micro-batches, of which nothing is kept
but what the last layer gives; then the loss of all of that, once, with its gradients in closed form; then the ordinary
schedule, in which each micro-batch's forward is run again and its backward begins with its share of these gradients.
Weights, drop-path and number formats are those of the first pass, so the forwards are the same, bit for bit; what is
cast to 8 bits counts for later scales in the second pass alone. *One pass*: where the schedule runs all forwards of the
last stage before the first of its backwards, the loss comes in between, and no forward is run again. The numbers are
the same.

Where keys come from a moving average of the weights (momentum contrast), a pass by that comes first of all: the average
and the weights change places for it, and back.

Either way the loss is computed within the last stage's last forward, by all data ranks that are there, whatever other
stages do meanwhile: no stage waits for another's loss but those of its own pipeline, which wait for its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from torch import Tensor

from data import Batch
from engine.assembly import Assembly
from engine.objectives.base import JointLoss, JointObjective, Keys, Outputs, inject
from model import MicroBatch, Shares
from parallel.pipeline.execution import PipelineExecutor

MOST_HELD = 2**31
"""Bytes of a step's images and texts that a rank holds on the host for the second pass; the others are read again."""


Pass = Literal["keys", "outputs", "gradients"]
"""What a pass over the micro-batches is for."""
Fresh = Callable[[Pass], Sequence[MicroBatch]]


class LossWatcher(Protocol):
    """Who looks at what comes of the loss (engine.run.diagnose)."""

    def whole_loss(self, loss: Tensor, batches: int) -> None:
        """This data rank's share of the loss of so many micro-batches."""


class JointStep:
    """Runs the micro-batches of training steps.

    Args:
        assembly: whose objective is joint. train: runs its schedule.
    """

    def __init__(self, assembly: Assembly, objective: JointObjective, train: PipelineExecutor) -> None:
        self._assembly, self._objective, self._train = assembly, objective, train
        self._first: PipelineExecutor | None = None
        self._keys_made: Keys | None = None
        if objective.passes == 2 or assembly.keys is not None:
            self._first = assembly.forwards(train.schedule.num_micro_batches)

    @property
    def reads_twice(self) -> bool:
        """Whether each micro-batch is asked for twice."""
        return self._first is not None

    def _make_keys(self, found: _Found, fresh: Fresh) -> None:
        """A pass by the average of the weights."""
        a = self._assembly
        assert a.keys is not None and self._first is not None
        with a.keys.applied():
            if a.fp8 is not None:
                a.fp8.forget_weights()
            self._first.run(found.numbered(fresh("keys")), found.note_keys)
        if a.fp8 is not None:
            a.fp8.forget_weights()

    def run(
        self, fresh: Fresh, scale: float, watcher: LossWatcher | None = None, shares: Shares | None = None
    ) -> list[Tensor]:
        """Forward and backward of a step.

        Args:
            fresh: the step's micro-batches, from the first on. scale: of gradients, a factor. shares: where the parts
                of the loss are noted, if they are told.

        Returns:
            this rank's share of the loss, times `scale`, on ranks that hold the last layer; elsewhere nothing.
        """
        found = _Found(self._assembly, self._objective, scale, watcher, shares)
        if self._assembly.keys is not None:
            self._make_keys(found, fresh)
        if self._first is not None and self._objective.passes == 2:
            self._first.run(found.numbered(fresh("outputs")), found.note)
        self._train.run(found.numbered(fresh("gradients")), found.inject)
        self._keys_made = found.keys
        return found.losses

    def taken(self) -> None:
        """The step counts: its keys enter the queue. Collective over data ranks."""
        if self._assembly.queue is not None and self._keys_made is not None:
            self._assembly.queue.push(self._keys_made.in_order())
        self._keys_made = None


class _Found:
    """What the last layer has given in a step, and, once that is complete, what its gradients are."""

    def __init__(
        self, assembly: Assembly, objective: JointObjective, scale: float, watcher: LossWatcher | None,
        shares: Shares | None,
    ) -> None:  # fmt: skip
        self._grid, self._objective, self._watcher = assembly.grid, objective, watcher
        self._shares = shares
        self._queue = assembly.queue
        self._share = scale / assembly.grid.context.size  # all context ranks compute the same
        self._outputs: dict[int, Outputs] = {}
        self._batches: dict[int, MicroBatch] = {}
        self._gradients: dict[int, Outputs] = {}
        self._keys: dict[int, Outputs] = {}
        self.losses: list[Tensor] = []

    def numbered(self, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """The same, of which it is known which was fetched last: it is what the head is called with."""
        self._fetched = _Numbered(micro_batches)
        return self._fetched

    def note(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """The head of a pass: takes note of a micro-batch, and of the loss when it was the last."""
        self._note(self._fetched.number_of(batch), outputs, batch)
        return outputs[0].new_zeros(())

    @property
    def keys(self) -> Keys | None:
        """What queries are compared with, if with keys."""
        return Keys([self._keys[m] for m in sorted(self._keys)], self._queue) if self._keys else None

    def note_keys(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """The head of the pass that makes keys."""
        self._keys[self._fetched.number_of(batch)] = tuple([x.detach() for x in outputs])
        return outputs[0].new_zeros(())

    def inject(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """The head of the pass with backwards: hands each its gradients, once they are known."""
        m = self._fetched.number_of(batch)
        if not self.losses:
            self._note(m, outputs, batch)
        return inject(lambda: self._gradients.pop(m), outputs)

    def _note(self, m: int, outputs: Outputs, batch: MicroBatch) -> None:
        self._outputs[m] = tuple([x.detach() for x in outputs])
        self._batches[m] = replace(batch, images=None)
        if len(self._outputs) < len(self._fetched):
            return
        numbers = range(len(self._outputs))
        with self._grid.meter.where.during("loss of the whole batch"):
            joint = self._objective.joint_loss(
                [self._outputs[m] for m in numbers],
                [self._batches[m] for m in numbers],
                self._grid,
                self.keys,
            )
        self._outputs.clear()
        self._batches.clear()
        if self._watcher is not None:
            self._watcher.whole_loss(joint.loss, len(numbers))
        self._take(joint)

    def _take(self, joint: JointLoss) -> None:
        self.losses.append(joint.loss * self._share)
        if self._shares is not None:
            for name, part in joint.parts.items():
                self._shares.note(name, part * (self._share / self._grid.tensor.size))
        for m, gradients in enumerate(joint.gradients):
            self._gradients[m] = gradients if self._share == 1 else tuple([x * self._share for x in gradients])


class _Numbered(Sequence[MicroBatch]):
    """Micro-batches, and the number of that which was fetched last."""

    def __init__(self, inner: Sequence[MicroBatch]) -> None:
        self._inner = inner
        self._last: tuple[int, MicroBatch] | None = None

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, m: Any) -> Any:
        self._last = m, self._inner[m]
        return self._last[1]

    def number_of(self, batch: MicroBatch) -> int:
        """Of the one that was fetched last."""
        assert self._last is not None and self._last[1] is batch
        return self._last[0]


class Told(Sequence[MicroBatch]):
    """Micro-batches that are told what a pass is for."""

    def __init__(self, inner: Sequence[MicroBatch], of: Pass) -> None:
        self._inner, self._of = inner, of

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, m: Any) -> Any:
        return replace(self._inner[m], keys=self._of == "keys", differentiated=self._of == "gradients")


class HeldBatches(Sequence[Batch]):
    """A step's micro-batches, kept on the host as they come, up to a number of bytes: they are wanted twice."""

    def __init__(self, inner: Sequence[Batch], most: int = MOST_HELD) -> None:
        self._inner, self._room = inner, most
        self._held: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, m: Any) -> Any:
        if (held := self._held.get(m)) is not None:
            return held
        batch = self._inner[m]
        size = sum(x.nbytes for x in vars(batch).values() if isinstance(x, Tensor))
        if size <= self._room:
            self._room -= size
            batch = self._held[m] = replace(batch, **{name: _own(x) for name, x in vars(batch).items()})
        return batch


def _own(x: Any) -> Any:
    """In this process's own memory: what a worker shares is an open file, of which few may be kept."""
    return x.clone() if isinstance(x, Tensor) and x.is_shared() else x
