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

from parallel.pipeline import SCHEDULES, Costs, Schedule, Timeline, build_schedule, simulate, with_recompute
from parallel.pipeline.costs import PerRank
from parallel.pipeline.readiness import POLICIES, Policy
from parallel.process_group import World
from tools.benchmark.table import Row, show
from tools.options import COUNT, add_json, cost, number, refusing, several, virtual_stages_of_each

_LEAST_WORK = 1e-9
_ALL = ["1f1b", *(name for name in SCHEDULES if name != "1f1b")]


def main(argv: Sequence[str], world: World) -> None:
    """Simulate and print."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.forward + options.input + options.weight < _LEAST_WORK:
        parser.error(
            f"--forward, --input and --weight together must be {_LEAST_WORK:g} or more: what is compared is work"
        )
    with refusing():
        rows = [row for p in options.ranks for m in options.micro_batches for row in _rows(options, p, m)]
    show(rows, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.benchmark schedules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, kind: Callable[[str], Any], default: object, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)

    add("--ranks", several(number(COUNT)), [4], "of the pipeline, one or several numbers: 4,8 (default 4)")
    add("--micro-batches", several(number(COUNT)), [8], "one or several numbers (default 8)")
    add("--schedule", several(str), _ALL, "names, or files ending in .csv (default: every schedule)")
    add("--virtual-stages", number(COUNT), None, "stages per rank, of interleaved (default 2)")
    add("--forward", cost("forward"), 1.0, "time of a forward (default 1)")
    add("--input", cost("backward_input"), 1.0, "of the gradient of the inputs (default 1)")
    add("--weight", cost("backward_weight"), 1.0, "of the gradient of the weights (default 1)")
    add("--recompute", cost("recompute"), 0.0, "of computing again what was dropped, before its backward (default 0)")
    add("--ahead", number(COUNT._replace(least=0)), 1, "micro-batches of a rank recomputed while it waits (default 1)")
    add("--latency", cost("latency"), 0.0, "of a message (default 0)")
    add("--bandwidth", cost("bandwidth"), math.inf, "bytes per unit of time of a message (default: no limit)")
    add("--bytes", cost("output_bytes"), 0.0, "of the tensors at a boundary, in either direction (default 0)")
    add("--speed", several(cost("speed")), [1.0], "of the ranks, one number or one for each (default 1)")
    add("--norm", cost("norm"), 0.0, "time of the gradient norm, which waits for all ranks (default 0)")
    add("--optimizer", cost("optimizer"), 0.0, "time of the update that follows (default 0)")
    add("--jitter", several(cost("jitter")), [0.0], "relative standard deviation of actions (default 0)")
    add("--seeds", number(COUNT), 10, "steps that a jitter is drawn for (default 10)")
    add("--policy", several(str), ["static"], f"{' or '.join(POLICIES)}, or both (default static)")
    add_json(parser)
    return parser


def _rows(options: argparse.Namespace, ranks: int, micro_batches: int) -> list[Row]:
    base = build_schedule("1f1b", ranks, micro_batches)
    stages = virtual_stages_of_each(options.schedule, options.virtual_stages)
    schedules = {name: build_schedule(name, ranks, micro_batches, v) for name, v in stages.items()}
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
    """The simulated step for each seed; where it recomputes is decided without the jitter, which nobody knows."""
    if options.ahead and not schedule.recomputes:
        schedule = with_recompute(schedule, _costs(options, schedule, 0.0), ahead=options.ahead)
    costs = _costs(options, schedule, jitter)
    return [simulate(schedule, replace(costs, seed=seed), policy) for seed in range(options.seeds if jitter else 1)]


def _costs(options: argparse.Namespace, schedule: Schedule, jitter: float) -> Costs:
    speed: PerRank = options.speed[0] if len(options.speed) == 1 else tuple(options.speed)
    return Costs.of_ranks(
        schedule,
        forward=options.forward,
        backward_input=options.input,
        backward_weight=options.weight,
        recompute=options.recompute,
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
