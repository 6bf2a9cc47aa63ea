"""Lanes through the memory of a host: per lane a ring of a few slots, each as large as one of its messages.

The sender copies a message in if a slot is free; else it waits in the sender's queue, which a thread pushes on, made
when that first happens: whatever the rank itself does or waits for, such as a collective with a rank that waits for
this message. The receiver copies a message out when it takes it. Of each lane two counters lie in the memory, of the
messages *sent* and *taken*, and of each rank two words, in which it says that it is *asleep* until something is sent to
it, and that its thread is, until there is *room*: who changes a counter wakes who may wait for that. A slot begins with
a label (lane, number, micro-batch, bytes), so ranks at different messages get an error, not data.

That a rank says that it is asleep and then looks once more, while the other changes a counter and then looks whether
it is asleep, needs a fence between the two on either side; taking a lock is one.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from parallel.comm import Axis, watched
from parallel.failures import MismatchError
from parallel.host import LINE, Memory, counted
from parallel.messages import count_message
from parallel.pipeline.boundary import Route, Specs
from parallel.pipeline.post import SENDS_IN_FLIGHT, FreeLane, Lane, Post, Tensors, message_bytes

SLOTS = 4
_LABEL = struct.Struct("<IIiQ")  # lane, number, micro-batch, bytes
_LOCK = threading.Lock()


def _fence() -> None:
    with _LOCK:
        pass


def lanes_bytes(routes: Mapping[Route, Specs], ranks: int) -> int:
    """Shared memory for all lanes of an axis; pages that no message has come to are not taken."""
    return 2 * ranks * LINE + sum(map(_lane_bytes, routes.values()))


def _lane_bytes(specs: Specs) -> int:
    return 2 * LINE + SLOTS * (LINE + sum(_room(spec_bytes) for spec_bytes in _sizes(specs)))


def _sizes(specs: Specs) -> list[int]:
    return [message_bytes((spec,)) for spec in specs]


def _room(nbytes: int) -> int:
    """In whole lines."""
    return -(-nbytes // LINE) * LINE


class HostLane(Lane):
    """One end of a lane whose part of the memory begins at `start`."""

    def __init__(self, post: HostPost, number: int, route: Route, specs: Specs, peer: int, start: int) -> None:
        self.post, self.number, self.route, self.specs, self.peer = post, number, route, specs, peer
        self.nbytes = message_bytes(specs)
        memory = post.memory
        self.sent, self.taken = memory.word(start), memory.word(start + LINE)
        self.labels, self.slots = list[int](), list[list[Tensor]]()
        start += 2 * LINE
        for _ in range(SLOTS):
            self.labels.append(start)
            start += LINE
            self.slots.append([])
            for spec, size in zip(specs, _sizes(specs), strict=True):
                self.slots[-1].append(memory.bytes[start : start + size].view(spec.dtype).view(spec.shape))
                start += _room(size)
        self.count = 0  # of messages sent, or taken, at this end
        self.queue = deque[tuple[int, Tensors]]()
        self.expected = deque[int]()

    @property
    def num_expected(self) -> int:
        """None of the end that sends."""
        return len(self.expected)

    def send(self, micro_batch: int, tensors: Tensors) -> None:
        """Into the memory, or the queue."""
        post = self.post
        count_message(post.axis, "send", self.nbytes)
        with post.lock:
            if not self.queue and self._has_room():
                self._deposit(micro_batch, tensors)
                return
            self.queue.append((micro_batch, tensors))
            post.full.add(self)
        post.push_on()
        if post.bounded and len(self.queue) > SENDS_IN_FLIGHT:
            post.finish(SENDS_IN_FLIGHT)

    def push(self) -> bool:
        """Send of the queue what there is room for; returns whether that was something. Under the post's lock."""
        before = len(self.queue)
        while self.queue and self._has_room():
            self._deposit(*self.queue.popleft())
        if not self.queue:
            self.post.full.discard(self)
        return len(self.queue) < before

    def _has_room(self) -> bool:
        return counted(self.count - self.taken.value) < SLOTS

    def _deposit(self, micro_batch: int, tensors: Tensors) -> None:
        slot = self.count % SLOTS
        for room, x in zip(self.slots[slot], tensors, strict=True):
            room.copy_(x)
        self.post.label(self.labels[slot], self._label(micro_batch))
        self.count = counted(self.count + 1)
        self.sent.value = self.count
        self.post.ring(self.post.asleep[self.peer])

    def _label(self, micro_batch: int) -> tuple[int, int, int, int]:
        return self.number, self.count, micro_batch, self.nbytes

    def expect(self, micro_batch: int) -> None:
        """Nothing is to be posted: the sender knows where to put it."""
        self.expected.append(micro_batch)
        count_message(self.post.axis, "recv", self.nbytes)

    def has_arrived(self) -> bool:
        """A look at the counter."""
        return self.sent.value != self.count

    def take(self) -> Tensors:
        """A copy of the oldest message."""
        if not self.has_arrived():
            self.post.wait_any((self,))
        slot, micro_batch = self.count % SLOTS, self.expected.popleft()
        found = self.post.read(self.labels[slot])
        if found != self._label(micro_batch):
            self._mismatch(micro_batch, found)
        tensors = tuple(room.clone() for room in self.slots[slot])
        self.count = counted(self.count + 1)
        self.taken.value = self.count
        _fence()
        if counted(self.sent.value - self.count) >= SLOTS - 1:  # the sender may have found no room
            self.post.ring(self.post.room[self.peer])
        return tensors

    def _mismatch(self, micro_batch: int, found: tuple[int, ...]) -> None:
        with watched(self.post.axis, "recv"):
            raise MismatchError(
                f"rank {self.post.axis.index} of the axis expects message {self.count} of the {self.route}, that of "
                f"micro-batch {micro_batch} with {self.nbytes} bytes; rank {self.peer} has sent message {found[1]}, "
                f"that of micro-batch {found[2]} with {found[3]} bytes"
            )


