"""What a layer costs with each save set that it may have: bytes and seconds, of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Of one layer with one save set, for one micro-batch.

    Attributes:
        kept: bytes that stay from its forward to its backward. What it shares with its neighbours counts once: its
            input is its own, if it keeps it, its output the next layer's.
        forward: the most that it holds while its forward runs, beside what was alive before; `kept` and its input
            included.
        backward: the most that is alive while its backward runs, beside what the layers before it keep and beside other
            micro-batches: its own `kept`, recomputed tensors, gradients on their way, `deferred` and `held`.
        deferred: of a split backward, bytes kept from BACKWARD_INPUT to BACKWARD_WEIGHT.
        weight: the most beside that while BACKWARD_WEIGHT of the stage runs.
        held: of the last layer of a stage: what was sent for it and is held, beside `deferred`, while the layers before
            it go backward.
        away: bytes that are in host memory between its forward and its backward: beside `kept`, unless this is a plan
            of CPUs, whose memory that is.
        seconds: that computing again takes.
    """

    kept: int
    forward: int
    backward: int
    deferred: int = 0
    weight: int = 0
    held: int = 0
    away: int = 0
    seconds: float = 0.0
