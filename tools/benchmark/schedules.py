r"""`python -m tools.benchmark schedules`: pipeline schedules on paper, side by side. Nothing is run.

Times are those of all stages of a rank together, per micro-batch, so schedules with several stages per rank do the same
work; messages carry the bytes of one boundary each. A row for each schedule, policy and size of jitter:

    step_time           mean over the seeds of the jitter, until the last rank has made its update
    slowest_step_time   of any of them
    bubble              what of it a rank idles
    bubble_percent      share of all ranks' time that is idle
    peak_activations    of the rank with most; 1 is a rank's share of a micro-batch
    messages_per_rank   that a rank sends in a step
    over_1f1b           step time over that of 1F1B with the static policy and the same jitter
    over_static         over that of the same schedule with the static policy

    python -m tools.benchmark schedules --ranks 4 --micro-batches 8,16 --jitter 0,0.3 --policy static,ready
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from engine.errors import ConfigError
from parallel.pipeline import SCHEDULES, Costs, Schedule, Timeline, build_schedule, simulate
from parallel.pipeline.costs import PerRank
from parallel.pipeline.simulation import POLICIES, Policy
from parallel.process_group import World
from tools.benchmark.table import Row, show

_ALL = ["1f1b", *(name for name in SCHEDULES if name != "1f1b")]


def main(argv: Sequence[str], world: World) -> None:
    """Simulate and print."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}: a jitter is drawn for one step at least")
    try:
        rows = [row for p in options.ranks for m in options.micro_batches for row in _rows(options, p, m)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    show(rows, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.benchmark schedules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    add = parser.add_argument
    add("--ranks", type=_several(int), default=[4], help="of the pipeline, one or several numbers: 4,8 (default 4)")
    add("--micro-batches", type=_several(int), default=[8], help="one or several numbers (default 8)")
    add("--schedule", type=_several(str), default=_ALL, help="names or CSV files (default: every schedule)")
    add("--virtual-stages", type=int, help="stages per rank of interleaved (default 2)")
    add("--forward", type=float, default=1.0, help="time of a forward (default 1)")
    add("--input", type=float, default=1.0, help="of the gradient of the inputs (default 1)")
    add("--weight", type=float, default=1.0, help="of the gradient of the weights (default 1)")
    add("--latency", type=float, default=0.0, help="of a message (default 0)")
    add("--bandwidth", type=float, default=math.inf, help="bytes per unit of time of a message (default: no limit)")
    add("--bytes", type=float, default=0.0, help="of the tensors at a boundary, in either direction (default 0)")
    add("--speed", type=_several(float), default=[1.0], help="of the ranks, one number or one for each (default 1)")
    add("--norm", type=float, default=0.0, help="time of the gradient norm, which waits for all ranks (default 0)")
    add("--optimizer", type=float, default=0.0, help="time of the update that follows (default 0)")
    add("--jitter", type=_several(float), default=[0.0], help="relative standard deviation of actions (default 0)")
    add("--seeds", type=int, default=10, help="steps that a jitter is drawn for (default 10)")
    add("--policy", type=_several(str), default=["static"], help=f"{' or '.join(POLICIES)}, or both (default static)")
    add("--json", help="also write the rows to this file")
    return parser


def _several(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes one or several values: 4,8."""

    def read(text: str) -> list[Any]:
        return [of(part) for part in text.split(",")]

    read.__name__ = f"list of {of.__name__}"  # argparse says it where a value is none
    return read


def _rows(options: argparse.Namespace, ranks: int, micro_batches: int) -> list[Row]:
    base = build_schedule("1f1b", ranks, micro_batches)
    v = options.virtual_stages
    schedules = {
        name: build_schedule(name, ranks, micro_batches, v if name == "interleaved" else None)
        for name in options.schedule
    }
    rows: list[Row] = []
    for jitter in options.jitter:
        one = _steps(base, options, jitter, "static")
        for name, schedule in schedules.items():
            static = _steps(schedule, options, jitter, "static")
            for policy in options.policy:
                steps = static if policy == "static" else _steps(schedule, options, jitter, policy)
                rows.append(
                    {
                        "ranks": ranks,
                        "micro_batches": micro_batches,
                        "schedule": name,
                        "policy": policy,
                        "jitter": jitter,
                        "step_time": _mean(steps),
                        "slowest_step_time": max(step.step_time for step in steps),
                        "bubble": fmean(fmean(step.bubble) for step in steps),
                        "bubble_percent": 100 * fmean(step.bubble_fraction for step in steps),
                        "peak_activations": max(max(step.peak_activations) for step in steps),
                        "messages_per_rank": _messages(schedule) / ranks,
                        "over_1f1b": _mean(steps) / _mean(one),
                        "over_static": _mean(steps) / _mean(static),
                    }
                )
    return rows


def _messages(schedule: Schedule) -> int:
    return sum(action.kind.is_send for program in schedule.ranks for action in program)


def _steps(schedule: Schedule, options: argparse.Namespace, jitter: float, policy: Policy) -> list[Timeline]:
    """The simulated step for each seed."""
    costs = _costs(options, schedule.num_stages / schedule.num_ranks, jitter)
    return [simulate(schedule, replace(costs, seed=seed), policy) for seed in range(options.seeds if jitter else 1)]


def _costs(options: argparse.Namespace, stages_per_rank: float, jitter: float) -> Costs:
    speed: PerRank = options.speed[0] if len(options.speed) == 1 else tuple(options.speed)
    return Costs(
        forward=options.forward / stages_per_rank,
        backward_input=options.input / stages_per_rank,
        backward_weight=options.weight / stages_per_rank,
        recompute=options.forward / stages_per_rank,
        latency=options.latency,
        bandwidth=options.bandwidth,
        output_bytes=options.bytes,
        speed=speed,
        norm=options.norm,
        optimizer=options.optimizer,
        jitter=jitter,
    )


def _mean(steps: Sequence[Timeline]) -> float:
    return fmean(step.step_time for step in steps)
