"""Stopping on request: a signal to any rank, a time limit, a step. The step is finished, the state saved, exit code 3.

A signal is only noted; whether to stop is voted on at the end of each step, with the loss, so that all ranks stop after
the same one. The same signal a second time, a second or more after the first, ends its rank at once: launcher and
scheduler may both pass on one request. SLURM's warning (--signal=USR1@120) and the SIGTERM
that follows it are different signals: the latter does not disturb a save that the former has begun. A warning that
comes before, while a rank starts, is heeded after the first step; one that comes after, while it ends, is let go.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from engine.config import TrainConfig
from parallel import comm
from parallel.comm import Axis, PeerLostError

_ONE_REQUEST = 1.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """Whether a run is to stop; a context manager, within which signals are requests.

    Signals that were ignored when the process began (nohup, background jobs) stay ignored. Outside the main thread,
    which alone can handle them, signals are left as they are.

    Args:
        config: `stop_step` and `time_limit`. rank: of this process: rank 0's clock decides.
        began: when the time limit began to run, by time.monotonic().
    """

    def __init__(self, config: TrainConfig, rank: int, began: float) -> None:
        self.stop_step = config.stop_step
        self._until = began + 60 * config.time_limit if config.time_limit is not None and rank == 0 else None
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._held = set[signal.Signals]()  # `parent.hold_warnings`
        self._noted: dict[int, float] = {}  # when each signal came first
        self._last_asked: float | None = None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
            self._held = {*self._before} & signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asked = self._signal if isinstance(error, PeerLostError) else None
        if asked is None:
            self._before |= dict.fromkeys(self._held, signal.SIG_IGN)
        self._give_back()
        if asked is not None:
            os.kill(os.getpid(), asked)  # it was how the launcher ends those that are left

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal = signal.Signals(number)
        if now - self._noted.setdefault(number, now) >= _ONE_REQUEST:
            self._give_back()
            os.kill(os.getpid(), number)

    def vote(self) -> float:
        """1 if this rank wants to stop after this step. Asked once a step."""
        now = time.monotonic()
        step = now - (self._last_asked or now)
        self._last_asked = now
        late = self._until is not None and now + step > self._until  # one more would end too late
        return float(self._signal is not None or late)

    def is_at_end(self, step: int) -> bool:
        """Whether this is the step to stop after, or beyond it."""
        return self.stop_step is not None and step >= self.stop_step

    def reason(self, world: Axis) -> str:
        """Why the run was stopped. Collective, after a vote."""
        names = comm.gather_objects(None if self._signal is None else self._signal.name, world)
        by_rank = [f"{name} to rank {rank}" for rank, name in enumerate(names) if name is not None]
        if by_rank:
            return by_rank[0] + (f" and {len(by_rank) - 1} more" if len(by_rank) > 1 else "")
        return "train.time_limit"
