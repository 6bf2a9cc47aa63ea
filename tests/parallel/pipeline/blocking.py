"""Messages between threads that really block: none moves before both its ends are there, and before those before it.

Each rank is a thread. What of a rank's messages go one after the other (its *channels*) is chosen: all of them, those
of a boundary (as over NCCL's groups of two), those of a lane. Nothing goes by the clock: when every rank waits, and for
what none of them can bring about, they are locked up.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence

from parallel.failures import MismatchError
from parallel.pipeline import Schedule
from parallel.pipeline.boundary import Route, Specs, routes_between_ranks
from parallel.pipeline.post import FreeLane, Lane, Post, Tensors

Channel = Callable[[Route], Hashable]


def one_for_all(route: Route) -> Hashable:
    """All messages of a rank go one after the other."""
    return 0


def per_boundary(route: Route) -> Hashable:
    """Those between two stages do."""
    return frozenset(route)


def per_lane(route: Route) -> Hashable:
    """Those of a lane do."""
    return route


class LockedUpError(RuntimeError):
    """Every rank waits."""


class _End:
    """One end of a message. met: so is the other. is_done: so are all that were posted with it."""

    def __init__(self, route: Route, micro_batch: int, tensors: Tensors | None) -> None:
        self.route, self.micro_batch, self.tensors, self.sends = route, micro_batch, tensors, tensors is not None
        self.met = self.is_done = False


class Wires:
    """What connects the ranks of a pipeline.

    Args:
        batches: what a rank posts at once in one channel moves in any order, and is done together; else in order.
        blocks_sender: a send returns when the message is received.
    """

    def __init__(
        self, stage_to_rank: Sequence[int], channel: Channel, *, batches: bool = False, blocks_sender: bool = False
    ) -> None:
        self.stage_to_rank, self.channel, self.batches, self.blocks_sender = (
            stage_to_rank, channel, batches, blocks_sender
        )  # fmt: skip
        self._moved = threading.Condition()
        self._posted: dict[tuple[int, Hashable], deque[list[_End]]] = defaultdict(deque)
        self._running = set(stage_to_rank)
        self._waiting: dict[int, Callable[[], bool]] = {}
        self._locked_up = False

    def post(self, rank: int, ends: Sequence[_End]) -> None:
        """Both ends of a message have to be; this never waits."""
        with self._moved:
            groups: dict[Hashable, list[_End]] = {}
            for n, end in enumerate(ends):
                groups.setdefault(self.channel(end.route) if self.batches else n, []).append(end)
            for group in groups.values():
                self._posted[rank, self.channel(group[0].route)].append(group)
            while self._move():
                self._moved.notify_all()

    def _move(self) -> bool:
        """Let what can move do so; returns whether something has."""
        heads: dict[tuple[Route, bool], _End] = {}
        for groups in self._posted.values():
            for end in groups[0] if groups else ():
                if not end.met:
                    heads.setdefault((end.route, end.sends), end)
        pairs = [
            (end, heads[route, False]) for (route, sends), end in heads.items() if sends and (route, False) in heads
        ]
        for sent, received in pairs:
            assert sent.tensors is not None
            if sent.micro_batch != received.micro_batch:
                raise MismatchError(f"{sent.route}: {sent.micro_batch} for {received.micro_batch}")
            received.tensors = tuple(x.clone() for x in sent.tensors)
            sent.met = received.met = True
        for groups in self._posted.values():
            while groups and all(end.met for end in groups[0]):
                for end in groups.popleft():
                    end.is_done = True
        return bool(pairs)

    def wait(self, rank: int, is_over: Callable[[], bool]) -> None:
        """Raises LockedUpError if it never will be."""
        with self._moved:
            self._waiting[rank] = is_over
            self._look()
            while not is_over():
                if self._locked_up:
                    raise LockedUpError(f"rank {rank}")
                assert self._moved.wait(30), "nothing has moved for long"
            del self._waiting[rank]

    def leave(self, rank: int) -> None:
        """This rank has come to its end."""
        with self._moved:
            self._running.discard(rank)
            self._look()

    def _look(self) -> None:
        waiting = [is_over for rank, is_over in self._waiting.items() if rank in self._running]
        if len(waiting) == len(self._running) and not any(is_over() for is_over in waiting):
            self._locked_up = True
            self._moved.notify_all()


class BlockingLane(Lane):
    """One end."""

    def __init__(self, post: BlockingPost, route: Route, specs: Specs) -> None:
        self.post, self.route, self.specs = post, route, specs
        self.expected = deque[_End]()

    @property
    def num_expected(self) -> int:
        """None of the end that sends."""
        return len(self.expected)

    def send(self, micro_batch: int, tensors: Tensors) -> None:
        """By itself."""
        self.post.start([(self, micro_batch, tensors)])

    def expect(self, micro_batch: int) -> None:
        """By itself."""
        self.post.start(receives=[(self, micro_batch)])

    def has_arrived(self) -> bool:
        """Whether it has met its sender."""
        return self.expected[0].is_done

    def take(self) -> Tensors:
        """What it has brought."""
        end = self.expected[0]
        self.post.wires.wait(self.post.rank, lambda: end.is_done)
        self.expected.popleft()
        assert end.tensors is not None
        return end.tensors


class BlockingPost(Post):
    """The lanes of one of the threads."""

    def __init__(self, wires: Wires, rank: int, boundaries: Sequence[Specs]) -> None:
        self.wires, self.rank, self.carrier, self.bounded = wires, rank, "threads", False
        self.lanes = {}
        self._sent: list[_End] = []
        places = wires.stage_to_rank
        for route, specs in routes_between_ranks(places, boundaries).items():
            if rank in (places[route.source], places[route.target]):
                self.lanes[route] = BlockingLane(self, route, specs) if specs else FreeLane(route)

    def start(self, sends: Iterable[tuple[Lane, int, Tensors]] = (), receives: Iterable[tuple[Lane, int]] = ()) -> None:
        """Receives first, where they go in order."""
        ends = []
        for lane, m in receives:
            assert isinstance(lane, BlockingLane)
            ends.append(_End(lane.route, m, None))
            lane.expected.append(ends[-1])
        leaving = [_End(lane.route, m, tensors) for lane, m, tensors in sends]
        self._sent = [end for end in self._sent if not end.is_done] + leaving
        self.wires.post(self.rank, ends + leaving)
        if self.wires.blocks_sender and leaving:
            self.wires.wait(self.rank, lambda: all(end.is_done for end in leaving))

    def wait_any(self, lanes: Sequence[Lane]) -> None:
        """Until one has met its sender."""
        self.wires.wait(self.rank, lambda: any(lane.has_arrived() for lane in lanes))

    def finish(self) -> None:
        """All receivers have come."""
        self.wires.wait(self.rank, lambda: all(end.is_done for end in self._sent))

    def close(self) -> None:
        """Nothing is held."""


def run_threads(schedule: Schedule, wires: Wires, run: Callable[[int], object]) -> list[object]:
    """`run(rank)` for all ranks at once; what each returned, or raises what one has raised."""
    results: dict[int, object] = {}
    errors: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            results[rank] = run(rank)
        except BaseException as error:
            errors.append(error)
        wires.leave(rank)

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(schedule.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(schedule.num_ranks)]
