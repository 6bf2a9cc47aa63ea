"""A student's first weights out of a larger teacher's: chosen blocks, of each tensor evenly spaced heads and features.

Xu et al. 2024, "Initializing Models with Larger Ones" (weight selection): the first blocks, and every n-th element
along each dim, the same ones wherever a dim is met, so that features still belong together. Nothing is scaled. A head
is a head: of its teacher's heads some are taken, of each of those some features.

Names and layouts alone decide, so this knows neither files nor ranks. Legend: H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import logical_layouts
from parallel.layout import TensorLayout

# what there is less of, what says nothing about weights, and what is compared stage by stage
_MAY_DIFFER = (
    "preset", "width", "depth", "num_heads", "mlp_dim", "stages", "drop_path", "num_classes", "head_bias",
    "attention", "window_size", "grid_size",
)  # fmt: skip
_CLASSES = ("head.fc.", "head.fc_distill.")


@dataclass(frozen=True)
class Inherited:
    """Where a tensor of the student's comes from.

    Attributes:
        source: its name in the teacher. indices: int64, of each dim, in order; None: all of it.
    """

    source: str
    indices: tuple[Tensor | None, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of it, as it is."""
        return all(index is None for index in self.indices)

    def of(self, whole: Tensor) -> Tensor:
        """The student's tensor, out of the teacher's: a copy, or the same where it is all of it."""
        for dim, index in enumerate(self.indices):
            whole = whole if index is None else whole.index_select(dim, index.to(whole.device))
        return whole


def inherit(
    teacher: ModelConfig, student: ModelConfig, blocks: Sequence[int] | Literal["first", "even"] = "first"
) -> Mapping[str, Inherited]:
    """What each of the student's tensors is made of; all of them, but for a classifier of other classes.

    Args:
        teacher, student: resolved. blocks: as of `chosen_blocks`.

    Raises:
        ValueError: the teacher has too few blocks, heads or features, or another kind of them; there is no such block.
    """
    _check_kind(teacher, student)
    chosen = chosen_blocks(teacher, student, blocks)
    there, here = logical_layouts(teacher), logical_layouts(student)
    found = {}
    for name, layout in here.items():
        kind, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        source = f"blocks.{chosen[int(number)]}.{part}" if kind == "blocks" else name
        if teacher.num_classes != student.num_classes and is_classifier(name):
            continue
        if source not in there:
            raise ValueError(f"the teacher has no {source}, which the student's {name} would start from")
        sides = _side_by_side(name, layout, student)
        found[name] = Inherited(source, _indices(name, there[source], layout, sides))
    return found


def is_classifier(name: str) -> bool:
    """Whether a tensor of a model is of its classes."""
    return name.startswith(_CLASSES)


def in_order(parts: Mapping[str, Inherited], classes: Sequence[int]) -> dict[str, Inherited]:
    """The same tensors, the classifier's with the teacher's classes in another order.

    Args:
        classes: for each of the student's, the teacher's.
    """
    order = torch.tensor(classes)

    def of(part: Inherited) -> Inherited:
        others = part.indices[1:] or (None,) * part.source.endswith("weight")
        return Inherited(part.source, (order, *others))

    return {name: of(part) if name.startswith(_CLASSES) else part for name, part in parts.items()}


def evenly(length: int, count: int) -> Tensor:
    """`count` of `length` places, the first among them: int64."""
    return torch.arange(count) * length // count


def _check_kind(teacher: ModelConfig, student: ModelConfig) -> None:
    may_differ = {*_MAY_DIFFER, *["classifier_bias"] * (teacher.num_classes != student.num_classes)}
    for key in (field.name for field in fields(ModelConfig) if field.name not in may_differ):
        theirs, own = getattr(teacher, key), getattr(student, key)
        if theirs != own:
            raise ValueError(
                f"model.{key} is {own}, the teacher's {theirs}: a student that starts from a teacher's weights has "
                "fewer blocks, heads or features and is alike in all else: give it the teacher's"
            )
    stages = teacher.sizes.stages, student.sizes.stages
    if len(stages[0]) != len(stages[1]):
        raise ValueError(f"the student has {len(stages[1])} stages, the teacher {len(stages[0])}: give it as many")
    for theirs, own in zip(*stages, strict=True):
        if theirs.merges != own.merges:
            raise ValueError(
                f"stage {own.index} has merge {own.merges}, the teacher's {theirs.merges}: give it the same"
            )
        if (theirs.window, theirs.grid) != (own.window, own.grid):
            raise ValueError(
                f"stage {own.index} has windows of {own.window} and grids of {own.grid}, the teacher's {theirs.window} "
                f"and {theirs.grid}: give it the teacher's"
            )
        if student.position == "rope_2d" and theirs.head_dim != own.head_dim:
            raise ValueError(
                f"a head has {own.head_dim} features, one of the teacher's {theirs.head_dim}: with model.position "
                "rope_2d each pair of them is turned by its own angle, so some of them are no head: give model.width "
                f"and model.num_heads such that a head has {theirs.head_dim}"
            )


