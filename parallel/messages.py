"""Messages from one rank to another, and groups of their own, so that those of one do not wait for those of others."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import host_collectives
from parallel.comm import Axis, Pending, watched
from parallel.host_channel import SLOT_BYTES


class Exchange:
    """Messages that were started together."""

    def __init__(self, works: Sequence[Any], axis: Axis, kind: str) -> None:
        self._works, self._axis, self._kind = works, axis, kind

    def is_done(self) -> bool:
        """Whether `wait` would return at once. On gloo that is known only after a wait."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Return when what is received can be used, and what is sent be changed; later calls return at once."""
        if self._works:
            with watched(self._axis, self._kind):
                self.wait_unseen()

    def wait_unseen(self) -> None:
        """The same in a thread of its own: the rank itself does not wait."""
        for work in self._works:
            work.wait()
        self._works = ()


def exchange_start(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], axis: Axis, tag: int = 0
) -> Exchange:
    """Start messages to and from ranks of the axis, which may hurry past each other.

    NCCL carries what is started at once as one, which is done when all of it is, and these one after the other in the
    order of the calls, whatever they are: all that two ranks have in one group.

    Args:
        sends: (tensor, index along the axis): contiguous, unchanged until waited for. receives: ditto, to be filled.
        tag: on gloo, which messages these are: those of two ranks, one tag and one direction keep their order.
    """
    kind = "recv" if receives else "send"
    if axis.planned:
        return Exchange((), axis, kind)
    ops = [dist.P2POp(dist.irecv, x, axis.ranks[source], axis.group, tag) for x, source in receives]
    ops += [dist.P2POp(dist.isend, x, axis.ranks[to], axis.group, tag) for x, to in sends]
    assert all(op.tensor.is_contiguous() for op in ops)
    with watched(axis, kind, starts=True):
        works = dist.batch_isend_irecv(ops)
    for x, _ in sends:
        count_message(axis, "send", x.numel() * x.itemsize)
    for x, _ in receives:
        count_message(axis, "recv", x.numel() * x.itemsize)
    return Exchange(works, axis, kind)


class _Arrival:
    """An exchange, as `Pending` waits for it."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def wait(self) -> None:
        self.exchange.wait_unseen()

    def is_completed(self) -> bool:
        return self.exchange.is_done()


def shift_start(x: Tensor, out: Tensor, axis: Axis) -> Pending:
    """Start passing `x` on to the next rank of the axis, the last rank's to the first; `wait` gives `out`, with that of
    the rank before.

    Args:
        x, out: contiguous, of one size and type on all ranks; `x` must be unchanged until waited for. They may be the
            same memory, which is then overwritten when it is waited for and not before: what goes round needs no second
            buffer. That holds as long as one operation of the axis at most is started meanwhile.
    """
    assert axis.size > 1 and x.is_contiguous() and out.is_contiguous() and x.numel() == out.numel()
    if (channel := axis.channel) is not None:
        alone = x.numel() * x.itemsize <= SLOT_BYTES or x.data_ptr() != out.data_ptr()
        room = out if alone else torch.empty_like(out)
        with watched(axis, "shift", x):
            pending = Pending(room, host_collectives.shift(channel, room, x), axis=axis, kind="shift")
        return pending if alone else pending.then(out.copy_)
    room = torch.empty_like(out)
    after, before = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    exchange = exchange_start([(x, after)], [(room, before)], axis)
    return Pending(room, _Arrival(exchange), axis=axis, kind="recv").then(out.copy_)


def count_message(axis: Axis, kind: str, nbytes: int) -> None:
    """Meter a message that is started (`send` or `recv`)."""
    axis.meter.calls[kind] += 1
    axis.meter.bytes[kind] += nbytes
    if (listener := axis.meter.where.listener) is not None:
        listener.watched(kind, axis, None, nbytes)


def open_groups(axis: Axis, subsets: Sequence[Sequence[int]]) -> list[Axis | None]:
    """For each of these sets of indices along `axis` a group of its own; None where this rank is not in it.

    Collective over the world, whose ranks all make all groups in one order: set after set those of this axis and of the
    axes beside it (other data, context or tensor ranks).
    """
    everywhere: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everywhere, axis.ranks)
    beside = sorted(set(everywhere))
    return [_open(axis, sorted(subset), beside) for subset in subsets]


def _open(axis: Axis, subset: Sequence[int], beside: Sequence[tuple[int, ...]]) -> Axis | None:
    own = None
    for ranks in beside:
        members = tuple(ranks[index] for index in subset)
        group = dist.new_group(list(members), timeout=timedelta(seconds=axis.timeout))
        if ranks == axis.ranks and axis.index in subset:
            own = _along(axis, members, group)
    return own


def _along(axis: Axis, ranks: tuple[int, ...], group: dist.ProcessGroup) -> Axis:
    index = ranks.index(axis.ranks[axis.index])
    return Axis(name=axis.name, ranks=ranks, index=index, group=group, meter=axis.meter, timeout=axis.timeout)


def is_on_host(axis: Axis) -> bool:
    """Whether the axis's group carries tensors of the CPU."""
    return axis.group is not None and "gloo" in dist.get_backend(axis.group)


def open_on_host(axis: Axis) -> Axis:
    """The ranks of an axis with a group that does. Collective over them alone: where NCCL's communicators exist from
    the start, torch has who is not in a group split the world's for it, and who is does not for gloo.
    """
    seconds = timedelta(seconds=axis.timeout)
    group = dist.new_group(list(axis.ranks), timeout=seconds, backend="gloo", use_local_synchronization=True)
    return _along(axis, axis.ranks, group)


def close_groups(axes: Sequence[Axis]) -> None:
    """Give them back."""
    for axis in axes:
        if axis.group is not None and dist.is_initialized():
            dist.destroy_process_group(axis.group)
        axis.forget()
