"""Starting from a checkpoint's weights: read into the masters as far as they fit, in whatever layout either is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import DataConfig
from engine.assembly import Assembly
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.fit import Fit, Geometry, fit, is_another_model, resized
from engine.checkpoint.states import targets, weight_pieces
from model import LayerSpec, ModelConfig, TextConfig
from model.formats.api import open_weights
from model.formats.base import ConversionError
from model.formats.checkpoint import RunWeights, description_of
from model.formats.pairs import is_contrastive
from model.formats.weights import StoredWeights, Which
from model.inherit import Inherited
from model.layers import logical_shapes
from parallel import comm
from parallel.checkpoint.manifest import CheckpointError, Manifest, NoCheckpointError, read_manifest
from parallel.checkpoint.place import newest
from parallel.checkpoint.read import Target
from parallel.sharding.boxes import Box
from parallel.sharding.pieces import StatePiece

_UNSHAPED = ("preset", "drop_path", "head_bias")  # keys of the model that say nothing about its weights
# keys that shapes do not say
_UNSAID = ("num_heads", "norm_eps", "gelu", "pool", "norm_after_pool", "rope_base", "window_size", "grid_size")
_SHOWN = 10  # differing tensors


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is to be loaded from where.

    Attributes:
        fits: of every tensor. unused: names of others there that have no part in the model of the checkpoint.
        source, target: geometries of the two models. changed: (key, its value there, here) where it is another.
    """

    fits: tuple[Fit, ...]
    unused: Sequence[str]
    source: Geometry
    target: Geometry
    changed: Sequence[tuple[str, Any, Any]]

    @property
    def parts(self) -> dict[str, Inherited]:
        """All of every tensor that is there, by its name."""
        return {f.name: Inherited(f.name, ()) for f in self.fits if f.how in ("taken", "resized")}

    @property
    def changes(self) -> str:
        """`changed`, in words."""
        values = ((key, *("null" if v is None else v for v in found)) for key, *found in self.changed)
        return ", ".join(f"{key} {old} -> {new}" for key, old, new in values)

    def of(self, how: str) -> dict[str, Fit]:
        """Those of one kind, by name."""
        return {f.name: f for f in self.fits if f.how == how}


def open_to_load(config: CheckpointConfig, model: ModelConfig, *, texts: bool = False) -> StoredWeights:
    """What `checkpoint.load` means, of any kind. What has no part in the model may be there.

    Args:
        model: of the run, resolved: what another library's files say nothing of is as there. texts: whether the run has
            a text tower, too: then both are meant, where there are two.

    Raises:
        ConversionError: there is none, it is damaged, has no average, or has what our model has not.
    """
    assert config.load is not None
    path = Path(config.load)
    if (towers := contrastive_folder(path)) is not None:
        return TowersWeights(towers[0], config.load_weights)
    given = {key: value for key in _UNSAID if (value := getattr(model, key, None)) is not None}

    def opened(**more: Any) -> StoredWeights:
        return open_weights(path, given=given | more, only_model=True, which=config.load_weights, whole=texts)

    try:  # as many positions may be of images of several ratios: if it can be the run's, it is
        return opened(image_size=model.image_size)
    except ConversionError:
        return opened()


class TowersWeights(RunWeights):
    """All of a checkpoint of objective contrastive, which describes its image tower. Arguments and errors as of
    RunWeights.
    """

    def __init__(self, folder: Path, which: Which) -> None:
        super().__init__(folder, which)
        self.description = description_of(self.manifest, folder)


def contrastive_folder(path: Path) -> tuple[Path, Manifest] | None:
    """The folder of a step that a path means, and its manifest, if that is of a contrastive run.

    Raises:
        ConversionError: it is damaged.
    """
    try:
        folder = newest(path)
        manifest = read_manifest(folder)
    except NoCheckpointError:
        return None  # another library's, or nothing
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    return (folder, manifest) if is_contrastive(manifest.config) else None


def plan_load(
    weights: StoredWeights,
    model: ModelConfig,
    layers: Sequence[LayerSpec],
    images: DataConfig,
    text: TextConfig | None = None,
) -> LoadPlan:
    """Decide what is taken, by names and shapes alone.

    Args:
        model: resolved. layers: of the whole model. images: that it will see. text: the text tower, resolved, if it has
            one.

    Raises:
        ConversionError: it is of another model.
    """
    there, here = (json.loads(json.dumps(asdict(m))) for m in (weights.description.model, model))
    source, target = Geometry.of(there), Geometry.of(here)
    shapes = {name: entry.shape for name, entry in weights.tensors.items()}
    plan = LoadPlan(
        fits=fit(logical_shapes(model, layers), shapes, source, target),
        unused=[*weights.carried, *weights.left_out],
        source=source,
        target=target,
        changed=[
            *_changed(dict(_flat(there)), dict(_flat(here))),
            *_changed_text(weights, text),
            *_changed_images(weights, images),
        ],
    )
    if is_another_model(plan.fits):
        raise ConversionError(_difference(weights, plan))
    return plan


