"""Collectives on plain tensors, along the axes of the grid.

Everything the rest of the engine wants moved between ranks goes through here, so backends (gloo on a CPU, NCCL on
GPUs), API names that differ between torch versions, and the pitfalls of each backend are met in one place:

- gloo silently corrupts the neighbours of a strided view: every tensor is made contiguous first;
- gloo's reduce-scatter is an all-reduce and a slice: here it is an all-to-all and a local sum, half the traffic;
- between processes of one host gloo goes through TCP: here the larger part goes through shared memory (parallel.host);
- a collective that fails because a peer is gone raises `PeerLostError`, so the entry script can tell the rank that
  failed from the ranks that merely noticed; what else is raised meanwhile stays what it is (parallel.failures).

An `Axis` is the set of ranks along one or more axes of the grid. Along an axis of size 1 every call is free: it returns
its input and touches no group. Legend: T = axis size, rows = dim 0.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import host_collectives
from parallel.failures import MismatchError, is_lost_peer
from parallel.failures import PeerLostError as PeerLostError  # for those who catch what is raised here
from parallel.heartbeat import Whereabouts
from parallel.host_channel import Channel

# torch 2.13 renamed these two; 2.11 and 2.12 have the older names only.
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class CommMeter:
    """Counts calls, bytes handed over and seconds spent waiting, per kind of operation, on this rank.

    Seconds are wall-clock time blocked in this process; on CUDA, where calls return before the work is done, they are
    launch times only. `where` says what this rank is at, calls among it.
    """

    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    where: Whereabouts = field(default_factory=Whereabouts, compare=False)

    def reset(self) -> None:
        """Forget everything counted so far."""
        for table in (self.calls, self.bytes, self.seconds):
            table.clear()

    @property
    def total_seconds(self) -> float:
        """Seconds blocked in communication since the last reset."""
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The ranks that differ from this one only along one axis (or several, flattened) of the grid.

    Attributes:
        name: the axis, e.g. `tensor`, or joined names such as `data+context`.
        ranks: global ranks, in order of their index along the axis.
        index: this rank's place in `ranks`.
        group: the process group; None where the axis has one rank.
        meter: where calls along this axis are counted.
        channel: shared memory of the ranks, where they are CPU processes of one host.
        timeout: seconds that calls wait for other ranks.
        shares: whether ranks of one host may use memory that they share. spins: see parallel.host.Memory.
        posts: the pipeline's lanes that are open along this axis (parallel.pipeline.lanes).
        planned: without a process group, to see what would be allocated: calls give tensors of the right shape and
            send nothing.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None = None
    meter: CommMeter = field(default_factory=CommMeter, compare=False)
    channel: Channel | None = field(default=None, compare=False)
    timeout: float = 600.0
    shares: bool = False
    spins: bool = False
    posts: dict[Any, Any] = field(default_factory=dict, compare=False)
    planned: bool = False

    @property
    def size(self) -> int:
        """Number of ranks along the axis."""
        return len(self.ranks)

    def forget(self) -> None:
        """Drop group and memory, whoever may still hold this axis: a group's threads end with the last reference."""
        for post in self.posts.values():
            post.close()
        self.posts.clear()
        object.__setattr__(self, "group", None)
        object.__setattr__(self, "channel", None)

    def __post_init__(self) -> None:
        assert self.planned or (self.group is None) == (self.size == 1), (self.name, self.ranks)


def single_axis(name: str) -> Axis:
    """An axis of one rank, for models built without any process group."""
    return Axis(name=name, ranks=(0,), index=0)


class Pending:
    """A started operation; `wait()` blocks until its result can be used and returns the result."""

    def __init__(self, result: Tensor, work: Any = None, *, axis: Axis | None = None, kind: str = "") -> None:
        self._result, self._work, self._axis, self._kind = result, work, axis, kind
        self._finish: Callable[[Tensor], Tensor] | None = None

    def then(self, finish: Callable[[Tensor], Tensor]) -> Pending:
        """Apply `finish` to the result when it has arrived."""
        self._finish = finish
        return self

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> Tensor:
        """Block until done; later calls return at once."""
        if self._work is not None:
            assert self._axis is not None
            with watched(self._axis, self._kind):
                self._work.wait()
            self._work = None
        if self._finish is not None:
            self._result, self._finish = self._finish(self._result), None
        return self._result


