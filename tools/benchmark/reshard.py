r"""`python -m tools.benchmark reshard`: what `tools.convert --reshard` costs, and what loading gains by it.

A ViT whose fp32 weights and AdamW moments are --gigabytes over all ranks is cut as one rank saves it, and that again
for the layout that the ranks are started in. They load both, in turn, from the disk. A row for each:

    held_GB, read_GB, places  of the rank with most: what it holds, bytes that it reads, places that do not follow
    alone_s                   that the slowest rank needs while no other reads, as on a host of its own: median over
                              rounds, fastest, slowest
    together_s                until the last has all, where all read at once, from one disk and page cache
    cut_seconds               that one process needs to cut it, from the page cache where that has it; MB_per_s of it

    python -m tools.launch --nproc-per-node 4 -m tools.benchmark reshard --parallel.tensor_parallel_size 4
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from engine.assembly import Assembly
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver
from engine.checkpoint.states import held_pieces, restore
from engine.config import plain
from parallel import comm
from parallel.checkpoint.read import Reader
from parallel.process_group import World
from parallel.sharding.boxes import Box
from tools.benchmark.bench import read_config, seconds, started
from tools.benchmark.checkpoint import model_of
from tools.benchmark.checkpoint_ways import forget_pages
from tools.benchmark.table import Row, show
from tools.convert.reshard import reshard
from tools.options import add_json


class _Cut(NamedTuple):
    """A checkpoint, and the seconds that it took to cut it."""

    name: str
    path: Path
    seconds: float


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are those of pretrain_vit.py."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark reshard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of all ranks' state (default 2)")
    parser.add_argument("--dir", type=Path, help="folder on the disk in question (default: the temporary one)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one that is not measured (default 3)")
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    config = read_config([*model_of(options.gigabytes), "--train.global_batch_size", "8", *flags])
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=options.dir) as name, started(config, world) as bench:
        folder = Path(comm.gather_objects(name, bench.assembly.grid.world)[0])
        rows = measure(bench.assembly, folder, options.repeats)
        if world.rank == 0:
            show(rows, options.json)
        comm.barrier(bench.assembly.grid.world)


def measure(a: Assembly, folder: Path, repeats: int) -> list[Row]:
    """A row for either checkpoint. Collective."""
    cuts = comm.gather_objects(_cuts(a, folder), a.grid.world)[0]
    alone, together = ({cut.name: list[float]() for cut in cuts} for _ in range(2))
    for number in range(repeats + 1):
        for cut in cuts if number % 2 else reversed(cuts):
            turns = [_seconds(a, cut.path, rank) for rank in range(a.grid.world.size)]
            if number:
                alone[cut.name].append(max(turns))
                together[cut.name].append(_seconds(a, cut.path))
    return [_row(a, cut, alone[cut.name], together[cut.name]) for cut in cuts]


def _seconds(a: Assembly, path: Path, rank: int | None = None) -> float:
    """That loading from the disk takes: of one rank while the others wait, or of all at once. Collective."""
    world = a.grid.world
    if world.index == 0:
        forget_pages(path)
    comm.barrier(world)
    taken = seconds(partial(_load, a, path), a.device) if rank in (None, world.index) else 0.0
    return max(comm.gather_objects(taken, world))


def _load(a: Assembly, path: Path) -> None:
    with Reader(path) as reader:
        restore(a, reader)


def _cuts(a: Assembly, folder: Path) -> list[_Cut]:
    """As one rank saves it, and as those of this layout do. Collective; rank 0 has them."""
    facts: dict[str, Any] = {"config": plain(asdict(a.config)), "about": {"layout": asdict(a.grid.shape)}}
    Saver(a, folder / "saved", CheckpointConfig(), facts).save(1, {}, {})
    if a.grid.world.index:
        return []
    shape, flags = a.grid.shape, ["--parallel.bucket_mib", str(a.config.parallel.bucket_mib)]
    words = {name: getattr(shape, name) for name in ("tensor", "pipeline", "context", "data")}
    layout = " ".join(f"{name}={n}" for name, n in (words | {"zero": a.config.parallel.zero_stage}).items())
    found = []
    for name, source, words_of in (("one rank", "saved", "zero=0"), (layout, "one rank", layout)):
        began = time.perf_counter()
        path = reshard(folder / source, folder / name, words_of, flags, lambda line: None)
        found.append(_Cut(name, path, time.perf_counter() - began))
    return found


def _row(a: Assembly, cut: _Cut, alone: Sequence[float], together: Sequence[float]) -> Row:
    held: dict[str, list[Box]] = {}
    for piece in held_pieces(a):
        held.setdefault(piece.name, []).extend(box for box, _ in piece.boxes())
    own = sum(piece.values.nbytes for piece in held_pieces(a))
    with Reader(cut.path) as reader:
        cost, manifest = reader.cost(held), reader.manifest
    ranks = comm.gather_objects((cost.bytes, cost.places, own), a.grid.world)
    most, places, held_most = (max(rank[i] for rank in ranks) for i in range(3))
    return {
        "cut_for": cut.name,
        "GB": manifest.bytes / 1e9,
        "files": len(manifest.files),
        "held_GB": held_most / 1e9,
        "read_GB": most / 1e9,
        "places": places,
        "alone_s": statistics.median(alone),
        "fastest_s": min(alone),
        "slowest_s": max(alone),
        "together_s": statistics.median(together),
        "cut_seconds": cut.seconds,
        "cut_MB_per_s": manifest.bytes / cut.seconds / 1e6,
    }
