"""Weights of a checkpoint of this program, and what its manifest says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig, StageConfig
from model.formats.base import ConversionError, Description, Entry, Origin, Preprocessing
from model.formats.pairs import has_texts, is_contrastive, pairing_of, shapes_of, tower_alone
from model.formats.shown import shown_by
from model.formats.weights import CARRIED, StoredWeights, Which
from model.matching import MATCH
from model.towers import IMAGE
from parallel.checkpoint.manifest import CheckpointError, Manifest, checksum
from parallel.checkpoint.read import Reader, Target

_SHOWN = 10
_PROJECTOR = ".head.project."


class RunWeights(StoredWeights):
    """Those of a checkpoint of this program, or a part of them, whatever layout saved it. Who makes it says of what
    model they are (`description`).

    Args:
        folder: of one step. which: the weights, or their moving average (frozen ones have none: theirs as they are).
        prefix: of the names of those that are wanted, which are called without it.

    Raises:
        ConversionError: it is damaged, or has no average.
    """

    kind = "vitruvius"
    left_out: Sequence[str] = ()

    def __init__(self, folder: Path, which: Which, prefix: str = "") -> None:
        self.path, self.prefix, self.carried = folder, prefix, dict[str, Entry]()
        try:
            self._reader = Reader(folder)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
        self.manifest = self._reader.manifest
        self.step = self.manifest.step
        names = stored_names(self.manifest, which, folder).items()
        self._names = {name.removeprefix(prefix): there for name, there in names if name.startswith(prefix)}
        self.tensors = {name: self._entry(there) for name, there in self._names.items()}

    def _entry(self, name: str) -> Entry:
        stored = self.manifest.tensors[name]
        return Entry(stored.shape, stored.dtype)

    def read(self, name: str) -> Tensor:
        """As Weights."""
        return self._read(self._names[name])

    def read_carried(self, name: str) -> Tensor:
        """As Weights."""
        return self._read(CARRIED + name)

    def _read(self, name: str) -> Tensor:
        try:
            return self._reader.whole(name)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error

    @property
    def identity(self) -> str:
        """As StoredWeights."""
        m = self.manifest
        sums = [(name, piece.checksums) for name, tensor in sorted(m.tensors.items()) for piece in tensor.pieces]
        key = checksum(repr((m.step, m.progress, m.config, m.about, m.files, sums)).encode())
        return f"{self.path} ({key})"

    def fill(self, wanted: Mapping[str, Sequence[Target]]) -> None:
        """As StoredWeights; only bytes that are wanted are read."""
        try:
            self._reader.read({self._names[name]: targets for name, targets in wanted.items()})
        except CheckpointError as error:
            raise ConversionError(str(error)) from error

    def close(self) -> None:
        """As Weights."""
        self._reader.close()


class CheckpointWeights(RunWeights):
    """Those of a checkpoint of one model, or of two towers.

    Args:
        folder, which: as of RunWeights. whole: of two towers both; else, as of a contrastive run that compares views,
            the image tower by itself, its linear projection as the classifier.

    Raises:
        ConversionError: it is damaged, has no average, or does not say of which model it is.
    """

    def __init__(self, folder: Path, which: Which = "weights", *, whole: bool = False) -> None:
        super().__init__(folder, which)
        whole = whole and has_texts(self.manifest.config)
        if is_contrastive(self.manifest.config) and not whole:
            self._take_image_tower()
        found = description_of(self.manifest, folder)
        if is_contrastive(self.manifest.config):  # whose classes are not the model's
            self.description = found if whole else self._image_tower_of(found)
        else:
            self.description = _with_labels(found, folder)
        shapes = shapes_of(self.description)
        stored = {name: entry for name, entry in self.tensors.items() if not name.startswith(f"{MATCH}.")}
        wrong = [
            f"{n}: {list(stored[n].shape) if n in stored else 'none'} there, {list(shapes.get(n, ()))} in its model"
            for n in {**shapes, **stored}
            if n not in stored or n not in shapes or stored[n].shape != shapes[n]
        ]
        if wrong:
            raise ConversionError("\n  ".join([f"{folder} has not the tensors of its own model:", *wrong[:_SHOWN]]))
        self.tensors = {name: stored[name] for name in shapes}
        carried = [name for name in self.manifest.tensors if name.startswith(CARRIED) and not self.left_out]
        self.carried = {name.removeprefix(CARRIED): self._entry(name) for name in carried}

    def _take_image_tower(self) -> None:
        """Leave out what is of both towers, or of the way from the image's features to the embedding, unless that is
        one matrix."""
        self.prefix = f"{IMAGE}."
        own = {n: there for n, there in self._names.items() if n.startswith(self.prefix) and _PROJECTOR not in n}
        self.left_out = [name for name in self._names if name not in own]
        self._names = {name.removeprefix(self.prefix): there for name, there in own.items()}
        self.tensors = {name: self._entry(there) for name, there in self._names.items()}

    def _image_tower_of(self, description: Description) -> Description:
        """By itself; it came from nowhere, as what came from elsewhere was both."""
        keys = self.manifest.config["contrastive"]
        embedding, projection, bias = keys["embedding"], keys["projection"], keys.get("projection_bias", False)
        return replace(tower_alone(description, embedding, projection, projection_bias=bias), origin=None)


def _with_labels(description: Description, folder: Path) -> Description:
    """With the names of classes that a run has written beside its checkpoints (`classes.json`), if they fit."""
    file = folder.absolute().parent.parent / "classes.json"
    if description.labels or not description.model.num_classes or not file.is_file():
        return description
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError):
        return description
    fits = isinstance(names, list) and len(names) == description.model.num_classes
    return replace(description, labels=tuple(map(str, names))) if fits else description


def stored_names(manifest: Manifest, which: Which, folder: Path) -> dict[str, str]:
    """Names in a manifest, by names in the model. Raises ConversionError if it has no average."""
    tensors = manifest.tensors
    names = {name.removeprefix("weights/"): name for name in tensors if name.startswith("weights/")}
    if which == "average":
        averages = {name.removeprefix("average/"): name for name in tensors if name.startswith("average/")}
        if not averages:
            raise ConversionError(
                f"{folder} has no moving average of the weights (its run had no optimizer.ema_decay): take the weights "
                "themselves"
            )
        names |= averages
    return names


def about_of(description: Description) -> dict[str, Any]:
    """What a manifest's `about` says of a model that came from elsewhere; `description_of` is the inverse."""
    d = description
    about: dict[str, Any] = {"labels": list(d.labels)} if d.labels else {}
    if d.preprocessing is not None:
        about["preprocessing"] = asdict(d.preprocessing)
    if d.origin is not None:
        about["origin"] = asdict(d.origin)
    if d.embeds:
        about["embeds"] = True
    return about


def description_of(manifest: Manifest, folder: Path) -> Description:
    """Of the model, or the two towers, of a checkpoint. Raises ConversionError if it does not say."""
    config, about = manifest.config, manifest.about
    try:
        data = config.get("data", {})
        own = about.get("preprocessing")
        images = Preprocessing(**_tuples(own)) if own else shown_by(data) if data else None
        return Description(
            model=model_of(config["model"]),
            preprocessing=images,
            origin=Origin(**about["origin"]) if "origin" in about else None,
            labels=tuple(about.get("labels", ())),
            pairing=pairing_of(config, _tuples) if has_texts(config) else None,
            embeds=bool(about.get("embeds", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{folder} does not say of which model it is: {error}") from error


def model_of(values: Mapping[str, Any]) -> ModelConfig:
    """Resolved, from the keys of a configuration as JSON has them. Raises ValueError."""
    known = {f.name for f in fields(ModelConfig)}
    if strange := sorted(set(values) - known):
        raise ValueError(f"model.{strange[0]} is no key of this version")
    given = dict(_tuples(values))
    if given.get("stages"):
        given["stages"] = tuple(StageConfig(**_tuples(stage)) for stage in given["stages"])
    return ModelConfig(**given).resolve()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
