"""The pipeline schedule as data: actions, and one program of actions per pipeline rank.

The idea, and the compact notation such as ``2F0`` (stage 2, forward, micro-batch 0), are those of
``torch.distributed.pipelining``. A schedule can be written by hand, printed, validated, simulated and executed, and
none of these needs to know which generator it came from.

How communication is meant:

* ``SEND_FORWARD(s, m)`` sends the output of stage s for micro-batch m to the rank of stage s+1, whose matching action
  is ``RECV_FORWARD(s+1, m)``. ``SEND_BACKWARD(s, m)`` sends the gradient of the input of stage s to the rank of stage
  s-1, whose matching action is ``RECV_BACKWARD(s-1, m)``.
* A rank posts sends and receives in the order of its program without waiting for them; a compute action waits for the
  receive that brings its input. Between two ranks messages of both directions pass one at a time, in posting order.
* Neighbouring stages on the same rank hand tensors over directly: no send, no receive.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule that cannot be run as written; the message names the rank and the action.

    Attributes:
        why: the message without the place. place: that of the action that is wrong, where it is one.
    """

    def __init__(self, why: str, place: Place | None = None) -> None:
        where = "" if place is None else f"rank {place.rank}, action {place.position + 1}: "
        super().__init__(where + why)
        self.why, self.place = why, place


class ActionKind(Enum):
    """What an action does; the value is its short name in printed schedules."""

    FORWARD = "F"
    BACKWARD = "B"  # the whole backward: gradients of the input and of the weights
    BACKWARD_INPUT = "I"  # the gradient of the input alone, which the previous stage waits for
    BACKWARD_WEIGHT = "W"  # the gradients of the weights alone, which nobody waits for
    RECOMPUTE = "R"  # what the stage has dropped is computed again, before its backward would have to
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECV_BACKWARD = "RECV_B"
    UNSHARD = "UNSHARD"  # reserved: gather the parameters of a stage (ZeRO-3); has no micro-batch, may repeat
    REDUCE = "REDUCE"  # reserved: reduce the gradients of a stage over data-parallel ranks; ditto

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is slow, and actions are hashed often

    @property
    def is_compute(self) -> bool:
        return self in _COMPUTE

    @property
    def is_send(self) -> bool:
        return self is ActionKind.SEND_FORWARD or self is ActionKind.SEND_BACKWARD

    @property
    def is_message(self) -> bool:
        """Whether this is a send or a receive."""
        return self in _COUNTERPARTS

    @property
    def is_whole_stage(self) -> bool:
        """Whether this acts on the parameters of a stage and not on a micro-batch."""
        return self in _WHOLE_STAGE


_COMPUTE = frozenset(
    {
        ActionKind.FORWARD,
        ActionKind.BACKWARD,
        ActionKind.BACKWARD_INPUT,
        ActionKind.BACKWARD_WEIGHT,
        ActionKind.RECOMPUTE,
    }
)

_WHOLE_STAGE = frozenset({ActionKind.UNSHARD, ActionKind.REDUCE})

# What an action adds to the activations that are alive.
_ALIVE = {
    ActionKind.FORWARD: 1,
    ActionKind.BACKWARD: -1,
    ActionKind.BACKWARD_WEIGHT: -1,
}

# The other end of each message: its kind, and its stage relative to this end.
_COUNTERPARTS = {
    ActionKind.SEND_FORWARD: (ActionKind.RECV_FORWARD, +1),
    ActionKind.RECV_FORWARD: (ActionKind.SEND_FORWARD, -1),
    ActionKind.SEND_BACKWARD: (ActionKind.RECV_BACKWARD, -1),
    ActionKind.RECV_BACKWARD: (ActionKind.SEND_BACKWARD, +1),
}

