"""When a rank's memory can be fullest: what else is alive while an action of its program runs.

Bytes alive at an action are those that all micro-batches keep whose forward is over and whose backward is not, what a
split backward has deferred to a coming BACKWARD_WEIGHT, what is on its way to another stage, and what the action itself
holds. All but the last go by counts, and of the actions of one kind and stage only those count at which no other has as
many alive of everything: a *moment*. There are few, whatever the length of the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.pipeline.actions import Action, ActionKind

F, B, R = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.RECOMPUTE
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT

Messages = Mapping[int, tuple[int, int]]
"""By stage: bytes of what goes to the stage behind, and of what goes back to the one before."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Actions of one kind and stage, where most is alive beside them.

    Stages are counted from 0 in the order of their numbers; then come the same stages once more, for micro-batches that
    an R has recomputed, if the program has any.

    Attributes:
        live: by stage: micro-batches that keep activations. deferred: by stage: micro-batches whose BACKWARD_WEIGHT is
            to come. Of neither the action's own. held: bytes on their way to other stages.
    """

    kind: ActionKind
    stage: int
    live: tuple[int, ...]
    deferred: tuple[int, ...]
    held: int = 0


def moments(program: Sequence[Action], messages: Messages | None = None) -> tuple[Moment, ...]:
    """Those of a rank's program.

    Args:
        messages: of the rank's stages, if they have a size; what is sent is held until its send, if that is among the
            actions.
    """
    return _moments(tuple(program), tuple(sorted((messages or {}).items())))


def passes(program: Sequence[Action]) -> tuple[int, ...]:
    """How many backwards of micro-batches each stage of a program runs, by stage, ascending."""
    stages = sorted({a.stage for a in program if a.kind.is_compute})
    return tuple(sum(a.kind in (B, I) and a.stage == stage for a in program) for stage in stages)


@lru_cache(maxsize=512)
def _moments(program: tuple[Action, ...], messages: tuple[tuple[int, tuple[int, int]], ...]) -> tuple[Moment, ...]:
    alive = _Alive(program, dict(messages))
    found = dict[tuple[ActionKind, int], set[tuple[int, ...]]]()
    for action in program:
        if action.kind.is_send:
            alive.let_go(action.kind, action.stage, action.micro_batch)
        elif action.kind.is_compute:
            place = alive.begin(action)
            found.setdefault((action.kind, place), set()).add((*alive.live, *alive.deferred, alive.held))
            alive.end(action)
    count = len(alive.live)
    return tuple(
        Moment(kind=kind, stage=stage, live=counts[:count], deferred=counts[count:-1], held=counts[-1])
        for (kind, stage), those in found.items()
        for counts in _greatest(those)
    )


class _Alive:
    """What is alive on a rank between two actions."""

    def __init__(self, program: Sequence[Action], messages: Messages) -> None:
        self._messages = messages
        self._stages = sorted({a.stage for a in program if a.kind.is_compute})
        self._sends = {(a.kind, a.stage, a.micro_batch) for a in program if a.kind.is_send}
        self._again = set[tuple[int, int | None]]()  # recomputed already
        count = len(self._stages) * (1 + any(a.kind is R for a in program))
        self.live, self.deferred, self.held = [0] * count, [0] * count, 0
        self._on_their_way = dict[object, int]()

    def _place(self, action: Action) -> int:
        again = (action.stage, action.micro_batch) in self._again
        return self._stages.index(action.stage) + len(self._stages) * again

    def let_go(self, *what: object) -> None:
        """Of what is on its way, if it is."""
        self.held -= self._on_their_way.pop(what, 0)

    def begin(self, action: Action) -> int:
        """The stage as moments count it; what the action reads is its own from now on."""
        place = self._place(action)
        if action.kind is W:
            self.deferred[place] -= 1
        elif action.kind is not F:
            self.live[place] -= 1
        if action.kind in (F, B, I):
            self.let_go("input" if action.kind is F else "gradient", action.stage, action.micro_batch)
        return place

    def end(self, action: Action) -> None:
        """What it leaves behind."""
        kind, stage = action.kind, action.stage
        if kind is R:
            self._again.add((stage, action.micro_batch))
        if kind in (F, R):
            self.live[self._place(action)] += 1
        elif kind is I:
            self.deferred[self._place(action)] += 1
        output, gradient = self._messages.get(stage, (0, 0))
        if kind is F:
            self._give("input", stage + 1, ActionKind.SEND_FORWARD, action, output)
        elif kind in (B, I):
            self._give("gradient", stage - 1, ActionKind.SEND_BACKWARD, action, gradient)

    def _give(self, what: str, to: int, send: ActionKind, action: Action, size: int) -> None:
        """To a stage of this rank, or to be sent."""
        key = (what, to, action.micro_batch) if to in self._stages else (send, action.stage, action.micro_batch)
        if to in self._stages or key in self._sends:
            self.let_go(*key)
            self._on_their_way[key] = size
            self.held += size


def _greatest(counts: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other is as great as in every place, in a fixed order."""
    kept = list[tuple[int, ...]]()
    for candidate in sorted(counts, key=lambda c: (-sum(c), c)):
        if not any(all(a >= b for a, b in zip(other, candidate, strict=True)) for other in kept):
            kept.append(candidate)
    return kept
