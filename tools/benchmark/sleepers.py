"""Pipeline stages that sleep known times, run by the engine's executor: what a schedule is worth on real ranks.

Nobody needs a core of his own to sleep, so four ranks on two cores take the time that they would take on four. The
simulator is told the same times, jitter included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.grid import GridShape, make_grid
from parallel.pipeline import Costs, Schedule, Timeline, build_schedule, simulate, with_recompute
from parallel.pipeline.actions import ActionKind
from parallel.pipeline.boundary import TensorSpec
from parallel.pipeline.execution import PipelineExecutor
from parallel.pipeline.local_stage import Products
from parallel.pipeline.readiness import Policy
from parallel.pipeline.recording import Recorder
from parallel.process_group import World

_CPU = torch.device("cpu")
_SHAPE = (4, 4)
_AWAKE = 2e-4  # the last of a sleep is waited for awake: a system wakes sleepers up to 0.1 ms late


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run. Times are in seconds, those of a rank's stages together, for one micro-batch.

    Attributes:
        virtual_stages: None for the schedule's own number. ahead: micro-batches that a rank recomputes while it waits;
            0: backwards do it all. jitter, seed, speeds: as in `Costs`.
    """

    schedule: str
    ranks: int
    micro_batches: int
    virtual_stages: int | None = None
    policy: Policy = "static"
    forward: float = 0.01
    backward_input: float = 0.01
    backward_weight: float = 0.01
    recompute: float = 0.0
    ahead: int = 1
    jitter: float = 0.0
    seed: int = 0
    speeds: tuple[float, ...] | None = None

    def program(self) -> Schedule:
        """Raises ValueError where there is no such schedule."""
        schedule = build_schedule(self.schedule, self.ranks, self.micro_batches, self.virtual_stages)
        if not self.ahead or schedule.recomputes:
            return schedule
        return with_recompute(schedule, replace(self.costs(schedule), jitter=0.0), ahead=self.ahead)

    def costs(self, schedule: Schedule) -> Costs:
        """Of its stages. Raises ValueError where a number makes no sense."""
        return Costs.of_ranks(
            schedule,
            forward=self.forward,
            backward_input=self.backward_input,
            backward_weight=self.backward_weight,
            recompute=self.recompute,
            jitter=self.jitter,
            seed=self.seed,
            speed=self.speeds or 1.0,
        )

    def simulated(self) -> Timeline:
        """The step on paper, with messages that take no time."""
        schedule = self.program()
        return simulate(schedule, self.costs(schedule), self.policy)

    @property
    def formula(self) -> float | None:
        """Idle seconds of each rank by the formulas of the papers; None where they do not say.

        A step ends for all ranks at once, and the last cannot start sooner than the way to it takes.
        """
        f, i, w = self.forward, self.backward_input, self.backward_weight
        if self.jitter or self.speeds:
            return None
        ranks, in_full_rounds = self.ranks - 1, self.micro_batches % self.ranks == 0
        match self.schedule:
            case "gpipe" | "1f1b":
                return ranks * (f + i + w + (0 if self.ahead else self.recompute))
            case _ if self.recompute:
                return None
            case "interleaved" if in_full_rounds:
                return ranks * (f + i + w) / (self.program().num_stages // self.ranks)
            case "zb_h1" | "zb_h2" if self.micro_batches >= 2 * self.ranks:
                return ranks * max(f, f + i - (1 if self.schedule == "zb_h1" else 2) * w)
            case "zb_v" if f == i == w:
                return ranks * f / 2
        return None


class Pass(NamedTuple):
    """One pass over a schedule, all ranks together: its seconds, and those in which a rank did not compute (mean)."""

    seconds: float
    idle: float

    @classmethod
    def of(cls, ranks: Sequence[Sequence[float]]) -> Pass:
        """From busy seconds, start and end of each rank."""
        busy, starts, ends = zip(*ranks, strict=True)
        seconds = max(ends) - min(starts)
        return cls(seconds, seconds - statistics.fmean(busy))


def sleep(seconds: float) -> None:
    """To within a few microseconds, where a core is free."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(max(0.0, left - _AWAKE))


class Sleepers:
    """One rank of a pipeline whose stages sleep."""

    def __init__(self, world: World) -> None:
        """Collective over the world, all of which is the pipeline."""
        self._grid = make_grid(GridShape(pipeline=world.size), world)
        self._recorder = Recorder(_CPU)
        self._executors: dict[Case, PipelineExecutor] = {}

    def together(self, case: Case) -> Pass:
        """One pass, of all ranks; the same on each. Collective."""
        return Pass.of(comm.gather_objects(self.run(case), self._grid.world))

    def run(self, case: Case) -> tuple[float, float, float]:
        """One pass: this rank's busy seconds, its start and its end. Collective."""
        executor = self._executors.get(case)
        if executor is None:
            executor = self._executors[case] = self._executor(case)
        where = self._grid.meter.where
        comm.barrier(self._grid.world)
        where.listener = self._recorder
        self._recorder.begin_pass()
        executor.run(range(case.micro_batches), lambda outputs, _: outputs[0].sum())
        where.now(None)
        where.listener = None
        return self._recorder.busy()

    def _executor(self, case: Case) -> PipelineExecutor:
        schedule, axis = case.program(), self._grid.pipeline
        times, postponed, notes = case.costs(schedule).durations(schedule), Postponed(), Notes()
        return PipelineExecutor(
            schedule,
            {s: _Stage(s, schedule, times, postponed, notes) for s in schedule.stages_of(axis.index)},
            [(), *[(TensorSpec(_SHAPE),)] * (schedule.num_stages - 1)],
            axis=axis,
            device=_CPU,
            deferrer=postponed,
            recomputer=notes,
            policy=case.policy,
        )


class Postponed:
    """Weight gradients that are put off (parallel.pipeline.local_stage.Deferrer)."""

    def __init__(self) -> None:
        self.products: Products | None = None

    @contextmanager
    def deferring(self) -> Iterator[Products]:
        """Put off products within."""
        products: Products = []
        self.products = products
        try:
            yield products
        finally:
            self.products = None

    def hold(self, order: Sequence[int]) -> None:
        """There is nothing to reduce."""

    def release(self) -> None:
        """There is nothing to reduce."""


class Notes:
    """What is to be called to recompute (parallel.pipeline.local_stage.Recomputer)."""

    def __init__(self) -> None:
        self.products: Products | None = None

    @contextmanager
    def noting(self) -> Iterator[Products]:
        """Note what is dropped within."""
        self.products = []
        try:
            yield self.products
        finally:
            self.products = None


class _Stage(nn.Module):
    """Sleeps in its forward, in its backward what the kind of the backward takes, and before it what a recompute does.

    Attributes:
        _late: micro-batches that are recomputed before their backward, and were not yet.
    """

    def __init__(
        self, number: int, schedule: Schedule, times: dict[ActionKind, list[float]], postponed: Postponed, notes: Notes
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        m = schedule.num_micro_batches
        own = slice(number * m, (number + 1) * m)
        self._times, self._postponed, self._notes = {kind: row[own] for kind, row in times.items()}, postponed, notes
        self._planned = {a.micro_batch for a in schedule.recomputes if a.stage == number}
        self._late = set[int]()

    def forward(self, inputs: tuple[Tensor, ...], micro_batch: int) -> tuple[Tensor, ...]:
        sleep(self._times[ActionKind.FORWARD][micro_batch])
        if self._notes.products is not None and micro_batch in self._planned:
            self._late.add(micro_batch)
            self._notes.products.append(partial(self._recompute, micro_batch))
        x = inputs[0] if inputs else torch.zeros(_SHAPE)
        y: Tensor = _Slept.apply(x, self.weight, partial(self._backward, micro_batch))
        return (y,)

    def _recompute(self, micro_batch: int) -> None:
        self._late.discard(micro_batch)
        sleep(self._times[ActionKind.RECOMPUTE][micro_batch])

    def _backward(self, micro_batch: int) -> None:
        if micro_batch in self._late:
            self._recompute(micro_batch)
        products = self._postponed.products
        if products is None:
            sleep(self._times[ActionKind.BACKWARD][micro_batch])
        else:
            sleep(self._times[ActionKind.BACKWARD_INPUT][micro_batch])
            products.append(partial(sleep, self._times[ActionKind.BACKWARD_WEIGHT][micro_batch]))


class _Slept(torch.autograd.Function):
    """Passes its input on, and the gradient back after a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, in_backward: Callable[[], None]) -> Tensor:
        ctx.in_backward = in_backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.in_backward()
        return grads[0], None, None
