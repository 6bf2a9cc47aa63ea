"""Layouts: how ranks, stages and micro-batches may be arranged for a configuration, each as one line of text.

    tensor=8,sequence=on,context=1,pipeline=4,schedule=interleaved,virtual=2,data=2,zero=1,micro_batch=4

What a layout leaves to the rest of the configuration is not part of it; save sets are found for each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from engine.config import Config
from engine.config.limits import divisors
from engine.config.objectives import resolve_model
from engine.errors import ConfigError
from engine.objectives import make_objective
from model import LayerSpec
from parallel.grid import GridShape
from parallel.pipeline.schedules import SCHEDULES, virtual_stages_of
from tools.plan.memory import at_stage

NAMES = ("tensor", "sequence", "context", "pipeline", "schedule", "virtual", "data", "zero", "micro_batch")
ROWS = 65536
"""Of products, beyond which larger micro-batches gain nothing and are not looked at."""
_VIRTUAL = (2, 3, 4, 6)
_SWITCH = {"on": True, "true": True, "off": False, "false": False}


@dataclass(frozen=True, kw_only=True, order=True)
class Layout:
    """Of ranks, stages and micro-batches. `virtual`: stages per rank, where the schedule leaves that open."""

    tensor: int = 1
    sequence: bool = True
    context: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    virtual: int | None = None
    data: int = 1
    zero: int = 0
    micro_batch: int = 1

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Ranks along pipeline, data, context and tensor axes."""
        return self.pipeline, self.data, self.context, self.tensor

    def __str__(self) -> str:
        parts = {
            "tensor": self.tensor,
            "sequence": {True: None, False: "off"}[self.sequence] if self.tensor > 1 else None,
            "context": self.context if self.context > 1 else None,
            "pipeline": self.pipeline,
            "schedule": self.schedule if self.pipeline > 1 else None,
            "virtual": self.virtual if self.pipeline > 1 else None,
            "data": self.data,
            "zero": self.zero,
            "micro_batch": self.micro_batch,
        }
        return ",".join(f"{name}={value}" for name, value in parts.items() if value is not None)

    def configured(self, config: Config) -> Config:
        """The configuration in this layout, not resolved; recompute.policy auto."""
        config = at_stage(config, self.zero)
        parallel = replace(
            config.parallel,
            tensor_parallel_size=self.tensor,
            sequence_parallel=self.sequence or self.tensor == 1,
            context_parallel_size=self.context,
            pipeline_parallel_size=self.pipeline,
            schedule=self.schedule if self.pipeline > 1 else "1f1b",
            virtual_stages=self.virtual if self.pipeline > 1 else None,
            layers_per_stage=None,
            schedule_policy=config.parallel.schedule_policy if self.pipeline > 1 else "static",
        )
        recompute = config.recompute if config.recompute.is_auto else replace(config.recompute, policy="auto")
        return replace(
            config,
            parallel=parallel,
            train=replace(config.train, micro_batch_size=self.micro_batch),
            recompute=recompute,
        )


