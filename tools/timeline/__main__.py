"""`python -m tools.timeline RUN`: a picture of a step of a run, measured and simulated (`log.profile_steps` records).

`python -m tools.timeline --schedule zb_v --ranks 4 --micro-batches 8`: of a schedule, without any run. Several names,
with commas, are drawn below each other, on one scale.

RUN is a run directory, or its profile/timeline.json. It is drawn to RUN/timeline.png, a schedule to NAME-4x8.png here.

Exit codes: 0 done, 2 there is nothing to draw, or the picture cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from engine.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from engine.run.trace_events import COMPUTE, SIMULATED, process_events, simulated_events
from parallel.pipeline import SCHEDULES, Costs, Timeline, build_schedule, simulate, to_csv, with_recompute
from parallel.pipeline.readiness import POLICIES
from parallel.pipeline.schedule_file import is_schedule_file, read_schedule
from tools.options import COUNT, cost, number, refusing, virtual_stages_of_each
from tools.places import check_place
from tools.timeline.picture import Panel, simulated_panel
from tools.timeline.read import choose_step, panels_of, read, source_of

_MOST_ACTIONS = 200_000  # in a picture
_OF_A_RUN = {"step": None, "rank": None}
_OF_A_SCHEDULE = {
    "ranks": None, "micro_batches": None, "virtual_stages": None, "policy": "static", "forward": 1.0, "input": 1.0,
    "weight": 1.0, "recompute": 0.0, "ahead": 1, "latency": 0.0, "jitter": 0.0, "seed": 0, "trace": None, "csv": None,
    "text": False,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Draw and print where. Returns the exit code. Raises ConfigError."""
    options = _options(argv)
    if options.run is not None:
        _draw_run(options)
    else:
        _draw_schedules(options)
    return EXIT_DONE


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.timeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", type=Path, help="a run directory, or its timeline.json")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where to draw to")
    run = parser.add_argument_group("of a run")
    run.add_argument("--step", type=number(COUNT), help="default: the last that torch's profiler did not slow")
    run.add_argument(
        "--rank",
        type=number(COUNT._replace(least=0)),
        help="draw the pipeline of this rank (default: rank 0's)",
    )
    one = parser.add_argument_group("of a schedule")
    one.add_argument("--schedule", metavar="NAME,...", help=f"of {', '.join(SCHEDULES)}, or files ending in .csv")
    one.add_argument("--ranks", type=number(COUNT), help="of the pipeline (default: a file's, or 4)")
    one.add_argument("--micro-batches", type=number(COUNT), help="per step (default: a file's, or 8)")
    one.add_argument("--virtual-stages", type=number(COUNT), help="stages per rank, of interleaved (default: 2)")
    one.add_argument("--policy", choices=POLICIES, help="default: static")
    for name, field, what in (
        ("forward", "forward", "forward"), ("input", "backward_input", "gradient of the inputs"),
        ("weight", "backward_weight", "that of the weights"),
    ):  # fmt: skip
        one.add_argument(f"--{name}", type=cost(field), metavar="T", help=f"time of a rank's {what} (default: 1)")
    one.add_argument(
        "--recompute", type=cost("recompute"), metavar="T", help="of what was dropped, before its backward (default: 0)"
    )
    one.add_argument(
        "--ahead", type=number(COUNT._replace(least=0)),
        help="micro-batches of a rank recomputed before their gradients come, where it waits (default: 1)",
    )  # fmt: skip
    one.add_argument("--latency", type=cost("latency"), metavar="T", help="of a message (default: 0)")
    one.add_argument("--jitter", type=cost("jitter"), help="standard deviation of times, as a share (default: 0)")
    one.add_argument("--seed", type=cost("seed"), help="of the jitter")
    one.add_argument("--trace", type=Path, metavar="JSON", help="write a Chrome trace, too: a unit of time is 1 ms")
    one.add_argument("--csv", type=Path, metavar="FILE", help="write it, too, for parallel.schedule; messages left out")
    one.add_argument("--text", action="store_true", default=None, help="print it as text instead of drawing it")
    options = parser.parse_args(argv)
    if (options.run is None) == (options.schedule is None):
        parser.error("give a RUN or --schedule, one of the two")
    others, what = (_OF_A_SCHEDULE, "--schedule") if options.run is not None else (_OF_A_RUN, "a RUN")
    if given := [name for name in others if getattr(options, name) is not None]:
        parser.error(f"--{given[0].replace('_', '-')} goes with {what}")
    for name, value in _OF_A_SCHEDULE.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.csv is not None and "," in (options.schedule or ""):
        parser.error("--csv writes one schedule: name one")
    if options.text and options.out is not None:
        parser.error("--text draws nothing: leave out --out")
    return options


def _draw_run(options: argparse.Namespace) -> None:
    from tools.figures import check_place as check_picture  # matplotlib: half a second

    source = source_of(options.run)
    folder = source.parent if source.is_file() else source
    home = folder.parent if folder.name == "profile" else folder
    place = check_picture(options.out or home / "timeline.png")
    recorded = read(source)
    step = choose_step(recorded, options.step)
    rank = options.rank or 0
    grid, schedule = recorded.told["grid"], recorded.told["schedule"]
    if rank >= grid["pipeline"] * grid["data"] * grid["context"] * grid["tensor"]:
        raise ConfigError(f"--rank {rank} is none of the run's ranks")
    panels = panels_of(recorded, step, rank)
    name = str(home if home.name else home.resolve())
    policy = ", policy ready" if schedule["policy"] == "ready" else ""
    size = ", ".join(f"{axis} {count}" for axis, count in grid.items() if count > 1) or "one rank"
    _save(panels, f"{name}, step {step}: {schedule['name']}{policy}; {size}", "milliseconds", place)


