"""How ranks that share micro-batches learn of which samples they are, where samples may be bad (data.mending).

Ranks of later pipeline stages need labels, and some need texts, but decode no image. So the rank that does tells them,
micro-batch by micro-batch, and before it hands one out: whoever needs it is told before what is computed of it arrives.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Relay(Protocol):
    """The way between such ranks."""

    @property
    def decides(self) -> bool:
        """Whether this rank tells the others."""
        ...

    def pass_on(self, number: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of micro-batch `number` since `begin`, [B]: what this rank has found, or is told instead."""
        ...

    def begin(self) -> None:
        """All that was passed on before has arrived: a step begins, or a pass over held-out samples."""
        ...


class Agreement:
    """Which samples the micro-batches of training are of, passed on once for each."""

    def __init__(self, relay: Relay | None) -> None:
        self._relay, self._first = relay, 0
        self._told = dict[int, NDArray[np.int64]]()

    def begin(self, first: int) -> None:
        """A step begins with draw `first`: nothing is kept of the others."""
        if self._relay is not None and first != self._first:
            self._relay.begin()
            self._first = first
            self._told.clear()

    def of(self, draw: int, number: int, own: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of the micro-batch of this step that begins with `draw`.

        Args:
            number: of it in its step. own: what this rank has found.
        """
        if self._relay is None:
            return own
        if draw not in self._told:
            self._told[draw] = self._relay.pass_on(number, own)
        return self._told[draw]
