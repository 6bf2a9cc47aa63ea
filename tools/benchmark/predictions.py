"""`python -m tools.benchmark predictions`: what the plan says of a run, held against runs.

Draws --count configurations by --seed (layouts of one to four ranks, models, formats, schedules, policies), runs each
for a few steps in processes of its own, and compares the peak of every rank with what tools.plan predicts for it.
Measurements go to --json, a line each, and are not taken again: predictions are made anew each time. What a rank
measures is told in tools.benchmark.prediction_ranks.

    python -m tools.benchmark predictions --count 30 --seed 0 --json predictions.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import EXIT_DONE, EXIT_FAULT, ConfigError
from engine.plan import MemoryPlan, plan_memory
from engine.run.provenance import commit
from parallel.process_group import World
from tools.benchmark.draws import Draw, draw
from tools.benchmark.prediction_ranks import PAGES_OF_THEIR_OWN
from tools.benchmark.table import Row, show
from tools.benchmark.turns import Program, ProgramFailedError, started
from tools.options import COUNT, number
from tools.places import check_place

_MIB = 2**20
_SHARED = "shared memory"
"""What a plan calls the memory through which ranks of a host talk; where it does not count it, neither do we."""


def main(argv: Sequence[str], world: World) -> int:
    """Measure what is missing, predict, print; returns the exit code: a run that failed is a fault."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark predictions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = number(COUNT)
    parser.add_argument("--count", type=count, default=30, help="configurations (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--steps", type=count, default=3, help="measured steps of each, after one more (default 3)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of draws, instead of --count of them from 0")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="measurements; what is there is kept")
    parser.add_argument("--list", action="store_true", help="show what is drawn, and run nothing")
    options = parser.parse_args(argv)
    if world.size > 1:
        raise ConfigError("predictions starts ranks of its own: run it without a launcher")
    check_place(options.json)
    draws = [draw(options.seed, n) for n in options.only or range(options.count)]
    if options.list:
        show([_about(one) for one in draws])
        return EXIT_DONE
    known = read(options.json, options.seed)
    failed = _measure_missing(draws, known, options)
    rows = [row(one, known[one.number]) for one in draws if one.number in known]
    if rows:
        show(rows)
        print(summary(rows))
        print(f"measured at commits {', '.join(sorted({line['commit'] for line in known.values()}))}")
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return EXIT_FAULT if failed else EXIT_DONE


# -- measuring ---------------------------------------------------------------------------------------------------------


def read(path: Path, seed: int) -> dict[int, Row]:
    """The measurements of a file, by the number of the draw.

    Raises:
        ConfigError: lines that are none, or of other draws than this program's.
    """
    known = dict[int, Row]()
    for place, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            found = json.loads(line)
            same = found["seed"] == seed and found["keys"] == draw(seed, found["number"]).keys
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: line {place} is no measurement: give another --json") from error
        if not same:
            raise ConfigError(f"{path}: line {place} is of another seed, or of other draws: give another --json")
        known[found["number"]] = found
    return known


def _measure_missing(draws: Sequence[Draw], known: dict[int, Row], options: argparse.Namespace) -> dict[str, str]:
    """Run what is not known, and write it down; returns what failed, with the reason."""
    failed = dict[str, str]()
    for one in draws:
        if one.number in known:
            continue
        print(f"draw {one.number}: {' '.join(one.flags)}", file=sys.stderr)
        try:
            ranks = measure(one, options.steps)
        except ProgramFailedError as error:
            failed[f"draw {one.number}"] = str(error)
            continue
        line = {"seed": options.seed, "number": one.number, "commit": commit(), "keys": one.keys, "ranks": ranks}
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
        known[one.number] = line
    return failed


def measure(one: Draw, steps: int) -> list[Row]:
    """What each rank of a run says."""
    program = Program(
        name=f"draw {one.number}",
        interpreter=sys.executable,
        module="tools.benchmark.prediction_ranks",
        ranks=one.ranks,
        threads=max(1, len(os.sched_getaffinity(0)) // one.ranks),
        task={"flags": one.flags, "tiny": one.tiny_flags, "steps": steps},
        environment=PAGES_OF_THEIR_OWN,
    )
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder, started([program], Path(folder)) as running:
        return running[0].ask({})


# -- comparing ---------------------------------------------------------------------------------------------------------


def row(one: Draw, line: Row) -> Row:
    """Of a configuration, the rank whose peak is predicted worst."""
    config = one.config.resolve(one.ranks)
    shape = config.grid_shape(one.ranks)
    plans = [plan_memory(config, shape, rank, _host_share(one.ranks), on_cpu=True) for rank in range(one.ranks)]
    worst = max(range(one.ranks), key=lambda rank: abs(error_of(plans[rank], line["ranks"][rank])))
    plan, found = plans[worst], line["ranks"][worst]
    seconds = max(statistics.median(rank["seconds"]) for rank in line["ranks"])
    return {
        **_about(one),
        "rank": worst,
        "predicted_MiB": plan.peak / _MIB,
        "measured_MiB": measured_bytes(plan, found) / _MIB,
        "error_percent": 100 * error_of(plan, found),
        "shared_MiB": found["shared_bytes"] / _MIB,
        "live_tensors_MiB": found["tensor_bytes"] / _MIB,
        "heap_MiB": found["heap_bytes"] / _MIB,
        "measured_seconds": seconds,
        "predicted_seconds": None,
    }


def _about(one: Draw) -> Row:
    config = one.config.resolve(one.ranks)
    shape = config.grid_shape(one.ranks)
    model = config.model
    return {
        "draw": one.number,
        "grid_p_d_c_t": "x".join(map(str, shape.sizes)),
        "model": model.preset or f"{model.block} {model.width}x{model.depth} {one.keys['model.attention']}",
        "dtype": config.precision.dtype,
        "zero": config.parallel.zero_stage,
        "schedule": config.parallel.schedule if shape.pipeline > 1 else "-",
        "recompute": str(config.recompute.policy),
        "micro_batches": f"{config.num_micro_batches(shape)} x {config.train.micro_batch_size}",
    }


def _host_share(ranks: int) -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def measured_bytes(plan: MemoryPlan, found: Row) -> int:
    """What a rank was measured to take, of what the plan counts."""
    peak: int = found["peak_bytes"]
    return peak if _SHARED in plan.states else peak - found["shared_bytes"]


def error_of(plan: MemoryPlan, found: Row) -> float:
    """Of the prediction, as a share of what was measured."""
    return plan.peak / measured_bytes(plan, found) - 1


def summary(rows: Sequence[Row]) -> str:
    """The errors of all configurations in a line."""
    errors = [abs(row["error_percent"]) for row in rows]
    median, most = statistics.median(errors), max(errors)
    text = f"memory: {len(rows)} configurations, error {median:.1f} % in the median, {most:.1f} % at most"
    times: list[Any] = [(row["predicted_seconds"], row["measured_seconds"]) for row in rows]
    if any(predicted is None for predicted, _ in times):
        return f"{text}; time: not predicted yet"
    from scipy.stats import kendalltau  # takes a second

    off = statistics.median(abs(predicted / measured - 1) for predicted, measured in times)
    return (
        f"{text}; time: {100 * off:.1f} % in the median, Kendall's tau {kendalltau(*zip(*times, strict=True))[0]:.2f}"
    )
