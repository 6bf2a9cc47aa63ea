"""Runs any valid schedule on one rank, over its stages (`local_stage.py`) and its lanes to other ranks (`lanes.py`).

Knows neither what a stage computes, nor which generator made the schedule, nor what carries messages. Shapes at stage
boundaries are static, so receives are posted without asking; what flows is a tuple of tensors. A stage is called as
`stage(inputs, micro_batch)`, the first one with no inputs; what the last one returns is turned into a loss by the
caller's function.

What there is to know of an action (what runs it, where its result goes) is found out once, when the executor is made:
a pass calls one bound method per action. Two ways to walk through a program: `Static`, in its own order, and
`ready.Ready`, by what is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.boundary import Route, Specs
from parallel.pipeline.boundary import TensorSpec as TensorSpec
from parallel.pipeline.choices import open_choices
from parallel.pipeline.lanes import Lane, Post, open_post
from parallel.pipeline.local_stage import Deferrer, Head, Inbox, LocalStage, Recomputer, StageModule, Tensors
from parallel.pipeline.readiness import Policy
from parallel.pipeline.ready import Ready

Announce = Callable[[Sequence[Action], Sequence[int]], None]
"""Told the actions that a rank will run next, and the numbers of all its stages, ascending."""


class Walk(Protocol):
    """A way through a rank's program."""

    def run(self) -> None:
        """One pass."""


