"""All that a run needs to go on, as pieces of logical tensors; and taking it back from a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.assembly import Assembly
from parallel.checkpoint.manifest import shapes_apart
from parallel.checkpoint.read import Reader, Target
from parallel.comm import Axis
from parallel.sharding.pieces import StatePiece, whole_piece


def state_pieces(a: Assembly) -> Iterator[StatePiece]:
    """What this rank holds: weights, frozen ones too, then the optimizer's state, average, fp8 histories, moments of
    teachers, numbers.

    Names are the same in every layout, and so are the logical tensors that the pieces of all ranks make up. A teacher's
    weights are no state of a run: they are read anew from where they came from.
    """
    yield from held_pieces(a)
    for name, (values, axis) in _copies(a).items():
        yield whole_piece(name, values, axis)


def held_pieces(a: Assembly) -> Iterator[StatePiece]:
    """Those whose values are the state's own memory."""
    taught = tuple({f"weights/{layer.tower.name}." for layer in a.layers if layer.tower and layer.is_frozen})
    yield from (piece for piece in weight_pieces(a) if not piece.name.startswith(taught))
    yield from a.optimizer.pieces()
    for average in a.averages:
        yield from average.pieces()
    yield from _queue_pieces(a)


def _queue_pieces(a: Assembly) -> Iterator[StatePiece]:
    """Of the queue of keys: data ranks have parts of it, context and tensor ranks copies of these."""
    if a.queue is None:
        return
    copies, is_first = a.grid.context.size * a.grid.tensor.size, not (a.grid.context.index or a.grid.tensor.index)
    for piece in a.queue.pieces():
        holders = [piece.holders[rank // copies]._replace(rank=rank) for rank in range(a.store.axis.size)]
        yield replace(piece, axis=a.store.axis, holders=holders, own=piece.own if is_first else slice(0, 0))


def weight_pieces(a: Assembly) -> Iterator[StatePiece]:
    """Of the weights, in fp32 where there are masters, frozen ones too."""
    return a.store.pieces("weights", {bucket: bucket.master for bucket in a.store.buckets})


def _copies(a: Assembly) -> dict[str, tuple[Tensor, Axis]]:
    """What has another form in memory."""
    found = {}
    if a.fp8 is not None:
        found = {f"fp8/{name}": (values, a.store.axis) for name, values in a.fp8.state_dict().items()}
    found |= {f"moments/{name}": (moments.values, a.store.axis) for name, moments in a.moments.items()}
    numbers = {name: torch.tensor(number, dtype=torch.float64) for name, number in _numbers(a).items()}
    return found | {name: (number, a.grid.world) for name, number in numbers.items()}


def _numbers(a: Assembly) -> dict[str, float]:
    numbers = {"optimizer.steps": float(a.optimizer.steps)}
    numbers |= {f"{average.name}.updates": float(average.updates) for average in a.averages}
    if a.scaler is not None:
        numbers |= {f"loss_scale.{name}": float(value) for name, value in a.scaler.state_dict().items()}
    return numbers


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in a checkpoint and in a run: shapes, None where there is none of it."""

    name: str
    stored: tuple[int, ...] | None
    here: tuple[int, ...] | None

    def describe(self) -> str:
        """For a message."""
        return shapes_apart(self.name, self.stored, self.here)


def shapes_of(a: Assembly) -> dict[str, tuple[int, ...]]:
    """Of the logical tensors of which this rank accounts for a part: those of all ranks are all that there are."""
    return {piece.name: piece.layout.shape for piece in state_pieces(a) if piece.own.start < piece.own.stop}


def differences(shapes: dict[str, tuple[int, ...]], reader: Reader) -> list[Difference]:
    """Between the logical tensors of a whole run and what is stored, in order of name."""
    stored = {name: tensor.shape for name, tensor in reader.manifest.tensors.items()}
    names = sorted(shapes.keys() | stored.keys())
    both = ((name, stored.get(name), shapes.get(name)) for name in names)
    return [Difference(*found) for found in both if found[1] != found[2]]


def restore(a: Assembly, reader: Reader) -> int:
    """Take back what is stored: the very bits, whatever layout it was saved from.

    What is not stored stays as it is, and so does a kind of state of which a tensor has another shape now (a longer
    queue of keys).

    Only bytes of what this rank holds are read. The weights must be made anew of it (`ParameterStore.loaded`). Returns
    the bytes read.

    Raises:
        CheckpointError: what is read is damaged: the state is of no use then. Other ranks may find theirs well.
    """
    stored, pieces = reader.manifest.tensors, list(held_pieces(a))
    other = {p.name.partition("/")[0] for p in pieces if p.name in stored and stored[p.name].shape != p.layout.shape}
    held = targets(pieces, {name: name for name in stored if name.partition("/")[0] not in other})
    count = reader.read({name: found for name, found in held.items() if name.startswith("weights/")})
    for average in a.averages:
        average.restart()  # what has no average yet begins with the weights
    count += reader.read({name: found for name, found in held.items() if not name.startswith("weights/")})
    numbers = {name: reader.whole(name) for name in stored if "/" not in name}
    if "optimizer.steps" in numbers:
        a.optimizer.steps = int(numbers["optimizer.steps"])
    for average in a.averages:
        average.updates = int(numbers.get(f"{average.name}.updates", average.updates))
    scale = {n.partition(".")[2]: float(value) for n, value in numbers.items() if n.startswith("loss_scale.")}
    if a.scaler is not None and scale:
        a.scaler.load_state_dict(scale)
    if a.fp8 is not None:
        wanted = [f"fp8/{name}" for name in a.fp8.state_dict()]
        if wanted and all(name in stored for name in wanted):
            a.fp8.load_state_dict({name.removeprefix("fp8/"): reader.whole(name) for name in wanted})
    for name, moments in a.moments.items():
        if f"moments/{name}" in stored:
            moments.values = reader.whole(f"moments/{name}").to(a.device)
    return count


def targets(pieces: Iterable[StatePiece], stored: Mapping[str, str]) -> dict[str, Sequence[Target]]:
    """All that is held of the pieces' tensors, to be read into, by their names in a manifest.

    Args:
        stored: those names, by the pieces' own; of others nothing is read.
    """
    wanted: dict[str, list[Target]] = {}
    for piece in pieces:
        if (name := stored.get(piece.name)) is not None:
            wanted.setdefault(name, []).extend(Target(*found) for found in piece.boxes())
    return dict(wanted)