def chosen_blocks(
    teacher: ModelConfig, student: ModelConfig, blocks: Sequence[int] | Literal["first", "even"] = "first"
) -> list[int]:
    """The teacher's block for each of the student's, in the same stage of a pyramid.

    Args:
        blocks: those; or the first of each stage, which the paper found best; or of each stage evenly spread ones, the
            last among them, as blocks are matched.

    Raises:
        ValueError: there are no such blocks.
    """
    depths = [[stage.depth for stage in model.sizes.stages] for model in (teacher, student)]
    total, starts = sum(depths[1]), [0, *accumulate(depths[0])]
    if not isinstance(blocks, str) and len(blocks) != total:
        raise ValueError(f"{len(blocks)} blocks of the teacher are given for the student's {total}: give one for each")
    chosen = list[int]()
    for number, (deep, depth) in enumerate(zip(*depths, strict=True)):
        first, end = starts[number], starts[number + 1]
        if isinstance(blocks, str) and depth > deep:
            raise ValueError(
                f"the student has {depth} blocks in stage {number}, the teacher {deep}: give the student fewer, or say "
                "which of the teacher's blocks each starts from"
            )
        if isinstance(blocks, str):
            chosen += [first + (n if blocks == "first" else -(-(n + 1) * deep // depth) - 1) for n in range(depth)]
            continue
        for own in range(len(chosen), len(chosen) + depth):
            if not first <= blocks[own] < end:
                raise ValueError(
                    f"the student's block {own} would start from the teacher's {blocks[own]}, which is not in the "
                    f"same stage: give one from {first} to {end - 1}"
                )
            chosen.append(blocks[own])
    return chosen


def _side_by_side(name: str, layout: TensorLayout, model: ModelConfig) -> int:
    """How many tokens' features its last dim holds: 4 where patches merge, 2 where a head has class token and mean."""
    kind, _, rest = name.partition(".")
    if kind == "merges":
        return layout.shape[-1] // model.sizes.stages[int(rest.partition(".")[0])].width
    if rest.startswith("norm.") or rest in ("fc.weight", "fc_distill.weight"):
        return layout.shape[-1] // model.sizes.last.width if kind == "head" else 1
    return 1


def _indices(name: str, there: TensorLayout, here: TensorLayout, sides: int) -> tuple[Tensor | None, ...]:
    """Of each dim; `sides`: see _side_by_side."""
    out = list[Tensor | None]()
    for dim, (length, count) in enumerate(zip(there.shape, here.shape, strict=True)):
        segments = [of.segments if dim == of.dim else (of.shape[dim],) for of in (there, here)]
        units = [(of.units if dim == of.dim else ()) or (1,) * len(segments[0]) for of in (there, here)]
        if dim == len(there.shape) - 1 and sides > 1:
            segments, units = [(of.shape[dim] // sides,) * sides for of in (there, here)], [(1,) * sides] * 2
        index = _segmented(name, *segments, *units)
        out.append(None if length == count and torch.equal(index, torch.arange(length)) else index)
    return tuple(out)


def _segmented(
    name: str, long: Sequence[int], short: Sequence[int], heads_of: Sequence[int], heads: Sequence[int]
) -> Tensor:
    """Of a dim made of segments, of the teacher and of the student, and their units."""
    parts, offset = list[Tensor](), 0
    for length, count, wide, narrow in zip(long, short, heads_of, heads, strict=True):
        if length // wide < count // narrow or wide < narrow:
            what = f"{length // wide} x {wide}", f"{count // narrow} x {narrow}"
            raise ValueError(
                f"{name} has {what[1]} features in a dim, the teacher's {what[0]}: a student that starts from a "
                "teacher's weights has no more heads, head features, width or hidden features than it"
            )
        whole = evenly(length // wide, count // narrow)[:, None] * wide
        parts.append((offset + whole + evenly(wide, narrow)).flatten())
        offset += length
    return torch.cat(parts)