class HostPost(Post):
    """The lanes of a rank, in memory of `lanes_bytes`."""

    def __init__(
        self, routes: Mapping[Route, Specs], stage_to_rank: Sequence[int], axis: Axis, memory: Memory, *, ready: bool
    ) -> None:
        self.axis, self.memory, self.carrier, self.bounded = axis, memory, "shared memory", not ready
        self.full = set[HostLane]()  # those that have messages in their queue
        self.lock = threading.Lock()  # of the queues, and of what is sent
        self.asleep = [memory.word(2 * rank * LINE) for rank in range(axis.size)]
        self.room = [memory.word((2 * rank + 1) * LINE) for rank in range(axis.size)]
        self._thread: threading.Thread | None = None
        self._has_queue, self._is_closed = threading.Event(), False
        self.label = lambda offset, label: _LABEL.pack_into(memory.map, offset, *label)
        self.read = partial(_LABEL.unpack_from, memory.map)
        self.lanes = {}
        start = 2 * axis.size * LINE
        for number, (route, specs) in enumerate(routes.items()):
            source, target = (stage_to_rank[stage] for stage in route)
            if axis.index in (source, target):
                peer = target if axis.index == source else source
                lane = HostLane(self, number, route, specs, peer, start) if specs else FreeLane(route)
                self.lanes[route] = lane
                self.nbytes += _lane_bytes(specs) if axis.index == target else 0
            start += _lane_bytes(specs)

    def push_on(self) -> None:
        """Let the thread see to what waits for room."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._push, daemon=True)
            self._thread.start()
        self._has_queue.set()

    def _push(self) -> None:
        own, room = self.axis.index, self.room[self.axis.index]
        while self._has_queue.wait() and not self._is_closed:
            room.value = 1
            _fence()
            with self.lock:
                has_moved = sum(lane.push() for lane in tuple(self.full)) > 0
                if not self.full:
                    self._has_queue.clear()
            if has_moved:
                self.ring(self.asleep[own])
            else:
                self.memory.sleep(room, 1)

    def ring(self, word: ctypes.c_uint32) -> None:
        """Wake who sleeps on it, if anybody does."""
        _fence()
        if word.value:
            word.value = 0
            self.memory.wake(word)

    def wait_any(self, lanes: Sequence[Lane]) -> None:
        """Asleep until one of the senders rings."""
        if any(lane.has_arrived() for lane in lanes):
            return
        peers = sorted({lane.peer for lane in lanes if isinstance(lane, HostLane)})
        with watched(self.axis, "recv"):
            self._sleep(lambda: any(lane.has_arrived() for lane in lanes), peers)

    def finish(self, keep: int = 0) -> None:
        """What is sent lies in the memory then, whoever may be gone; all but the last `keep` messages of a lane."""
        lanes = tuple(self.full)
        if any(len(lane.queue) > keep for lane in lanes):
            with watched(self.axis, "send"):
                peers = sorted({lane.peer for lane in lanes})
                self._sleep(lambda: all(len(lane.queue) <= keep for lane in lanes), peers)

    def _sleep(self, is_over: Callable[[], bool], peers: Sequence[int]) -> None:
        own = self.asleep[self.axis.index]

        def look() -> int | None:
            own.value = 1
            _fence()
            return None if is_over() else 1

        self.memory.wait(look, own, peers)
        own.value = 0

    def close(self) -> None:
        """The thread ends; the memory goes with the last reference."""
        self.lanes, self._is_closed = {}, True
        self._has_queue.set()
        self.ring(self.room[self.axis.index])
