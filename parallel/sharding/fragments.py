"""What an optimizer works on: this rank's part of every parameter, in fp32, and what it must know to treat it.

Two views of the same memory. Element-wise optimizers take `Span`s, long flat arrays of everything that is treated
alike. Optimizers that need the logical tensor (its rows and columns, its norm) take `Fragment`s, one per parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from parallel.comm import Axis
from parallel.layout import ParameterInfo, TensorLayout


class Group(NamedTuple):
    """What an optimizer treats alike.

    Attributes:
        decay: weight-decay group: `body`, `head` or `none`.
        depth: of the layer in the model, for learning rates by layer; 0 where they do not differ.
    """

    decay: str
    depth: int = 0


class Part(NamedTuple):
    """What of one parameter lies where in a flat array.

    Attributes:
        name: of the parameter. layout: its logical tensor, and the part of it that this tensor rank holds.
        start, stop: elements of that part, flattened. own: of these, counted from start, what this rank alone accounts
            for in sums over ranks. offset: of the first in the flat array.
    """

    name: str
    layout: TensorLayout
    start: int
    stop: int
    own: slice
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Span:
    """A flat array of neighbouring parameters of one group. eq=False: spans are compared and hashed by identity.

    Attributes:
        parts: the parameters, or what this rank trains of them; between them lies padding.
        weight: fp32 [L], what is trained. grad: fp32 [L]. model_weight: bf16 or fp16 [L], which must be given the
            rounded weight after each update; None where the model computes with `weight` itself.
    """

    group: Group
    parts: Sequence[Part]
    weight: Tensor = field(repr=False)
    grad: Tensor = field(repr=False)
    model_weight: Tensor | None = field(repr=False, default=None)


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, stop) of one parameter, flattened: those that this rank updates (at ZeRO stage 0, all of them).

    Attributes:
        name: of the parameter. info: its logical tensor, and the part of it that this tensor rank holds, of
            shape info.layout.local_shape; start and stop count in that.
        own: the elements, of start to stop, that this rank alone accounts for in sums over ranks: sums of `own` over
            all ranks of `Fragments.axis` meet every element of the logical tensor once. May be empty.
        weight, grad, model_weight: flat [stop - start], as in Span.
    """

    name: str
    info: ParameterInfo
    group: Group
    start: int
    stop: int
    own: slice
    weight: Tensor = field(repr=False)
    grad: Tensor = field(repr=False)
    model_weight: Tensor | None = field(repr=False, default=None)

    @property
    def parts(self) -> tuple[Part]:
        """Itself, as the one parameter of a flat array."""
        return (Part(self.name, self.info.layout, self.start, self.stop, self.own),)


class Holding(NamedTuple):
    """Where a piece of a parameter is: elements [start, stop) of the flattened local part of `layout`, on a rank.

    Attributes:
        rank: index along `Fragments.axis`.
    """

    rank: int
    layout: TensorLayout
    start: int
    stop: int


class Holdings(Mapping[str, list[Holding]]):
    """By parameter name, who holds what; found when it is first asked for, since of thousands of ranks it is long."""

    def __init__(self, find: Callable[[], dict[str, list[Holding]]]) -> None:
        self._find = find

    @cached_property
    def _found(self) -> dict[str, list[Holding]]:
        return self._find()

    def __getitem__(self, name: str) -> list[Holding]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@dataclass(frozen=True)
class Fragments:
    """All that this rank trains.

    Attributes:
        spans, fragments: the two views. Every rank of `axis` has a fragment, if only an empty one, of every parameter,
            in the same order.
        axis: the ranks that train this pipeline stage: along data, context and tensor.
        owned: by parameter name, who accounts for what (`Fragment.own`): pieces that cover the logical tensor once.
        trained: by parameter name, who updates what: at stage 0 and for copies over tensor ranks, pieces overlap.
    """

    spans: Sequence[Span]
    fragments: Sequence[Fragment]
    axis: Axis
    owned: Mapping[str, list[Holding]]
    trained: Mapping[str, list[Holding]]
