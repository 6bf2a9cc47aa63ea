"""Whether what was trained are numbers: asked at the end of a run, and before a state is kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.checkpoint.states import state_pieces
from engine.errors import DivergedError
from engine.layer_list import layer_of
from parallel import comm


def check_finite(assembly: Assembly, step: int) -> None:
    """Return if every state of the run (`state_pieces`), and the weights that the model computes with, are finite on
    every rank. Collective over the world: one all-reduce of a number, if so.

    Args:
        step: after which this is, for the message.

    Raises:
        DivergedError: on every rank, with the first that is not, in the order of the model's layers.
    """
    world, found = assembly.grid.world, _first(assembly)
    flag = torch.tensor([float(found is not None)], dtype=torch.float64, device=assembly.device)
    if not comm.all_reduce(flag, world, "max").item():
        return
    _, what = min(first for first in comm.gather_objects(found, world) if first is not None)
    raise DivergedError(
        f"step {step}: {what} is not finite, and nothing good can come of it. Lower optimizer.lr, warm up longer, or "
        "check the data"
    )


def _first(assembly: Assembly) -> tuple[int, str] | None:
    """(place of its layer, name) of the first that is not finite among what this rank holds."""
    named = list(_held(assembly))
    if not named:
        return None
    # both are NaN where one element is; and nothing is allocated, as isfinite() would
    extremes = torch.stack([torch.stack(values.aminmax()).double() for _, values in named])
    bad = extremes.isfinite().all(1).logical_not().tolist()
    places = {layer.name: place for place, layer in enumerate(assembly.layers)}

    def placed(name: str) -> tuple[int, str]:
        parameter = name.partition("/")[2]
        return (places.get(layer_of(parameter), len(places)) if parameter else len(places), name)

    return min((placed(name) for (name, _), is_bad in zip(named, bad, strict=True) if is_bad), default=None)


def _held(assembly: Assembly) -> Iterator[tuple[str, Tensor]]:
    for piece in state_pieces(assembly):
        if piece.values.numel():
            yield piece.name, piece.values.to(assembly.device)
    for fragment in assembly.optimizer.fragments.fragments:
        if fragment.model_weight is not None and fragment.model_weight.numel():
            yield f"rounded weights/{fragment.name}", fragment.model_weight
