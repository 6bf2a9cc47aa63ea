"""What a loss over pairs is given and gives back, and what all ranks must know before they begin.

Legend: n rows of this rank, N of all ranks, E width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """A loss and its derivatives, as one rank has them.

    Attributes:
        loss: [], this rank's share: the loss is the sum over ranks, a mean over the rows of all. left, right: [n, E],
            gradients of the loss with respect to this rank's rows, whole; None where they were not asked for. scale,
            bias: [], this rank's share of the gradient; bias None where there is none.
    """

    loss: Tensor
    left: Tensor | None
    right: Tensor | None
    scale: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What ranks have told each other. Attributes: left, right: rows of each rank. bound: no product of two rows is
    larger, whatever its sign; not a number where a row is none.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    bound: float


def agree(left: Tensor, right: Tensor, scale: Tensor, axis: Axis, *, paired: bool = True) -> Sizes:
    """Check what this rank is given, then learn what the others have. One small all-gather, and a wait for a GPU.

    Args:
        left, right: [n, E], [m, E]. scale: []. paired: whether rows belong together by their number.

    Raises:
        ValueError: shapes or types do not fit; no rank has a row.
    """
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"embeddings are {list(left.shape)} and {list(right.shape)}: both must be [rows, width], of one width"
        )
    if paired and left.shape != right.shape:
        raise ValueError(
            f"{left.shape[0]} left rows and {right.shape[0]} right rows are no pairs: give as many of each"
        )
    if left.dtype != right.dtype or not left.is_floating_point() or left.device != right.device:
        raise ValueError(
            f"embeddings are {left.dtype} on {left.device} and {right.dtype} on {right.device}: give both as one "
            "floating-point type, on one device"
        )
    if scale.numel() != 1:
        raise ValueError(f"the scale is {list(scale.shape)}: it must be one number")
    lengths = [_longest(left), _longest(right), scale.detach().double().abs().reshape(())]
    rows = [torch.tensor(float(x.shape[0]), dtype=torch.float64, device=left.device) for x in (left, right)]
    known = comm.all_gather_rows(torch.stack([*rows, *lengths])[None], axis).tolist()
    counts = [tuple(int(row[side]) for row in known) for side in (0, 1)]
    if not all(sum(side) for side in counts):
        raise ValueError(
            f"a contrastive loss over {axis.size} ranks without a single row: give at least one pair in all"
        )
    longest = [_largest([row[column] for row in known]) for column in (2, 3, 4)]
    return Sizes(left=counts[0], right=counts[1], bound=longest[0] * longest[1] * longest[2])


def _longest(x: Tensor) -> Tensor:
    """Euclidean length of the longest row, [] in float64; 0 of none."""
    lengths = torch.linalg.vector_norm(x.detach(), dim=1)
    return lengths.amax().double() if x.shape[0] else lengths.new_zeros((), dtype=torch.float64)


def _largest(values: list[float]) -> float:
    """Not a number if one of them is none."""
    return sum(values) if any(v != v for v in values) else max(values)
