"""`python -m tools.schedules --ranks 4 --micro-batches 8`: what each pipeline schedule costs, before there are ranks.

Simulated; the unit of time is a forward of a rank's layers. The table shows the length of a step, what each rank idles
in it, activations alive at once on the rank that keeps most (1 is its share of one micro-batch), and messages that a
rank sends per step. With --csv the schedule itself is printed, as a file that can be edited and used.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from parallel.pipeline import SCHEDULES, Costs, Schedule, build_schedule, compute_order, simulate, to_csv
from parallel.pipeline.simulation import POLICIES, Policy
from tools.benchmark.table import Row, show

_MOST = 4_000_000  # takes a minute per schedule, and some GB


def main(argv: Sequence[str]) -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(prog="tools.schedules", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True, help="on the pipeline axis")
    parser.add_argument("--micro-batches", type=int, required=True, help="per step")
    parser.add_argument("--schedule", nargs="+", default=[*SCHEDULES], help="names, or CSV files (default: all names)")
    parser.add_argument("--virtual-stages", type=int, help="stages per rank of interleaved (default 2)")
    parser.add_argument(
        "--times", type=_times, default=(1.0, 1.0, 1.0), help="F,I,W of a rank's layers (default 1,1,1)"
    )
    parser.add_argument("--latency", type=_time, default=0.0, help="of a message, in the same unit (default 0)")
    parser.add_argument("--policy", default="static", choices=POLICIES, help="parallel.schedule_policy")
    parser.add_argument("--csv", action="store_true", help="print the schedule instead, without its messages")
    parser.add_argument("--json", help="also write the rows to this file")
    o = parser.parse_args(argv)
    sizes = (o.ranks, o.micro_batches)
    if o.ranks * o.micro_batches > _MOST:
        parser.error(f"{o.ranks} ranks with {o.micro_batches} micro-batches: their product is at most {_MOST}")
    try:
        if o.csv:
            if len(o.schedule) != 1:
                parser.error("--csv prints one schedule: name it with --schedule")
            print(to_csv(compute_order(o.schedule[0], *sizes, o.virtual_stages)), end="")
            return
        schedules = {
            name: build_schedule(name, *sizes, o.virtual_stages if name == "interleaved" else None)
            for name in o.schedule
        }
    except ValueError as error:
        parser.error(str(error))
    show([row(name, schedule, o.times, o.latency, o.policy) for name, schedule in schedules.items()], o.json)


def row(name: str, schedule: Schedule, times: Sequence[float], latency: float, policy: Policy) -> Row:
    """One simulated schedule, each rank's layers cut into equal stages."""
    per_rank = schedule.num_stages / schedule.num_ranks
    f, i, w = (time / per_rank for time in times)
    costs = Costs(forward=f, backward_input=i, backward_weight=w, latency=latency)
    timeline = simulate(schedule, costs, policy)
    sends = sum(action.kind.is_send for program in schedule.ranks for action in program)
    return {
        "schedule": name,
        "stages_per_rank": f"{per_rank:g}",
        "step": timeline.makespan,
        "bubble": sum(timeline.bubble) / schedule.num_ranks,
        "bubble_percent": 100 * timeline.bubble_fraction,
        "peak_activations": max(timeline.peak_activations),
        "messages_per_rank": sends / schedule.num_ranks,
    }


def _time(text: str) -> float:
    try:
        if math.isfinite(time := float(text)) and time >= 0:
            return time
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"is {text}: it must be a time of 0 or more")


def _times(text: str) -> tuple[float, ...]:
    times = tuple(map(_time, text.split(",")))
    if len(times) != 3 or not sum(times):
        raise argparse.ArgumentTypeError(f"is {text}: give the times of F, I and W, as in 1,1.2,0.8")
    return times


if __name__ == "__main__":
    main(sys.argv[1:])
