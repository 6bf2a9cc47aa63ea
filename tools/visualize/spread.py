"""The model that is looked at, spread over ranks, of which the first one has what was found.

Legend: B images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from engine.assemble import grid_of
from engine.assembly import Assembly
from engine.checkpoint.load import contrastive_folder
from engine.device import memory_share, prepare_cpu, set_matmul
from engine.errors import ConfigError
from engine.run.agreement import check_agreement, code_version
from engine.run.device import device_of
from engine.seeing.capture import capture
from model.formats.base import ConversionError, Preprocessing
from model.seeing.capture import Attended, Wanted, choose
from model.seeing.similarity import cosines
from model.seeing.trace import Score, traced
from parallel import comm, process_group
from parallel.grid import world_axis
from parallel.layout import split_range
from parallel.process_group import World
from tools.evaluate.source import Source, load, open_source, source_of, sources_of
from tools.evaluate.tasks import extractor_of
from tools.evaluate.texts import TextStream
from tools.evaluate.towers import IMAGE, TEXT, TowerName
from tools.visualize import texts
from tools.visualize.methods import BACK, BY_GRADIENTS, EVERYWHERE, EXPLAIN, captum, check_target
from tools.visualize.of_rows import OF_LAYERS, Captured, flow
from tools.visualize.ranks import Ranks
from tools.visualize.shown import Asked, Shown

_AT_ONCE = 8  # images of a micro-batch, where nothing of each is kept
_WITH_GRADIENTS = ("fp32", "bf16")


class Spread:
    """Over all ranks, as Looked, in the format of the checkpoint's run."""

    def __init__(self, options: argparse.Namespace, flags: Sequence[str], world: World) -> None:
        self._world, self._said = world, options.text or []
        self._words = repr({k: v for k, v in sorted(vars(options).items()) if k not in ("checkpoint", "images", "out")})
        method = options.method
        keeps = method in (*BACK, "rollout") or method not in EVERYWHERE  # rows, or queries and keys
        flags = [*flags, "--device", options.device, "--train.micro_batch_size", str(1 if keeps else _AT_ONCE)]
        flags += ["--data.variable_resolution", "0"]  # images are shown in the model's own size
        self._sources = _opened(options, flags, world)
        source = self._sources[IMAGE]
        self.how = source.weights.description.preprocessing or Preprocessing()
        self.config, dtype = source.config.model, source.config.precision.dtype
        self._embeds = source.weights.description.embeds
        if method in EXPLAIN and not self._said:
            check_target(self.config.sizes.classes, options.target, embeds=self._embeds)
        if method in BY_GRADIENTS and dtype not in _WITH_GRADIENTS:
            raise ConfigError(
                f"--method {method} takes gradients without a loss scale, and precision.dtype is {dtype}, as in the "
                f"checkpoint's run: give --precision.dtype {' or '.join(_WITH_GRADIENTS)}"
            )
        if method == "integrated_gradients":
            captum()
        if self._said:
            given = source.config.text, options.checkpoint, options.tokenizer
            self._tokens = texts.tokens_of(self._said, *given, says=world.rank == 0)
        self._device = device_of(source.config, world)

    def begin(self, images: Tensor) -> None:
        """As Looked. Collective, as all that follows."""
        config, world = self._sources[IMAGE].config, self._world
        prepare_cpu(world)
        set_matmul(config.precision, self._device)
        process_group.start(world, self._device, config.parallel.timeout)
        facts = {
            "version of this code": code_version(),
            "options": self._words,
            "configuration": repr((config.model, config.parallel, config.precision)),
            "checkpoint": self._sources[IMAGE].weights.identity,
            "images": blake2b(images.numpy().tobytes(), digest_size=8).hexdigest(),
        }
        check_agreement(facts, world_axis(world))
        self._grid = grid_of(config, world, self._device)
        self._assembly = self._loaded(IMAGE)
        self._ranks = Ranks(self._assembly, self.config, self._embeds)
        self._scores = self._likeness() if self._said else []

    def _loaded(self, tower: TowerName) -> Assembly:
        return load(self._sources[tower], self._grid, self._device, memory_share(self._device, self._world))

    def _likeness(self) -> list[Score]:
        """To each text, whose tower is let go of again."""
        assembly, count = self._loaded(TEXT), len(self._tokens)
        rows = extractor_of(assembly).rows(TextStream(self._tokens, assembly), count, "text")
        whole = torch.zeros(count, rows.width, device=self._device)
        whole[slice(*split_range(count, self._world.size, self._world.rank))] = rows.values
        return cosines(comm.all_reduce(whole, self._grid.world))

    def shown(self, method: str, images: Tensor, asked: Asked) -> Shown | None:
        """As Looked."""
        if method in EVERYWHERE:
            here = images.to(self._device)
            found = (
                texts.explained(method, self._ranks, here, asked, self._scores, self._said)
                if self._said
                else EVERYWHERE[method](self._ranks, here, asked)
            )
            return found if self._world.rank == 0 else None
        every = self.rows(images, choose(self.config, asked.layers))
        if every is None:
            return None
        layers = {name: Captured(one.rows, wanted=one.wanted) for name, one in every.items()}
        return (
            OF_LAYERS[method](self.config, layers, asked)
            if method in OF_LAYERS
            else flow(self.config, traced(self.config, layers))
        )

    def rows(self, images: Tensor, wanted: Mapping[str, Wanted]) -> Mapping[str, Attended] | None:
        """As Looked."""
        return capture(self._assembly, images, wanted)

    def end(self) -> None:
        """As Looked."""
        comm.barrier(self._grid.world)  # a rank that has ended has its launcher end the others
        process_group.stop()


def _opened(options: argparse.Namespace, flags: Sequence[str], world: World) -> dict[TowerName, Source]:
    """The model of images, or its tower, and that of texts where there are some."""
    method, backward = options.method, options.method in BY_GRADIENTS
    try:
        pair = contrastive_folder(options.checkpoint)
    except ConversionError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    if pair is None and method in EXPLAIN and not options.text:
        weights = open_source(options.checkpoint, options.weights, flags)
        check_target(weights.description.model.num_classes or 0, None, embeds=weights.description.embeds)
        return {IMAGE: source_of(weights, flags, world, features=False, backward=backward)}
    task = "zero_shot" if options.text else "knn"  # without a classifier; of two towers the image's
    given = argparse.Namespace(checkpoint=options.checkpoint, weights=options.weights, features="pooled", task=task)
    try:
        return sources_of(given, flags, world, backward=backward)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"--task {task}", "--text")) from error
