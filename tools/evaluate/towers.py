"""One tower of a contrastive model by itself: images need no texts to be embedded, nor texts images.

A tower is run as a model of its own, whose layers are those of the pair without `image.` or `text.` before their names;
so it is cut into stages, split and sharded like any other, and its embeddings are shared out as all features are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from engine.config import Config
from model import Build, LayerSpec, MicroBatch, ModelConfig, build_layers
from model.formats.base import ConversionError, Description, Preprocessing
from model.formats.checkpoint import RunWeights
from model.formats.weights import Which
from model.layers import measured
from model.towers import image_tower, text_tower
from parallel.checkpoint.manifest import CheckpointError, Manifest, NoCheckpointError, read_manifest
from parallel.checkpoint.place import newest

TowerName = Literal["image", "text"]
IMAGE: TowerName = "image"
TEXT: TowerName = "text"


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
    return (folder, manifest) if manifest.config.get("objective") == "contrastive" else None


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
        specs = image_tower(model, keys.embedding, keys.projection)
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
        folder, which: as of RunWeights. tower: its name. model: what it is, resolved.

    Raises:
        ConversionError: it is damaged, or has no average.
    """

    def __init__(self, folder: Path, which: Which, tower: TowerName, model: ModelConfig) -> None:
        super().__init__(folder, which, f"{tower}.")
        data = self.manifest.config.get("data", {})
        images: dict[str, Any] = {key: tuple(data[key]) for key in ("mean", "std") if key in data}
        self.description = Description(model=model, preprocessing=Preprocessing(**images) if images else None)
