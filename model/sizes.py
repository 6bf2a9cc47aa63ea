"""The numbers of a model: those that hold throughout, and those of each stage of a pyramid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from parallel.comm import Axis, single_axis
from parallel.layout import split_range


def class_tokens_of(pool: str | None) -> int:
    """How many class tokens a kind of pooling asks for."""
    return int(pool in ("cls", "cls_gap"))


def class_rows(position: str | None, class_tokens: int, class_position: bool | None) -> int:
    """How many of the first rows of `embed.pos` belong to class tokens."""
    return class_tokens if position == "learned_1d" and class_position else 0


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """One stage of a pyramid; a model without one has a single stage.

    Attributes:
        index: of the stage. depth, width, heads, mlp: its blocks. kinds: of attention, one per block.
        window, grid: sides of a window, and of the spread-out grid, in patches.
        merges: whether 2 x 2 patches of the stage before are one of its.
        rows, cols: patches of its map. stride: pixels between neighbours of the map.
    """

    index: int
    depth: int
    width: int
    heads: int
    mlp: int
    kinds: tuple[str, ...]
    window: int
    grid: int
    merges: bool
    rows: int
    cols: int
    stride: int

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.width // self.heads

    @property
    def window_sides(self) -> tuple[int, int]:
        """Rows and columns of a window, which is no larger than the map."""
        return min(self.window, self.rows), min(self.window, self.cols)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a resolved model, none of them missing.

    Attributes:
        image: rows and columns of pixels. patch: side of a patch, in pixels. channels: of the image.
        classes: of the head; 0: it gives pooled features. class_tokens, registers, global_tokens: how many of each
            stand before the patches. class_rows: of the table of learned positions, of class tokens.
        stages: at least one.
    """

    image: tuple[int, int]
    patch: int
    channels: int
    classes: int
    class_tokens: int
    class_rows: int
    registers: int
    global_tokens: int
    stages: tuple[StageSizes, ...]

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(stage.depth for stage in self.stages)

    def stage_of(self, block: int) -> int:
        """That a block is in."""
        ends = accumulate(stage.depth for stage in self.stages)
        return next(number for number, end in enumerate(ends) if block < end)

    @property
    def last(self) -> StageSizes:
        """The stage that the head sees."""
        return self.stages[-1]

    @property
    def projection(self) -> str | None:
        """The layer that projects tokens for the head alone, if the last stage has no blocks."""
        return None if self.last.depth else f"merges.{self.last.index - 1}"

    @property
    def patch_features(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch**2

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class tokens, registers, global tokens, in this order."""
        return self.class_tokens + self.registers + self.global_tokens

    @property
    def tokens(self) -> int:
        """Tokens per image at the entry."""
        return self.tokens_of(0)

    def tokens_of(self, stage: int) -> int:
        """Tokens per image in a stage."""
        return self.prefix + self.stages[stage].rows * self.stages[stage].cols

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of a window, of each block."""
        return tuple(stage.window_sides for stage in self.stages for _ in range(stage.depth))

    @property
    def fewest_heads(self) -> int:
        """Of the narrowest stage: the most tensor-parallel ranks that attention can be split over."""
        return min(stage.heads for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Which tokens of an image this rank of the context axis holds in one stage.

    The map is cut along its rows, so that a patch merge never needs a neighbour's: a stage that m merges follow is cut
    at multiples of 2^m rows. Prefix tokens belong to the first rank. Along an axis of one rank that is everything.

    Attributes:
        rows, cols: of the whole map. prefix: tokens before it. rows_of_ranks: (first, stop) row of each rank.
        context: the ranks that share an image.
    """

    rows: int
    cols: int
    prefix: int
    rows_of_ranks: tuple[tuple[int, int], ...]
    context: Axis

    @staticmethod
    def of(sizes: Sizes, stage: int, context: Axis | None = None) -> Tokens:
        """Of a stage on this rank."""
        context = context or single_axis("context")
        here, unit = sizes.stages[stage], 2 ** sum(later.merges for later in sizes.stages[stage + 1 :])
        shares = (split_range(sizes.last.rows, context.size, i) for i in range(context.size))
        return Tokens(
            rows=here.rows,
            cols=here.cols,
            prefix=sizes.prefix,
            rows_of_ranks=tuple((min(a * unit, here.rows), min(b * unit, here.rows)) for a, b in shares),
            context=context,
        )

    @property
    def first(self) -> int:
        """First row of this rank."""
        return self.rows_of_ranks[self.context.index][0]

    @property
    def stop(self) -> int:
        """The row after this rank's last."""
        return self.rows_of_ranks[self.context.index][1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        patches = ((b - a) * self.cols for a, b in self.rows_of_ranks)
        return tuple(n + (self.prefix if i == 0 else 0) for i, n in enumerate(patches))

    @property
    def own_prefix(self) -> int:
        """Prefix tokens that this rank holds."""
        return self.prefix if self.context.index == 0 else 0

    @property
    def patches(self) -> int:
        """Patches that this rank holds."""
        return (self.stop - self.first) * self.cols

    @property
    def count(self) -> int:
        """Tokens that this rank holds."""
        return self.own_prefix + self.patches
