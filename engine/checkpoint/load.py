"""Starting from a checkpoint's weights: read into the masters as far as they fit, in whatever layout either is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.assemble import Assembly
from engine.checkpoint.fit import Fit, Geometry, fit, is_another_model, resized
from engine.checkpoint.states import targets, weight_pieces
from model import LayerSpec, ModelConfig
from model.layers import logical_shapes
from parallel import comm
from parallel.checkpoint.manifest import CheckpointError
from parallel.checkpoint.read import Reader
from parallel.sharding.boxes import Box
from parallel.sharding.pieces import StatePiece

Which = Literal["weights", "average"]
_UNSHAPED = ("preset", "drop_path", "head_bias")  # keys of the model that say nothing about its weights
_SHOWN = 10  # differing tensors


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is to be loaded from where.

    Attributes:
        fits: of every tensor. stored: name in the manifest, by name in the model that was saved. source, target:
            geometries of the two models. changed: (key of the model, its value there, here) where it is another.
    """

    fits: tuple[Fit, ...]
    stored: Mapping[str, str]
    source: Geometry
    target: Geometry
    changed: Sequence[tuple[str, Any, Any]]

    @property
    def changes(self) -> str:
        """`changed`, in words."""
        values = ((key, *("null" if v is None else v for v in found)) for key, *found in self.changed)
        return ", ".join(f"model.{key} {old} -> {new}" for key, old, new in values)

    def of(self, how: str) -> dict[str, Fit]:
        """Those of one kind, by name."""
        return {f.name: f for f in self.fits if f.how == how}


def plan_load(reader: Reader, which: Which, model: ModelConfig, layers: Sequence[LayerSpec]) -> LoadPlan:
    """Decide what is taken, by names and shapes alone.

    Args:
        which: the weights, or their average, beside which frozen ones have none. model: resolved. layers: of the whole
            model.

    Raises:
        CheckpointError: it has no average, is of another model, or does not say of which.
    """
    names = _stored_names(reader, which)
    there, here = reader.manifest.config.get("model", {}), json.loads(json.dumps(asdict(model)))
    try:
        source = Geometry.of(there)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{reader.folder} does not say of which model it is: its config has no model") from error
    target = Geometry.of(here)
    shapes = {name: reader.manifest.tensors[stored].shape for name, stored in names.items()}
    plan = LoadPlan(
        fits=fit(logical_shapes(model, layers), shapes, source, target),
        stored=names,
        source=source,
        target=target,
        changed=_changed(dict(_flat(there)), dict(_flat(here))),
    )
    if is_another_model(plan.fits):
        raise CheckpointError(_difference(reader, plan))
    return plan


def _flat(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys that say something about weights, those of stages one by one."""
    for key, value in model.items():
        if key == "stages" and value:
            yield from ((f"stages[{i}].{k}", v) for i, stage in enumerate(value) for k, v in stage.items())
        elif key not in _UNSHAPED:
            yield key, value


def _changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, there[key], value) for key, value in here.items() if key in there and there[key] != value]


def _difference(reader: Reader, plan: LoadPlan) -> str:
    different = [f.describe() for f in plan.fits if f.how != "taken"]
    more = [f"and {len(different) - _SHOWN} more"] * (len(different) > _SHOWN)
    cure = f" (other than there: {plan.changes})" if plan.changed else ""
    head = (
        f"{reader.folder} is of another model, no matrix of a block fits: give this one the same blocks{cure}, or load "
        "another checkpoint. These tensors differ:"
    )
    return "\n  ".join([head, *different[:_SHOWN], *more])


def _stored_names(reader: Reader, which: Which) -> dict[str, str]:
    tensors = reader.manifest.tensors
    names = {name.removeprefix("weights/"): name for name in tensors if name.startswith("weights/")}
    if which == "average":
        averages = {name.removeprefix("average/"): name for name in tensors if name.startswith("average/")}
        if not averages:
            raise CheckpointError(
                f"{reader.folder} has no moving average of the weights (its run had no optimizer.ema_decay): leave out "
                "checkpoint.load_weights"
            )
        names |= averages
    return names


@torch.no_grad()
def load_weights(a: Assembly, reader: Reader, plan: LoadPlan) -> None:
    """Fill the masters of this rank, frozen ones too, and make all that hangs on them anew. Collective.

    What is taken as it is, each rank reads itself, and of it what it holds alone. What is resized comes from the first
    rank, so that copies are equal whatever processors have computed them.

    Raises:
        CheckpointError: on every rank, if one has found damage.
    """
    pieces = list(weight_pieces(a))
    taken = {f"weights/{name}": plan.stored[f.source] for name, f in plan.of("taken").items() if f.source is not None}
    problem, changed = None, dict[str, tuple[Box, Tensor]]()
    try:
        reader.read(targets(pieces, taken))
        if a.grid.world.index == 0:
            changed = {name: _resized(name, f, reader, plan) for name, f in plan.of("resized").items()}
    except CheckpointError as error:
        problem = str(error)
    found = comm.gather_objects((problem, {name: box for name, (box, _) in changed.items()}), a.grid.world)
    if (problem := next((p for p, _ in found if p is not None), None)) is not None:
        raise CheckpointError(problem)
    for name, box in found[0][1].items():
        values = changed[name][1].to(a.device) if changed else torch.empty(box.shape, device=a.device)
        _place(comm.broadcast(values, a.grid.world), box, (p for p in pieces if p.name == f"weights/{name}"))
    a.store.loaded()
    if a.average is not None:
        a.average.restart()
    if a.fp8 is not None:
        a.fp8.forget_weights()


def _resized(name: str, found: Fit, reader: Reader, plan: LoadPlan) -> tuple[Box, Tensor]:
    assert found.source is not None
    box, values = resized(name, reader.whole(plan.stored[found.source]).float(), plan.source, plan.target)
    return box, values.contiguous()


def _place(values: Tensor, box: Box, pieces: Iterable[StatePiece]) -> None:
    """Write what of a box of a logical tensor is in the pieces of it."""
    for piece in pieces:
        for held, elements in piece.boxes():
            if (common := held.common(box)) is not None:
                common.of(elements, held.offset).copy_(common.of(values, box.offset))
