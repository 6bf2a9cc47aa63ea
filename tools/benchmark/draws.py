"""Configurations drawn by seed, for predictions to be held against: layouts, models, formats, schedules, policies.

A draw is a function of (seed, number) alone: no prediction has a say in what is drawn, lest it choose what it is good
at. What no configuration can be is drawn again; so is what would take much less or more than SIZES per rank, by a rough
formula of this module's own. Rivals are draws of one model and global batch on two ranks, in different layouts: which
of them is quickest is a question that has an answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from engine.config import Config
from engine.errors import ConfigError
from engine.objectives import make_objective
from engine.recompute import LADDER

SIZES = (250 << 20, 1200 << 20)
"""Bytes per rank that a draw takes, roughly: mostly tensors, and ranks of all of them fit into a small machine."""
_MOST_FLOPS = 6e11  # of a step of all ranks: a few seconds on two cores
_GROUPS = get_type_hints(Config)
_TRIES = 50  # models for a layout
_SHARES = (0.2, 0.4, 0.6, 0.8)
_RIVAL_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A configuration to run: `ranks` processes, and keys of the configuration that are not at their defaults."""

    name: str
    ranks: int
    keys: Mapping[str, Any]

    @property
    def share(self) -> float | None:
        """With policy auto: the budget is what is planned with everything computed again, and this share of what is
        planned beyond that when all is kept.
        """
        if self.keys.get("recompute.policy") != "auto":
            return None
        return random.Random(f"{self.name} {sorted(self.keys.items())}").choice(_SHARES)

    @property
    def flags(self) -> list[str]:
        """For the command line."""
        return [f"--{key}={_text(value)}" for key, value in self.keys.items()]

    @property
    def tiny_flags(self) -> list[str]:
        """What makes the model small, in the same layout, with as many micro-batches. A preset keeps its weights."""
        data = self.config.resolve(self.ranks).grid_shape(self.ranks).data
        count = self.keys["train.global_batch_size"] // self.keys["train.micro_batch_size"] // data
        keys: dict[str, Any] = {"train.micro_batch_size": 1, "train.global_batch_size": count * data}
        if "recompute.policy" in self.keys:
            keys |= {"recompute.policy": "full", "recompute.memory_budget": "auto"}  # whatever its depth
        if "model.preset" not in self.keys:
            keys |= {"model.width": 64, "model.num_heads": 4, "model.mlp_dim": 128, "model.image_size": 128}
            keys |= {"model.depth": 8}  # as many as there can be stages
        return [f"--{key}={value}" for key, value in keys.items()]

    @property
    def config(self) -> Config:
        """Not resolved. As the flags give it, but a hundred times as quickly as they are read."""
        groups: dict[str, dict[str, Any]] = {"train": {"steps": 1}}
        for key, value in self.keys.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        return Config(**{group: _GROUPS[group](**given) for group, given in groups.items()})


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def named(seed: int, name: str) -> Draw:
    """The draw of this name, such as `7` or `rival 7`."""
    group, _, number = name.rpartition(" ")
    return {"": draw, "rival": rival}[group](seed, int(number))


@cache
def draw(seed: int, number: int) -> Draw:
    """The configuration of this seed and number."""
    source = random.Random(f"{seed} {number}")  # of nothing secret
    while True:
        ranks = source.choice((1, 2, 2, 3, 4, 4, 4))
        layout = _layout(source, ranks)
        for _ in range(_TRIES):  # else layouts that take little would be drawn seldom
            model = _model(source)
            keys = {**layout, **model, **_formats(source), **_recompute(source, model.get("model.depth", 12))}
            found = Draw(name=str(number), ranks=ranks, keys=keys)
            if _is_possible(found):
                return found


