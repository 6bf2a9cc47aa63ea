"""Lanes over process groups: gloo between hosts, NCCL between GPUs.

On gloo all lanes share the axis's group and differ by tag; a message is one array of bytes that begins with a label.
gloo tells that a message is through only to who waits for it, so where lanes are asked what has arrived (`ready`) a
thread per lane does nothing but wait.

On NCCL the messages of a group go one after the other. So each boundary has a group of its own: neither waits for the
other. What stands between two compute actions and goes by one group is started at once, that is both ways at the same
time, and is done together. No schedule locks up by that which does not when all messages of a rank go one by one, which
is what `validate` sees to: nothing then waits for a message and is itself waited for by an earlier one. Where the order
of a rank is not known (`ready`) each direction has a group, so that a message waits for those of its own lane alone.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from time import sleep

import torch
from torch import Tensor

from parallel.comm import Axis, watched
from parallel.failures import MismatchError
from parallel.messages import Exchange, close_groups, exchange_start
from parallel.pipeline.boundary import Route, Specs
from parallel.pipeline.post import SENDS_IN_FLIGHT, FreeLane, Lane, Post, Tensors, message_bytes

_LABEL_BYTES = 64
_LABEL = struct.Struct("=qqq")  # lane, micro-batch, bytes
_LOOK_SECONDS = 2e-5  # between looks whether something has come to a GPU


class _Waiter(threading.Thread):
    """Waits for the messages of a lane, one by one."""

    def __init__(self, moved: threading.Condition) -> None:
        super().__init__(daemon=True)
        self._moved, self._messages = moved, SimpleQueue[_Message | None]()
        self.start()

    def put(self, message: _Message | None) -> None:
        """The next; None: there will be none."""
        self._messages.put(message)

    def run(self) -> None:
        """Called by the thread."""
        while (message := self._messages.get()) is not None:
            try:
                message.exchange.wait_unseen()
            except RuntimeError as error:
                message.error = error
            with self._moved:
                message.is_through = True
                self._moved.notify_all()


class _Message:
    """One that is under way.

    Attributes:
        wire: its tensors, as they are sent. is_through: where a thread waits for it, whether it is.
    """

    def __init__(self, micro_batch: int, wire: Sequence[Tensor]) -> None:
        self.micro_batch, self.wire = micro_batch, wire
        self.exchange: Exchange
        self.is_through = False
        self.error: RuntimeError | None = None


class GroupLane(Lane):
    """One end.

    Args:
        axis: whose group carries it. peer: the other end, along that axis. number: among all lanes, its tag.
        kind: `send` or `recv`.
    """

    def __init__(
        self, post: GroupPost, number: int, route: Route, specs: Specs, axis: Axis, peer: int, kind: str
    ) -> None:
        self.post, self.number, self.route, self.specs = post, number, route, specs
        self.axis, self.peer, self.kind = axis, peer, kind
        self.sizes = [message_bytes((spec,)) for spec in specs]
        self.nbytes, self.wire_bytes = sum(self.sizes), _LABEL_BYTES + sum(map(_aligned, self.sizes))
        self.under_way = deque[_Message]()  # all that were sent and not seen through, or all that are expected
        self.waiter = _Waiter(post.moved) if post.has_waiters else None

    @property
    def num_expected(self) -> int:
        """Of the end that receives."""
        return len(self.under_way) if self.kind == "recv" else 0

    def send(self, micro_batch: int, tensors: Tensors) -> None:
        """By itself."""
        self.post.start([(self, micro_batch, tensors)])

    def expect(self, micro_batch: int) -> None:
        """By itself."""
        self.post.start(receives=[(self, micro_batch)])

    def has_arrived(self) -> bool:
        """Known by the lane's thread, or by the GPU."""
        message = self.under_way[0]
        return message.is_through if self.waiter else message.exchange.is_done()

    def take(self) -> Tensors:
        """The buffer that the message has come to."""
        self.finish(self.under_way[0])
        message = self.under_way.popleft()
        return self._unpack(message) if self.post.labels else tuple(message.wire)

    def finish(self, message: _Message) -> None:
        """Wait for it."""
        if self.waiter is None:
            message.exchange.wait()
            return
        if not message.is_through or message.error:
            with watched(self.axis, self.kind):
                self.post.await_moved(lambda: message.is_through)
                if message.error:
                    raise message.error

    def free(self, keep: int) -> None:
        """Let go of what was sent and is through; if the post is bounded, wait until at most `keep` are left."""
        while self.under_way and (self.has_arrived() or (len(self.under_way) > keep and self.post.bounded)):
            self.finish(self.under_way[0])
            self.under_way.popleft()

    def pack(self, micro_batch: int, tensors: Tensors) -> _Message:
        """To be sent."""
        if not self.post.labels:
            return _Message(micro_batch, [x.contiguous() for x in tensors])
        message = self.room(micro_batch)
        _LABEL.pack_into(message.wire[0].numpy().data, 0, *self._label(micro_batch))
        for part, x in zip(self._parts(message), tensors, strict=True):
            part.copy_(x)
        return message

    def room(self, micro_batch: int) -> _Message:
        """To be received."""
        if self.post.labels:
            return _Message(micro_batch, [torch.empty(self.wire_bytes, dtype=torch.uint8)])
        device = self.post.device
        return _Message(micro_batch, [torch.empty(x.shape, dtype=x.dtype, device=device) for x in self.specs])

    def _label(self, micro_batch: int) -> tuple[int, int, int]:
        return self.number, micro_batch, self.nbytes

    def _parts(self, message: _Message) -> Iterator[Tensor]:
        start = _LABEL_BYTES
        for spec, nbytes in zip(self.specs, self.sizes, strict=True):
            yield message.wire[0][start : start + nbytes].view(spec.dtype).view(spec.shape)
            start += _aligned(nbytes)

    def _unpack(self, message: _Message) -> Tensors:
        found = _LABEL.unpack_from(message.wire[0].numpy().data)
        if found != self._label(message.micro_batch) and not self.axis.planned:
            with watched(self.axis, "recv"):
                raise MismatchError(
                    f"rank {self.axis.index} expects of the {self.route} that of micro-batch {message.micro_batch}, "
                    f"rank {self.peer} has sent that of micro-batch {found[1]}"
                )
        return tuple(self._parts(message))


