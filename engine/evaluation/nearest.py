"""The nearest rows of one set to each row of another, by cosine, exactly, wherever the rows are.

The bank travels around the ranks in shares, and each rank compares it with its own queries block by block, so that no
matrix of all similarities exists. Neighbours have one order, the same on any number of ranks: by similarity, and of
equal ones the sample with the smaller number first. To that end products are taken in fp64, whose differences between
one blocking and another are far below what fp32 tells apart, and rounded to fp32: equal images are equally near.

Legend: Q queries, N rows of the bank, D features, k neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.evaluation.rows import Rows

QUERIES, BANK = 1024, 8192
"""Rows of a block: 64 MiB of similarities."""
_LOW = 0xFFFFFFFF


class Nearest(NamedTuple):
    """Of this rank's queries, the nearest first. similarities: fp32 [q, k]. indices: of samples in the bank, [q, k]."""

    similarities: Tensor
    indices: Tensor


def nearest(queries: Rows, bank: Rows, k: int) -> Nearest:
    """The k rows of `bank` nearest to each row of `queries`, both of normalised rows. Collective over their axis.

    Raises:
        ValueError: the bank has fewer than k rows.
    """
    if k > bank.total:
        raise ValueError(f"{k} neighbours are asked for, and the bank has {bank.total}: ask for at most as many")
    keys: list[Tensor | None] = [None] * -(-len(queries.values) // QUERIES)
    for span, rows in bank.around():
        for start in range(0, len(span), BANK):
            block = rows[start : start + BANK].double()
            for i, own in enumerate(queries.values.split(QUERIES) if keys else ()):
                found = _keys((own.double() @ block.T).float(), span.start + start)
                known = keys[i]
                found = found if known is None else torch.cat([known, found], 1)
                keys[i] = found.topk(min(k, found.shape[1]), dim=1, sorted=True).values
    if not keys:
        nothing = queries.values.new_empty(0, k)
        return Nearest(nothing.float(), nothing.long())
    return _unpacked(torch.cat([key for key in keys if key is not None]))


def _keys(similarities: Tensor, first: int) -> Tensor:
    """Similarity and number of each neighbour in one integer, larger where it is to come first: [q, n] -> int64 [q, n].

    The bits of a float are ordered as the float is, once those of negative ones are turned around.
    """
    bits = (similarities + 0.0).view(torch.int32).long()  # -0 is 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    numbers = torch.arange(first, first + similarities.shape[1], device=similarities.device)
    return (ordered << 32) | (_LOW - numbers)


def _unpacked(keys: Tensor) -> Nearest:
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return Nearest(bits.to(torch.int32).view(torch.float32), _LOW - (keys & _LOW))
