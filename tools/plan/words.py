"""What a search has found, in words: tables, where time goes, why others lose, what does not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from engine.config import Config
from parallel.grid import AXES
from tools.benchmark.table import Row
from tools.plan.bounds import Misfit
from tools.plan.evaluate import Evaluator, Prediction
from tools.plan.search import Found

PARTS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "passes over memory",
    "tensor": "waiting for tensor ranks",
    "context": "waiting for context ranks",
    "data": "waiting for data ranks",
    "recompute": "computing again",
    "optimizer": "the optimizer",
    "bubble": "waiting in the pipeline (bubble and messages)",
}
"""Of a step, as of `engine.step_time.StepTime`, in words."""

_GB = 1e9
_FEW = 3


def found_anyway(config: Config) -> str:
    """What a configuration says beside layouts, and each layout has as is best for it; "" if it says nothing of it."""
    cut, recompute = config.parallel.layers_per_stage, config.recompute
    given = [f"recompute.policy ({recompute.as_text})"] * (not recompute.is_auto and recompute.policy != "none")
    given += [f"parallel.layers_per_stage ({', '.join(map(str, cut or ()))})"] * (cut is not None)
    return ", ".join(given)


def rows(found: Sequence[Prediction]) -> list[Row]:
    """A line for each."""
    return [
        {
            "layout": str(p.layout),
            "recompute": recompute(p),
            "step_s": p.seconds,
            "images_per_s": p.images_per_second,
            "mfu": p.mfu,
            "peak_GB": p.peak / _GB,
            "slower_%": 100 * (p.seconds / found[0].seconds - 1),
        }
        for p in found
    ]


def as_json(found: Sequence[Prediction]) -> list[Row]:
    """The same with all parts and ranks."""
    return [
        {
            **row,
            **{f"{name}_s": p.parts.get(name, 0.0) for name in PARTS},
            "peak_GB_by_pipeline_rank": [peak / _GB for peak in p.peaks],
            "save_sets": list(p.config.recompute.policy),
        }
        for row, p in zip(rows(found), found, strict=True)
    ]


def recompute(p: Prediction) -> str:
    """The save sets of the blocks."""
    runs = [(name, len(list(run))) for name, run in groupby(p.config.recompute.policy)]
    if len(runs) > _FEW:
        return f"{len({name for name, _ in runs})} kinds"
    return ", ".join(f"{name} * {count}" for name, count in runs) if len(runs) > 1 else runs[0][0]


def pattern(p: Prediction) -> str:
    """The save sets of all blocks, as a configuration has them."""
    runs = [(name, len(list(run))) for name, run in groupby(p.config.recompute.policy)]
    return ", ".join(f"{name} * {count}" for name, count in runs)


def as_written(p: Prediction) -> Iterator[str]:
    """What the configuration of a layout says beside its name."""
    yield f"  save sets: {pattern(p)}"
    if (layers := p.config.parallel.layers_per_stage) is not None:
        yield f"  layers of the stages: {', '.join(map(str, layers))}"


def where_time_goes(p: Prediction) -> Iterator[str]:
    """A line for each part of the step, the longest first, and one for each pipeline rank's memory."""
    for name, seconds in sorted(p.parts.items(), key=lambda part: -part[1]):
        if seconds > 1e-6 * p.seconds:
            yield f"  {PARTS.get(name, name):46} {_ms(seconds):>12}  {100 * seconds / p.seconds:5.1f} %"
    peaks = ", ".join(map(gigabytes, p.peaks))
    yield f"  memory of pipeline rank{'s' * (len(p.peaks) > 1)}: {peaks} GB"


def why_slower(p: Prediction, first: Prediction) -> str:
    """The parts of a step that it loses most by, and what it wins elsewhere."""
    more = {name: p.parts.get(name, 0.0) - first.parts.get(name, 0.0) for name in {*p.parts, *first.parts}}
    least = (p.seconds - first.seconds) / 10
    order = sorted(more.items(), key=lambda part: -part[1])
    loses = [f"{PARTS.get(name, name)} +{_ms(s)}" for name, s in order if s > least][:_FEW]
    wins = [f"{PARTS.get(name, name)} -{_ms(-s)}" for name, s in reversed(order) if -s > least][:2]
    slower = f"{_ms(p.seconds - first.seconds)} ({100 * (p.seconds / first.seconds - 1):.2g} %) slower"
    return f"  {p.layout}: {slower}: {', '.join(loses)}" + (f"; against {', '.join(wins)}" if wins else "")


def misfits(found: Iterable[Misfit], budget: int) -> Iterator[str]:
    """How much too large layouts are that might have been quicker, by ranks and ZeRO stage."""
    groups = defaultdict[tuple[tuple[int, int, int, int], int], list[Misfit]](list)
    for misfit in found:
        groups[misfit.layout.grid, misfit.layout.zero].append(misfit)
    for (grid, zero), some in sorted(groups.items(), key=lambda item: min(m.least for m in item[1])):
        low, high = (f(m.least for m in some) for f in (min, max))
        sizes = sorted({m.layout.micro_batch for m in some})
        lack = gigabytes(low - budget) + (f" to {gigabytes(high - budget)}" if high > low else "")
        ranks = " x ".join(f"{name} {size}" for name, size in zip(AXES, grid, strict=True) if size > 1)
        yield (
            f"  {ranks or 'one rank'}, zero {zero}, micro-batches of {_list(sizes)}: {len(some)} layout"
            f"{'s' * (len(some) > 1)}, at least {lack} GB too much"
        )


def looked_at(found: Found, evaluator: Evaluator, seconds: float) -> str:
    """What the search has done."""
    c, did = found.counts, evaluator.counts
    return (
        f"{found.looked_at:,} layouts in {seconds:.0f} s: {c['slower']:,} cannot be quicker, by a lower bound; "
        f"{c['too large']:,} do not fit, by a lower bound; {c['planned'] + c['misfits']:,} were planned with save sets "
        f"({c['misfits']:,} do not fit). {did['priced']:,} times layers were priced, and {did['simulated']:,} "
        "schedules simulated."
    )


def gigabytes(count: int) -> str:
    """Of bytes, small numbers of them with three digits."""
    return f"{count / _GB:,.1f}" if count >= 10 * _GB else f"{count / _GB:.3g}"


def _list(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if len(sizes) <= _FEW else f"{sizes[0]} to {sizes[-1]}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"