class GroupPost(Post):
    """The lanes of a rank, over the group of `axis` or, where there are such, over groups of two ranks.

    Args:
        routes: with the tensors of their messages, and of this rank's the axis that carries it.
        batches: whether what is started at once goes as one. has_waiters: whether threads wait for messages.
        labels: whether messages are labelled.
    """

    def __init__(
        self,
        routes: Sequence[tuple[Route, Specs, Axis | None]],
        stage_to_rank: Sequence[int],
        axis: Axis,
        device: torch.device,
        *,
        carrier: str,
        ready: bool,
        batches: bool = False,
        has_waiters: bool = False,
        labels: bool = True,
    ) -> None:
        self.axis, self.device, self.carrier, self.bounded = axis, device, carrier, not ready
        self.batches, self.has_waiters, self.labels = batches, has_waiters, labels
        self.moved = threading.Condition()
        self.lanes = {}
        self._sending = list[GroupLane]()
        for number, (route, specs, by) in enumerate(routes):
            if by is None:
                continue
            ends = [axis.ranks[stage_to_rank[stage]] for stage in route]
            sends = ends[0] == by.ranks[by.index]
            if not specs:
                self.lanes[route] = FreeLane(route)
                continue
            peer, kind = by.ranks.index(ends[sends]), "send" if sends else "recv"
            self.lanes[route] = lane = GroupLane(self, number, route, specs, by, peer, kind)
            if sends:
                self._sending.append(lane)
        self._groups = list({id(by): by for _, _, by in routes if by is not None and by is not axis}.values())

    def start(self, sends: Iterable[tuple[Lane, int, Tensors]] = (), receives: Iterable[tuple[Lane, int]] = ()) -> None:
        """Those of one group at once, if it is one that `batches`."""
        messages = [(lane, lane.room(m), False) for lane, m in receives if isinstance(lane, GroupLane)]
        for lane, m, tensors in sends:
            if isinstance(lane, GroupLane):
                lane.free(SENDS_IN_FLIGHT - 1)
                messages.append((lane, lane.pack(m, tensors), True))
        together: dict[object, list[tuple[GroupLane, _Message, bool]]] = {}
        for message in messages:
            together.setdefault(id(message[0].axis) if self.batches else id(message[1]), []).append(message)
        for batch in together.values():
            self._start(batch)

    def _start(self, batch: Sequence[tuple[GroupLane, _Message, bool]]) -> None:
        sends = [(x, lane.peer) for lane, message, leaves in batch if leaves for x in message.wire]
        receives = [(x, lane.peer) for lane, message, leaves in batch if not leaves for x in message.wire]
        first = batch[0][0]
        exchange = exchange_start(sends, receives, first.axis, 0 if self.batches else first.number)
        for lane, message, _ in batch:
            message.exchange = exchange
            lane.under_way.append(message)
            if lane.waiter is not None:
                lane.waiter.put(message)

    def wait_any(self, lanes: Sequence[Lane]) -> None:
        """Asleep until a thread notices, or looking at the GPU again and again."""
        if any(lane.has_arrived() for lane in lanes):
            return
        with watched(self.axis, "recv"):
            if self.has_waiters:
                self.await_moved(lambda: any(lane.has_arrived() for lane in lanes))
            while not any(lane.has_arrived() for lane in lanes):
                sleep(_LOOK_SECONDS)

    def await_moved(self, is_over: Callable[[], bool]) -> None:
        """Wait for what a thread brings about; gloo sees to it that it is not too long."""
        with self.moved:
            self.moved.wait_for(is_over)

    def finish(self) -> None:
        """The oldest of each lane first."""
        for lane in self._sending:
            while lane.under_way:
                lane.finish(lane.under_way.popleft())

    def close(self) -> None:
        """Threads and groups end."""
        for lane in self.lanes.values():
            if isinstance(lane, GroupLane) and lane.waiter is not None:
                lane.waiter.put(None)
        self.lanes = {}
        close_groups(self._groups)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _LABEL_BYTES) * _LABEL_BYTES
