"""`checkpoint.load`: what a new run starts from, checked before ranks talk, loaded, and told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from engine.assemble import Assembly, layer_of
from engine.checkpoint.fit import Fit
from engine.checkpoint.load import LoadPlan, Which, load_weights, plan_load
from engine.config import Config
from engine.errors import ConfigError
from engine.objectives import Objective
from engine.run.agreement import check_agreement
from parallel.checkpoint.manifest import CheckpointError, Manifest, checksum
from parallel.checkpoint.place import newest
from parallel.checkpoint.read import Reader

_MOST = 6  # groups of tensors on a line


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from, open for reading, and what is to be taken of it."""

    reader: Reader
    which: Which
    plan: LoadPlan


def source_of(config: Config, objective: Objective) -> Source | None:
    """What a resolved configuration says to start from, if anything: by the same code on every rank, before they talk.

    Raises:
        ConfigError: there is no such checkpoint, it cannot be read, or it is of another model.
    """
    path, which = config.checkpoint.load, config.checkpoint.load_weights
    if path is None:
        return None
    try:
        reader = Reader(newest(Path(path)))
        return Source(reader, which, plan_load(reader, which, config.model, objective.layers))
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.load: {error}") from error


def start_from(a: Assembly, source: Source | None = None) -> list[str]:
    """Load the weights and close the checkpoint. Collective. Returns lines for the console; none where the
    configuration says nothing to start from.

    Args:
        source: from `source_of`, if that was called before.

    Raises:
        ConfigError: on every rank, if ranks have found different checkpoints, or one of them damage.
    """
    source = source or source_of(a.config, a.objective)
    if source is None:
        return []
    with source.reader as reader:
        check_agreement({"the checkpoint of checkpoint.load": _identity(reader)}, a.grid.world)
        try:
            load_weights(a, reader, source.plan)
        except CheckpointError as error:
            raise ConfigError(f"checkpoint.load: {error}") from error
    return [*report_lines(source), *_frozen_lines(a, source.plan)]


def _frozen_lines(a: Assembly, plan: LoadPlan) -> list[str]:
    """A warning of tensors that stay as they were initialised for good."""
    names = [name for name in plan.of("new") if name in a.frozen.names]
    shown = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
    return [f"  warning: new, and frozen as initialised: {shown}"] if names else []


def _identity(reader: Reader) -> str:
    m: Manifest = reader.manifest
    key = checksum(repr((m.step, m.progress, m.config, m.about, m.files)).encode())
    return f"{reader.folder} ({key})"


def report_lines(source: Source) -> Iterator[str]:
    """What was taken, resized, new and left out, tensors grouped by layer."""
    plan, folder = source.plan, source.reader.folder
    average = ", their moving average" if source.which == "average" else ""
    yield f"weights from {folder} (step {source.reader.manifest.step}){average}"
    sizes: dict[str, int] = {}
    for f in plan.fits:
        if f.here is not None:
            sizes[layer_of(f.name)] = sizes.get(layer_of(f.name), 0) + 1
    for how in ("taken", "resized", "new", "left out"):
        fits = [f for f in plan.fits if f.how == how]
        groups = list(_groups(fits, sizes if how in ("taken", "new") else {}))
        shown = groups[:_MOST] + [f"and {len(groups) - _MOST} more"] * (len(groups) > _MOST)
        if how == "taken" or fits:
            yield f"  {how}: {len(fits)} tensor(s): {', '.join(shown)}"
    if plan.changed:
        yield f"  other than there: {plan.changes}"


def _groups(fits: Sequence[Fit], sizes: dict[str, int]) -> Iterator[str]:
    """Runs of layers of which the same tensors are meant, in words.

    Args:
        sizes: number of tensors of each layer that is to be named alone where all of them are meant.
    """
    layers = [(layer, list(found)) for layer, found in groupby(fits, key=lambda f: layer_of(f.name))]

    def kind(entry: tuple[str, list[Fit]]) -> tuple[object, ...]:
        layer, found = entry
        if len(found) == sizes.get(layer):
            return ("all", layer.partition(".")[0])
        return (layer.partition(".")[0], *(f.name.removeprefix(layer) for f in found))

    for (first, *_), run in groupby(layers, key=kind):
        entries = list(run)
        span = entries[0][0] if len(entries) == 1 else f"{entries[0][0]} to {entries[-1][0]}"
        found = entries[0][1]
        if first == "all":
            yield span
        elif len(entries) == 1 and len(found) <= 4:
            yield from map(_in_words, found)
        elif len(found) <= 4:
            yield f"{span}: {' '.join(f.name.removeprefix(entries[0][0] + '.') for f in found)}"
        else:
            yield f"{span} ({len(found)} tensors{' each' if len(entries) > 1 else ''})"


def _in_words(f: Fit) -> str:
    note = f" ({f.note})" if f.note else ""
    if f.how == "resized":
        return f"{f.name} {list(f.stored or ())} -> {list(f.here or ())}{note}"
    if f.how == "new" and f.stored is not None:
        return f"{f.name} {list(f.here or ())} (there {list(f.stored)})"
    return f.name