class _Planned:
    """Along an axis without ranks nothing is under way."""

    def wait(self) -> None:
        """At once."""

    def is_completed(self) -> bool:
        """It is."""
        return True


@contextmanager
def watched(axis: Axis, kind: str, tensor: Tensor | None = None, *, starts: bool = False) -> Iterator[None]:
    """Meter a call, and turn a backend's complaint about a vanished peer into PeerLostError.

    Args:
        tensor: what the call hands over, which is counted. starts: whether the call starts something that another waits
            for; as if it handed over a tensor, which is counted elsewhere.
    """
    start, where = time.perf_counter(), axis.meter.where
    listener = where.listener
    began = None if listener is None else listener.stamp()
    where.waiting = kind, axis
    where.moves += 1
    try:
        yield
    except MismatchError as error:
        raise MismatchError(f"ranks {axis.ranks} along the {axis.name} axis do not do the same: {error}") from error
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise PeerLostError(f"{kind} along the {axis.name} axis {axis.ranks} failed: {error}") from error
    where.waiting = None
    where.moves += 1
    axis.meter.seconds[kind] += time.perf_counter() - start
    size = 0 if starts else None
    if tensor is not None:
        size = tensor.numel() * tensor.element_size()
        axis.meter.calls[kind] += 1
        axis.meter.bytes[kind] += size
    if listener is not None:
        listener.watched(kind, axis, began, size)


def _call(axis: Axis, kind: str, tensor: Tensor, result: Tensor, run: Callable[[], Any]) -> Pending:
    with watched(axis, kind, tensor):
        work = _Planned() if axis.planned else run()
    return Pending(result, work, axis=axis, kind=kind)


# -- collectives -------------------------------------------------------------------------------------------------------


def all_reduce_start(x: Tensor, axis: Axis, op: str = "sum") -> Pending:
    """Start reducing `x` over the axis, in place where `x` is contiguous.

    Args:
        x: any shape. op: `sum`, `max` or `min`.
    """
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    if (channel := axis.channel) is not None:
        return _call(axis, "all_reduce", x, x, lambda: host_collectives.all_reduce(channel, x, op))
    return _call(axis, "all_reduce", x, x, lambda: dist.all_reduce(x, _OPS[op], group=axis.group, async_op=True))


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduce `x` over the axis; every rank gets the result."""
    return all_reduce_start(x, axis, op).wait()


def all_gather_rows_start(x: Tensor, axis: Axis) -> Pending:
    """Start gathering [R, ...] from each of T ranks into [T * R, ...], in order of index."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    return all_gather_into_start(x.new_empty(axis.size * x.shape[0], *x.shape[1:]), x, axis)


def all_gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """Gather [R, ...] from each of T ranks into [T * R, ...]."""
    return all_gather_rows_start(x, axis).wait()


