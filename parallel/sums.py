"""The sum of very many squares, exact whatever their number.

On a CPU torch's norms add up one square after the other in fp32, as many lanes as a vector has: the norm of 12 M
numbers comes out 0.05 % too small, that of 200 M 3 %, and how much depends on how ranks have cut them. In rows of a
thousand, whose sums are added in fp64, the error is about 1e-9, at worst 1e-7 (all numbers alike), at the same speed.
On GPUs norms are sums of blocks as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ROW = 1024


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of contiguous `tensors` (one at least, on one device): fp64 scalar."""
    if tensors[0].device.type == "cpu":
        norms = torch.cat([norm for t in tensors for norm in _norms_of_rows(t.view(-1))])
    else:
        norms = torch.stack(torch._foreach_norm(list(tensors)))
    return norms.double().square().sum()


def _norms_of_rows(flat: Tensor) -> Iterator[Tensor]:
    whole = flat.numel() // _ROW * _ROW
    for rows in (flat[:whole].view(-1, _ROW), flat[None, whole:]):
        yield torch.linalg.vector_norm(rows, dim=1)
