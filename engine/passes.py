"""How many passes over the pipeline a step takes, where memory decides (`contrastive.passes: auto`).

On one pipeline rank a step may keep the activations of all its micro-batches until the loss of the whole batch is
known, or run all forwards twice. The numbers are the same; the first takes more memory, the second a forward more.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config import Config
from engine.objectives import make_objective
from engine.plan import peaks
from parallel import comm
from parallel.grid import Grid, GridShape


def settle_passes(config: Config, grid: Grid, memory: float, *, on_cpu: bool) -> tuple[Config, list[str]]:
    """The configuration with its passes known, and lines for the console. The first rank decides for all. Collective.

    Args:
        config: resolved. memory: bytes that this rank may count on; what goes by it goes by the least of all ranks.
            on_cpu: whether ranks are processes of one host.
    """
    if not is_open(config):
        return config, []
    least = comm.least(memory, grid.world)
    needed = most_of_one_pass(config, grid.shape, least, on_cpu=on_cpu) if grid.world.index == 0 else 0
    needed = comm.gather_objects(needed, grid.world)[0]
    budget = config.recompute.budget(least)
    keeps = needed <= budget
    of = f"{needed / 2**20:,.1f} MiB planned, of {budget / 2**20:,.1f} MiB per rank"
    how = (
        "one, activations of all micro-batches stay" if keeps else "two, as activations of all micro-batches do not fit"
    )
    return replace(config, contrastive=replace(config.contrastive, passes=1 if keeps else 2)), [f"passes: {how} ({of})"]


def is_open(config: Config) -> bool:
    """Whether memory is to decide."""
    return config.objective == "contrastive" and config.contrastive.passes == "auto"


def most_of_one_pass(config: Config, shape: GridShape, memory: float, *, on_cpu: bool) -> int:
    """Bytes at the peak of the fullest rank, if all forwards come first; with `recompute.policy: auto` if nothing is
    computed again."""
    if config.recompute.is_auto:
        config = replace(config, recompute=config.recompute.keeping_all())
    config = replace(config, contrastive=replace(config.contrastive, passes=1))
    assert make_objective(config).passes == 1
    return max(peaks(config, shape, memory, on_cpu=on_cpu))
