r"""`python -m tools.benchmark recompute`: step time over memory of activations, ours against torch's checkpointing.

Our save sets against torch.utils.checkpoint of whole blocks (all, or each n-th) and its selective form, on the same
model mathematics, weights, images, threads, allocator settings and matrix library. All ways take turns, step by step,
in one process (of each rank); what counts is the median of ratios within a round. Memory is each way's in a process of
its own: of activations, what a step takes beside weights, gradients and optimizer state; and the whole process's peak
less imports.

    python -m tools.benchmark recompute --model.preset vit_b16 --train.global_batch_size 16 --picture front.png

--ours takes values of recompute.policy with semicolons between them, such as 'none; fc1 * 6, norm * 6; auto 0.3; full':
with auto the share of what policy none is planned to take beyond full that the budget leaves; --theirs some of torch's
with commas, or nothing. In a layout that torch's checkpointing knows nothing of (tensor, pipeline, context, several
micro-batches) ours alone are measured; over data ranks it has DDP.

Memory is the same whatever else the machine does: --memory FILE keeps what was measured, with the save sets that auto
has chosen, and --memory-only stops then, so that times can be taken later, when the machine is quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.errors import ConfigError
from engine.recompute.config import RecomputeConfig
from parallel.process_group import World
from tools.benchmark.bench import read_config
from tools.benchmark.front import Point, at_every_budget, draw, verdicts
from tools.benchmark.peer_coordinator import ALLOCATOR, check_plain
from tools.benchmark.peer_inputs import make_task
from tools.benchmark.peer_programs import Task
from tools.benchmark.prediction_errors import budget_between
from tools.benchmark.recompute_theirs import WAYS
from tools.benchmark.table import Row, show
from tools.benchmark.timing import quartiles
from tools.benchmark.turns import Answer, Program, ProgramFailedError, Running, started
from tools.options import COUNT, add_json, number
from tools.places import check_place

WARMUP = 1
_MIB = 2**20
_MODULES = {
    "ours": ["tools.benchmark.peer_vitruvius", "engine.recompute.assignment"],
    "theirs": ["tools.benchmark.peer_torch", "tools.benchmark.recompute_theirs"],
}
_OURS = ("none", "auto 0.8", "auto 0.6", "auto 0.4", "auto 0.25", "auto 0.1", "full")
_AUTO = "auto "


@dataclass
class Way:
    """One program run in one way.

    Attributes:
        name: in the table; of ours a value of recompute.policy, or auto with a share. how: what a process of all ways
            is told; of ours a value of recompute.policy.
        seconds: of its steps, the slowest rank's. losses: of each step.
        activations, above_imports: bytes of the largest rank.
    """

    program: str
    name: str
    how: Any
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    activations: int = 0
    above_imports: int = 0

    def message(self, step: int, **more: Any) -> Answer:
        """For a process of its program."""
        return {"program": self.program, "way": self.how, "step": step} | more


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are those of pretrain_vit.py."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark recompute", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = number(COUNT)
    parser.add_argument("--ranks", type=count, default=1, help="processes of a layout (default 1)")
    parser.add_argument("--rounds", type=count, default=7, help="measured rounds, a step of each way (default 7)")
    parser.add_argument("--ours", default="", help="values of recompute.policy, with semicolons between them")
    parser.add_argument("--theirs", default=",".join(WAYS), help=f"torch's (default all: {','.join(WAYS)})")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the front of time over memory there, as PNG")
    parser.add_argument("--memory", type=Path, metavar="FILE", help="keep what is measured of memory, and use it")
    parser.add_argument("--memory-only", action="store_true", help="measure no time")
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    if options.memory is not None:
        check_place(options.memory)
    if world.size > 1:
        raise ConfigError("recompute starts ranks of its own: run it without a launcher, with --ranks")
    if options.picture is not None:
        from tools import figures  # takes half a second

        figures.check_place(options.picture)
    config = read_config([*flags, "--optimizer.clip_grad", "0"]).resolve(options.ranks)
    check_plain(config)
    ways = [*_ours(options.ours, config), *_theirs(options.theirs, config, options.ranks)]
    with tempfile.TemporaryDirectory(prefix="recompute-") as name:
        flags = [*flags, "--optimizer.clip_grad", "0"]
        task = make_task(config, config.grid_shape(options.ranks).data, flags, Path(name))
        try:
            _measure_all_memory(ways, config, task, options, Path(name))
            if options.memory_only:
                show([_memory_of(way) for way in ways])
                return
            _measure_time(ways, task, options.ranks, options.rounds, Path(name))
        except ProgramFailedError as error:
            raise ConfigError(str(error)) from error
    report(ways, config, options)


# -- ways --------------------------------------------------------------------------------------------------------------


def _ours(text: str, config: Config) -> list[Way]:
    depth = config.model.sizes.depth
    names = [name.strip() for name in text.split(";")] if text else _OURS
    for name in names:
        try:
            if name.startswith(_AUTO):
                RecomputeConfig(policy="auto", memory_budget=float(name.removeprefix(_AUTO)))
            else:
                RecomputeConfig(policy=name).sets(depth)
        except ValueError as error:
            raise ConfigError(f"--ours {name}: {error}") from error
    return [Way("ours", name, name) for name in names]


def _theirs(text: str, config: Config, ranks: int) -> list[Way]:
    names = text.split(",") if text else []
    if strange := [name for name in names if name not in WAYS]:
        raise ConfigError(f"--theirs {','.join(strange)}: take some of {', '.join(WAYS)}, or nothing")
    shape = config.grid_shape(ranks)
    if names and (shape.data != ranks or config.num_micro_batches(shape) > 1):
        print(f"recompute: torch's ways are left out: grid {'x'.join(map(str, shape.sizes))}, micro-batches")
        return []
    return [Way("theirs", name, name) for name in names]


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextmanager
def _running(programs: Sequence[str], task: Task, ranks: int, folder: Path) -> Iterator[Running]:
    modules = [module for name in programs for module in _MODULES[name]]
    program = Program(
        name="+".join(programs),
        interpreter=sys.executable,
        module="tools.benchmark.recompute_ranks",
        ranks=ranks,
        threads=max(1, len(os.sched_getaffinity(0)) // ranks),
        task={"task": asdict(task), "programs": list(programs), "imports": modules},
        environment=ALLOCATOR,
    )
    with started([program], folder) as running:
        yield running[0]


def _measure_all_memory(
    ways: Sequence[Way], config: Config, task: Task, options: argparse.Namespace, folder: Path
) -> None:
    """Of each way, unless the file of --memory has it."""
    known = read_memory(options.memory)
    for way in ways:
        key = json.dumps([way.program, way.name, options.ranks, task.flags])
        if key not in known:
            known[key] = _measure_memory(way, config, task, options.ranks, folder)
            if options.memory is not None:
                with options.memory.open("a") as file:
                    file.write(json.dumps([key, known[key]]) + "\n")
        way.how, way.activations, way.above_imports = known[key]


def read_memory(path: Path | None) -> dict[str, list[Any]]:
    """How a way is run, bytes of activations, bytes above imports, by what was measured.

    Raises:
        ConfigError: lines that are none of this.
    """
    known = dict[str, list[Any]]()
    for place, line in enumerate(path.read_text().splitlines() if path is not None and path.exists() else [], 1):
        try:
            key, (how, activations, above_imports) = json.loads(line)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: line {place} is no measurement of memory: give another --memory") from error
        known[key] = [how, activations, above_imports]
    return known


def _measure_memory(way: Way, config: Config, task: Task, ranks: int, folder: Path) -> list[Any]:
    """Two steps as they are, for the peak of the process; then one of which that of the activations is measured."""
    flags = [*task.flags, *_own_flags(way, config, ranks)]
    how = None if way.program == "ours" else way.how
    with _running([way.program], replace(task, flags=flags), ranks, folder) as running:
        for step in range(2):
            answers = running.ask(way.message(step, way=how))
        above_imports, sets = (
            max(answer["peak_bytes"] - answer["imports_bytes"] for answer in answers),
            answers[0]["sets"],
        )
        answers = running.ask(way.message(2, way=how, measure=True))
        activations = max(answer["activation_bytes"] for answer in answers)
    return [", ".join(sets) if way.name.startswith(_AUTO) else way.how, activations, above_imports]


def _memory_of(way: Way) -> Row:
    bytes_of = {"activations_MiB": way.activations / _MIB, "above_imports_MiB": way.above_imports / _MIB}
    return {"program": way.program, "way": way.name, **bytes_of, "save_sets": way.how}


def _own_flags(way: Way, config: Config, ranks: int) -> list[str]:
    if way.program != "ours":
        return []
    if not way.name.startswith(_AUTO):
        return [f"--recompute.policy={way.name}"]
    budget = budget_between(config, config.grid_shape(ranks), float(way.name.removeprefix(_AUTO)))
    return ["--recompute.policy=auto", f"--recompute.memory_budget={budget}"]


def _measure_time(ways: Sequence[Way], task: Task, ranks: int, rounds: int, folder: Path) -> None:
    """One step of each way per round, every other round backwards. Weights are left as they are, since the ways share
    them: so losses of the same step must agree.
    """
    task = replace(task, lr=0.0, flags=[*task.flags, "--recompute.policy", "full"])
    with _running(list({way.program: None for way in ways}), task, ranks, folder) as running:
        for round_ in range(WARMUP + rounds):
            for way in ways if round_ % 2 else ways[::-1]:
                answers = running.ask(way.message(round_))
                way.seconds.append(max(answer["seconds"] for answer in answers))
                way.losses.append(statistics.fmean(answer["loss"] for answer in answers))
    for way in ways:
        del way.seconds[:WARMUP]


# -- what is reported --------------------------------------------------------------------------------------------------


def report(ways: Sequence[Way], config: Config, options: argparse.Namespace) -> None:
    """Table, verdicts, files."""
    points = [
        Point(
            name=way.name,
            is_ours=way.program == "ours",
            seconds=tuple(way.seconds),
            memory={"activations": way.activations / _MIB, "above_imports": way.above_imports / _MIB},
        )
        for way in ways
    ]
    rows = [_row(way, ways, config, options.ranks) for way in ways]
    for measure in points[0].memory:
        found = verdicts(points, measure)
        for row in rows:
            row[f"dominated_by_{measure}"] = found.get(row["way"]) if row["program"] == "theirs" else None
    show(rows, options.json)
    for measure in points[0].memory:
        found = verdicts(points, measure)
        lost = [name for name, by in found.items() if by is None]
        if found:
            print(f"{measure}: ours dominates {len(found) - len(lost)} of {len(found)}; not {', '.join(lost) or '-'}")
            print(f"{measure}: {at_every_budget(points, measure)}")
    if points[0].is_ours:
        print(at_half(points))
    if options.picture is not None:
        draw(points, options.picture, f"{rows[0]['model']}, {rows[0]['global_batch']} images, {rows[0]['dtype']}")
        print(f"recompute: the picture is {options.picture}")


def at_half(points: Sequence[Point]) -> str:
    """In words, the fastest of ours with half the activations of the first, beside that and beside the smallest."""
    first, ours = points[0], [point for point in points if point.is_ours]
    small = min(ours, key=lambda one: one.memory["activations"])
    fits = [one for one in ours if 2 * one.memory["activations"] <= first.memory["activations"]]
    if not fits:
        return f"no way of ours takes half of the activations of {first.name}"
    best = min(fits, key=lambda one: one.time_over(first))
    return (
        f"with half of the activations of {first.name}: {best.name} ({best.memory['activations']:.0f} of "
        f"{first.memory['activations']:.0f} MiB) takes {best.time_over(first):.3f} of its time, and has "
        f"{small.time_over(best):.3f} times the throughput of {small.name}"
    )


def _row(way: Way, ways: Sequence[Way], config: Config, ranks: int) -> Row:
    first = ways[0]
    ratios = [a / b for a, b in zip(way.seconds, first.seconds, strict=True)]
    low, high = quartiles(ratios)
    images = config.train.global_batch_size
    return {
        "model": config.model.preset or f"{config.model.width}x{config.model.depth}",
        "program": way.program,
        "way": way.name,
        "ranks": ranks,
        "global_batch": images,
        "dtype": config.precision.dtype,
        "step_time_ms": 1000 * statistics.median(way.seconds),
        "images_per_second": images / statistics.median(way.seconds),
        f"time_over_{first.name}": statistics.median(ratios),
        "lower_quartile": low,
        "upper_quartile": high,
        "activations_MiB": way.activations / _MIB,
        "activations_over_first": way.activations / first.activations,
        "above_imports_MiB": way.above_imports / _MIB,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(way.losses, first.losses, strict=True)),
    }
