"""What is drawn: panels, each of lanes of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.pipeline import Timeline


class Box(NamedTuple):
    """Something that takes time on a lane.

    Attributes:
        kind: one of `draw.KINDS`. start, end: in the picture's unit. label: written into it where it fits.
        shade: 0 for the first stage of the rank, 1 for the next.
    """

    kind: str
    start: float
    end: float
    label: str = ""
    shade: int = 0


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One step.

    Attributes:
        lanes: boxes by the name of their rank. note: beside the title.
    """

    title: str
    note: str
    lanes: Mapping[str, Sequence[Box]] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """Of the last box."""
        return max((box.end for boxes in self.lanes.values() for box in boxes), default=0.0)


def lane_names(stage_to_rank: Sequence[int], names: Sequence[str]) -> list[str]:
    """The names of pipeline ranks with the stages that they hold, where these are several."""
    held: list[list[int]] = [[] for _ in names]
    for stage, rank in enumerate(stage_to_rank):
        held[rank].append(stage)
    if len(stage_to_rank) == len(names):
        return list(names)
    return [f"{name}: stages {', '.join(map(str, stages))}" for name, stages in zip(names, held, strict=True)]


def shades(stage_to_rank: Sequence[int]) -> list[int]:
    """Which of its rank's stages each stage is."""
    return [list(stage_to_rank[:stage]).count(rank) for stage, rank in enumerate(stage_to_rank)]


def simulated_panel(timeline: Timeline, title: str) -> Panel:
    """The compute actions of a simulated step; what the norm and the optimizer take follows them."""
    schedule, costs = timeline.schedule, timeline.costs
    shade = shades(schedule.stage_to_rank)
    names = lane_names(schedule.stage_to_rank, [f"rank {rank}" for rank in range(schedule.num_ranks)])
    lanes = {}
    for rank, (name, intervals) in enumerate(zip(names, timeline.ranks, strict=True)):
        boxes = [
            Box(i.action.kind.value, i.start, i.end, str(i.action.micro_batch), shade[i.action.stage])
            for i in intervals
        ]
        updates = timeline.makespan + costs.norm
        if costs.norm:
            boxes.append(Box("norm", timeline.makespan, updates))
        if timeline.optimizer[rank]:
            boxes.append(Box("optimizer", updates, updates + timeline.optimizer[rank]))
        lanes[name] = boxes
    peak = max(timeline.peak_activations)
    share, time = 100 * timeline.bubble_fraction, timeline.step_time
    note = f"bubble {share:.1f} %, time {time:.6g}, at most {peak:g} activation{'s' * (peak != 1)} per rank"
    return Panel(title=title, note=note, lanes=lanes)