def _flat(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys that say something about weights, those of stages one by one."""
    for key, value in model.items():
        if key == "stages" and value:
            yield from ((f"model.stages[{i}].{k}", v) for i, stage in enumerate(value) for k, v in stage.items())
        elif key not in _UNSHAPED:
            yield f"model.{key}", value


def _changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, there[key], value) for key, value in here.items() if key in there and there[key] != value]


def _changed_text(weights: StoredWeights, text: TextConfig | None) -> list[tuple[str, Any, Any]]:
    """Of the text tower, where both have one."""
    if (pairing := weights.description.pairing) is None or text is None:
        return []
    return _changed(*(dict(_flat_text(t)) for t in (pairing.text, text)))


def _flat_text(text: TextConfig) -> Iterator[tuple[str, Any]]:
    """Its keys, those that are null as the model has them."""
    model, unsaid = text.model(1, "linear"), (*_UNSHAPED, "projection")  # which is null where it is as the image's
    for key, value in asdict(text).items():
        if key not in unsaid:
            yield f"text.{key}", getattr(model, key, None) if value is None else value


def _changed_images(weights: StoredWeights, images: DataConfig) -> Iterator[tuple[str, Any, Any]]:
    """Of what pixels are normalised with, if that is known; one number is that of all channels."""
    if (before := weights.description.preprocessing) is None:
        return
    for key in ("mean", "std"):
        there, here = getattr(before, key), getattr(images, key)
        channels = max(len(there), len(here))
        if (there * channels)[:channels] != (here * channels)[:channels]:
            yield f"data.{key}", list(there), list(here)


def _difference(weights: StoredWeights, plan: LoadPlan) -> str:
    different = [f.describe() for f in plan.fits if f.how != "taken"]
    more = [f"and {len(different) - _SHOWN} more"] * (len(different) > _SHOWN)
    cure = f" (other than there: {plan.changes})" if plan.changed else ""
    head = (
        f"{weights.path} is of another model, no matrix of a block fits: give this one the same blocks{cure}, or load "
        "another checkpoint. These tensors differ:"
    )
    return "\n  ".join([head, *different[:_SHOWN], *more])


@torch.no_grad()
def load_weights(
    a: Assembly,
    weights: StoredWeights,
    plan: LoadPlan,
    prefix: str = "",
    chosen: Mapping[str, Inherited] | None = None,
) -> None:
    """Fill the masters of this rank, frozen ones too, and make all that hangs on them anew. Collective.

    What is taken as it is, each rank reads itself: of a checkpoint of this program what it holds alone, of another
    library's the tensors that it holds some of, one at a time. What is resized comes from the first rank, so that
    copies are equal whatever processors have computed them.

    Args:
        prefix: of the names here of the model that the plan is of, such as `teacher.`. chosen: by names here, of which
            of the plan's tensors some elements are taken; others are left. None: all, by their own names.

    Raises:
        ConversionError: on every rank, if one has found damage.
    """
    pieces, under = list(weight_pieces(a)), f"weights/{prefix}"
    fits = plan.of("taken") | plan.of("resized")
    parts = plan.parts if chosen is None else chosen
    taken = {name: part for name, part in parts.items() if fits[part.source].how == "taken"}
    problem, changed = None, list[tuple[str, Box, Tensor]]()
    try:
        whole = {under + name: str(fits[part.source].source) for name, part in taken.items() if part.is_whole}
        weights.fill(targets(pieces, whole))
        for name, part in taken.items():
            if not part.is_whole:
                own = (piece for piece in pieces if piece.name == under + name)
                _fill_some(weights, str(fits[part.source].source), part, own)
        if a.grid.world.index == 0:
            for name, part in parts.items():
                if (f := fits[part.source]).how == "resized":
                    changed += _resized(name, f, part, weights, plan)
    except (ConversionError, OSError) as error:
        problem = str(error)
    found = comm.gather_objects((problem, [(name, box) for name, box, _ in changed]), a.grid.world)
    if (problem := next((p for p, _ in found if p is not None), None)) is not None:
        raise ConversionError(problem)
    for i, (name, box) in enumerate(found[0][1]):
        values = changed[i][2].to(a.device) if changed else torch.empty(box.shape, device=a.device)
        _place(comm.broadcast(values, a.grid.world), box, (p for p in pieces if p.name == under + name))
    a.store.loaded()
    for average in a.averages:
        average.restart()
    if a.fp8 is not None:
        a.fp8.forget_weights()
    for products in a.row_products:
        products.forget_weight()


def _fill_some(weights: StoredWeights, source: str, part: Inherited, pieces: Iterable[StatePiece]) -> None:
    """Chosen elements of a tensor: of what is held here, the box around them is read, and they are taken out of it."""
    wanted = list[tuple[Target, Tensor, list[Tensor]]]()
    for box, elements in (found for piece in pieces for found in piece.boxes()):
        places = [
            torch.arange(first, stop) if index is None else index[first:stop]
            for first, stop, index in zip(box.offset, box.end, part.indices, strict=True)
        ]
        firsts = [int(at.min()) for at in places]
        shape = tuple(int(at.max()) - first + 1 for at, first in zip(places, firsts, strict=True))
        room = torch.empty(shape, dtype=weights.tensors[source].dtype)
        within = [at - first for at, first in zip(places, firsts, strict=True)]
        wanted.append((Target(Box(tuple(firsts), shape), room), elements, within))
    weights.fill({source: [target for target, _, _ in wanted]} if wanted else {})
    for target, elements, within in wanted:
        elements.copy_(Inherited(source, tuple(within)).of(target.values))


def _resized(
    name: str, found: Fit, part: Inherited, weights: StoredWeights, plan: LoadPlan
) -> Iterator[tuple[str, Box, Tensor]]:
    """A tensor of the plan, of which elements are chosen along dims that a box of it has all of."""
    assert found.source is not None
    for box, values in resized(found.name, weights.read(found.source).float(), plan.source, plan.target):
        values = part.of(values).contiguous()
        yield name, Box(box.offset, tuple(values.shape)), values


def _place(values: Tensor, box: Box, pieces: Iterable[StatePiece]) -> None:
    """Write what of a box of a logical tensor is in the pieces of it."""
    for piece in pieces:
        for held, elements in piece.boxes():
            if (common := held.common(box)) is not None:
                common.of(elements, held.offset).copy_(common.of(values, box.offset))
