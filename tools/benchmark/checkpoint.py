r"""`python -m tools.benchmark checkpoint`: a state saved and loaded, against the disk and torch.distributed.checkpoint.

A ViT whose fp32 weights and AdamW moments are --gigabytes over all ranks (ZeRO 1), written and read again in several
ways that take turns: `tools/benchmark/checkpoint_ways.py` says which. Each is written, forgotten by the page cache,
read from the disk, read again from memory, deleted. Then asynchronous saves, beside a loop of steps. A row each:

    seconds                  median over rounds, fastest, slowest; all ranks at it at once
    over_plain, _direct, _dcp  the rate over theirs in the same round, median; of two dcp, the faster one
    extra_MiB_per_rank       most memory that a rank held beyond what it had before; page cache not counted
    blocked                  that training stood still for an asynchronous save; over the time of one that it waits for

In the layout it is started in, or with --ranks in several, which it starts itself:
    python -m tools.benchmark checkpoint --ranks 1 4 --gigabytes 2 --dir /scratch
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from engine.assembly import Assembly
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver, SaveReport, Votes
from engine.checkpoint.states import held_pieces
from engine.device import peak_memory_bytes
from parallel import comm
from parallel.comm import Axis
from parallel.process_group import World
from tools.benchmark.bench import read_config, seconds, started
from tools.benchmark.checkpoint_ways import Way, all_ways, forget_pages
from tools.benchmark.table import Row, show
from tools.options import add_json

_STATE_BYTES = 12  # of a parameter: weight and two moments in fp32
ACTIONS = ("write", "read, cold", "read, warm")


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are those of pretrain_vit.py."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="start so many ranks, one layout after another")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of all ranks' state (default 2)")
    parser.add_argument("--dir", type=Path, help="folder on the disk in question (default: the temporary one)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not (default 5)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds of computing in a step (default 1)")
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.dir) as name:
        if options.ranks:
            _show([row for ranks in options.ranks for row in _in_ranks(ranks, argv, Path(name))], options.json)
            return
        sizes = [*model_of(options.gigabytes), "--parallel.zero_stage", "1", "--train.global_batch_size", "8"]
        with started(read_config([*sizes, *flags]), world) as bench:
            folder = Path(comm.gather_objects(name, bench.assembly.grid.world)[0])
            rows = measure(bench.assembly, folder, options.repeats, options.pause)
            if world.rank == 0:
                _show(rows, options.json)


def _in_ranks(ranks: int, argv: Sequence[str], folder: Path) -> list[Row]:
    file = folder / f"{ranks}.json"
    launch = [sys.executable, "-m", "tools.launch", "--nproc-per-node", str(ranks), "-m", "tools.benchmark"]
    start = argv.index("--ranks")
    stop = next((i for i in range(start + 1, len(argv)) if argv[i].startswith("--")), len(argv))
    own = [*argv[:start], *argv[stop:], "--dir", str(folder), "--json", str(file)]
    subprocess.run([*launch, "checkpoint", *own], check=True, stdout=subprocess.DEVNULL)
    rows: list[Row] = json.loads(file.read_text())
    return rows


def model_of(gigabytes: float) -> list[str]:
    """Flags of a ViT of this size: its depth is what fits."""
    width = 1024 if gigabytes >= 1 else 256
    depth = max(1, round(gigabytes * 1e9 / _STATE_BYTES / (12 * width**2)))
    sizes = {"width": width, "depth": depth, "mlp_dim": 4 * width, "num_heads": width // 64, "image_size": 32}
    return [part for name, value in sizes.items() for part in (f"--model.{name}", str(value))]


def _show(rows: Sequence[Row], file: str | None) -> None:
    for tables in ([row for row in rows if "blocked_ms" not in row], [row for row in rows if "blocked_ms" in row]):
        show(tables)
        print()
    if file:
        Path(file).write_text(json.dumps(list(rows), indent=1) + "\n")


def measure(a: Assembly, folder: Path, repeats: int, pause: float) -> list[Row]:
    """Rows, all of them on rank 0. Collective."""
    ways = all_ways(a)
    total = sum(comm.gather_objects(sum(piece.values[piece.own].nbytes for piece in held_pieces(a)), a.grid.world))
    common = {"ranks": a.grid.world.size, "zero_stage": a.config.parallel.zero_stage, "GB": total / 1e9}
    figures = _rounds(a, ways, folder, repeats)
    rows = [common | _row(figures, action, way, total) for action in ACTIONS for way in ways]
    ways.clear()
    save = statistics.median(figures["write", "ours"].seconds)
    for name, work in ((f"{pause:g} s of products", products(pause, a.grid.world)), ("none", lambda: None)):
        saves = _beside_steps(a, folder / "beside", work, repeats)
        if a.grid.world.index == 0:
            rows.append(common | {"between_updates": name} | _async_row(saves, save))
    return rows


# -- saves that training waits for, and loads --------------------------------------------------------------------------


@dataclass
class Measured:
    """Of each round: seconds until the last rank was done, and the most memory that a rank held in addition."""

    seconds: list[float] = field(default_factory=list)
    extra: list[float] = field(default_factory=list)


def _rounds(a: Assembly, ways: dict[str, Way], folder: Path, repeats: int) -> dict[tuple[str, str], Measured]:
    """By action and way. Each round begins with another way."""
    found: dict[tuple[str, str], Measured] = defaultdict(Measured)
    for number in range(repeats + 1):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            here = folder / f"{number} {name}"
            for action in ACTIONS:
                if action == "read, cold":
                    ways[name].read(here)  # so that all find as much memory that a virtual machine's host has given it
                    comm.barrier(a.grid.world)
                if action != "read, warm" and a.grid.world.index == 0:
                    forget_pages(here)
                run = ways[name].write if action == "write" else ways[name].read
                taken = _measured(a, lambda run=run, here=here: run(here))  # type: ignore[misc]
                found[action, name].extra.append(taken[1])  # most in the first round: freed memory may stay
                if number:
                    found[action, name].seconds.append(taken[0])
            if a.grid.world.index == 0:
                shutil.rmtree(here)
    return found


def _measured(a: Assembly, run: Callable[[], object]) -> tuple[float, float]:
    """(Seconds, bytes in addition) of the rank with most."""
    gc.collect()
    before = _begin_peak()
    comm.barrier(a.grid.world)
    taken = seconds(run, a.device), peak_memory_bytes(torch.device("cpu")) - before
    both = comm.gather_objects(taken, a.grid.world)
    return max(s for s, _ in both), max(extra for _, extra in both)


def _begin_peak() -> int:
    """Bytes this process holds, from which its peak is counted anew (where it may)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _row(figures: dict[tuple[str, str], Measured], action: str, way: str, total: int) -> Row:
    own = figures[action, way].seconds
    others = {name: figures[action, name].seconds for name in ("plain", "direct", "dcp", "dcp, 2 threads")}
    theirs = [min(times) for times in zip(others["dcp"], others["dcp, 2 threads"], strict=True)]
    over = lambda times: statistics.median(b / a for a, b in zip(own, times, strict=True))  # noqa: E731
    return {
        "action": action,
        "way": way,
        "seconds": statistics.median(own),
        "fastest_seconds": min(own),
        "slowest_seconds": max(own),
        "GB_per_second": total / statistics.median(own) / 1e9,
        "over_plain": over(others["plain"]),
        "over_direct": over(others["direct"]),
        "over_dcp": over(theirs),
        "extra_MiB_per_rank": max(figures[action, way].extra) / 2**20,
    }