def _draw_schedules(options: argparse.Namespace) -> None:
    names = [name.strip() for name in options.schedule.split(",")]
    for path in filter(None, (options.trace, options.csv)):
        check_place(path)
    if options.csv is not None and not is_schedule_file(options.csv.name):
        raise ConfigError(f"--csv {options.csv}: parallel.schedule takes files that end in .csv: give such a name")
    with refusing():
        options.ranks, options.micro_batches = _sizes(names, options)
        stages = virtual_stages_of_each(names, options.virtual_stages)
        timelines = [_simulated(name, options, stages[name]) for name in names]
    if options.text:
        for name, timeline in zip(names, timelines, strict=True):
            print(*([f"{name}:"] if len(names) > 1 else []), timeline, sep="\n")
    if options.trace is not None:
        _write_trace(timelines, options.trace)
    if options.csv is not None:
        _write_csv(timelines[0], options.csv)
    if options.text:
        return
    from tools.figures import check_place as check_picture

    sizes = f"{options.ranks}x{options.micro_batches}"
    stem = "+".join(Path(name).stem for name in names)
    place = check_picture(options.out or Path(f"{stem}-{sizes}.png"))
    panels = [simulated_panel(t, Path(name).name) for name, t in zip(names, timelines, strict=True)]
    if len(panels) == 1:
        panels = [Panel(title=panels[0].note, note="", lanes=panels[0].lanes)]
    policy = ", policy ready" if options.policy == "ready" else ""
    jitter = f", times vary by {100 * options.jitter:g} %" if options.jitter else ""
    files = ", ".join(Path(name).name for name in names)
    size = f"{_count(options.ranks, 'rank')}, {_count(options.micro_batches, 'micro-batch')}"
    title = f"{files}: {size}{policy}{jitter}"
    costs = f"F = {options.forward:g}, I = {options.input:g}, W = {options.weight:g}"
    costs += f", R = {options.recompute:g}" if options.recompute else ""
    message = f", a message {options.latency:g}" if options.latency else ""
    _save(panels, title, f"time, where a rank's whole share of a micro-batch takes {costs}{message}", place)


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural * (number != 1)}"


def _sizes(names: Sequence[str], options: argparse.Namespace) -> tuple[int, int]:
    """Ranks and micro-batches: as given, else those of the first file, else a few."""
    ranks, micro_batches = options.ranks, options.micro_batches
    file = next(filter(is_schedule_file, names), None)
    if file is None or (ranks and micro_batches):
        return ranks or 4, micro_batches or 8
    schedule = read_schedule(file, ranks, micro_batches)
    return schedule.num_ranks, schedule.num_micro_batches


def _simulated(name: str, options: argparse.Namespace, virtual_stages: int | None) -> Timeline:
    least = 2 * options.ranks * options.micro_batches
    if least > _MOST_ACTIONS and not options.text:
        raise ConfigError(f"{name} has at least {least} actions: a picture shows {_MOST_ACTIONS}; ask for less")
    schedule = build_schedule(name, options.ranks, options.micro_batches, virtual_stages)
    costs = Costs.of_ranks(
        schedule, forward=options.forward, backward_input=options.input, backward_weight=options.weight,
        recompute=options.recompute, latency=options.latency, jitter=options.jitter, seed=options.seed,
    )  # fmt: skip
    if options.ahead and not schedule.recomputes:
        schedule = with_recompute(schedule, replace(costs, jitter=0.0), ahead=options.ahead)
    return simulate(schedule, costs, options.policy)


def _write_trace(timelines: Sequence[Timeline], path: Path) -> None:
    """The simulated schedules as processes of one Chrome trace."""
    events, first = [], 0
    for timeline in timelines:
        shift = SIMULATED + first
        for event in simulated_events(timeline.ranks, 1, 0.0, unit=1e3):
            events.append(event | {"pid": event["pid"] + first})
        names = (
            process_events(shift + rank, f"{timeline.schedule.name}, rank {rank}", (COMPUTE,))
            for rank in range(len(timeline.ranks))
        )
        events += chain.from_iterable(names)
        first += len(timeline.ranks)
    _write(path, json.dumps({"displayTimeUnit": "ms", "traceEvents": events}), "--trace")


def _write_csv(timeline: Timeline, path: Path) -> None:
    """What ran, in the order in which it ran: by `--policy ready` that is the order that fits these times."""
    _write(path, to_csv(replace(timeline.schedule, ranks=tuple(map(tuple, timeline.programs)))), "--csv")


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}") from error
    print(path)


def _save(panels: Sequence[Panel], title: str, unit: str, place: Path) -> None:
    from tools.figures import save, style
    from tools.timeline.draw import draw

    with style():
        save(draw(panels, title=title, unit=unit), place)
    print(place)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"tools.timeline: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