class PipelineExecutor:
    """Executes one schedule on one rank.

    Args:
        schedule: validated; its communication inserted.
        stages: this rank's stages by their number.
        boundaries: entry s describes the inputs of stage s (empty for stage 0).
        axis: the pipeline axis. device: where tensors are.
        deferrer: puts off weight gradients for schedules that split the backward.
        recomputer: notes what is to be computed again by schedules that recompute (R); None where the stages of this
            rank drop nothing. Of a stage that drops nothing an R does nothing.
        before_run: told this rank's actions before they are run: all of a pass, or under `ready` before each action
            that and the next ones to be expected.
        policy: `static`: actions run in the order of the program. `ready`: the first that is ready does; a schedule
            without backwards runs static, too.
        group: under `ready` the ranks that must choose alike, since collectives between them come within actions; the
            first of them chooses for all.
        post: this rank's lanes, if not those that `open_post` gives.

    Raises:
        ScheduleError: the policy is `ready`, but neighbouring stages take their micro-batches in different orders.
        ValueError: the schedule has actions that cannot be run.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, StageModule],
        boundaries: Sequence[Specs],
        *,
        axis: Axis,
        device: torch.device,
        deferrer: Deferrer | None = None,
        recomputer: Recomputer | None = None,
        before_run: Announce | None = None,
        policy: Policy = "static",
        group: Axis | None = None,
        post: Post | None = None,
    ) -> None:
        assert set(stages) == set(schedule.stages_of(axis.index)), (set(stages), schedule.stages_of(axis.index))
        self.schedule, self.axis = schedule, axis
        self.program = schedule.ranks[axis.index]
        unknown = {a.kind for a in self.program if a.kind.is_whole_stage}
        if unknown:
            raise ValueError(
                f"schedule {schedule.name} uses {sorted(k.name for k in unknown)}, which cannot be run yet"
            )
        ready = policy == "ready" and not schedule.is_forward_only
        self.post = post or open_post(schedule.stage_to_rank, boundaries, axis=axis, device=device, ready=ready)
        arrived = axis.meter.where.arrived
        self.stages = _connect(schedule, stages, boundaries, self.post, deferrer, recomputer, arrived, ready=ready)
        announce = None if before_run is None else lambda actions: before_run(actions, sorted(stages))
        self._bounded = not ready  # a schedule in its own order may have a sender wait
        self._walk: Walk
        if ready:
            choices = open_choices(group, sum(action.kind.is_compute for action in self.program), device)
            self._walk = Ready(schedule, axis, device, self.stages, self.post, choices, announce, deferrer)
        else:
            self._walk = Static(self.program, axis, self.stages, self.post, announce)

    def run(self, micro_batches: Sequence[Any], head: Head) -> list[Tensor]:
        """One pass over the schedule.

        Args:
            micro_batches: handed to the stages as they are, one per micro-batch of the schedule.
            head: outputs of the last stage and its micro-batch -> the scalar to differentiate (training), or whatever
                tensor is to be returned (a forward-only schedule).

        Returns:
            What `head` returned for each micro-batch, detached, on ranks that hold the last stage; elsewhere nothing.
        """
        assert len(micro_batches) == self.schedule.num_micro_batches, (len(micro_batches), self.schedule)
        trains = not self.schedule.is_forward_only
        self.post.bounded = self._bounded
        for stage in self.stages.values():
            stage.begin(micro_batches, head, trains=trains)
        with torch.set_grad_enabled(trains):
            self._walk.run()
        self.axis.meter.where.now("sending what is left")
        self.post.end_pass()
        return [result for stage in self.stages.values() for result in stage.end()]


class Static:
    """The order of the program. Messages that stand between two compute actions are posted together."""

    def __init__(
        self,
        program: Sequence[Action],
        axis: Axis,
        stages: Mapping[int, LocalStage],
        post: Post,
        announce: Callable[[Sequence[Action]], None] | None,
    ) -> None:
        self._where, self._program, self._stages, self._post = axis.meter.where, program, stages, post
        self._announce = announce
        self._steps: list[tuple[Action, Callable[[Any], None], Any]] = []
        for are_messages, actions in groupby(program, key=lambda action: action.kind.is_message):
            if are_messages:
                exchange = self._exchange_of(list(actions))
                self._steps.append((exchange.actions[0], self._exchange, exchange))
            else:
                self._steps += [(a, stages[a.stage].method(a.kind), a.micro_batch) for a in actions]

    def run(self) -> None:
        """One pass."""
        if self._announce is not None:
            self._announce(self._program)
        now = self._where.now
        for action, run, argument in self._steps:
            now(action)
            run(argument)

    def _exchange_of(self, actions: list[Action]) -> _Exchange:
        lanes, sends, receives = self._post.lanes, [], []
        for action in actions:
            assert action.micro_batch is not None
            lane, m, stage = lanes[Route.of(action)], action.micro_batch, self._stages[action.stage]
            match action.kind:
                case ActionKind.SEND_FORWARD:
                    sends.append((lane, m, stage.outputs))
                case ActionKind.SEND_BACKWARD:
                    sends.append((lane, m, stage.input_gradients))
                case _:
                    receives.append((lane, m))
        return _Exchange(actions, sends, receives)

    def _exchange(self, exchange: _Exchange) -> None:
        if len(exchange.actions) > 1 and self._where.listener is not None:  # who records wants to hear of each
            for action in exchange.actions[1:]:
                self._where.now(action)
        sends = [(lane, m, laid_out.pop(m)) for lane, m, laid_out in exchange.sends]
        self._post.start(sends, exchange.receives)


class _Exchange(NamedTuple):
    """Messages that are posted together: sends with where their tensors are laid out, and receives."""

    actions: list[Action]
    sends: list[tuple[Lane, int, dict[int, Tensors]]]
    receives: list[tuple[Lane, int]]


def _connect(
    schedule: Schedule,
    stages: Mapping[int, StageModule],
    boundaries: Sequence[Specs],
    post: Post,
    deferrer: Deferrer | None,
    recomputer: Recomputer | None,
    arrived: Callable[[], None],
    *,
    ready: bool,
) -> dict[int, LocalStage]:
    """A rank's stages, ascending, with what they read from and write to: neighbours on the rank hand over directly."""
    program, last = schedule.ranks[schedule.stage_to_rank[min(stages)]], schedule.num_stages - 1
    recomputed = {action.stage for action in schedule.recomputes}
    inboxes = {
        route: Inbox(post.lanes.get(route), _order(program, *route, ready=ready), arrived)
        for stage in stages
        for route in (Route(stage - 1, stage), Route(stage + 1, stage))
        if 0 <= route.source <= last
    }

    def laid_out(stage: int, target: int) -> dict[int, Tensors]:
        return inboxes[Route(stage, target)].here if target in stages else {}

    return {
        stage: LocalStage(
            stages[stage],
            inputs=inboxes.get(Route(stage - 1, stage)),
            gradients=inboxes.get(Route(stage + 1, stage)),
            boundary_before=boundaries[stage],
            boundary_after=boundaries[stage + 1] if stage < last else (),
            outputs=laid_out(stage, stage + 1),
            input_gradients=laid_out(stage, stage - 1),
            deferrer=deferrer,
            recomputer=recomputer if stage in recomputed else None,
        )
        for stage in sorted(stages)
    }


def _order(program: Sequence[Action], source: int, stage: int, *, ready: bool) -> list[int]:
    """The micro-batches in the lane from a neighbour, as they come: in the order of its receives, or, where they are
    not gone by, in that of the actions that take them.
    """
    kinds = ActionKind
    if ready:
        wanted = (kinds.FORWARD,) if source < stage else (kinds.BACKWARD, kinds.BACKWARD_INPUT)
    else:
        wanted = (kinds.RECV_FORWARD,) if source < stage else (kinds.RECV_BACKWARD,)
    return [a.micro_batch for a in program if a.kind in wanted and a.stage == stage and a.micro_batch is not None]
