"""`python -m tools.benchmark predictions`: what the plan says of runs, held against runs.

Draws --count configurations by --seed (layouts of one to four ranks, models, formats, schedules, policies), and
--rivals of one model and global batch on two ranks; runs each for a few steps in processes of its own, with a thread
per rank, and compares the peak of every rank, and the time of a step on the machine of --cluster, with what is
predicted; and the plan's first choice among the rivals with the quickest of them. Measurements go to --json, a line
each, and are not taken again: predictions are made anew each time. What a rank measures is told in
tools.benchmark.prediction_ranks.

    python -m tools.plan --measure --out this.yaml
    python -m tools.benchmark predictions --seed 0 --rivals 10 --cluster this.yaml --json predictions.jsonl

Memory can be measured whatever else the machine does, times cannot: --measure memory, then --measure time. How well
times can be known at all is told by measuring them again, into another file: with it as --repeat, steps of both count,
and its times are held against the first as predictions are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine.clusters import Cluster, read_cluster
from engine.errors import EXIT_DONE, EXIT_FAULT, ConfigError
from engine.run.provenance import commit
from parallel.process_group import World
from tools.benchmark.draws import Draw, draw, named, rival
from tools.benchmark.prediction_errors import about, budget_of, repeated, row, summary, together
from tools.benchmark.table import Row, show, show_markdown
from tools.benchmark.turns import Program, ProgramFailedError, started
from tools.options import COUNT, number
from tools.places import check_place

KINDS = ("memory", "time")
Known = dict[str, dict[str, Row]]
"""Measurements by the name of the draw and their kind."""


def main(argv: Sequence[str], world: World) -> int:
    """Measure what is missing, predict, print; returns the exit code: a run that failed is a fault."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark predictions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = number(COUNT)
    parser.add_argument("--count", type=count, default=30, help="configurations (default 30)")
    parser.add_argument("--rivals", type=int, default=0, help="of one model, on two ranks (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--measure", nargs="*", choices=KINDS, default=KINDS, help="what is missing (default: both)")
    parser.add_argument("--steps", type=count, default=3, help="measured steps of each, after one more (default 3)")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="of this machine, for times: tools.plan --measure")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="draws, such as 3 'rival 7', instead of all")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="measurements; what is there is kept")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="the same measured another time, as --json")
    parser.add_argument("--list", action="store_true", help="show what is drawn, and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print the table for a page of documentation")
    options = parser.parse_args(argv)
    if world.size > 1:
        raise ConfigError("predictions starts ranks of its own: run it without a launcher")
    check_place(options.json)
    draws = _draws(options)
    if options.list:
        show([about(one) for one in draws])
        return EXIT_DONE
    cluster = None if options.cluster is None else read_cluster(str(options.cluster))
    known = read(options.json, options.seed)
    failed = _measure_missing(draws, known, options)
    again = {} if options.repeat is None else read(options.repeat, options.seed)
    _report(draws, known, again, cluster, markdown=options.markdown)
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return EXIT_FAULT if failed else EXIT_DONE


def _draws(options: argparse.Namespace) -> list[Draw]:
    if options.only:
        try:
            return [named(options.seed, name) for name in options.only]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"--only {' '.join(options.only)}: give names as in the table: 3 'rival 7'") from error
    every = [draw(options.seed, n) for n in range(options.count)]
    return every + [rival(options.seed, n) for n in range(options.rivals)]


def _report(draws: Sequence[Draw], known: Known, again: Known, cluster: Cluster | None, *, markdown: bool) -> None:
    both = {name: together(kinds, again.get(name, {})) for name, kinds in known.items()}
    rows = [row(one, both[one.name], cluster) for one in draws if known.get(one.name)]
    if not rows:
        return
    (show_markdown if markdown else show)(rows)
    print("", *summary(rows), *repeated(known, again), sep="\n")
    lines = [line for of_draw in known.values() for line in of_draw.values()]
    print(f"measured at commits {', '.join(sorted({line['commit'] for line in lines}))}")


# -- measuring ---------------------------------------------------------------------------------------------------------


def read(path: Path, seed: int) -> Known:
    """The measurements of a file.

    Raises:
        ConfigError: lines that are none, or of other draws than this program's.
    """
    known: Known = {}
    for place, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            found = json.loads(line)
            of, kind, ranks = found["draw"], found["kind"], found["ranks"]
            same = found["seed"] == seed and found["keys"] == named(seed, of).keys and kind in KINDS and bool(ranks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: line {place} is no measurement: give another --json") from error
        if not same:
            raise ConfigError(f"{path}: line {place} is of another seed, or of other draws: give another --json")
        known.setdefault(of, {})[kind] = found
    return known


def _measure_missing(draws: Sequence[Draw], known: Known, options: argparse.Namespace) -> dict[str, str]:
    """Run what is not known, and write it down; returns what failed, with the reason."""
    failed = dict[str, str]()
    for one, kind in ((one, kind) for one in draws for kind in options.measure):
        if kind in known.get(one.name, {}):
            continue
        print(f"{kind} of draw {one.name}: {' '.join(one.flags)}", file=sys.stderr)
        try:
            ranks = measure(one, options.steps if kind == "time" else None)
        except ProgramFailedError as error:
            failed[f"{kind} of draw {one.name}"] = str(error)
            continue
        line = {"seed": options.seed, "draw": one.name, "kind": kind, "commit": commit(), "keys": one.keys}
        with options.json.open("a") as file:
            file.write(json.dumps(line | {"ranks": ranks}) + "\n")
        known.setdefault(one.name, {})[kind] = line | {"ranks": ranks}
    return failed


def measure(one: Draw, steps: int | None) -> list[Row]:
    """What each rank of a run says: of its memory, or with `steps` of the time of so many."""
    budget = [f"--recompute.memory_budget={budget_of(one)}"] if one.share is not None else []
    program = Program(
        name=f"draw {one.name}",
        interpreter=sys.executable,
        module="tools.benchmark.prediction_ranks",
        ranks=one.ranks,
        threads=1,  # as tools.plan --measure has it on a CPU
        task={"flags": [*one.flags, *budget], **({"tiny": one.tiny_flags} if steps is None else {"steps": steps})},
        environment={},
    )
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder, started([program], Path(folder)) as running:
        return running[0].ask({})