def all_gather_into_start(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """Start gathering [R, ...] from each of T ranks into `out` [T * R, ...], contiguous; `x` must not be part of it."""
    if axis.size == 1:
        out.copy_(x)
        return Pending(out)
    assert out.is_contiguous() and x.is_contiguous()
    if (channel := axis.channel) is not None:
        return _call(axis, "all_gather", x, out, lambda: host_collectives.all_gather(channel, out, x))
    return _call(axis, "all_gather", x, out, lambda: _all_gather_single(out, x, group=axis.group, async_op=True))


def reduce_scatter_rows_start(x: Tensor, axis: Axis) -> Pending:
    """Start summing [T * R, ...] over the axis, of which this rank gets rows [index * R, (index + 1) * R)."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    rows, rest = divmod(x.shape[0], axis.size)
    assert rest == 0, (x.shape, axis.size)
    needs_room = x.device.type == "cpu" and axis.channel is None
    return reduce_scatter_into_start(
        x.new_empty(rows, *x.shape[1:]), x, torch.empty_like(x) if needs_room else x.new_empty(0), axis
    )  # fmt: skip


def reduce_scatter_into_start(out: Tensor, x: Tensor, room: Tensor, axis: Axis, *, accumulate: bool = False) -> Pending:
    """Start summing `x` [T * R, ...] over the axis; `wait` writes, or adds, this rank's rows of it to `out` [R, ...].

    On CPUs ranks are added up in the order of their index, 16-bit numbers in fp32. `x` and `room` must be left alone
    until then.

    Args:
        out: fp32, or of the type of `x`. x: contiguous. room: of the type of `x`, for what arrives: as large as x where
            gloo carries it, as `out` on a GPU unless the sum can go straight there, none in shared memory.
    """
    assert axis.size > 1 and x.is_contiguous()
    if (channel := axis.channel) is not None:
        run = lambda: host_collectives.reduce_scatter(channel, out, x, accumulate=accumulate)  # noqa: E731
        return _call(axis, "reduce_scatter", x, out, run)
    if x.device.type == "cpu":
        run = lambda: dist.all_to_all_single(room, x, group=axis.group, async_op=True)  # noqa: E731
    elif x.dtype == out.dtype and not accumulate:
        run = lambda: _reduce_scatter_single(out, x, group=axis.group, async_op=True)  # noqa: E731
        return _call(axis, "reduce_scatter", x, out, run)
    else:
        run = lambda: _reduce_scatter_single(room, x, group=axis.group, async_op=True)  # noqa: E731

    def finish(arrived: Tensor) -> Tensor:
        if x.device.type != "cpu":  # the sum itself
            return out.add_(arrived.view_as(out)) if accumulate else out.copy_(arrived.view_as(out))
        parts = arrived.view(axis.size, *out.shape)
        if accumulate:
            return out.add_(parts.sum(0, dtype=out.dtype))
        return torch.sum(parts, 0, dtype=out.dtype, out=out)

    return _call(axis, "reduce_scatter", x, room, run).then(finish)


def reduce_scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    """Sum [T * R, ...] over the axis; this rank gets its [R, ...]."""
    return reduce_scatter_rows_start(x, axis).wait()


def all_to_all_rows(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Send rows of [sum(send), ...], in order of destination; get [sum(receive), ...], in order of source.

    Args:
        send, receive: rows for and from each rank of the axis.
    """
    if axis.size == 1:
        return x
    x = x.contiguous()
    out = x.new_empty(sum(receive), *x.shape[1:])
    if (channel := axis.channel) is not None:
        with watched(axis, "all_to_all", x):
            host_collectives.all_to_all(channel, out, x, send, receive)
        return out
    run = lambda: dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group, async_op=True)  # noqa: E731
    return _call(axis, "all_to_all", x, out, run).wait()


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite `x` (contiguous) with that of the rank at index `source` of the axis."""
    if axis.size == 1:
        return x
    assert x.is_contiguous()
    run = lambda: dist.broadcast(x, axis.ranks[source], group=axis.group, async_op=True)  # noqa: E731
    return _call(axis, "broadcast", x, x, run).wait()


def gather_objects(value: object, axis: Axis) -> list[Any]:
    """Every rank's (picklable, small) `value` along the axis, in order of index. For reports, not for hot paths."""
    values: list[Any] = [None] * axis.size
    if axis.size == 1:
        return [value]
    with watched(axis, "gather_objects"):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def gather_objects_to_first(value: object, axis: Axis) -> list[Any] | None:
    """Every rank's (picklable) `value`, in order of index, on the first rank of the axis; None on the others."""
    if axis.size == 1:
        return [value]
    values: list[Any] | None = [None] * axis.size if axis.index == 0 else None
    with watched(axis, "gather_objects"):
        dist.gather_object(value, values, dst=axis.ranks[0], group=axis.group)
    return values


def least(value: float, axis: Axis) -> float:
    """The least of all ranks' values: for what all must decide alike, of something that each knows of itself alone."""
    return float(all_reduce(torch.tensor([value], dtype=torch.float64, device=device_of(axis)), axis, "min"))


def barrier(axis: Axis) -> None:
    """Return when every rank of the axis has come here."""
    all_reduce(torch.zeros(1, device=device_of(axis)), axis).item()  # waits for a GPU, too


def device_of(axis: Axis) -> torch.device:
    """Where tensors are that calls along an axis move."""
    if axis.group is not None and "nccl" in dist.get_backend(axis.group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
