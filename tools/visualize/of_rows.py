"""Methods that need nothing but rows of attention, wherever these were computed: here, or on many ranks.

Legend: B images, S tokens, h heads, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import ConfigError
from model import ModelConfig
from model.seeing.capture import PROBE, Wanted, attention_layers
from model.seeing.flow import attention_flow
from model.seeing.lens import check_lens
from model.seeing.measures import distances, entropy
from model.seeing.rollout import Maps, Merging, Mixing, Trace
from model.seeing.rows import Seen
from model.seeing.trace import map_of, mergings, pooled_tokens
from model.sizes import StageSizes
from tools.visualize.shown import Asked, Shown


@dataclass(frozen=True)
class Captured(Maps):
    """Rows that were computed elsewhere, of all queries and heads of a layer, or of the probe.

    Attributes:
        wanted: which these are.
    """

    wanted: Wanted = field(kw_only=True)


Rows = Mapping[str, Seen | Captured]
"""Of layers by name, in order."""


@dataclass(frozen=True)
class _Layer:
    """A layer that attends.

    Attributes:
        name: of it. here: numbers of its stage. prefix: tokens before the patches. rows: of all its queries.
    """

    name: str
    here: StageSizes
    prefix: int
    rows: Seen | Captured

    @property
    def total(self) -> int:
        """S."""
        return self.prefix + self.here.rows * self.here.cols

    @staticmethod
    def of(name: str, rows: Seen | Captured) -> _Layer:
        """By where its rows come from."""
        if isinstance(rows, Captured):
            return _Layer(name, rows.wanted.here, rows.wanted.prefix, rows)
        return _Layer(name, rows.sight.site.here, rows.sight.site.tokens.prefix, rows)


def check(method: str, config: ModelConfig, asked: Asked, images: int) -> None:
    """Raise ConfigError where a resolved model, or so many images, have not what is asked for, before any pass."""
    sizes, first, last = config.sizes, config.sizes.stages[0], config.sizes.last
    if wrong := [n for n in asked.layers or () if not 0 <= n < sizes.depth]:
        raise ConfigError(f"--layers {wrong[0]}: there are blocks 0 to {sizes.depth - 1}")
    known = attention_layers(config)
    for name in known if asked.layers is None else [f"blocks.{n}" for n in asked.layers]:
        if wrong := [head for head in asked.heads or () if not 0 <= head < known[name].heads]:
            raise ConfigError(f"--heads {wrong[0]}: {name} has heads 0 to {known[name].heads - 1}")
    if asked.query is not None and not (0 <= asked.query[0] < first.rows and 0 <= asked.query[1] < first.cols):
        raise ConfigError(f"--query {asked.query}: there are {first.rows} rows and {first.cols} columns of patches")
    if method == "flow" and mergings(config):
        raise ConfigError("--method flow is for models whose tokens are the same in all layers: take rollout")
    if method == "clusters" and asked.clusters > (patches := images * last.rows * last.cols):
        raise ConfigError(f"--clusters {asked.clusters}: there are {patches} patches")
    if method == "lens":
        try:
            check_lens(config)
        except ValueError as error:
            raise ConfigError(f"--method lens: {error}") from error


def heads(config: ModelConfig, rows: Rows, asked: Asked) -> Shown:
    """What each head takes of each patch, and how spread and how far it looks."""
    shown, arrays = dict[tuple[str, str], Tensor](), dict[str, Tensor]()
    for layer in _layers(rows, asked):
        name, (row, spread, far) = layer.name, _row(layer, asked, config)
        arrays |= {f"{name}.entropy": spread, f"{name}.distance": far}
        for head in asked.heads or range(row.shape[1]):
            shown[name, f"head {head}"] = _patches(row[:, head], layer)
    return Shown(maps=shown, arrays=arrays)


def of_heads(shown: Shown) -> list[str]:
    """Lines: how spread each head looks, and how far, on average over images; `-` where no patch takes of patches."""
    found = []
    for name in (name.removesuffix(".entropy") for name in shown.arrays if name.endswith(".entropy")):
        spread, far = (shown.arrays[f"{name}.{what}"].nanmean(0) for what in ("entropy", "distance"))
        for head, (nats, patches) in enumerate(zip(spread.tolist(), far.tolist(), strict=True)):
            distance = "     -" if math.isnan(patches) else f"{patches:6.2f}"
            found.append(f"{name:<10} head {head:<3} entropy {nats:6.3f} nats, distance {distance} patches")
    return found


def mean(config: ModelConfig, rows: Rows, asked: Asked) -> Shown:
    """The mean over heads, layer by layer."""
    means = {of.name: _patches(_row(of, asked, config)[0].mean(1), of) for of in _layers(rows, asked)}
    return Shown(maps={(name, "mean of heads"): row for name, row in means.items()})


def by_name(noted: Trace) -> Rows:
    """The layers of a forward pass."""
    blocks = [step for step in noted.steps if isinstance(step, Seen)]
    probe = {PROBE: noted.probe} if isinstance(noted.probe, Seen) else {}
    return {f"blocks.{number}": of for number, of in enumerate(blocks)} | probe


def _layers(rows: Rows, asked: Asked) -> list[_Layer]:
    """Blocks that are asked for; the probe, too, where all are."""
    names = rows if asked.layers is None else [f"blocks.{n}" for n in asked.layers]
    return [_Layer.of(name, rows[name]) for name in names]


def _row(layer: _Layer, asked: Asked, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What each head takes of each token for what is asked for [B, h, S]; its entropy and distance, NaN where there is
    none, over all queries [B, h]."""
    probe = layer.name == PROBE
    weights = torch.ones(1) if probe else _query(layer, asked, config)
    grid = layer.here.rows, layer.here.cols
    row, spread, far, patches = (torch.zeros(()) for _ in range(4))
    for block, rows in layer.rows.blocks():
        part = rows.new_zeros(*rows.shape[:2], layer.total)
        part[:, :, block.keys] = torch.einsum("q,bhqs->bhs", weights[block.queries].to(rows), rows)
        queries = torch.tensor([-1]) if probe else block.queries
        apart, counted = distances(rows, queries, block.keys, grid, layer.prefix)
        row, far, patches = row + part, far + apart, patches + counted
        spread = spread + entropy(rows) * len(queries)
    return row, spread / len(weights), far / patches


