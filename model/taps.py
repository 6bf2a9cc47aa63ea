"""Taps: where queries, keys and values of chosen attention layers come out of a forward pass.

A tap stands between two of a block's named regions (model.regions), `qk_norm` and `attention`: it is given q, k and v
after QK norm and rotation, before whatever kernel makes a mixture of them. It looks at them (detached, for capture), or
keeps them and has a loss of them differentiated with the block, or hands on others, through a node of autograd that
adds gradients in backward. So nothing has to come out at a block's end: pipelines and messages know nothing of it.

Legend: B images, S tokens that this rank holds, h heads that it holds, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from model.build import Build
from model.sizes import StageSizes, Tokens
from parallel.layout import split_range


class Tap(Protocol):
    """Sees what a layer attends with."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, h, K] each -> those to attend with, of the same shapes: themselves, or what a node gives for them.

        Of the probe of attention pooling (the layer `head`), q is [B, 1, h, K].

        Runs as the region `tap` of the block, of which nothing is dropped: what a node saves of q, k and v by
        `save_for_backward` is kept where the block's save set has them kept, else computed again when backward comes;
        what else it saves is kept, or offloaded. Tensors that the tap itself holds stay as long as it holds them.
        """


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a layer attends.

    Attributes:
        kind: of attention, or `probe`. here: numbers of its stage. tokens: those that this rank holds. heads: likewise.
        feature_map: of linear attention.
    """

    kind: str
    here: StageSizes
    tokens: Tokens
    heads: range
    feature_map: str

    @staticmethod
    def of(build: Build, kind: str) -> Site:
        """Of a layer that is being built."""
        heads = range(*split_range(build.here.heads, build.tp.size, build.tp.axis.index))
        feature_map = build.config.feature_map or "elu"
        return Site(kind=kind, here=build.here, tokens=build.tokens, heads=heads, feature_map=feature_map)


class NamedLayers(Protocol):
    """A stage or a model."""

    @property
    def layers(self) -> Sequence[tuple[str, nn.Module]]:
        """Names and modules, in forward order."""


class Tapped(nn.Module):
    """An attention layer. Without a tap it costs a comparison."""

    site: Site
    tap: Tap | None = None


def tapped(layers: NamedLayers) -> dict[str, Tapped]:
    """The attention layers of a stage or a model, in order, by the name of their layer: `blocks.3`, `head`."""
    return {name: part for name, layer in layers.layers for part in layer.modules() if isinstance(part, Tapped)}


@contextmanager
def tapped_by(place: Tapped, tap: Tap) -> Iterator[None]:
    """Within, a layer has this tap, behind the one that it may have for longer."""
    usual = place.tap
    place.tap = tap if usual is None else lambda q, k, v: tap(*usual(q, k, v))
    try:
        yield
    finally:
        place.tap = usual


@contextmanager
def tapping(layers: NamedLayers, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Within, the layers of these names have these taps.

    For longer, `tapped(layers)[name].tap = tap` does.
    """
    places = tapped(layers)
    with ExitStack() as stack:
        for name, tap in taps.items():
            stack.enter_context(tapped_by(places[name], tap))
        yield
