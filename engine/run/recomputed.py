"""What of a forward pass is computed again in backward: told when the run starts, and counted in its first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import get_args

from engine.assembly import Assembly
from engine.recompute.save_sets import SaveSet
from model.regions import Region
from parallel import comm


def recompute_lines(a: Assembly) -> Iterator[str]:
    """For the start-up report: how many blocks of each stage keep what; stages that are alike in one line."""
    if not _changes(a):
        yield "recompute: none"
        return
    stages = [(number, _of_stage(a, layers)) for number, layers in enumerate(a.placement.layers)]
    for what, run in groupby((stage for stage in stages if stage[1]), key=lambda stage: stage[1]):
        numbers = [number for number, _ in run]
        alike = f"stage {numbers[0]}" if len(numbers) == 1 else f"stages {numbers[0]} to {numbers[-1]}, each"
        yield f"recompute: {alike}: {what}"


def recomputed_lines(a: Assembly) -> list[str]:
    """After the first step: what was really computed again, with a warning where that was nothing. Collective."""
    if not _changes(a):
        return []
    own = a.recompute
    facts = None if own is None else (dict(own.ran_again), own.offload.sent, any(of.drops for of in own.sets.values()))
    gathered = comm.gather_objects(facts, a.grid.pipeline)
    found = [None if of is None or not of[2] else of[0] for of in gathered]
    count = a.config.num_micro_batches(a.grid.shape)
    parts = [(rank, _counted(again, count)) for rank, again in enumerate(found) if again]
    lines = [
        f"recompute: per micro-batch again on pipeline {_ranks([rank for rank, _ in run])}: {what}"
        for what, run in groupby(parts, key=lambda part: part[1])
    ]
    if any(of.offloads for of in a.sets.values()):
        sent = [0 if of is None else of[1] for of in gathered]
        sizes = ", ".join(f"{n / count / 2**20:,.1f}" for n in sent)
        lines.append(f"recompute: per micro-batch to host memory: {sizes} MiB (by pipeline rank)")
    if idle := [rank for rank, again in enumerate(found) if again is not None and not any(again.values())]:
        lines.append(
            f"warning: recompute: nothing was computed again on pipeline {_ranks(idle)}, whose blocks are to drop "
            "what this layout does not make"
        )
    return lines


def _changes(a: Assembly) -> bool:
    return not all(of.keeps_all for of in a.sets.values())


def _of_stage(a: Assembly, layers: range) -> str:
    """`6 block(s) keep qk_norm, 6 all; 1 patch merge(s) again`, "" of a stage without any."""
    names = [a.layers[i].name for i in layers]
    kept = Counter(_name(a, a.sets[n]) if n in a.sets else "nothing" for n in names if "blocks." in n)
    merges = sum(bool(a.sets[n].drops) for n in names if "merges." in n and n in a.sets)
    parts = [f"{count} {'block(s) keep ' * (not i)}{name}" for i, (name, count) in enumerate(kept.items())]
    return "; ".join([", ".join(parts)] * bool(parts) + [f"{merges} patch merge(s) again"] * bool(merges))


def _name(a: Assembly, of: SaveSet) -> str:
    """What a block keeps in this layout: there is nothing to gather where rows are whole."""
    return of.name if a.build.tp.splits_rows else of.name.replace("+gather", "")


def _counted(again: dict[str, int], micro_batches: int) -> str:
    parts = ", ".join(f"{name} {number / micro_batches:g}" for name, number in sorted(again.items(), key=_place))
    return f"{sum(again.values()) / micro_batches:g} region(s) ({parts})"


def _place(count: tuple[str, int]) -> int:
    """In forward order."""
    return get_args(Region).index(count[0])


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
