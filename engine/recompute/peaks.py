"""The most that a rank holds, from what its layers cost and the order in which it runs them.

This is arithmetic alone, and the only one: `engine.plan` finds the costs of a configuration, the solver
(`engine.recompute.solve`) tries assignments of save sets by the same moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from engine.recompute.costs import LayerCost
from engine.recompute.moments import B, F, I, Moment, R, W, moments
from engine.recompute.offload import LOADS_IN_FLIGHT
from parallel.pipeline.actions import Action, ActionKind


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
        held = [0, *accumulate(layer.held for layer in self.layers)]
        most = dict.fromkeys((F, B, I, W), 0)
        for i, layer in enumerate(self.layers):
            backward = before[i] + layer.backward + held[-1] - held[i + 1]
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
    at = moments(program, {number: (of.output, of.input_gradient) for number, of in stages.items()})
    flight = LOADS_IN_FLIGHT * max((layer.away for of in stages.values() for layer in of.layers), default=0)
    return static + flight + fullest([stages[number] for number in sorted(stages)], at)


def host_peak(program: Sequence[Action], stages: Mapping[int, StageCost]) -> int:
    """The most bytes that a rank has in host memory. Arguments as of `peak`."""
    sent = {stage: sum(layer.away for layer in of.layers) for stage, of in stages.items()}
    alone = {stage: StageCost(layers=(LayerCost(kept=n, forward=n, backward=n),)) for stage, n in sent.items()}
    return peak(program, alone)


def fullest(stages: Sequence[StageCost], at: Sequence[Moment]) -> int:
    """The most bytes alive at any of the moments of a rank with these stages, ascending."""
    of = [*stages, *(stage.recomputed for stage in stages)]
    return max((_alive(of, moment) for moment in at), default=0)


def _alive(of: Sequence[StageCost], at: Moment) -> int:
    kept = sum(n * stage.kept for n, stage in zip(at.live, of, strict=False))
    deferred = sum(n * stage.deferred for n, stage in zip(at.deferred, of, strict=False))
    return kept + deferred + at.held + of[at.stage].most[at.kind]
