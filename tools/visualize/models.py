"""The model that is looked at, in one process (tools.visualize.spread: over ranks).

Legend: B images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from engine.device import choose_device, prepare_cpu
from engine.errors import ConfigError
from model import ModelConfig, VisionTransformer
from model.formats.base import Preprocessing
from model.seeing.capture import Attended, Wanted
from model.seeing.similarity import likeness
from parallel.process_group import World
from tools.visualize import texts
from tools.visualize.methods import METHODS
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

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown | None:
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
        self.model, self._device, self._said = model.to(device), device, options.text
        self._scores = likeness(self.model, tokens.to(device))
        self.config, self.how = model.config, model.preprocessing or Preprocessing()

    def begin(self, images: Tensor) -> None:
        """As Looked."""

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown:
        """As Looked: a map for each text."""
        return texts.explained(method, self.model, images.to(self._device), asked, self._scores, self._said)

    def rows(self, images: Tensor, wanted: Mapping[str, Wanted]) -> Mapping[str, Attended]:
        """As Looked."""
        raise AssertionError("texts are for other methods")

    def end(self) -> None:
        """As Looked."""
