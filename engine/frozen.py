"""What of a model is frozen (`train.freeze`): found from the names of the whole model, before there is any layout.

A frozen parameter has a weight and nothing else: no gradient, no master, no optimizer state, no average. Where all
layers up to some place are frozen, nothing is sent or computed backward through them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate

from torch import nn

from engine.config import Config
from engine.errors import ConfigError
from model import Build, LayerSpec, ModelConfig, makers


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The frozen part of a model.

    Attributes:
        names: of the frozen parameters. count: numbers in them.
        passes: of each layer, products of the forward's cost that a step takes: 1 where nothing is sent backward, 2
            where gradients only pass through, 3 where a weight is trained. So the output of a layer with 1 carries no
            gradient, wherever it rides to.
    """

    names: frozenset[str]
    count: int
    passes: tuple[int, ...]

    @property
    def front(self) -> int:
        """How many layers there are before the first that trains anything."""
        return next((place for place, passes in enumerate(self.passes) if passes == 3), len(self.passes))

    def apply(self, module: nn.Module) -> None:
        """Freeze what is in `module`, whose parameters have the names of the whole model."""
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in self.names:
                parameter.requires_grad_(False)


def frozen_of(config: Config, layers: Sequence[LayerSpec]) -> Frozen:
    """What a resolved configuration freezes of these layers, and what their factories do by themselves.

    Raises:
        ConfigError: a pattern that is no name's, or patterns that leave nothing to train.
    """
    patterns = config.train.freeze
    known = dict[str, bool]()  # of what the user may freeze: no teacher's
    names, count, trains = set[str](), 0, list[bool]()
    for layer, parameters in zip(layers, _parameters(config.model, tuple(layers)), strict=True):
        trains.append(False)
        for name, numbers, trainable in parameters:
            stays = not trainable or layer.is_frozen or any(matches(name, pattern) for pattern in patterns)
            if stays:
                names.add(name)
                count += numbers
            if not layer.is_frozen:
                known[name] = stays
            trains[-1] |= not stays
    _check(patterns, known)
    return Frozen(names=frozenset(names), count=count, passes=_passes(layers, trains))


def _passes(layers: Sequence[LayerSpec], trains: Sequence[bool]) -> tuple[int, ...]:
    """Of each layer, from whether it trains anything, and whether anything does that has made what it reads."""
    carries, passes = dict[str, bool](), list[int]()
    for place, (layer, own) in enumerate(zip(layers, trains, strict=True)):
        rows, rides = layer.parted(makers(layers, place))
        read = [*([] if rows is None else [rows]), *layer.seen(rides)]
        carries[layer.name] = own or any(carries[maker.name] for maker in read)
        passes.append(3 if own else 2 if carries[layer.name] else 1)
    return tuple(passes)


@lru_cache(maxsize=32)  # some milliseconds, and the same for all runs of a model in this process
def _parameters(model: ModelConfig, layers: tuple[LayerSpec, ...]) -> tuple[tuple[tuple[str, int, bool], ...], ...]:
    """Of each layer, its parameters: (name in the model, numbers in it, whether the layer's factory lets it train)."""
    build = Build(config=model)
    return tuple(
        tuple(
            (f"{spec.name}.{inner}", parameter.numel(), parameter.requires_grad)
            for inner, parameter in spec.factory(build.of(spec)).named_parameters()
        )
        for spec in layers
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern, as of file names, fits a parameter's name, or what its name begins with up to a dot."""
    return any(fnmatchcase(start, pattern) for start in _starts(name))


def _starts(name: str) -> Iterator[str]:
    """`blocks`, `blocks.3`, `blocks.3.norm`, ..., the name itself."""
    return accumulate(name.split("."), "{}.{}".format)


def _check(patterns: Sequence[str], known: dict[str, bool]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            names = dict.fromkeys(start for name in known for start in _starts(name))
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names)[:3]
            raise ConfigError(
                f"train.freeze holds {pattern!r}, which is the name of no parameter or layer: nearest are "
                f"{', '.join(near)}"
            )
    if patterns and all(known.values()):
        raise ConfigError(
            f"train.freeze {list(patterns)} freezes all {len(known)} parameters: leave something to train, such as head"
        )
