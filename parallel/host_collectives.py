"""Collectives over a `parallel.host_channel.Channel`. Messages larger than a slot go in several operations.

Ranks are added up in the order of their index, 16-bit numbers in fp32, so that all get the same bits.
Legend: T ranks of the axis, R elements of a rank's part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parallel.failures import MismatchError
from parallel.host import LINE
from parallel.host_channel import SLOT_BYTES, Channel, Operation

_ALIGN = 64  # elements


def _pieces(length: int, most: int) -> Iterator[slice]:
    """Elements 0 to `length` in pieces of at most `most`; one, if only an empty one, at least."""
    most = max(_ALIGN, most // _ALIGN * _ALIGN)
    for start in range(0, max(1, length), most):
        yield slice(start, min(start + most, length))


def _view(slot: Tensor, dtype: torch.dtype, start: int, length: int) -> Tensor:
    """Elements of `dtype` in a slot of bytes."""
    return slot[start * dtype.itemsize : (start + length) * dtype.itemsize].view(dtype)


def _what(operation: str, x: Tensor) -> str:
    """What all ranks must be at."""
    return f"{operation} of {x.numel()} {str(x.dtype)[6:]}"


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A new tensor of `dtype`; what is narrower than fp32 is added up in fp32."""
    if dtype.itemsize < 4 and dtype.is_floating_point:
        return _sum(parts, torch.float32).to(dtype)
    total = parts[0].to(dtype) + parts[1].to(dtype)
    for part in parts[2:]:
        total += part
    return total