# -- saves beside training ---------------------------------------------------------------------------------------------


class Beside(NamedTuple):
    """An asynchronous save: seconds that it blocked and took, of a step without it and (mean) beside it; the most bytes
    that a rank held in addition.
    """

    blocked: float
    seconds: float
    quiet: float
    step: float
    extra: float


def products(pause: float, world: Axis) -> Callable[[], object]:
    """Matrix products for about `pause` seconds, all ranks at it at once, the same number each time. Collective."""
    x = torch.randn(1024, 1024)
    once = lambda: x @ x  # noqa: E731
    count = comm.least(pause / statistics.median(seconds(once, x.device) for _ in range(11)), world)
    return lambda: [once() for _ in range(max(1, round(count)))]


def _beside_steps(a: Assembly, folder: Path, work: Callable[[], object], repeats: int) -> list[Beside]:
    """Saves beside steps that compute, then update all weights and moments. Rank 0 has what was reported."""
    reports: list[SaveReport] = []
    saver = Saver(a, folder, CheckpointConfig(async_save=True, keep=1), {"config": {}, "about": {}}, reports.append)
    found = []
    for number in range(repeats + 1):
        quiet = statistics.median(_step(a, saver, work) for _ in range(4))
        before, steps = _begin_peak(), []
        saver.save(number, {}, {})
        while saver.newest != number:
            steps.append(_step(a, saver, work))
        extra = max(comm.gather_objects(peak_memory_bytes(torch.device("cpu")) - before, a.grid.world))
        if reports:
            found.append(Beside(reports[-1].blocked, reports[-1].seconds, quiet, statistics.mean(steps), extra))
    if a.grid.world.index == 0:
        shutil.rmtree(folder)
    comm.barrier(a.grid.world)
    return found


def _step(a: Assembly, saver: Saver, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    saver.before_change()
    a.optimizer.update(lr=1e-4, grad_factor=1.0)
    saver.poll(Votes(*comm.all_reduce(torch.tensor(saver.votes(), dtype=torch.float64), a.grid.world).tolist()))
    return time.perf_counter() - began


def _async_row(saves: Sequence[Beside], save: float) -> Row:
    """save: seconds of one that training waits for."""
    middle = lambda name: statistics.median(getattr(one, name) for one in saves[1:])  # noqa: E731
    return {
        "blocked_ms": 1000 * middle("blocked"),
        "most_blocked_ms": 1000 * max(one.blocked for one in saves[1:]),
        "first_blocked_ms": 1000 * saves[0].blocked,
        "blocked_over_save": middle("blocked") / save,
        "seconds": middle("seconds"),
        "step_seconds": middle("quiet"),
        "step_beside_it_over_step": statistics.median(one.step / one.quiet for one in saves[1:]),
        "extra_MiB_per_rank": max(one.extra for one in saves) / 2**20,
    }
