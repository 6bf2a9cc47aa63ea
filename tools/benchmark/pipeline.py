r"""`python -m tools.benchmark pipeline`: what schedules are worth, and what running them costs; starts its own ranks.

Stages that sleep known times (so that two cores do for four ranks), run by the engine's executor; idle time of a rank
beside the formulas of the papers and beside the simulator, which is told the same times, jitter included:

    python -m tools.benchmark pipeline --schedule 1f1b,interleaved,zb_h1,zb_v --micro-batches 8,16
    python -m tools.benchmark pipeline --policy static,ready --jitter 0,0.3 --rounds 9 --ms 10,10,10

    step_ms, simulated_ms     from the start of the first action on any rank to the end of the last; the same on paper
    bubble_ms, formula_ms     the part of it in which a rank does not compute, mean over ranks; the same by formula
    busy_over_nominal         what ranks were busy for over what their stages slept: the executor's own time on top
    over_static_1f1b          step time over that of static 1F1B with the same draw of the jitter, if that is run too

Medians over rounds. Each round draws the jitter anew, for all cases alike.

Stages that do next to nothing, under this engine's executor and under torch.distributed.pipelining, taking turns.
Messages of this engine go through shared memory or over gloo, as torch's do:

    python -m tools.benchmark pipeline --against torch --schedule 1f1b,interleaved,zb_v --micro-batches 8,16
    python -m tools.benchmark pipeline --against torch --stage empty   (this engine alone: torch's cannot be empty)

    us_per_action             from the first rank's start to the last one's end, over a rank's F, B, I and W
    cpu_us_per_action         processor time of all threads of the rank that took most, over the same
    over_static               pass time over that of this engine, static, by the first carrier: median of neighbours

All start from the same barrier, which is neither program's. What memory they take, each case in ranks of its own, which
have run a pass over the same schedule with next to no activations before, so that none pays for what all need once:

    python -m tools.benchmark pipeline --against torch --memory --stage linear --rows 1024 --width 256 --passes 3

    grown_MiB                 resident memory at its most, beyond what it was before; of the rank that took most
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.errors import ConfigError
from parallel.pipeline import build_schedule
from parallel.pipeline.readiness import POLICIES, Policy
from parallel.process_group import World
from tools.benchmark.sleepers import Case, Pass
from tools.benchmark.table import Row, show
from tools.benchmark.toys import CARRIERS, STAGES, TORCH_SCHEDULES, Toy
from tools.benchmark.turns import Answer, Program, ProgramFailedError, Running, started
from tools.options import add_json, refusing, virtual_stages_of_each

SLEEPING = ("1f1b", "interleaved", "zb_h1", "zb_v")
_MIB = 2**20
Number = TypeVar("Number", int, float)


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    if world.size > 1:
        raise ConfigError("pipeline starts ranks of its own: run it without a launcher")
    options = _parser().parse_args(argv)
    if options.rounds < 1 or options.passes < 1:
        raise ConfigError(f"--rounds {options.rounds}, --passes {options.passes}: give at least 1")
    show(_against_torch(options) if options.against else _sleeping(options), options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.benchmark pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: object, text: str, **more: Any) -> None:
        text += f" (default {default})" if default is not None else ""
        parser.add_argument(name, default=default, help=text, **more)

    add("--schedule", None, "names, or .csv files, with commas between (default: those above)")
    add("--ranks", 4, "of the pipeline", type=int)
    add("--micro-batches", "8,16", "numbers with commas between")
    add("--virtual-stages", None, "of schedules that can be asked for them", type=int)
    add("--policy", "static", f"some of {','.join(POLICIES)}")
    add("--rounds", 5, "all cases in turn, so often", type=int)
    add("--ms", "40,40,40", "milliseconds of a rank's F, I and W of a micro-batch, all its stages together")
    add("--jitter", "0", "standard deviations, relative to the mean, with commas between")
    add("--speed", None, "of each rank, with commas between: it sleeps 1/speed of the times")
    parser.add_argument("--against", choices=["torch"], help="compare executors, with stages that do next to nothing")
    add("--stage", STAGES[0], f"that does next to nothing: one of {', '.join(STAGES)}", choices=STAGES)
    add("--carrier", ",".join(CARRIERS), "of our messages between these, with commas between")
    parser.add_argument("--memory", action="store_true", help="measure the memory of these instead")
    add("--rows", 4, "of what flows between these", type=int)
    add("--width", 8, "of these", type=int)
    add("--passes", 10, "in a row, after three that warm up", type=int)
    add_json(parser)
    return parser


def _list(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers with commas between") from None


@contextmanager
def _ranks(kinds: Sequence[str], count: int) -> Iterator[list[Running]]:
    programs = [
        Program(
            name=kind, interpreter=sys.executable, module="tools.benchmark.pipeline_ranks", ranks=count, threads=1,
            task={"kind": kind}, environment={},
        )
        for kind in kinds
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        try:
            with started(programs, Path(folder)) as running:
                yield running
        except ProgramFailedError as error:
            raise RuntimeError(str(error)) from error


# -- stages that sleep -------------------------------------------------------------------------------------------------


def _sleeping(options: argparse.Namespace) -> list[Row]:
    cases = _cases(options)
    with refusing():
        for case in cases:
            case.simulated()
    with _ranks(["sleepers"], options.ranks) as (ranks,):
        rounds = [[_pass(ranks, _drawn(case, number)) for case in cases] for number in range(options.rounds)]
    passes = {case: [row[n] for row in rounds] for n, case in enumerate(cases)}
    return [_sleeping_row(case, passes) for case in cases]


def _cases(options: argparse.Namespace) -> list[Case]:
    times = _list(options.ms, float, "--ms")
    if len(times) != 3:
        raise ConfigError(f"--ms {options.ms}: give three numbers, of F, I and W")
    f, i, w = (ms / 1000 for ms in times)
    stages = virtual_stages_of_each(_names(options, SLEEPING), options.virtual_stages)
    return [
        Case(
            schedule=name, ranks=options.ranks, micro_batches=m, policy=policy, jitter=jitter,
            virtual_stages=stages[name],
            forward=f, backward_input=i, backward_weight=w,
            speeds=tuple(_list(options.speed, float, "--speed")) if options.speed else None,
        )
        for jitter, m, name, policy in product(
            _list(options.jitter, float, "--jitter"), _list(options.micro_batches, int, "--micro-batches"),
            _names(options, SLEEPING), _policies(options),
        )
    ]  # fmt: skip


def _names(options: argparse.Namespace, default: Sequence[str]) -> Sequence[str]:
    return default if options.schedule is None else options.schedule.split(",")


def _policies(options: argparse.Namespace) -> list[Policy]:
    for policy in options.policy.split(","):
        if policy not in POLICIES:
            raise ConfigError(f"--policy {policy}: give some of {','.join(POLICIES)}")
    return list(options.policy.split(","))


def _drawn(case: Case, number: int) -> Case:
    return replace(case, seed=number) if case.jitter else case


def _pass(ranks: Running, case: Case) -> Pass:
    return Pass.of([answer["figures"] for answer in ranks.ask(asdict(case))])


def _sleeping_row(case: Case, passes: dict[Case, list[Pass]]) -> Row:
    def milliseconds(seconds: Sequence[float]) -> float:
        return 1000 * statistics.median(seconds)

    own = passes[case]
    simulated = [_drawn(case, number).simulated() for number in range(len(own))]
    idle = [statistics.fmean(timeline.bubble) for timeline in simulated]
    nominal = [timeline.makespan - i for timeline, i in zip(simulated, idle, strict=True)]
    bubble, formula = milliseconds([one.idle for one in own]), case.formula
    base = passes.get(replace(case, schedule="1f1b", policy="static", virtual_stages=None))
    return {
        "schedule": case.schedule,
        "policy": case.policy,
        "ranks": case.ranks,
        "micro_batches": case.micro_batches,
        "jitter": case.jitter,
        "step_ms": milliseconds([one.seconds for one in own]),
        "simulated_ms": milliseconds([timeline.makespan for timeline in simulated]),
        "bubble_ms": bubble,
        "simulated_bubble_ms": milliseconds(idle),
        "formula_ms": None if formula is None else 1000 * formula,
        "bubble_over_formula": None if formula is None else bubble / (1000 * formula),
        "busy_over_nominal": _ratio([one.seconds - one.idle for one in own], nominal),
        "step_over_simulated": _ratio([one.seconds for one in own], [timeline.makespan for timeline in simulated]),
        "over_static_1f1b": base and _ratio([one.seconds for one in own], [one.seconds for one in base]),
    }


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


# -- stages that do next to nothing ------------------------------------------------------------------------------------


def _against_torch(options: argparse.Namespace) -> list[Row]:
    names = _names(options, TORCH_SCHEDULES)
    if strange := [name for name in names if name not in TORCH_SCHEDULES]:
        raise ConfigError(f"--schedule {','.join(strange)}: torch is compared in {', '.join(TORCH_SCHEDULES)}")
    stages = virtual_stages_of_each(names, options.virtual_stages)
    toys = [
        Toy(
            schedule=name, micro_batches=m, virtual_stages=stages[name],
            rows=options.rows, width=options.width, stage=options.stage,
        )
        for name, m in product(names, _list(options.micro_batches, int, "--micro-batches"))
    ]  # fmt: skip
    with refusing():
        for toy in toys:
            build_schedule(toy.schedule, options.ranks, toy.micro_batches, toy.virtual_stages)
    sides = _sides(options)
    return _memory(options, toys, sides) if options.memory else _times(options, toys, sides)


class _Side(NamedTuple):
    """What runs a toy: a program, and how."""

    kind: str
    policy: Policy
    carrier: str

    def of(self, toy: Toy) -> Toy:
        """As this side runs it."""
        return replace(toy, policy=self.policy, carrier=self.carrier)

    @property
    def row(self) -> Row:
        """In the table."""
        name = self.kind if self.kind == "torch" else f"{self.kind} {self.policy}"
        return {"program": name, "carrier": self.carrier.replace("_", " ")}


def _sides(options: argparse.Namespace) -> list[_Side]:
    """Ours first, static by the first carrier: what others are compared with."""
    carriers = options.carrier.split(",")
    if not set(carriers) <= set(CARRIERS):
        raise ConfigError(f"--carrier {options.carrier}: give some of {','.join(CARRIERS)}")
    policies: list[Policy] = ["static", *(policy for policy in _policies(options) if policy != "static")]
    sides = [_Side("vitruvius", policy, carrier) for carrier in carriers for policy in policies]
    return sides if options.stage == "empty" else [*sides, _Side("torch", "static", "gloo")]


def _times(options: argparse.Namespace, toys: Sequence[Toy], sides: Sequence[_Side]) -> list[Row]:
    kinds = list(dict.fromkeys(side.kind for side in sides))
    with _ranks(kinds, options.ranks) as running:
        by = dict(zip(kinds, running, strict=True))
        rounds = [
            {(toy, side): _toy_pass(by[side.kind], side.of(toy), options.passes) for toy in toys for side in sides}
            for _ in range(options.rounds)
        ]
    return [_time_row(options, toy, side, rounds, sides[0]) for toy in toys for side in sides]


def _toy_pass(ranks: Running, toy: Toy, passes: int) -> Answer:
    """Seconds of all ranks together, the rest of the dearest in all."""
    answers = ranks.ask({"toy": asdict(toy), "passes": passes})
    spans = [list(zip(*each, strict=True)) for each in zip(*(answer["spans"] for answer in answers), strict=True)]
    return {
        "seconds": statistics.median(max(ends) - min(starts) for starts, ends in spans),
        "cpu": max(answer["cpu"] for answer in answers) / passes,
        "grown": max(answer["grown"] for answer in answers),
    }


def _time_row(
    options: argparse.Namespace, toy: Toy, side: _Side, rounds: list[dict[tuple[Toy, _Side], Answer]], first: _Side
) -> Row:
    schedule = build_schedule(toy.schedule, options.ranks, toy.micro_batches, toy.virtual_stages)
    actions = sum(action.kind.is_compute for action in schedule.ranks[0])
    own, base = ([row[toy, one] for row in rounds] for one in (side, first))
    seconds = statistics.median(one["seconds"] for one in own)
    return {
        **_toy_row(options, toy, side),
        "pass_ms": 1e3 * seconds,
        "actions_per_rank": actions,
        "us_per_action": 1e6 * seconds / actions,
        "cpu_us_per_action": 1e6 * statistics.median(one["cpu"] for one in own) / actions,
        "over_static": _ratio([one["seconds"] for one in own], [one["seconds"] for one in base]),
    }


def _toy_row(options: argparse.Namespace, toy: Toy, side: _Side) -> Row:
    return {"schedule": toy.schedule, "ranks": options.ranks, "micro_batches": toy.micro_batches, **side.row}


def _memory(options: argparse.Namespace, toys: Sequence[Toy], sides: Sequence[_Side]) -> list[Row]:
    def grown(toy: Toy, side: _Side) -> float:
        with _ranks([side.kind], options.ranks) as (ranks,):
            _toy_pass(ranks, replace(side.of(toy), rows=1), 1)
            return float(_toy_pass(ranks, side.of(toy), options.passes)["grown"]) / _MIB

    return [{**_toy_row(options, toy, side), "grown_MiB": grown(toy, side)} for toy in toys for side in sides]
