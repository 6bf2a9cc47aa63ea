"""Ranks that see the same images make a portion of each micro-batch each, and tell each other what all of it is of.

A sample's pixels are a function of (seed, draw), so a portion has the rows that the micro-batch would have, bit by bit.
What is said of them goes round here, before anything is made of it: which samples they are, which were bad, texts, maps
of patches. Pixels are put together where they are computed with, which is nobody's matter here: a batch has those of
this rank's portion, filled up with zeros, and says how they were cut.

Shapes: V views of each sample; rows of images and texts are view by view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.reading import BadSample, Content


class Circle(Protocol):
    """Ranks that ask for the same micro-batches in the same order."""

    @property
    def size(self) -> int: ...
    @property
    def index(self) -> int: ...
    def tell(self, own: Any) -> list[Any]:
        """What each of them says, in order: small, and all wait for all."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a micro-batch is cut: the last portion may have fewer samples.

    Attributes:
        samples: in all. rows: of a portion.
    """

    samples: int
    rows: int

    @staticmethod
    def of(samples: int, ranks: int, config: DataConfig) -> Cut:
        """Of images that are made together, all are in one portion."""
        together = config.images_together * (2 * config.repeats if config.mixes else 1)
        return Cut(samples=samples, rows=-(-samples // (together * ranks)) * together)

    @property
    def count(self) -> int:
        """Portions, at most as many as ranks."""
        return -(-self.samples // self.rows)

    def span(self, index: int) -> range:
        """The places of a portion in its micro-batch. Ranks beyond the last make the first once more."""
        first = index * self.rows if index < self.count else 0
        return range(first, min(first + self.rows, self.samples))


class _Told(NamedTuple):
    """Of a portion; `first`: the place of its first index among those of the micro-batch. Others: as of Content."""

    first: int
    indices: NDArray[np.int64]
    bad: tuple[BadSample, ...]
    texts: NDArray[np.int64] | None
    texts_cut: int
    maps: tuple[tuple[int, int], ...] | None


class Portions:
    """How one rank makes its part of micro-batches.

    Args:
        says: whether there is something to say: samples may be bad, there are texts, or images have several sizes.

    Attributes:
        cut: of each.
    """

    def __init__(self, circle: Circle, samples: int, config: DataConfig, *, says: bool) -> None:
        self._circle, self._says, self.cut = circle, says, Cut.of(samples, circle.size, config)

    def part(self, first: int) -> range:
        """This rank's places of those from `first` on that are a micro-batch."""
        own = self.cut.span(self._circle.index)
        return range(first + own.start, first + own.stop)

    def filled(self, content: Content) -> Content:
        """A portion with as many rows as any other has."""
        images, own = content.images, len(self.part(0))
        missing = self.cut.rows - own
        if images is None or not missing:
            return content
        of_views = images.unflatten(0, (-1, images.shape[0] if content.maps else own))
        more = of_views.shape[1] // own * missing
        return replace(content, images=F.pad(of_views, (0, 0) * (of_views.ndim - 2) + (0, more)).flatten(0, 1))

    def whole(self, content: Content, drawn: NDArray[np.int64], first: int, places: range) -> Content:
        """What the micro-batch is of, but for images, which stay this rank's.

        Args:
            content: of this rank's portion. drawn: indices of the micro-batch, were none bad. first: place of the
            portion's first index among these. places: where samples are that are the portion's own, as of BadSample.
        """
        if not self._says:
            return replace(content, indices=drawn)
        assert content.indices is not None
        bad = tuple(one for one in content.bad if one.place in places)
        own = _Told(first, content.indices, bad, content.texts, content.texts_cut, content.maps)
        told: list[_Told] = self._circle.tell(own)[: self.cut.count]
        indices = np.empty_like(drawn)
        for part in told:
            indices[part.first : part.first + len(part.indices)] = part.indices
        maps = [part.maps for part in told if part.maps is not None]
        return replace(
            content,
            indices=indices,
            bad=tuple(one for part in told for one in part.bad),
            texts=self._joined([part.texts for part in told]),
            texts_cut=sum(part.texts_cut for part in told),
            maps=tuple(each for part in maps for each in part) if maps else None,
        )

    def _joined(self, texts: Sequence[NDArray[np.int64] | None]) -> NDArray[np.int64] | None:
        """Of portions, all with as many views as have texts."""
        of_views = [
            part.reshape(-1, len(self.cut.span(index)), part.shape[-1])
            for index, part in enumerate(texts)
            if part is not None
        ]
        return np.concatenate(of_views, axis=1).reshape(-1, of_views[0].shape[-1]) if of_views else None


def put_together(portions: Tensor, ranks: int, cut: Cut, maps: Sequence[tuple[int, int]] | None) -> Tensor:
    """The images of a micro-batch [V * samples, ...], of what each of its ranks has of them, one after the other.

    Args:
        maps: of images of several sizes, whose patches [samples * N, ...] follow each other without a gap.
    """
    of_ranks = portions.unflatten(0, (ranks, -1))[: cut.count]
    if maps is None:
        of_views = of_ranks.unflatten(1, (-1, cut.rows)).transpose(0, 1).flatten(1, 2)
        return of_views[:, : cut.samples].flatten(0, 1)
    whole = portions.new_zeros(of_ranks.shape[1] // cut.rows * cut.samples, *portions.shape[1:])
    first = 0
    for index, part in enumerate(of_ranks):
        span = cut.span(index)
        count = sum(rows * columns for rows, columns in maps[span.start : span.stop])
        whole[first : first + count] = part[:count]
        first += count
    return whole