_NOTATION = re.compile(r"([0-9]+)([A-Z_]+)([0-9]*)")


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a rank's program, printed as ``<stage><kind><micro-batch>``: ``2F0``, ``1SEND_B3``, ``0REDUCE``.

    Raises:
        ValueError: the micro-batch is missing, or given to a kind that acts on a whole stage.
    """

    kind: ActionKind
    stage: int
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if (self.micro_batch is None) is not (self.kind in _WHOLE_STAGE):
            need = "takes no" if self.kind.is_whole_stage else "needs a"
            raise ValueError(f"action {self}: {self.kind.name} {need} micro-batch")

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.micro_batch is None else self.micro_batch}"

    @property
    def words(self) -> str:
        """For people: `forward of micro-batch 0 on stage 2`."""
        of = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        return f"{self.kind.name.lower().replace('_', ' ')}{of} on stage {self.stage}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The inverse of ``str``. Raises ValueError when the text is no action."""
        match = _NOTATION.fullmatch(text)
        if match is None or match[2] not in {kind.value for kind in ActionKind}:
            kinds = ", ".join(kind.value for kind in ActionKind)
            raise ValueError(f"{text!r} is no action: write <stage><kind><micro-batch>, as in 2F0; kinds are {kinds}")
        return cls(ActionKind(match[2]), int(match[1]), int(match[3]) if match[3] else None)

    @property
    def counterpart(self) -> Action:
        """The action at the other end of this send or receive."""
        kind, step = _COUNTERPARTS[self.kind]
        return Action(kind, self.stage + step, self.micro_batch)


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Within, or in a function so decorated, Python does not look through all objects for those that hold each other.

    Among the millions of actions of a large schedule there are none, and to look takes as long as to make them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Place(NamedTuple):
    """Where an action stands: the rank, and the position in that rank's program."""

    rank: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The program of each pipeline rank, with or without its communication.

    Raises:
        ValueError: ``stage_to_rank`` does not fit the number of stages or of ranks.
    """

    name: str
    """For people; has no effect."""
    num_stages: int
    """Pieces that the model is cut into; a multiple of the number of ranks when ranks hold several each."""
    num_micro_batches: int
    """Micro-batches per training step."""
    stage_to_rank: tuple[int, ...]
    """The rank that holds each stage."""
    ranks: tuple[tuple[Action, ...], ...]
    """The program of each rank."""

    def __post_init__(self) -> None:
        if len(self.stage_to_rank) != self.num_stages or set(self.stage_to_rank) != set(range(self.num_ranks)):
            raise ValueError(
                f"schedule {self.name!r}: stage_to_rank {self.stage_to_rank} does not place {self.num_stages} stages "
                f"on {self.num_ranks} ranks: give one rank per stage, each rank from 0 to {self.num_ranks - 1} a stage"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank)

    def peer(self, action: Action) -> int:
        """The rank at the other end of a send or receive."""
        return self.stage_to_rank[action.counterpart.stage]

    def crosses_ranks(self, stage: int, neighbour: int) -> bool:
        """Whether both stages exist and are on different ranks, so that tensors between them are messages."""
        exist = min(stage, neighbour) >= 0 and max(stage, neighbour) < self.num_stages
        return exist and self.stage_to_rank[stage] != self.stage_to_rank[neighbour]

    @cached_property
    def places(self) -> dict[Action, Place]:
        """Where each action stands (the last place of one that repeats)."""
        return {a: Place(rank, i) for rank, program in enumerate(self.ranks) for i, a in enumerate(program)}

    @cached_property
    def is_forward_only(self) -> bool:
        """Whether no micro-batch goes backward, as in evaluation."""
        backward = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
        return not any(action.kind in backward for program in self.ranks for action in program)

    @cached_property
    def recomputes(self) -> tuple[Action, ...]:
        """The recomputes of all ranks."""
        return tuple(a for program in self.ranks for a in program if a.kind is ActionKind.RECOMPUTE)

    def __str__(self) -> str:
        """One line per rank; `from_text` reads it back."""
        return "\n".join(f"rank {rank}: {' '.join(map(str, program))}" for rank, program in enumerate(self.ranks))

    @classmethod
    def from_text(cls, text: str, *, name: str = "custom", stage_to_rank: Sequence[int] | None = None) -> Schedule:
        """A schedule from one line of actions per rank, blank lines and a leading ``rank N:`` ignored.

        Stage s is on rank s unless ``stage_to_rank`` says otherwise; the number of micro-batches is that of the
        largest index met.

        Raises:
            ValueError: a word is no action, or the stages do not fit the ranks.
        """
        lines = [line.split(":")[-1] for line in text.splitlines() if line.strip()]
        ranks = tuple(tuple(map(Action.parse, line.split())) for line in lines)
        placement = tuple(range(len(ranks)) if stage_to_rank is None else stage_to_rank)
        micro_batches = {a.micro_batch for program in ranks for a in program if a.micro_batch is not None}
        return cls(
            name=name,
            num_stages=len(placement),
            num_micro_batches=max(micro_batches, default=-1) + 1,
            stage_to_rank=placement,
            ranks=ranks,
        )


def live_activations(schedule: Schedule, rank: int, program: Sequence[Action] | None = None) -> list[int]:
    """How many activations a rank keeps for a coming backward, after each action of its program.

    An activation, of one stage, lives from the forward, however little of it is kept, until the whole backward, or
    until the weight gradient where the backward is split, since that still reads the inputs of the layers. A
    forward-only schedule keeps nothing.

    Args:
        program: actions of the rank in another order, or fewer, instead of its own.
    """
    return list(accumulate(alive_changes(schedule, schedule.ranks[rank] if program is None else program)))


def alive_changes(schedule: Schedule, program: Sequence[Action]) -> list[int]:
    """What each action of a rank adds to the count of activations that are alive."""
    return [0] * len(program) if schedule.is_forward_only else [_ALIVE.get(a.kind, 0) for a in program]


def recomputed_ahead(program: Sequence[Action]) -> list[int]:
    """How many activations, each of one stage, lie recomputed and wait for their gradient, after each action of a rank:
    from the recompute (R) until the backward, whole or of the inputs.
    """
    waiting, counts = set[tuple[int, int | None]](), []
    for action in program:
        key = action.stage, action.micro_batch
        if action.kind is ActionKind.RECOMPUTE:
            waiting.add(key)
        elif action.kind is ActionKind.BACKWARD or action.kind is ActionKind.BACKWARD_INPUT:
            waiting.discard(key)
        counts.append(len(waiting))
    return counts


def peak_activations(schedule: Schedule) -> tuple[float, ...]:
    """Most activations alive at once on each rank; 1 is its share of one micro-batch, all its stages together."""
    return tuple(
        max(live_activations(schedule, rank), default=0) / len(schedule.stages_of(rank))
        for rank in range(schedule.num_ranks)
    )
