"""What the search for layouts refuses, in words that say what to change."""

from __future__ import annotations

import math

from engine.config import Config
from engine.config.objectives import resolve_model
from engine.errors import ConfigError
from parallel.grid import GridShape
from tools.plan.bounds import Misfit
from tools.plan.evaluate import Evaluator
from tools.plan.layouts import Space
from tools.plan.search import Found
from tools.plan.words import gigabytes


def room(evaluator: Evaluator) -> str:
    """What a rank may take."""
    return f"{gigabytes(evaluator.budget)} of {evaluator.cluster.memory.gb:g} GB for each"


def too_large(found: Misfit, evaluator: Evaluator) -> str:
    """Of one layout."""
    keys = [_more_room(found, evaluator)]
    keys += [f"train.micro_batch_size below {found.layout.micro_batch}"] * (found.layout.micro_batch > 1)
    keys += ["a higher parallel.zero_stage"] * (found.layout.zero < 3)
    cure = ", ".join([*keys, "more tensor or pipeline ranks"])
    return (
        f"{found.layout} does not fit: with everything computed again a rank takes {gigabytes(found.least)} GB at "
        f"least, and may take {room(evaluator)}: use {cure}"
    )


def none_fits(found: Found, evaluator: Evaluator) -> str:
    """Of all that were looked at."""
    least = min(found.misfits, key=lambda misfit: misfit.least)
    even = " (if its layers are cut as without a budget: --explain cuts them by it)" * (least.layout.pipeline > 1)
    return (
        f"no layout fits on {evaluator.ranks} ranks: {least.layout} needs least, {gigabytes(least.least)} GB with "
        f"everything computed again{even}, and a rank may take {room(evaluator)}: use more --ranks, "
        f"{_more_room(least, evaluator)}, parallel.gradient_dtype weights (half the memory of gradients), or an "
        "optimizer.name with less state"
    )


def _more_room(found: Misfit, evaluator: Evaluator) -> str:
    """What lets ranks take as much as it needs."""
    if found.least <= evaluator.memory:
        return f"recompute.memory_budget {found.least} or more"
    return f"devices of {math.ceil(found.least / evaluator.config.recompute.share / 1e9)} GB"


def check_objective(config: Config) -> None:
    """Raise ConfigError where the model can be on no ranks, or a step has an order that no layout is priced with."""
    try:
        resolve_model(config, GridShape())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.is_joint and getattr(config, config.objective).passes == 1:
        raise ConfigError(
            f"{config.objective}.passes is 1, and layouts are priced with two passes over several micro-batches: leave "
            "it out; layouts of one micro-batch, and of gpipe (--explain schedule=gpipe,...), have one pass as it is"
        )


def check(space: Space, evaluator: Evaluator, only: str | None) -> None:
    """Raise ConfigError where there is no layout to look at, or none that bounds are true of."""
    if space.config.recompute.offload != "never" and evaluator.cluster.device_type != "cpu":
        raise ConfigError(
            "recompute.offload auto is for one layout (--explain LAYOUT): the search has no bounds of what host memory "
            "saves; leave it out, and look at the layouts that are found with it"
        )
    if space.count():
        return
    batch = space.config.train.global_batch_size
    keys = list(space.families())
    if any(space.shapes(key) for key in keys) and not any(space.pipelines(key) for key in keys):
        data = min(d for key in keys for _, d in space.shapes(key))
        near = [n for n in (batch // data * data, (batch // data + 1) * data) if n]
        raise ConfigError(
            f"train.global_batch_size {batch} can be dealt to the data ranks of no layout of {space.ranks} ranks, "
            f"which are {data} at least: use {' or '.join(map(str, near))} images, or other --ranks"
        )
    what = f" with {only}" if only else ""
    raise ConfigError(
        f"no layout{what} is there of {space.ranks} ranks of this model and {batch} images: sizes must multiply to the "
        "ranks, data ranks must divide the images, and each stage needs a layer: give other --ranks, or less in --only"
    )