def _query(layer: _Layer, asked: Asked, config: ModelConfig) -> Tensor:
    """Shares of queries [S]: one patch, or what the head pools."""
    first = config.sizes.stages[0]
    if asked.query is None:
        return pooled_tokens(config, layer.total)
    weights, stride = torch.zeros(layer.total), layer.here.stride // first.stride
    weights[layer.prefix + asked.query[0] // stride * layer.here.cols + asked.query[1] // stride] = 1
    return weights


def _patches(row: Tensor, layer: _Layer) -> Tensor:
    """[B, S] -> [B, rows, cols] of the layer's own stage."""
    return row[:, layer.prefix :].unflatten(1, (layer.here.rows, layer.here.cols))


def rollout(config: ModelConfig, tokens: Tensor) -> Shown:
    """Attention rollout, of the shares of tokens [B, S]."""
    return Shown(maps={("rollout", ""): map_of(config, tokens)}, arrays={"tokens": tokens})


def flow(config: ModelConfig, noted: Trace) -> Shown:
    """Attention flow."""
    maps = [_mean_map(step) for step in noted.steps if not isinstance(step, Merging)]
    start = noted.start if noted.probe is None else _mean_map(noted.probe)[:, 0]
    assert start is not None
    found = [attention_flow([rows[image] for rows in maps], start[image].cpu()) for image in range(len(start))]
    return Shown(maps={("attention flow", ""): map_of(config, torch.stack(found))})


def _mean_map(layer: Mixing) -> Tensor:
    """[B, Q, S], meaned over heads."""
    blocks = list(layer.blocks())
    queries = sum(len(block.queries) for block, _ in blocks)
    found = blocks[0][1].new_zeros(len(blocks[0][1]), queries, layer.tokens, device="cpu")
    for block, rows in blocks:
        found[:, block.queries[:, None], block.keys] = rows.mean(1).cpu()
    return found


OF_LAYERS: dict[str, Callable[[ModelConfig, Rows, Asked], Shown]] = {"heads": heads, "mean": mean}
"""Those that show layers by themselves, wherever their rows come from."""
