"""One tower of a contrastive model by itself: images need no texts to be embedded, nor texts images.

A tower is run as a model of its own, whose layers are those of the pair without `image.` or `text.` before their names;
so it is cut into stages, split and sharded like any other, and its embeddings are shared out as all features are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from engine.config import Config
from engine.errors import ConfigError
from model import Build, LayerSpec, MicroBatch, ModelConfig, build_layers
from model.formats.base import ConversionError
from model.formats.checkpoint import RunWeights, description_of
from model.formats.weights import Which
from model.layers import measured
from model.towers import image_tower, text_tower
from parallel.checkpoint.manifest import Manifest

TowerName = Literal["image", "text"]
IMAGE: TowerName = "image"
TEXT: TowerName = "text"
_SAYS_NOTHING = ("preset", "drop_path")  # of a text tower that is not trained


def as_trained(config: Config, manifest: Manifest, folder: Path) -> Config:
    """A resolved configuration with the towers that the checkpoint is of, whatever flags have made of them.

    Raises:
        ConversionError: it does not say which these are. ConfigError: a flag makes another text tower; of images there
            may be other sizes, to which weights are resized (engine.checkpoint.fit).
    """
    found = description_of(manifest, folder)
    trained = replace(config, model=found.model)
    if not config.contrastive.has_texts:
        return trained
    if found.pairing is None:
        raise ConversionError(f"{folder} has no text tower: leave out --contrastive.pairs")
    text = found.pairing.text
    given = asdict(config.text)
    for key, value in asdict(text).items():
        if given[key] != value and key not in _SAYS_NOTHING:
            raise ConfigError(
                f"--text.{key} is {given[key]}, but the text tower of {folder} was trained with {value}: leave it out"
            )
    return replace(trained, text=text)


def layers_of(config: Config, tower: TowerName, *, embedding: bool) -> list[LayerSpec]:
    """Those of one tower of a resolved configuration, measured.

    Args:
        embedding: with the projection; of the image tower it may be left out, as of texts there is no use for that.
    """
    keys, model = config.contrastive, config.model
    if tower == TEXT:
        specs = text_tower(config.text, keys.embedding, keys.projection)
        assert config.text.context_length is not None
        texts = torch.zeros(1, config.text.context_length, dtype=torch.int64, device="meta")
        batch = MicroBatch.of(None, texts)
    elif not embedding:
        return build_layers(model)
    else:
        specs = image_tower(model, keys.embedding, keys.projection, projection_bias=keys.projection_bias)
        sizes = model.sizes
        batch = MicroBatch.of(torch.empty(1, sizes.channels, *sizes.image, device="meta"), None)
    own = [replace(spec, name=spec.name.removeprefix(f"{tower}.")) for spec in specs]
    return measured(own, Build(config=model), batch)


def model_of(config: Config, layers: Sequence[LayerSpec]) -> ModelConfig:
    """Of the tower that these layers are."""
    tower = layers[0].tower
    return config.model if tower is None else tower.config


class TowerWeights(RunWeights):
    """Those of one tower of a checkpoint, by their names in the tower.

    Args:
        folder, which: as of RunWeights. tower: its name. model: what it was trained as, resolved.

    Raises:
        ConversionError: it is damaged, or has no average.
    """

    def __init__(self, folder: Path, which: Which, tower: TowerName, model: ModelConfig) -> None:
        super().__init__(folder, which, f"{tower}.")
        self.description = replace(description_of(self.manifest, folder), model=model)
