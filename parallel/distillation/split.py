"""What relations need of other ranks: heads cut anew over tensor ranks, the tokens of all context ranks.

Legend: B images, S tokens, H heads, K head dim, T tensor ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.context import exchange
from parallel.layout import split_range


def resplit_heads(x: Tensor, heads: int, relations: int, axis: Axis) -> Tensor:
    """All heads side by side, cut into as many relation heads as one likes, so that those of a teacher with other heads
    and of another width can be compared (Wang et al. 2021, MiniLMv2). A rank gets whole relation heads: what it does
    not hold of them is exchanged, and nothing where the cuts are the same.

    Args:
        x: [B, S, h, K], the heads that this rank holds: `split_range` of H. heads: H. relations: of all ranks. axis:
            the tensor axis.

    Returns:
        [B, S, r, H K / relations]: `split_range` of the relations; r may be 0.

    Raises:
        ValueError: H x K does not divide.
    """
    width, own = heads * x.shape[3], x.flatten(2)
    check_relations(width, relations)
    each = width // relations
    if axis.size > 1 and not all(
        _cut(heads, x.shape[3], axis, i) == _cut(relations, each, axis, i) for i in range(axis.size)
    ):
        held, wanted = _cut(heads, x.shape[3], axis, axis.index), _cut(relations, each, axis, axis.index)
        send = [_common(held, _cut(relations, each, axis, i)) for i in range(axis.size)]
        receive = [_common(_cut(heads, x.shape[3], axis, i), wanted) for i in range(axis.size)]
        own = exchange(own.permute(2, 0, 1).contiguous(), send, receive, axis).permute(1, 2, 0)
    return own.unflatten(2, (own.shape[2] // each, each))


def check_relations(width: int, relations: int) -> None:
    """Raise ValueError where features cannot be cut into as many relation heads."""
    if relations < 1 or width % relations:
        raise ValueError(
            f"{width} features of all heads cannot be cut into {relations} relation heads: take a number that divides "
            "the widths of student and teacher"
        )


def tokens_of_all(x: Tensor, counts: Sequence[int], axis: Axis) -> Tensor:
    """Those of this rank [B, S, ...] -> those of all ranks [B, N, ...]; gradients go home and are added up.

    Args:
        counts: tokens of each rank. axis: the context axis.
    """
    if axis.size == 1:
        return x
    rows = torch.cat([x.transpose(0, 1)] * axis.size)
    return exchange(rows, [x.shape[1]] * axis.size, counts, axis).transpose(0, 1)


def _cut(heads: int, size: int, axis: Axis, index: int) -> tuple[int, int]:
    """(first, end) of the features that a rank has."""
    start, stop = split_range(heads, axis.size, index)
    return start * size, stop * size


def _common(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