@cache
def rival(seed: int, number: int) -> Draw:
    """Of one model and global batch of this seed, the layout of this number, unlike those of the numbers before."""
    model, source = _model_of_rivals(seed), random.Random(f"{seed} rival {number}")
    others = [rival(seed, other).keys for other in range(number)]
    while True:
        keys = {**_layout(source, 2), **model, **_recompute(source, model["model.depth"])}
        pieces = keys["train.global_batch_size"] // keys["train.micro_batch_size"]
        keys |= {"train.global_batch_size": _RIVAL_IMAGES, "train.micro_batch_size": _RIVAL_IMAGES // pieces}
        found = Draw(name=f"rival {number}", ranks=2, keys=keys)
        if not _RIVAL_IMAGES % pieces and keys not in others and _is_possible(found, least=0):
            return found


def _model_of_rivals(seed: int) -> dict[str, Any]:
    """Neither small nor with a kind of attention that some layouts refuse."""
    source = random.Random(f"{seed} rivals")
    batch = {"train.global_batch_size": _RIVAL_IMAGES, "train.micro_batch_size": _RIVAL_IMAGES}
    while True:
        model = {**_model(source), **_formats(source)}
        plain = model.get("model.attention") == "full" and model["precision.dtype"] != "fp8"
        if plain and _is_possible(Draw(name="", ranks=1, keys=model | batch), least=2 * SIZES[0]):
            return model


def _layout(source: random.Random, ranks: int) -> dict[str, Any]:
    """Ranks dealt to the axes, and what goes with each."""
    sizes = {"tensor": 1, "pipeline": 1, "context": 1, "data": 1}
    for factor in {1: (), 2: (2,), 3: (3,), 4: source.choice(((4,), (2, 2)))}[ranks]:
        sizes[source.choice(("tensor", "pipeline", "pipeline", "context", "data", "data"))] *= factor
    pipeline, shards = sizes["pipeline"], sizes["data"] * sizes["context"]
    micro_batches = source.choice((1, 2, 4)) if pipeline == 1 else pipeline * source.choice((1, 2, 3))
    size = source.choice((1, 2, 4, 8, 12, 16))
    keys: dict[str, Any] = {
        "parallel.tensor_parallel_size": sizes["tensor"],
        "parallel.pipeline_parallel_size": pipeline,
        "parallel.context_parallel_size": sizes["context"],
        "train.micro_batch_size": size,
        "train.global_batch_size": size * micro_batches * sizes["data"],
    }
    if sizes["tensor"] > 1:
        keys["parallel.sequence_parallel"] = source.choice((True, True, False))
    if pipeline > 1:
        names = ("gpipe", "1f1b", "1f1b", "interleaved", "zb_h1", "zb_h2", "zb_v", "v_half")
        keys["parallel.schedule"] = source.choice(names)
    if shards > 1:
        keys["parallel.zero_stage"] = stage = source.choice((0, 1, 2, 3, 3))
        if stage == 3:
            keys["parallel.reshard_after_forward"] = source.choice(("always", "never"))
    return keys


def _model(source: random.Random) -> dict[str, Any]:
    if source.random() < 0.04:
        return {"model.preset": "swin_t", "model.image_size": source.choice((112, 224))}
    width = source.choice((192, 256, 384, 512, 768, 1024))
    keys: dict[str, Any] = {
        "model.width": width,
        "model.depth": source.choice((4, 6, 8, 10, 12)),
        "model.num_heads": width // 64,
        "model.mlp_dim": width * source.choice((3, 4)),
        "model.image_size": source.choice((128, 160, 224, 256)),
        "model.patch_size": 16,
        "model.num_classes": 1000,
        "model.block": source.choice(("parallel", "sequential")),
        "model.qk_norm": source.choice((True, False)),
        "model.norm": source.choice(("layernorm", "layernorm", "rmsnorm")),
        "model.mlp": source.choice(("gelu", "gelu", "swiglu")),
        "model.pool": source.choice(("map", "cls", "gap")),
        "model.position": source.choice(("learned_1d", "learned_2d", "sincos_2d", "rope_2d")),
        "model.attention": source.choice(("full", "full", "full", "linear", "window")),
    }
    if keys["model.attention"] == "window":
        keys["model.window_size"] = source.choice((4, 7))
    if source.random() < 0.2:
        keys |= {"model.drop_path": 0.1, "model.layer_scale": 0.5}
    return keys


def _formats(source: random.Random) -> dict[str, Any]:
    return {"precision.dtype": source.choice(("fp32", "fp32", "bf16", "bf16", "fp16", "fp8"))}


def _recompute(source: random.Random, depth: int) -> dict[str, Any]:
    """A policy; or two save sets, of the first blocks and of the rest."""
    first = source.randrange(1, depth)
    sets = [source.choice(LADDER) for _ in range(2)]
    mixed = f"{sets[0]} * {first}, {sets[1]} * {depth - first}"
    policy = source.choice(("none", "none", "full", "selective", "auto", "auto", mixed, mixed))
    return {} if policy == "none" else {"recompute.policy": policy}


def _is_possible(found: Draw, least: float = SIZES[0]) -> bool:
    try:
        config = found.config.resolve(found.ranks)
        shape = config.grid_shape(found.ranks)
        if not least <= _rough_bytes(config, found.ranks) <= SIZES[1]:
            return False
        layers = make_objective(config).layers
        stages = config.pipeline(shape).schedule(config.num_micro_batches(shape)).stage_to_rank
    except (ConfigError, ValueError):
        return False
    if len(layers) < len(stages):
        return False
    return 3.0 * config.train.global_batch_size * sum(layer.flops for layer in layers) <= _MOST_FLOPS


def _rough_bytes(config: Config, ranks: int) -> float:
    """Sixteen bytes per weight, and of each block some twenty widths of every row of a micro-batch, however shared."""
    shape, sizes, zero = config.grid_shape(ranks), config.model.sizes, config.parallel.zero_stage
    assert config.train.micro_batch_size is not None
    weights = sum(stage.depth * (4 * stage.width**2 + 2 * stage.width * stage.mlp) for stage in sizes.stages)
    whole = {0: 16, 1: 8, 2: 4, 3: 0}[zero]
    state = weights * (whole + (16 - whole) / (shape.data * shape.context))
    images = config.train.micro_batch_size * min(config.num_micro_batches(shape), shape.pipeline)
    element = 4 if config.precision.dtype == "fp32" else 2
    kept = images * element * sum(20 * s.depth * s.width * sizes.tokens_of(s.index) for s in sizes.stages)
    return (state + kept / shape.context) / (shape.tensor * shape.pipeline)