def all_gather(channel: Channel, out: Tensor, x: Tensor) -> Operation:
    """`x` [R] of every rank into `out` [T * R], both contiguous; x is read at once."""
    flat, rows, what = x.view(-1), out.view(channel.size, -1), _what("all_gather", x)
    for piece in _pieces(flat.shape[0], SLOT_BYTES // x.itemsize):
        length = piece.stop - piece.start
        rows[channel.index, piece].copy_(flat[piece])

        def deposit(slot: Tensor, piece: slice = piece, length: int = length) -> None:
            _view(slot, x.dtype, 0, length).copy_(flat[piece])

        def collect(slots: Sequence[Tensor], piece: slice = piece, length: int = length) -> None:
            for rank, slot in enumerate(slots):
                if rank != channel.index:
                    rows[rank, piece].copy_(_view(slot, x.dtype, 0, length))

        operation = channel.start(what, deposit, collect)
    return operation


def reduce_scatter(channel: Channel, out: Tensor, x: Tensor, *, accumulate: bool = False) -> Operation:
    """The sum over ranks of this rank's part of `x` [T * R] over, or onto, `out` [R]; both contiguous.

    `x` must be left alone until the operation is waited for.
    """
    parts, flat, others = x.view(channel.size, -1), out.view(-1), channel.size - 1
    what = _what("reduce_scatter", x)
    for piece in _pieces(flat.shape[0], SLOT_BYTES // (x.itemsize * others)):
        length = piece.stop - piece.start

        def deposit(slot: Tensor, piece: slice = piece, length: int = length) -> None:
            for place, rank in enumerate(r for r in range(channel.size) if r != channel.index):
                _view(slot, x.dtype, place * length, length).copy_(parts[rank, piece])

        def collect(slots: Sequence[Tensor], piece: slice = piece, length: int = length) -> None:
            own = [
                parts[rank, piece]
                if rank == channel.index
                else _view(slot, x.dtype, (channel.index - (channel.index > rank)) * length, length)
                for rank, slot in enumerate(slots)
            ]
            if accumulate:
                flat[piece] += _sum(own, out.dtype)
            elif len(own) == 2 and x.dtype == out.dtype == torch.float32:
                torch.add(own[0], own[1], out=flat[piece])
            else:
                flat[piece] = _sum(own, out.dtype)

        operation = channel.start(what, deposit, collect)
    return operation


def all_reduce(channel: Channel, x: Tensor, op: str) -> Operation:
    """`x` (contiguous) of all ranks summed, or their largest or smallest elements, in place when waited for."""
    flat, what = x.view(-1), _what(f"all_reduce({op})", x)
    for piece in _pieces(flat.shape[0], SLOT_BYTES // x.itemsize):
        length = piece.stop - piece.start

        def deposit(slot: Tensor, piece: slice = piece, length: int = length) -> None:
            _view(slot, x.dtype, 0, length).copy_(flat[piece])

        def collect(slots: Sequence[Tensor], piece: slice = piece, length: int = length) -> None:
            parts = [_view(slot, x.dtype, 0, length) for slot in slots]
            if op == "sum":
                flat[piece] = _sum(parts, x.dtype)
                return
            choose = torch.maximum if op == "max" else torch.minimum
            result = choose(parts[0], parts[1])
            for part in parts[2:]:
                result = choose(result, part)
            flat[piece] = result

        operation = channel.start(what, deposit, collect)
    return operation


def shift(channel: Channel, out: Tensor, x: Tensor) -> Operation:
    """`x` of the rank before this one into `out`, both contiguous; x is read at once.

    `out` is written to when the operation is waited for, or before, where x takes several slots: then it must not
    share memory with x.
    """
    flat, into, before, what = x.view(-1), out.view(-1), (channel.index - 1) % channel.size, _what("shift", x)
    for piece in _pieces(flat.shape[0], SLOT_BYTES // x.itemsize):
        length = piece.stop - piece.start

        def deposit(slot: Tensor, piece: slice = piece, length: int = length) -> None:
            _view(slot, x.dtype, 0, length).copy_(flat[piece])

        def collect(slots: Sequence[Tensor], piece: slice = piece, length: int = length) -> None:
            into[piece].copy_(_view(slots[before], x.dtype, 0, length))

        operation = channel.start(what, deposit, collect)
    return operation


def all_to_all(channel: Channel, out: Tensor, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
    """Rows of `x`, `send` of them for each rank, into `out`, `receive` of them from each: done on return.

    Each slot has a place per destination, and says before them how many bytes there are for each in all: so all ranks
    know, whatever they send themselves, how many rounds there are.
    """
    width = x.itemsize * math.prod(x.shape[1:])
    given = x.view(-1).view(torch.uint8).split([rows * width for rows in send])
    wanted = out.view(-1).view(torch.uint8).split([rows * width for rows in receive])
    sizes = torch.tensor([len(part) for part in given])
    head = (sizes.nbytes + LINE - 1) // LINE * LINE
    room = (SLOT_BYTES - head) // channel.size // LINE * LINE
    wanted[channel.index].copy_(given[channel.index])
    most = done = 0

    def deposit(slot: Tensor) -> None:
        slot[: sizes.nbytes].copy_(sizes.view(torch.uint8))
        for rank, part in enumerate(given):
            if rank != channel.index:
                piece = part[done : done + room]
                slot[head + rank * room :][: len(piece)].copy_(piece)

    def collect(slots: Sequence[Tensor]) -> None:
        nonlocal most
        for rank, slot in enumerate(slots):
            theirs = slot[: sizes.nbytes].view(torch.int64).tolist()
            most = max(most, *(size for to, size in enumerate(theirs) if to != rank))
            if theirs[channel.index] != len(wanted[rank]):
                raise MismatchError(
                    f"rank {channel.index} of the axis awaits {len(wanted[rank])} bytes from rank {rank}, which sends "
                    f"{theirs[channel.index]}"
                )
            if rank != channel.index:
                piece = wanted[rank][done : done + room]
                piece.copy_(slot[head + channel.index * room :][: len(piece)])

    while not done or done < most:
        channel.start(f"all_to_all of rows of {width} bytes, {str(x.dtype)[6:]}", deposit, collect).wait()
        done += room
