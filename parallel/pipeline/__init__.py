"""Pipeline parallelism: schedules as data, their generators, validator and simulator, and the cut of the layers."""

from parallel.pipeline.actions import Action, ActionKind, Schedule, ScheduleError
from parallel.pipeline.communication import insert_communication
from parallel.pipeline.costs import Costs, sum_layers
from parallel.pipeline.partition import balance, partition
from parallel.pipeline.placement import Placement
from parallel.pipeline.recompute import with_recompute
from parallel.pipeline.schedule_file import to_csv
from parallel.pipeline.schedules import SCHEDULES, behind_forwards, build_schedule, compute_order, forward_only
from parallel.pipeline.simulation import simulate
from parallel.pipeline.timeline import Interval, Message, Timeline
from parallel.pipeline.validation import validate

__all__ = [
    "SCHEDULES",
    "Action",
    "ActionKind",
    "Costs",
    "Interval",
    "Message",
    "Placement",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "balance",
    "behind_forwards",
    "build_schedule",
    "compute_order",
    "forward_only",
    "insert_communication",
    "partition",
    "simulate",
    "sum_layers",
    "to_csv",
    "validate",
    "with_recompute",
]
