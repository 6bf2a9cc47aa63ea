"""Attention rows of chosen layers, heads and query tokens, out of a forward pass.

Each rank computes, while the pass runs, the rows of its own heads over its own tokens, and keeps nothing else. Such
pieces say where they belong, so those of any layout are put together alike.

Legend: B images, S tokens of an image, H heads, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.seeing.rows import Sight, rows_of
from model.sizes import StageSizes
from model.taps import Tapped

PROBE = "head"
Numbers = Sequence[int] | None
Queries = Sequence[int] | str
QUERIES = ("all", "class", "patches")
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of one layer.

    Attributes:
        name: of the layer. heads, queries: numbers, those among all tokens of the image (class tokens, registers,
            global tokens, patches row by row). prefix: tokens before the patches. here: numbers of its stage.
    """

    name: str
    heads: tuple[int, ...]
    queries: tuple[int, ...]
    prefix: int
    here: StageSizes

    @property
    def total(self) -> int:
        """S."""
        return self.prefix + self.here.rows * self.here.cols


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Rows of one layer.

    Attributes:
        rows: fp32 [B, H, Q, S]: what share of its mixture each query takes of each token. wanted: which these are.
    """

    rows: Tensor
    wanted: Wanted

    @property
    def maps(self) -> Tensor:
        """[B, H, Q, rows, cols]: the shares of patches."""
        return self.rows[..., self.wanted.prefix :].unflatten(-1, (self.wanted.here.rows, self.wanted.here.cols))


def attention_layers(config: ModelConfig) -> dict[str, StageSizes]:
    """Of a resolved model, by name, in order: its blocks, and the probe of its head, if it has one."""
    sizes = config.sizes
    names = (stage for stage in sizes.stages for _ in range(stage.depth))
    found = {f"blocks.{i}": stage for i, stage in enumerate(names)}
    return found | ({PROBE: sizes.last} if config.pool == "map" else {})


def choose(
    config: ModelConfig, layers: Sequence[str | int] | None = None, heads: Numbers = None, queries: Queries = "all"
) -> dict[str, Wanted]:
    """What is asked of each layer.

    Args:
        config: resolved. layers: names, or numbers of blocks, from the end if negative (default: all, and the probe).
            heads: numbers (default: all). queries: `all`, `class` (class tokens), `patches`, or numbers of tokens; the
            probe has one query, whatever is asked.

    Raises:
        ValueError: there are none such.
    """
    sizes, known = config.sizes, attention_layers(config)
    names = list(known) if layers is None else [_name(layer, sizes.depth, known) for layer in layers]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"layers {list(layers or [])} name {'one twice' if names else 'none'}: name each once")
    found = {}
    for name in names:
        here = known[name]
        total = sizes.prefix + here.rows * here.cols
        chosen = _numbers(list(range(here.heads)) if heads is None else heads, here.heads, f"heads of {name}")
        asked = _queries(queries, sizes.class_tokens, sizes.prefix, total)
        tokens = (0,) if name == PROBE else _numbers(asked, total, f"tokens of {name}")
        found[name] = Wanted(name=name, heads=chosen, queries=tokens, prefix=sizes.prefix, here=here)
    return found


def _name(layer: str | int, depth: int, known: Mapping[str, StageSizes]) -> str:
    name = f"blocks.{layer + depth if layer < 0 else layer}" if isinstance(layer, int) else layer
    if name not in known:
        probe = f", and the probe, {PROBE!r}" if PROBE in known else ""
        raise ValueError(f"layer {layer!r} attends to nothing here: take blocks 0 to {depth - 1}{probe}")
    return name


def _queries(queries: Queries, class_tokens: int, prefix: int, total: int) -> Sequence[int]:
    if not isinstance(queries, str):
        return queries
    if queries not in QUERIES:
        raise ValueError(f"queries {queries!r} are none of {', '.join(QUERIES)}, and no numbers of tokens")
    if queries == "class" and not class_tokens:
        raise ValueError("queries 'class': this model has no class token: take 'all', 'patches' or numbers of tokens")
    return range(prefix if queries == "patches" else 0, class_tokens if queries == "class" else total)


def _numbers(numbers: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    if wrong := [n for n in numbers if not 0 <= n < count]:
        raise ValueError(f"{what} {wrong[:_SHOWN]}: there are 0 to {count - 1}")
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ValueError(f"{what} {list(numbers)[:_SHOWN]}: name one at least, and each once")
    return tuple(numbers)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank has computed of one layer's rows.

    Attributes:
        name: of the layer. images: int64 [b], their numbers, -1 of padding. heads: numbers among those that are wanted.
            first: number of the first token of those that it is about. rows: [b, heads, Q, tokens].
    """

    name: str
    images: Tensor
    heads: tuple[int, ...]
    first: int
    rows: Tensor


class RowsTap:
    """Computes rows of a layer as it runs.

    Attributes:
        images: numbers of those that run now, to be set; None: 0 to B - 1. pieces: what was computed.
    """

    def __init__(self, layer: Tapped, wanted: Wanted) -> None:
        self._layer, self._wanted = layer, wanted
        site = layer.site
        self._here = [i for i, head in enumerate(wanted.heads) if head in site.heads]
        self._heads = torch.tensor([wanted.heads[i] - site.heads.start for i in self._here], dtype=torch.int64)
        self.images: Tensor | None = None
        self.pieces = list[Piece]()

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Tap."""
        sight, queries = Sight.of(self._layer), torch.tensor(self._wanted.queries)
        rows = rows_of(sight, q, k, queries, self._heads)
        images = torch.arange(q.shape[0]) if self.images is None else self.images.cpu()
        name, heads = self._wanted.name, tuple(self._here)
        self.pieces.append(Piece(name=name, images=images, heads=heads, first=sight.own.start, rows=rows))
        return q, k, v


def joined(pieces: Iterable[Piece], wanted: Mapping[str, Wanted], images: int) -> dict[str, Attended]:
    """All rows, of all ranks' pieces."""
    found = {
        name: torch.zeros(images, len(of.heads), len(of.queries), of.total) for name, of in wanted.items()
    }  # fmt: skip
    for piece in pieces:
        real = piece.images >= 0
        place = piece.images[real][:, None], torch.tensor(piece.heads, dtype=torch.int64)
        columns = slice(piece.first, piece.first + piece.rows.shape[-1])
        found[piece.name][..., columns][place] = piece.rows[real].float()
    return {name: Attended(rows=found[name], wanted=of) for name, of in wanted.items()}