def read_layout(text: str, config: Config, ranks: int, option: str) -> Layout:
    """The layout that a text names; what it leaves out is as the configuration says, and data ranks what remains.

    Raises:
        ConfigError: an unknown name, a value that cannot be, or sizes that are not those of so many ranks.
    """
    given = read_values(text, option)
    p = config.parallel
    own = {
        "tensor": p.tensor_parallel_size,
        "sequence": p.sequence_parallel,
        "context": p.context_parallel_size,
        "pipeline": p.pipeline_parallel_size,
        "schedule": p.schedule,
        "virtual": p.virtual_stages if given.get("schedule", p.schedule) == p.schedule else None,
        "zero": p.zero_stage,
        **given,
    }
    each = own["tensor"] * own["context"] * own["pipeline"]
    own["data"] = given.get("data", ranks // each)
    if each * own["data"] != ranks:
        raise ConfigError(
            f"{option} {text}: tensor {own['tensor']} x context {own['context']} x pipeline {own['pipeline']} x data "
            f"{own['data']} is {each * own['data']} ranks, but there are {ranks}: give sizes whose product is that, or "
            "other --ranks"
        )
    if own.get("micro_batch") is None:
        per_rank = config.train.global_batch_size // own["data"]
        own["micro_batch"] = config.train.micro_batch_size or max(1, per_rank // own["pipeline"])
    try:
        virtual_stages_of(own["schedule"], own["virtual"])
        layout = Layout(**own)
        layout.configured(config).resolve(ranks)
    except ConfigError as error:
        raise ConfigError(f"{option} {text}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from error
    return layout


def read_values(text: str, option: str) -> dict[str, Any]:
    """Names and values of a layout's text. Raises ConfigError where one is unknown or cannot be."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.replace(" ", ",").split(","))):
        name, equals, value = part.partition("=")
        name = {"micro": "micro_batch", "virtual_stages": "virtual", "zero_stage": "zero"}.get(name, name)
        if not equals or not value:
            raise ConfigError(f"{option}: {part!r} is not name=value: write such as tensor=8,pipeline=4,zero=1")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise ConfigError(
                f"{option}: unknown name {name!r}: {f'did you mean {near[0]}? ' if near else ''}Give {', '.join(NAMES)}"
            )
        if name in found:
            raise ConfigError(f"{option}: {name} is given twice")
        found[name] = _value(name, value, option)
    if not found:
        raise ConfigError(f"{option} is empty: write such as tensor=8,pipeline=4,zero=1")
    return found


def _value(name: str, text: str, option: str) -> Any:
    if name == "schedule":
        if text not in SCHEDULES:
            raise ConfigError(f"{option}: schedule is {text!r}: choose one of {', '.join(SCHEDULES)}")
        return text
    if name == "sequence":
        if text not in _SWITCH:
            raise ConfigError(f"{option}: sequence is {text!r}: it must be on or off")
        return _SWITCH[text]
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or (number := int(text)) < (name != "zero"):
        raise ConfigError(f"{option}: {name} is {text!r}: it must be a positive integer")
    if name == "zero" and number > 3:
        raise ConfigError(f"{option}: zero is {text}: it must be 0, 1, 2 or 3")
    return number


@dataclass(frozen=True, kw_only=True, order=True)
class Key:
    """What the times of layers hang on: tensor ranks, whether rows are split over them, context ranks."""

    tensor: int
    sequence: bool
    context: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """All layouts of a configuration on so many ranks.

    Attributes:
        config: as given; its batch is kept. only: of some names, the values that they may have.
    """

    config: Config
    ranks: int
    only: Mapping[str, Any]

    def families(self) -> Iterator[Key]:
        """Of layouts that the model can be split by."""
        sizes = [n for n in divisors(self.ranks) if n <= 1024]
        for tensor, context in product(self._of("tensor", sizes), self._of("context", sizes)):
            if self.ranks % (tensor * context) or not self._splits(tensor, context):
                continue
            for sequence in self._of("sequence", [True, False] if tensor > 1 else [True]):
                yield Key(tensor=tensor, sequence=sequence, context=context)

    def pipelines(self, key: Key) -> list[tuple[int, int]]:
        """As `shapes`, where the batch can be dealt to the data ranks."""
        together = self.config.data.images_together
        return [(p, d) for p, d in self.shapes(key) if not self.config.train.global_batch_size % (d * together)]

    def shapes(self, key: Key) -> list[tuple[int, int]]:
        """(pipeline ranks, data ranks) with a key, where all ranks have layers."""
        rest = self.ranks // (key.tensor * key.context)
        pairs = [(p, rest // p) for p in self._of("pipeline", divisors(rest)) if not rest % p and p <= self.num_layers]
        found = [(p, d) for p, d in pairs if d in self._of("data", [d])]
        return [(p, d) for p, d in found if self._splits(key.tensor, key.context, d)]

    def micro_batches(self, key: Key, data: int) -> list[int]:
        """Sizes that divide a data rank's images, up to so many rows of products."""
        together = self.config.data.images_together
        sizes = [n for n in divisors(self.config.train.global_batch_size // data) if not n % together]
        most = max(1, ROWS * key.context // max(layer.output[0] for layer in self._layers))
        return [n for n in self._of("micro_batch", sizes) if n in sizes and (n <= most or "micro_batch" in self.only)]

    def schedules(self, pipeline: int) -> list[tuple[str, int | None]]:
        """Schedules and virtual stages of so many pipeline ranks; gpipe takes as long as 1f1b and holds more."""
        if pipeline == 1:
            return [("1f1b", None)]
        names = self._of("schedule", [name for name in SCHEDULES if name != "gpipe"])
        found = [(name, v) for name in names for v in ((None,) if SCHEDULES[name].is_fixed else _VIRTUAL)]
        if (wanted := self.only.get("virtual")) is not None:
            found = [(name, wanted if not SCHEDULES[name].is_fixed else None) for name, _ in found]
            found = [(name, v) for name, v in dict.fromkeys(found) if virtual_stages_of(name, v) == wanted]
        return [(name, v) for name, v in found if pipeline * virtual_stages_of(name, v) <= self.num_layers]

    def zeros(self, key: Key, data: int) -> list[int]:
        """ZeRO stages that so many ranks with the same weights may have."""
        return list(self._of("zero", range(4) if key.context * data > 1 else [0]))

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._layers)

    @cached_property
    def _layers(self) -> tuple[LayerSpec, ...]:
        least = Layout(micro_batch=self.config.data.images_together)
        return make_objective(least.configured(self.config).resolve(1)).layers

    def _splits(self, tensor: int, context: int, data: int = 1) -> bool:
        if context > 1 and self.config.data.variable_resolution:
            return False
        try:
            resolve_model(self.config, GridShape(tensor=tensor, context=context, data=data))
        except ValueError:
            return False
        return True

    def count(self) -> int:
        """How many layouts there are."""
        return sum(
            len(self.micro_batches(key, d)) * len(self.schedules(p)) * len(self.zeros(key, d))
            for key in self.families()
            for p, d in self.pipelines(key)
        )

    def _of(self, name: str, values: Iterable[Any]) -> list[Any]:
        return [self.only[name]] if name in self.only else list(values)
