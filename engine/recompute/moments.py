"""When a rank's memory can be fullest: what of other micro-batches is alive while an action of its program runs.

Bytes alive at an action are those that all micro-batches keep whose forward is over and whose backward is not, what a
split backward has deferred to a coming BACKWARD_WEIGHT, and what the action itself holds. The first two go by counts of
micro-batches alone, and of the actions of one kind and stage only those count at which no other has as many alive of
every stage: a *moment*. There are few, whatever the length of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.recompute.costs import LayerCost
from parallel.pipeline.actions import Action, ActionKind

F, B = ActionKind.FORWARD, ActionKind.BACKWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Actions of one kind and stage, where most is alive beside them.

    Attributes:
        live: by stage, ascending: micro-batches that keep activations, the action's own not among them. deferred: by
            stage: micro-batches whose BACKWARD_WEIGHT is to come, that of the action itself among them.
    """

    kind: ActionKind
    stage: int
    live: tuple[int, ...]
    deferred: tuple[int, ...]


def moments(program: Sequence[Action]) -> tuple[Moment, ...]:
    """Those of a rank's program; stages are numbered from 0 in the order of their numbers in the program.

    Raises:
        ValueError: it has no backward, or a RECOMPUTE.
    """
    computes = [a for a in program if a.kind.is_compute]
    stages = {stage: place for place, stage in enumerate(sorted({a.stage for a in computes}))}
    if not any(a.kind in (B, I) for a in computes) or any(a.kind is ActionKind.RECOMPUTE for a in computes):
        raise ValueError("save sets are chosen for a program with forwards and backwards and no RECOMPUTE: give that")
    live, deferred = [0] * len(stages), [0] * len(stages)
    found = dict[tuple[ActionKind, int], set[tuple[int, ...]]]()
    for action in computes:
        place = stages[action.stage]
        if action.kind in (B, I):
            live[place] -= 1
        found.setdefault((action.kind, place), set()).add((*live, *deferred))
        if action.kind is F:
            live[place] += 1
        elif action.kind is not B:
            deferred[place] += 1 if action.kind is I else -1
    return tuple(
        Moment(kind=kind, stage=stage, live=counts[: len(stages)], deferred=counts[len(stages) :])
        for (kind, stage), those in found.items()
        for counts in _greatest(those)
    )


def passes(program: Sequence[Action]) -> tuple[int, ...]:
    """How many backwards of micro-batches each stage of a program runs, by stage, ascending."""
    stages = sorted({a.stage for a in program if a.kind.is_compute})
    return tuple(sum(a.kind in (B, I) and a.stage == stage for a in program) for stage in stages)


def peak(stages: Sequence[Sequence[LayerCost]], at: Sequence[Moment]) -> int:
    """The most bytes alive on a rank, beside what is alive all the time.

    Args:
        stages: the layers of each, with the save sets that they have. at: `moments` of the rank's program.
    """
    kept = [sum(layer.kept for layer in layers) for layers in stages]
    deferred = [sum(layer.deferred for layer in layers) for layers in stages]
    return max(
        sum(n * k for n, k in zip(moment.live, kept, strict=True))
        + sum(n * d for n, d in zip(moment.deferred, deferred, strict=True))
        + _own(moment.kind, stages[moment.stage])
        for moment in at
    )


def _own(kind: ActionKind, layers: Sequence[LayerCost]) -> int:
    """What one action of a stage holds."""
    before = [0, *accumulate(layer.kept for layer in layers)]
    if kind is W:
        return max((layer.weight for layer in layers), default=0)
    if kind is F:
        return max((k + layer.forward for k, layer in zip(before, layers, strict=False)), default=0)
    after = [0] * len(layers)
    if kind is I:
        total = sum(layer.deferred for layer in layers)
        after = [total - d for d in accumulate(layer.deferred for layer in layers)]
    return max((k + layer.backward + d for k, layer, d in zip(before, layers, after, strict=False)), default=0)


def _greatest(counts: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other is as great as in every place, in a fixed order."""
    kept = list[tuple[int, ...]]()
    for candidate in sorted(counts, key=lambda c: (-sum(c), c)):
        if not any(all(a >= b for a, b in zip(other, candidate, strict=True)) for other in kept):
            kept.append(candidate)
    return kept
