"""`checkpoint.load`, `distillation.start_from`: what a new run starts from, checked before ranks talk, loaded, and
told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, takewhile

from engine.assembly import Assembly
from engine.checkpoint.fit import Fit
from engine.checkpoint.load import LoadPlan, load_weights, open_to_load, plan_load
from engine.config import Config
from engine.config.classes import class_orders
from engine.config.inheritance import Inheritance, inheritance_of
from engine.config.teachers import fingerprint_of
from engine.errors import ConfigError
from engine.layer_list import layer_of
from engine.objectives import Objective
from engine.run.agreement import check_agreement
from model import build_layers, student_layers
from model.formats.api import open_weights
from model.formats.base import ConversionError
from model.formats.checkpoint import RunWeights
from model.formats.pairs import ALONE
from model.formats.weights import StoredWeights, Which
from model.inherit import in_order

_MOST = 6  # groups of tensors on a line


@dataclass(frozen=True)
class Source:
    """The weights that a run starts from.

    Attributes:
        weights: open for reading. which: of a checkpoint. plan: what is to be taken. no_text: why the text tower that
            is there is left out; empty: it is not, or there is none. inheritance: what of them, which are a
            teacher's, the student's are made of; None: they are what checkpoint.load means.
    """

    weights: StoredWeights
    which: Which
    plan: LoadPlan
    no_text: str = ""
    inheritance: Inheritance | None = None

    @property
    def key(self) -> str:
        """That says so."""
        return "checkpoint.load" if self.inheritance is None else "distillation.start_from"

    @property
    def identity(self) -> str:
        """Of the weights; a teacher's may lie elsewhere on each host."""
        try:
            return self.weights.identity if self.inheritance is None else fingerprint_of(self.weights, self.which)
        except ConversionError as error:  # the ranks that still find it are told
            return str(error)


def source_of(config: Config, objective: Objective) -> Source | None:
    """What a resolved configuration says to start from, if anything: by the same code on every rank, before they talk.

    Raises:
        ConfigError: there is no such checkpoint, it cannot be read, or it is of another model.
    """
    if (inheritance := inheritance_of(config)) is not None:
        return _of_teacher(config, inheritance)
    if config.checkpoint.load is None:
        return None
    try:
        has_texts = config.objective == "contrastive" and config.contrastive.has_texts
        text = config.text if has_texts else None
        weights, no_text = _opened(config, texts=has_texts)
        plan = plan_load(weights, config.model, student_layers(objective.layers), config.data, text)
        return Source(weights, config.checkpoint.load_weights, plan, no_text)
    except ConversionError as error:
        raise ConfigError(f"checkpoint.load: {error}") from error


def _of_teacher(config: Config, inheritance: Inheritance) -> Source:
    """The weights of a teacher, as those of a model of the student's images and patches."""
    try:
        found = inheritance.found
        weights = open_weights(found.path, only_model=True, which=found.which)
        plan = plan_load(weights, inheritance.model, build_layers(inheritance.model), config.data)
        wanted = {part.source for part in inheritance.tensors.values()}
        if new := [f.describe() for f in plan.of("new").values() if f.name in wanted]:
            raise ConversionError(f"{weights.path} cannot be had for the student's images: {'; '.join(new[:_MOST])}")
        return Source(weights, found.which, plan, inheritance=inheritance)
    except ConversionError as error:
        raise ConfigError(f"distillation.start_from: {error}") from error


def _opened(config: Config, *, texts: bool) -> tuple[StoredWeights, str]:
    """The weights, and why they are without the text tower that is there: one that this program cannot read is no
    reason to refuse the image tower beside it (LiT, Zhai et al. 2022, needs no more).

    Args:
        texts: whether both towers are wanted.
    """
    try:
        return open_to_load(config.checkpoint, config.model, texts=texts), ""
    except ConversionError as error:
        if not texts:
            raise
        return open_to_load(config.checkpoint, config.model), str(error).removesuffix(f"; {ALONE}")


def start_from(a: Assembly, source: Source | None = None, classes: Sequence[str] | None = None) -> list[str]:
    """Load the weights and close the checkpoint. Collective. Returns lines for the console; none where the
    configuration says nothing to start from.

    Args:
        source: from `source_of`, if that was called before. classes: names of the data's, in order.

    Raises:
        ConfigError: on every rank, if ranks have found different checkpoints, or one of them damage.
    """
    source = source or source_of(a.config, a.objective)
    if source is None:
        return []
    with closing(source.weights) as weights:
        check_agreement({f"the checkpoint of {source.key}": source.identity}, a.grid.world)
        try:
            chosen = None if source.inheritance is None else source.inheritance.tensors
            places = next((of.places for of in class_orders(a.config, classes).values()), None)  # of the first teacher
            if chosen is not None and places is not None:
                chosen = in_order(chosen, places)
            load_weights(a, weights, source.plan, chosen=chosen)
        except ConversionError as error:
            raise ConfigError(f"{source.key}: {error}") from error
    if source.inheritance is not None:
        return list(_inherited_lines(source.inheritance, source.plan))
    return [*report_lines(source), *_frozen_lines(a, source.plan)]


def _frozen_lines(a: Assembly, plan: LoadPlan) -> list[str]:
    """A warning of tensors that stay as they were initialised for good."""
    names = [name for name in plan.of("new") if name in a.frozen.names]
    shown = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
    return [f"  warning: new, and frozen as initialised: {shown}"] if names else []


def _inherited_lines(of: Inheritance, plan: LoadPlan) -> Iterator[str]:
    """What a student takes of a teacher's weights, and what it does not."""
    yield f"weights from the teacher {of.found.path}: {of.describe()}"
    sources = {part.source for part in of.tensors.values()}
    if resized := [f for f in plan.of("resized").values() if f.name in sources]:
        yield f"  resized: {', '.join(map(_in_words, resized))}"


def report_lines(source: Source) -> Iterator[str]:
    """What was taken, resized, new and left out, tensors grouped by layer."""
    plan, weights = source.plan, source.weights
    average = ", their moving average" if source.which == "average" else ""
    what, origin = weights.kind, weights.description.origin
    if isinstance(weights, RunWeights):
        what = f"step {weights.manifest.step}" + (f", converted from {origin.kind}" if origin is not None else "")
    yield f"weights from {weights.path} ({what}){average}"
    if source.no_text:
        yield f"  warning: without the text tower that is there: {source.no_text}"
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
    if plan.unused:
        groups = list(_unused(plan.unused))
        shown = groups[:_MOST] + [f"and {len(groups) - _MOST} more"] * (len(groups) > _MOST)
        yield f"  of no use here: {len(plan.unused)} tensor(s): {', '.join(shown)}"
    if plan.changed:
        yield f"  other than there: {plan.changes}"


def _unused(names: Sequence[str]) -> Iterator[str]:
    """Those that begin alike, in words."""
    for _, group in groupby(sorted(name.split(".") for name in names), key=lambda path: path[0]):
        alike = list(group)
        start = (parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*alike, strict=False)))
        yield ".".join(start) + (f" ({len(alike)} tensors)" if len(alike) > 1 else "")


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
