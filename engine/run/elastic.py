"""A run on as many hosts as there are: `parallel.elastic`, for launchers that go on with fewer hosts or more.

The global batch is kept, so that the run stays the same up to rounding: the data axis is as long as the ranks and the
batch allow, micro-batches are made smaller where they must (of the size that is left where a schedule's file fixes
their number), and ranks that are left over wait for the end.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.config import Config
from engine.config.limits import divisors
from engine.config.pipeline import Pipeline
from parallel import process_group
from parallel.process_group import World


def fit(config: Config, world: World) -> tuple[Config, World, list[str]]:
    """(configuration, ranks that train, what to say). Unchanged without `parallel.elastic`, without such a
    launcher, and where nothing fits, which `Config.resolve` then refuses.
    """
    p, batch, given = config.parallel, config.train.global_batch_size, config.train.micro_batch_size
    if not p.elastic or not process_group.by_launcher():
        return config, world, []
    replica = p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size
    pipeline = Pipeline.of(p, p.pipeline_parallel_size)
    fixed = pipeline.micro_batches
    pieces = fixed or (1 if given else pipeline.pieces)
    together = config.data.images_together
    fits = [n for n in range(world.size // replica, 0, -1) if batch % (n * pieces * together) == 0]
    if not fits:
        return config, world, []
    data, notes = fits[0], []
    per_rank = batch // data
    if given:
        sizes = [n for n in divisors(per_rank) if n <= given and not n % together]
        micro = per_rank // fixed if fixed else max(sizes, default=given)
        config = replace(config, train=replace(config.train, micro_batch_size=micro))
        if micro != given:
            notes.append(f"elastic: train.micro_batch_size {micro}, not {given}, for {data} data-parallel ranks")
    used = data * replica
    if used < world.size:
        notes.append(
            f"elastic: {used} of {world.size} ranks train, the others wait: train.global_batch_size {batch} can be "
            f"dealt to {data} data-parallel ranks, not to more"
        )
        here = max(0, min(world.local_size, used - (world.rank - world.local_rank)))
        world = replace(world, size=used, local_size=here, idle=world.size - used)
    return config, world, notes


def wait_for_the_others(config: Config, world: World) -> None:
    """What a rank does that is left over: it ends when the others do, with their code.

    Raises:
        SystemExit
    """
    process_group.start(world, torch.device("cpu"), config.parallel.timeout)
    raise SystemExit(process_group.await_end())
