"""From a checkpoint to a model that is run in whatever layout: its configuration, its frozen layers, its weights.

Nothing of training is made: all layers are frozen, so that a rank holds weights and nothing else; and for features the
classifier is not built, since what it would be given is what comes out. Of a contrastive model each tower is a source
of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.assemble import assemble
from engine.assembly import Assembly
from engine.checkpoint.load import LoadPlan, contrastive_folder, load_weights, plan_load
from engine.config import Config
from engine.config.cli import parse
from engine.errors import ConfigError
from engine.objectives import Objective, make_objective
from engine.objectives.base import Evaluation
from model import Build, LayerSpec, MicroBatch, build_layers
from model.formats.api import open_weights
from model.formats.base import ConversionError, Description, Preprocessing
from model.formats.checkpoint import CheckpointWeights, RunWeights, description_of
from model.formats.weights import StoredWeights, Which
from parallel.checkpoint.manifest import CheckpointError
from parallel.checkpoint.read import Reader
from parallel.grid import Grid
from parallel.process_group import World
from tools.evaluate.options import OF_FEATURES, OF_TEXTS, PROGRAM
from tools.evaluate.stored import stored_keys, values_of
from tools.evaluate.towers import (
    IMAGE,
    TEXT,
    TowerName,
    TowerWeights,
    as_trained,
    layers_of,
    model_of,
)

_MICRO_BATCH = 64  # of what no run of ours has saved
_HEADS = ("head.fc.", "head.fc_distill.", "head.project.")
_SHOWN = 4


@dataclass(frozen=True)
class Forward(Objective):
    """Layers that nothing is trained of: what the last one gives is what is wanted."""

    layers: tuple[LayerSpec, ...]

    @classmethod
    def of(cls, config: Config) -> Self:
        """As Objective."""
        return cls(tuple(build_layers(config.model)))

    def loss_share(self, outputs: tuple[Tensor, ...], batch: MicroBatch, grid: Grid, scale: float) -> Tensor:
        """There is none."""
        raise AssertionError("nothing is trained")

    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        """There is none."""
        raise AssertionError("nothing is trained")


@dataclass(frozen=True)
class Source:
    """A model to evaluate, or one tower of it, known to be possible before ranks talk.

    Attributes:
        weights: open for reading. config: resolved, of this world and without a classifier where features are wanted.
        objective: with frozen layers. plan: what is loaded.
    """

    weights: StoredWeights
    config: Config
    objective: Objective
    plan: LoadPlan

    @property
    def step(self) -> int | None:
        """Of a checkpoint of this program."""
        return self.weights.step if isinstance(self.weights, RunWeights) else None


def sources_of(
    options: argparse.Namespace, flags: Sequence[str], world: World, *, backward: bool = False
) -> dict[TowerName, Source]:
    """What is built and loaded for a task: of a contrastive model the towers that it needs, else one model of images.
    By the same code on every rank, before they talk.

    Args:
        backward: as of `source_of`.

    Raises:
        ConfigError: the checkpoint cannot be read or evaluated so.
    """
    task = options.task
    try:
        found = contrastive_folder(options.checkpoint)
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    if found is None:
        weights = open_source(options.checkpoint, options.weights, flags)
        if task in OF_TEXTS or options.features == "embedding":
            what = f"--task {task}" if task in OF_TEXTS else "--features embedding"
            raise ConfigError(
                f"{what} is for contrastive models, and {weights.path} has no text tower here: if it is another "
                "library's that has one, convert it (tools.convert --to vitruvius)"
            )
        return {IMAGE: source_of(weights, flags, world, features=task in OF_FEATURES, backward=backward)}
    folder, manifest = found
    if task == "supervised":
        raise ConfigError(f"{folder} has no classifier: take --task {' or '.join(OF_FEATURES)}, which need none")
    try:
        shown = description_of(manifest, folder).preprocessing
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    config = _config_of(manifest.config, None, shown, flags, world)
    if task in OF_TEXTS and not config.contrastive.has_texts:
        raise ConfigError(
            f"--task {task} is for models of images and texts, and {folder} compares views of images: it has no text "
            "tower"
        )
    wanted: tuple[TowerName, ...] = (IMAGE, TEXT) if task in OF_TEXTS else (IMAGE,)
    embedding = task in OF_TEXTS or options.features == "embedding"
    try:
        trained = as_trained(config, manifest, folder)
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    tower_of = partial(_tower, folder, options.weights, config, trained, world, embedding=embedding, backward=backward)
    return {tower: tower_of(tower) for tower in wanted}


def _tower(
    folder: Path, which: Which, config: Config, trained: Config, world: World, tower: TowerName, *,
    embedding: bool, backward: bool,
) -> Source:  # fmt: skip
    """One tower of a configuration, with the weights of the one that was trained."""
    try:
        layers = layers_of(config, tower, embedding=embedding)
        stages = config.pipeline(config.grid_shape(world.size)).num_stages
        if stages > len(layers):
            raise ConfigError(f"the {tower} tower has {len(layers)} layers, fewer than the {stages} stages: use fewer")
        model = model_of(config, layers)
        weights = TowerWeights(folder, which, tower, model_of(trained, layers_of(trained, tower, embedding=embedding)))
        objective = _frozen(Forward(tuple(layers)), backward=backward)
        plan = plan_load(weights, model, objective.layers, config.data)
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    _check(weights, plan)
    return Source(weights, config, objective, plan)


def open_source(path: Path, which: Which, flags: Sequence[str]) -> StoredWeights:
    """What --checkpoint means, of a model of images. Raises ConfigError if it cannot be read."""
    given = {k.removeprefix("model."): v for k, v in values_of(flags).items() if k.startswith("model.")}
    try:
        model = parse([f"--model.{k}={v}" for k, v in given.items()], PROGRAM)[0].model if given else None
        keys = {k: getattr(model, k) for k in given}
        return open_weights(path, given=keys, only_model=True, which=which)
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error


def source_of(
    weights: StoredWeights, flags: Sequence[str], world: World, *, features: bool, backward: bool = False
) -> Source:
    """What is built and loaded. By the same code on every rank, before they talk.

    Args:
        features: what the classifier would be given is wanted, not what it gives. backward: gradients are to pass
            through all layers, as where the first is trained, to which they are sent.

    Raises:
        ConfigError: the model cannot be run so, or has not all weights.
    """
    config = _config(weights, flags, world, features=features)
    whole = Forward(tuple(build_layers(config.model))) if features else make_objective(config)
    objective = _frozen(whole, backward=backward)
    try:
        plan = plan_load(weights, config.model, objective.layers, config.data)
        plan = replace(plan, changed=[found for found in plan.changed if found[0] != "model.num_classes"])
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    _check(weights, plan)
    return Source(weights, config, objective, plan)


def _config(weights: StoredWeights, flags: Sequence[str], world: World, *, features: bool) -> Config:
    description = weights.description
    if not features and not description.model.num_classes:
        raise ConfigError(f"{weights.path} has no classifier: take --task {' or '.join(OF_FEATURES)}, which need none")
    saved = weights.manifest.config if isinstance(weights, CheckpointWeights) else {}
    return _config_of(saved, description, description.preprocessing, flags, world, features=features)


def _config_of(
    saved: Mapping[str, Any],
    description: Description | None,
    shown: Preprocessing | None,
    flags: Sequence[str],
    world: World,
    *,
    features: bool = True,
) -> Config:
    """Resolved, with batches that any layout can have, and each image once.

    Args:
        saved: of a checkpoint of this program. description: of a model of images alone. shown: how images are.
    """
    config, _ = parse(flags, PROGRAM, stored=stored_keys(saved, description, shown, values_of(flags)))
    shape = config.grid_shape(world.size)
    micro = config.train.micro_batch_size or _MICRO_BATCH
    batch = max(2, micro) * shape.data * config.pipeline(shape).pieces  # a step's, of which there will be none
    config = replace(config, train=replace(config.train, micro_batch_size=micro, global_batch_size=batch))
    if features and description is not None:  # a run must have classes, over all tensor ranks
        config = replace(config, model=replace(config.model, num_classes=shape.tensor))
    config = config.resolve(world.size)
    config = replace(config, data=config.data.one_view)
    return replace(config, model=replace(config.model, num_classes=0)) if features else config


def _frozen(objective: Objective, *, backward: bool) -> Objective:
    """The same with layers of which none is trained, or, for gradients to pass through the others, the first alone."""
    first, rest = objective.layers[: int(backward)], objective.layers[int(backward) :]
    layers = (*first, *(replace(spec, factory=partial(_freeze, spec.factory)) for spec in rest))
    frozen: Objective = replace(objective, layers=layers)  # type: ignore[type-var]
    return frozen


def _freeze(factory: Any, build: Build) -> nn.Module:
    layer: nn.Module = factory(build)
    return layer.requires_grad_(False)


def _check(weights: StoredWeights, plan: LoadPlan) -> None:
    """Raise ConfigError where a weight would stay as it was initialised, or one of the checkpoint's has no place."""
    new = [f.describe() for f in plan.of("new").values()]
    left = [name for name in plan.of("left out") if not name.startswith(_HEADS)]
    if not new and not left:
        return
    changed = f" (other than there: {plan.changes})" if plan.changed else ""
    shown = "; ".join([*new, *(f"{name} has no place" for name in left)][:_SHOWN])
    raise ConfigError(
        f"{weights.path} has not the weights of this model{changed}: {shown}: evaluate it as it was trained, leaving "
        "out flags of model"
    )


def load(source: Source, grid: Grid, device: torch.device, memory: float) -> Assembly:
    """The model on this rank, with its weights; the checkpoint is closed. Collective.

    Raises:
        ConfigError: on every rank, if one has found damage.
    """
    with closing(source.weights):
        assembly = assemble(source.config, grid, device, source.objective, device_memory=memory)
        try:
            load_weights(assembly, source.weights, source.plan)
            _load_scales(assembly, source)
        except (ConversionError, CheckpointError) as error:
            raise ConfigError(f"--checkpoint: {error}") from error
    return assembly


def _load_scales(assembly: Assembly, source: Source) -> None:
    """What numbers in 8 bits were scaled by when they were saved, which decides how they round."""
    weights = source.weights
    if assembly.fp8 is None or not isinstance(weights, RunWeights):
        return
    prefix = f"fp8/{weights.prefix}"
    with Reader(weights.path) as reader:
        names = list(assembly.fp8.state_dict())
        if names and all(prefix + name in reader.manifest.tensors for name in names):
            assembly.fp8.load_state_dict({name: reader.whole(prefix + name) for name in names})
