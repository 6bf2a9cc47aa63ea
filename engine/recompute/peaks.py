"""The most that a rank holds, from what its layers cost and the order in which it runs them.

This is arithmetic alone: `engine.plan` finds the costs of a configuration, the solver tries assignments of save sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from engine.recompute.costs import LayerCost
from parallel.pipeline.actions import Action, ActionKind

F, B, R = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.RECOMPUTE
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT
SEND_FORWARD, SEND_BACKWARD = ActionKind.SEND_FORWARD, ActionKind.SEND_BACKWARD


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Of one stage, for one micro-batch.

    Attributes:
        layers: in order, each with its save set. ahead: the same, for micro-batches that an R recomputes: what is kept
            from there on, and `forward` is the most while it runs; none where there is no R.
        output, input_gradient: bytes of what goes to the stage behind, and of what goes back to the one before.
    """

    layers: tuple[LayerCost, ...]
    ahead: tuple[LayerCost, ...] = ()
    output: int = 0
    input_gradient: int = 0

    @cached_property
    def kept(self) -> int:
        """From forward to backward."""
        return sum(layer.kept for layer in self.layers)

    @cached_property
    def deferred(self) -> int:
        """From BACKWARD_INPUT to BACKWARD_WEIGHT."""
        return sum(layer.deferred for layer in self.layers)

    @cached_property
    def most(self) -> dict[ActionKind, int]:
        """While an action of the stage runs, all that it holds of its micro-batch."""
        before = [0, *accumulate(layer.kept for layer in self.layers)]
        put_off = [0, *accumulate(layer.deferred for layer in self.layers)]
        most, last = dict.fromkeys((F, B, I, W), 0), len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            backward = before[i] + layer.backward + (self.layers[-1].held if i < last else 0)
            most[F] = max(most[F], before[i] + layer.forward)
            most[B] = max(most[B], backward)
            most[I] = max(most[I], backward + self.deferred - put_off[i + 1])
            most[W] = max(most[W], put_off[i + 1] + layer.weight)
        return most | {R: self._most_again}

    @property
    def _most_again(self) -> int:
        """While an R runs, layer by layer from the first."""
        others, most = self.kept, 0
        for layer, again in zip(self.layers, self.ahead, strict=False):
            most = max(most, others - layer.kept + again.forward)
            others += again.kept - layer.kept
        return most

    @cached_property
    def recomputed(self) -> StageCost:
        """Of a micro-batch that an R has recomputed."""
        return replace(self, layers=self.ahead, ahead=())


def peak(program: Sequence[Action], stages: Mapping[int, StageCost], static: int = 0) -> int:
    """The most bytes that are alive on a rank at any action of its program.

    Args:
        program: the rank's actions; what is sent is held until its send, if that is among them.
        stages: those of the rank, by number. static: bytes that are there all the time.
    """
    held, most = _Held(program, stages), 0
    for action in program:
        if action.kind.is_send:
            held.let_go(action.kind, action.stage, action.micro_batch)
        elif action.kind.is_compute:
            others = held.begin(action)
            most = max(most, others + held.cost(action).most[action.kind])
            held.end(action)
    return static + most


class _Held:
    """What a rank holds between two actions: of micro-batches, and on its way from one stage to another."""

    def __init__(self, program: Sequence[Action], stages: Mapping[int, StageCost]) -> None:
        self._stages = stages
        self._sends = {(a.kind, a.stage, a.micro_batch) for a in program if a.kind.is_send}
        self._sizes = dict[object, int]()
        self._again = set[tuple[int, int | None]]()  # recomputed already
        self._now = 0

    def cost(self, action: Action) -> StageCost:
        """Of its stage, for its micro-batch."""
        of = self._stages[action.stage]
        return of.recomputed if (action.stage, action.micro_batch) in self._again else of

    def let_go(self, *what: object) -> None:
        """Of what is held, if it is."""
        self._now -= self._sizes.pop(what, 0)

    def _hold(self, *what: object, size: int) -> None:
        self.let_go(*what)
        self._sizes[what] = size
        self._now += size

    def begin(self, action: Action) -> int:
        """What is held beside an action that begins: what it reads is its own from now on."""
        self.let_go("kept", action.stage, action.micro_batch)
        if action.kind in (F, B, I):
            self.let_go("input" if action.kind is F else "gradient", action.stage, action.micro_batch)
        return self._now

    def end(self, action: Action) -> None:
        """What it leaves behind."""
        kind, stage, m = action.kind, action.stage, action.micro_batch
        if kind is R:
            self._again.add((stage, m))
        of = self.cost(action)
        self._hold("kept", stage, m, size={F: of.kept, R: of.kept, I: of.deferred}.get(kind, 0))
        if kind is F:
            self._give("input", stage + 1, SEND_FORWARD, action, of.output)
        elif kind in (B, I):
            self._give("gradient", stage - 1, SEND_BACKWARD, action, of.input_gradient)

    def _give(self, what: str, to: int, send: ActionKind, action: Action, size: int) -> None:
        """To a stage of this rank, or to be sent."""
        if to in self._stages:
            self._hold(what, to, action.micro_batch, size=size)
        elif (send, action.stage, action.micro_batch) in self._sends:
            self._hold(send, action.stage, action.micro_batch, size=size)
