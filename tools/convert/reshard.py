"""A checkpoint of this program, with all its state, as the ranks of another layout would have written it.

What each rank of that layout accounts for is found by assembling it on the meta device, with a grid that has no process
groups; the files are then written one after the other, by one process, a piece in memory at a time. A checkpoint can be
loaded in any layout without this: only the files are cut as that layout reads them, so that it reads fewer places.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.assemble import assemble
from engine.assembly import Assembly
from engine.checkpoint import folder as folders
from engine.checkpoint.states import held_pieces, state_pieces
from engine.config import Config
from engine.config.cli import parse
from engine.config.objective_keys import ENOUGH_IMAGES
from engine.config.pipeline import Pipeline
from engine.errors import ConfigError
from engine.objectives import Objective, make_objective
from engine.plan import META
from model.formats.base import ConversionError
from model.formats.writing import Job, tensors_of
from parallel.checkpoint.manifest import CheckpointError, StoredPiece, StoredTensor, shapes_apart
from parallel.checkpoint.place import name_of, newest
from parallel.checkpoint.read import Reader, Target
from parallel.checkpoint.write import FileEntry, Item, in_order, items_of, write_tensors
from parallel.grid import GridShape, planned_grid
from parallel.sharding.boxes import Box, whole_box
from tools.inspect_checkpoint.text import counted, size

KEYS = {
    "tensor": "parallel.tensor_parallel_size", "pipeline": "parallel.pipeline_parallel_size",
    "context": "parallel.context_parallel_size", "zero": "parallel.zero_stage",
}  # fmt: skip
_WORDS = (*KEYS, "data")
_LEAST = 2  # samples of a step: of contrastive training a batch of one has nothing to be told from


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is stated: words of the command line.

    Attributes:
        flags: of the configuration. data: model replicas.
    """

    flags: tuple[str, ...]
    data: int

    @staticmethod
    def of(text: str) -> Layout:
        """Of `tensor=2 pipeline=2 data=4 zero=3`; axes that are not named have one rank. Raises ConfigError."""
        found: dict[str, int] = {}
        for word in text.replace(",", " ").split():
            name, _, value = word.partition("=")
            if name not in _WORDS or not (value.isdecimal() and len(value) <= 7) or (name != "zero" and not int(value)):
                raise ConfigError(
                    f"--reshard {text!r}: {word} is none of {', '.join(f'{name}=N' for name in _WORDS)}: give the axes "
                    "that have several ranks, such as 'tensor=2 data=4 zero=3'"
                )
            if name in found:
                raise ConfigError(f"--reshard {text!r} says {name} twice")
            found[name] = int(value)
        axes = {name: 1 for name in KEYS if name != "zero"} | found
        flags = (part for name, key in KEYS.items() if name in axes for part in (f"--{key}", str(axes[name])))
        return Layout(flags=tuple(flags), data=found.get("data", 1))


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's.

    Attributes:
        items: what it is to write, in order; their values are on the meta device. held: all that it reads.
    """

    items: list[Item]
    held: dict[str, list[Box]]


def reshard(
    source: Path, destination: Path, layout: str, flags: Sequence[str] = (), say: Callable[[str], None] = print
) -> Path:
    """Write the checkpoint `source` for a layout. Returns the folder of the new one, of the same step.

    Args:
        source: a step's folder, that of all steps, or a run's. destination: `step-NNNNNNNN` of that step, or another
            name, in which it is made, so that a run may have it as its checkpoint.dir; neither may exist yet.
        layout: see `Layout.of`. flags: dotted keys of the configuration, which win over it. say: is told of it.

    Raises:
        ConfigError: the layout does not fit the run. ConversionError: there is no such checkpoint, or it is damaged; or
            the destination is taken, or cannot be written to. Nothing is left there then.
    """
    stated = Layout.of(layout)
    try:
        with Reader(newest(source), threads=2) as reader:
            folder = _place(destination, reader.manifest.step)
            config, shape = _config(reader, stated, flags)
            make = partial(_share, reader, config, shape, make_objective(config))
            shares = [make(rank) for rank in range(shape.world_size)]
            _say_layout(say, reader, config, shape)
            began = time.perf_counter()
            path = _write(reader, folder, shares, config, shape)
            seconds = time.perf_counter() - began
            with Reader(path) as written:
                count = written.manifest.bytes
                say(f"to        {path}: {size(count)} in {seconds:.1f} s, {count / 1e6 / seconds:,.0f} MB/s")
                say(f"reading   {_reads(written, shares)}; before, {_reads(reader, shares)}")
            return path
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


def _place(destination: Path, step: int) -> Path:
    """The folder of all steps in which the new one is made. Raises ConversionError where it cannot be."""
    if os.path.lexists(destination):
        raise ConversionError(f"{destination} exists: give another place, or remove it")
    if not destination.name.startswith("step-"):
        return destination
    if destination.name != name_of(step):
        raise ConversionError(f"{destination}: the checkpoint is of step {step}: call it {name_of(step)}")
    return destination.parent


# -- what each rank has ------------------------------------------------------------------------------------------------


def _config(reader: Reader, stated: Layout, flags: Sequence[str]) -> tuple[Config, GridShape]:
    """That of the checkpoint in the layout, resolved. Raises ConfigError where they do not fit."""
    config, _ = parse([*stated.flags, *flags], "tools.convert", stored=reader.manifest.config)
    p, train = config.parallel, config.train
    if train.steps is None and train.epochs is None:  # weights that no run of this program has saved
        train = replace(train, steps=1, global_batch_size=max(_LEAST, stated.data))
    ranks = stated.data * p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size
    pipeline = Pipeline.of(p, p.pipeline_parallel_size)
    train = replace(train, micro_batch_size=None if pipeline.micro_batches else 1)
    config = replace(config, kernels="reference", train=train)
    config.resolve(ranks)
    # the pieces do not hang on how many micro-batches there are, or how large: the fewest make the shortest schedule
    count = stated.data * pipeline.pieces
    micro = -(-ENOUGH_IMAGES // count)
    few = replace(train, micro_batch_size=micro, global_batch_size=micro * count)
    return replace(config, train=few).resolve(ranks), config.grid_shape(ranks)


def _share(reader: Reader, config: Config, shape: GridShape, objective: Objective, rank: int) -> Share:
    """Raises ConversionError where the checkpoint is not of the model of its configuration."""
    stored = reader.manifest.tensors
    a: Assembly = assemble(config, planned_grid(shape, rank), META, objective, device_memory=0.0)
    items = []
    for item in items_of(state_pieces(a)):
        if (there := stored.get(item.name)) is None:
            continue  # it is not saved, as of weights alone
        if there.shape != item.shape:
            raise ConversionError(f"{reader.folder}: {shapes_apart(item.name, there.shape, item.shape)}")
        items.append(item._replace(values=_empty(item.box, there)))
    held: dict[str, list[Box]] = {}
    for piece in held_pieces(a):
        if piece.name in stored:
            held.setdefault(piece.name, []).extend(box for box, _ in piece.boxes())
    return Share(items=in_order(items), held=held)


def _empty(box: Box, stored: StoredTensor) -> Tensor:
    return torch.empty(box.shape, dtype=stored.dtype, device=META)


def _others(reader: Reader, shares: Sequence[Share]) -> list[Item]:
    """What is stored and no rank of the layout has, such as an average that a flag leaves out."""
    known = {item.name for share in shares for item in share.items}
    found = ((name, t, whole_box(t.shape)) for name, t in reader.manifest.tensors.items() if name not in known)
    return in_order(Item(name, t.shape, box, _empty(box, t)) for name, t, box in found)


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(reader: Reader, folder: Path, shares: Sequence[Share], config: Config, shape: GridShape) -> Path:
    """The new checkpoint, complete. Raises ConversionError, CheckpointError."""
    manifest, made = reader.manifest, not folder.exists()
    names = [f"rank-{rank:05d}.safetensors" for rank in range(len(shares))]
    dealt = [share.items for share in shares]
    if others := _others(reader, shares):
        names, dealt = [*names, "others.safetensors"], [*dealt, others]
    temporary = folders.temporary_path(folder, manifest.step)
    try:
        folders.begin(folder, manifest.step)
        _check_room(folder, manifest.bytes)
        files, pieces = [], dict[str, list[StoredPiece]]()
        for number, (name, items) in enumerate(zip(names, dealt, strict=True)):
            metadata = {"step": str(manifest.step), "rank": str(number), "format": "vitruvius"}
            entries = [FileEntry(item.key, item.box.shape, item.values.dtype) for item in items]
            written = write_tensors(temporary / name, entries, _values(reader, items), metadata)
            files.append(written.file)
            for item, place in zip(items, written.tensors, strict=True):
                pieces.setdefault(item.name, []).append(StoredPiece(number, item.box, *place))
        tensors = {name: replace(t, pieces=tuple(pieces[name])) for name, t in manifest.tensors.items()}
        resharded = {"layout": asdict(shape), "zero_stage": config.parallel.zero_stage}
        about = {**manifest.about, "resharded": resharded}  # `layout` stays: of the ranks that have computed it
        return folders.commit(temporary, replace(manifest, about=about, files=tuple(files), tensors=tensors))
    except OSError as error:
        raise ConversionError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        folders.discard(temporary)
        with suppress(OSError):
            if made:
                folder.rmdir()  # if nothing is in it


def _check_room(folder: Path, wanted: int) -> None:
    if (free := shutil.disk_usage(folder).free) < wanted:
        raise ConversionError(f"{folder} has {size(free)} free, and {size(wanted)} are to be written: make room")


def _values(reader: Reader, items: Sequence[Item]) -> Iterator[Tensor]:
    """Of the items in order; one is read while the one before is written."""

    def read(item: Item) -> list[Tensor]:
        values = torch.empty_like(item.values, device="cpu")
        reader.read({item.name: [Target(item.box, values)]})
        return [values]

    return tensors_of(Job((), partial(read, item)) for item in items)


# -- what is said ------------------------------------------------------------------------------------------------------


def _say_layout(say: Callable[[str], None], reader: Reader, config: Config, shape: GridShape) -> None:
    m, zero = reader.manifest, config.parallel.zero_stage
    before = _axes(m.about["layout"]) if "layout" in m.about else "an unknown layout"
    files, ranks = counted(len(m.files), "file"), counted(shape.world_size, "rank")
    say(f"from      {reader.folder} (step {m.step}): {size(m.bytes)} in {files}, saved by {before}")
    say(f"for       {_axes(asdict(shape))}, zero_stage {zero}: {ranks}")


def _axes(shape: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {length}" for axis, length in shape.items())


def _reads(reader: Reader, shares: Sequence[Share]) -> str:
    """What the rank that reads most reads of a checkpoint, when a run goes on from it."""
    found = [reader.cost(share.held) for share in shares]
    most = max(found, key=lambda cost: cost.bytes)
    return f"a rank reads at most {size(most.bytes)} in {counted(max(cost.places for cost in found), 'place')}"
