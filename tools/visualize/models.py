"""The model that is looked at: in one process, or spread over ranks, of which the first one has what was found.

Legend: B images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

from torch import Tensor

from engine.assemble import grid_of
from engine.device import choose_device, memory_share, prepare_cpu, set_matmul
from engine.errors import ConfigError
from engine.run.agreement import check_agreement, code_version
from engine.run.device import device_of
from engine.seeing.capture import capture
from model import ModelConfig, VisionTransformer
from model.formats.base import Preprocessing
from model.seeing.capture import Attended, Wanted, choose
from model.seeing.trace import traced
from parallel import comm, process_group
from parallel.grid import world_axis
from parallel.process_group import World
from tools.evaluate.source import load, sources_of
from tools.evaluate.towers import IMAGE
from tools.visualize import texts
from tools.visualize.methods import METHODS
from tools.visualize.of_rows import OF_ROWS, Captured
from tools.visualize.shown import Asked, Shown


class Looked(Protocol):
    """A model that is looked at.

    Attributes:
        config: resolved. how: its images are prepared.
    """

    config: ModelConfig
    how: Preprocessing

    def begin(self, images: Tensor) -> None:
        """All that can be refused has been. Args: images: all that will be asked about, alike on all ranks."""

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown | None:
        """What a method gives; None on ranks but the first."""

    def rows(self, images: Tensor, wanted: Mapping[str, Wanted]) -> Mapping[str, Attended] | None:
        """Rows of attention, likewise."""

    def end(self) -> None:
        """Let go of other ranks."""


class Alone:
    """In this process, as Looked. Computes in fp32."""

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self.device = choose_device(options.device, world)
        prepare_cpu(world)
        try:
            self.model = VisionTransformer.from_pretrained(
                options.checkpoint, weights=options.weights, device=self.device
            )
        except ValueError as error:
            raise ConfigError(f"--checkpoint: {error}") from error
        self.config, self.how = self.model.config, self.model.preprocessing or Preprocessing()

    def begin(self, images: Tensor) -> None:
        """As Looked."""

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown:
        """As Looked."""
        return METHODS[method](self.model, images.to(self.device), asked)

    def rows(self, images: Tensor, wanted: Mapping[str, Wanted]) -> Mapping[str, Attended]:
        """As Looked."""
        heads = next(iter(wanted.values())).heads
        alike = all(of.heads == heads for of in wanted.values())
        return self.model.capture(images.to(self.device), layers=list(wanted), heads=heads if alike else None)

    def end(self) -> None:
        """As Looked."""


class WithTexts:
    """In this process, as Looked: both towers of a contrastive model, and the texts that images may be like."""

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        device = choose_device(options.device, world)
        prepare_cpu(world)
        model, tokens = texts.opened(options.checkpoint, options.weights, options.text, options.tokenizer)
        self.model, self._tokens, self._said = model.to(device), tokens.to(device), options.text
        self.config, self.how = model.config, model.preprocessing or Preprocessing()

    def begin(self, images: Tensor) -> None:
        """As Looked."""

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown:
        """As Looked: a map for each text."""
        return texts.explained(method, self.model, images.to(self._tokens.device), asked, self._tokens, self._said)

    def rows(self, images: Tensor, wanted: Mapping[str, Wanted]) -> Mapping[str, Attended]:
        """As Looked."""
        raise AssertionError("texts are for other methods")

    def end(self) -> None:
        """As Looked."""


class Spread:
    """Over all ranks, as Looked, in the format of the checkpoint's run. Rows of all layers come to the first rank, for
    as many images at once as are asked about at once."""

    def __init__(self, options: argparse.Namespace, flags: Sequence[str], world: World) -> None:
        self._world = world
        self._words = repr({k: v for k, v in sorted(vars(options).items()) if k not in ("checkpoint", "images", "out")})
        flags = [*flags, "--device", options.device, "--train.micro_batch_size", "1"]  # a rank's rows, image by image
        features = {"task": "knn", "features": "pooled"}  # without a classifier; of two towers the image's
        given = argparse.Namespace(checkpoint=options.checkpoint, weights=options.weights, **features)
        self._source = sources_of(given, flags, world)[IMAGE]
        self.how = self._source.weights.description.preprocessing or Preprocessing()
        config = self._source.config
        self.config = config.model
        self._device = device_of(config, world)

    def begin(self, images: Tensor) -> None:
        """As Looked. Collective, as all that follows."""
        config, world = self._source.config, self._world
        prepare_cpu(world)
        set_matmul(config.precision, self._device)
        process_group.start(world, self._device, config.parallel.timeout)
        facts = {
            "version of this code": code_version(),
            "options": self._words,
            "configuration": repr((config.model, config.parallel, config.precision)),
            "checkpoint": self._source.weights.identity,
            "images": blake2b(images.numpy().tobytes(), digest_size=8).hexdigest(),
        }
        check_agreement(facts, world_axis(world))
        self._grid = grid_of(config, world, self._device)
        self._assembly = load(self._source, self._grid, self._device, memory_share(self._device, world))

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown | None:
        """As Looked."""
        found = self.rows(images, choose(self.config))
        if found is None:
            return None
        layers = {name: Captured(one.rows, wanted=one.wanted) for name, one in found.items()}
        return OF_ROWS[method](self.config, traced(self.config, layers), asked)

    def rows(self, images: Tensor, wanted: Mapping[str, Wanted]) -> Mapping[str, Attended] | None:
        """As Looked."""
        return capture(self._assembly, images, wanted)

    def end(self) -> None:
        """As Looked."""
        comm.barrier(self._grid.world)  # a rank that has ended has its launcher end the others
        process_group.stop()
