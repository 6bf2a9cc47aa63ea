"""Images of several sizes in one micro-batch: their tokens behind each other, as rows, with as little filling as can be
(Dehghani et al. 2023, "Patch n' Pack: NaViT"; the same weights at any size: Beyer et al. 2023, FlexiViT).

The rows of an image are its prefix tokens and its patches, row by row of its own map. Rows behind the last image are
filling: nothing reads them, and their gradients are zero. All that works on rows alone knows nothing of it; what goes
by images (positions, attention, drop-path, pooling) asks the packing which rows are whose.

Legend: B images, R rows in all, P prefix tokens, r_i x c_i patches of the map of image i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Map = tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """Whose the rows of a micro-batch are.

    Attributes:
        maps: rows and columns of patches of each image. prefix: P. rows: R.
        device: where its tables are made.
    """

    maps: tuple[Map, ...]
    prefix: int
    rows: int
    device: torch.device | str = "cpu"
    _made: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.maps or min(min(sides) for sides in self.maps) < 1:
            raise ValueError(f"maps of patches are {self.maps}: there must be one at least, and none of them empty")
        if self.filling < 0:
            raise ValueError(f"images of {self.maps} patches have {sum(self.lengths)} tokens, more than {self.rows}")

    def once(self, make: Callable[..., Any], *args: Any) -> Any:
        """`make(self, *args)`, made when it is first asked for: layers share tables."""
        if (make, args) not in self._made:
            self._made[make, args] = make(self, *args)
        return self._made[make, args]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each image."""
        return tuple(self.prefix + r * c for r, c in self.maps)

    @property
    def filling(self) -> int:
        """Rows behind the last image."""
        return self.rows - sum(self.lengths)

    @property
    def patches(self) -> int:
        """Rows without those of prefix tokens."""
        return self.rows - self.prefix * len(self.maps)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """[R, ...] -> the rows of each image."""
        return x.split([*self.lengths, self.filling])[: len(self.maps)]

    def spread(self, of_images: Tensor) -> Tensor:
        """[B, ...] -> [R, ...]: to each row what its image has; to filling what the last one has."""
        return of_images[self._image_of_row]

    @cached_property
    def _image_of_row(self) -> Tensor:
        """int64 [R]."""
        last = len(self.maps) - 1
        counts = torch.tensor([*self.lengths, self.filling])
        images = torch.tensor([*range(last + 1), last])
        return images.repeat_interleave(counts).to(self.device, non_blocking=True)

    @cached_property
    def firsts(self) -> Tensor:
        """int64 [B], the first row of each image."""
        lengths = torch.tensor(self.lengths)
        return (lengths.cumsum(0) - lengths).to(self.device, non_blocking=True)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """What each row is, int64 [R] each, counted from 1 on, 0 for what it is not: which prefix token, or, behind
        these, which of all images' patches; in which of the r_0 + r_1 + ... rows of all maps; in which of their
        c_0 + c_1 + ... columns.
        """
        none, filling = torch.zeros(self.prefix, dtype=torch.int64), torch.zeros(self.filling, dtype=torch.int64)
        tokens, rows, cols = list[Tensor](), list[Tensor](), list[Tensor]()
        patches, above, before = self.prefix + 1, 1, 1
        for r, c in self.maps:
            tokens += [torch.arange(1, self.prefix + 1), torch.arange(patches, patches + r * c)]
            rows += [none, torch.arange(above, above + r).repeat_interleave(c)]
            cols += [none, torch.arange(before, before + c).repeat(r)]
            patches, above, before = patches + r * c, above + r, before + c
        token, row, col = (torch.cat([*each, filling]).to(self.device) for each in (tokens, rows, cols))
        return token, row, col

    def with_prefix(self, patches: Tensor) -> Tensor:
        """[`patches`, F], the patches of all images and as much filling -> [R, F], with zeros for prefix tokens."""
        if not self.prefix:
            return patches
        zeros = patches.new_zeros(self.prefix, *patches.shape[1:])
        *each, filling = patches.split([*(r * c for r, c in self.maps), self.filling])
        return torch.cat([part for image in each for part in (zeros, image)] + [filling])
