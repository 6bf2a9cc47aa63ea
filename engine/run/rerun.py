"""Running saved steps again, to see whether they give the same bits: what else can find that a device computes wrong?

Which checkpoint is run on from, what its result is compared with, and the comparison, of what each rank holds.
`tools.rerun_step` is the program. Nothing is written anywhere.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.checkpoint.examine import Differences
from engine.checkpoint.states import state_pieces
from engine.config import Config
from engine.config.classes import fingerprints
from engine.device import memory_share
from engine.errors import ConfigError
from engine.passes import settle_passes
from engine.recompute_choice import settled
from engine.run.loop import Loop
from engine.run.progress import Progress
from engine.run.resume import take
from engine.run.step import Stepper
from engine.run.trainer import Inputs, build
from parallel.checkpoint import place
from parallel.checkpoint.manifest import FILE, CheckpointError, NoCheckpointError
from parallel.checkpoint.read import Reader, Target
from parallel.grid import Grid
from parallel.process_group import World
from parallel.sharding.boxes import Box


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done.

    Attributes:
        start: the checkpoint that steps are run from. against: that they lead to; None: what they give is compared
            with what they give when they are run again. steps, times: how many, how often, where there is no `against`.
    """

    start: Path
    against: Path | None
    steps: int = 1
    times: int = 2


def choose(path: Path, against: Path | None, steps: int | None, times: int | None) -> Task:
    """What is meant by the options of the command, of which None were not given.

    Raises:
        ConfigError: there is no such checkpoint, or options contradict each other.
    """
    try:
        is_step, last = (path / FILE).exists(), place.newest(path)
        there = place.steps_in(last.parent)
        repeats = steps is not None or times is not None
        if against is not None and repeats:
            raise ConfigError("--steps and --times compare several tries with each other: leave them out, or --against")
        if against is not None:
            other = place.newest(against)
            return Task(start=last if is_step else _before(last.parent, there, other), against=other)
        if not repeats and is_step and (later := [step for step in there if last.name < place.name_of(step)]):
            return Task(start=last, against=last.parent / place.name_of(later[0]))
        if not repeats and not is_step and len(there) > 1:
            return Task(start=last.parent / place.name_of(there[-2]), against=last)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return Task(start=last, against=None, steps=steps or 1, times=times or 2)


def _before(folder: Path, steps: Sequence[int], other: Path) -> Path:
    earlier = [path for step in steps if (path := folder / place.name_of(step)).name < other.name]
    if not earlier:
        raise ConfigError(f"{folder} has no checkpoint before {other.name}, to run on from")
    return earlier[-1]


def opened(path: Path) -> Reader:
    """For reading, so that no run deletes it meanwhile.

    Raises:
        ConfigError: it is no checkpoint of a run. CheckpointError: it is damaged.
    """
    try:
        reader = Reader(path)
    except NoCheckpointError as error:
        raise ConfigError(str(error)) from error
    if reader.manifest.is_of_weights_alone:
        reader.close()
        raise ConfigError(
            f"{path} has weights alone, as a conversion writes them: there is no state of training, and no step to be "
            "run again"
        )
    return reader


# -- running -----------------------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """What a try gave. steps: (step, loss as metrics have it, gradient norm) of each."""

    assembly: Assembly
    steps: list[tuple[int, float, float]]


def run_again(
    config: Config, world: World, grid: Grid, inputs: Inputs, start: Path, last: int, notes: list[str]
) -> Ran:
    """Make a model, give it the state of a checkpoint, train up to step `last`. Collective.

    Args:
        notes: are added to, where the checkpoint has not all of the state.

    Raises:
        CheckpointError: it is damaged. ConfigError: it is of another model.
    """
    memory = memory_share(inputs.device, world)
    config, _ = settle_passes(config, grid, memory, on_cpu=inputs.device.type == "cpu")
    config, _ = settled(config, grid, inputs.device, memory)
    assembly = build(config, world, grid, inputs)
    teachers = fingerprints(config, inputs.train_set.class_names)
    manifest, problem = take(assembly, start, lambda done: inputs.steps, notes, teachers)
    if manifest is None:
        raise CheckpointError(problem)
    loop = Loop(
        Stepper(assembly),
        inputs.train_set,
        inputs.eval_set,
        steps=inputs.steps,
        writer=None,
        progress=Progress.of(manifest.progress),
    )
    return Ran(assembly, [(step, loss, result.grad_norm) for step, loss, result in loop.replay(last)])


# -- comparing ---------------------------------------------------------------------------------------------------------

_Held = dict[str, list[tuple[Box, Tensor]]]
Then = Callable[[str, Sequence[Box]], Sequence[Tensor] | None]


class Apart(NamedTuple):
    """A tensor that is not the same, as a rank has it. held: elements of it there. problem: instead of a comparison."""

    name: str
    rank: int
    held: int
    found: Differences
    problem: str = ""


class Compared(NamedTuple):
    """By one rank. names: of tensors, in their order. bytes: of all of them."""

    names: list[str]
    bytes: int
    apart: list[Apart]


def compare_state(a: Assembly, then: Then) -> Compared:
    """All that this rank holds, copies that others hold too among it, bit for bit.

    Args:
        then: what these boxes of a tensor were; None: there was no such tensor.
    """
    apart, count, held = [], 0, _held(a)
    for name, boxes in held.items():
        elements, found, problem = sum(box.numel for box, _ in boxes), Differences(), ""
        count += sum(values.nbytes for _, values in boxes)
        try:
            if (before := then(name, [box for box, _ in boxes])) is None:
                problem = "is new"
            for (box, values), other in zip(boxes, before or (), strict=False):
                found.add(_flat(values), _flat(other), box)
        except CheckpointError as error:
            problem = str(error)
        if found.count or problem:
            apart.append(Apart(name, a.grid.world.index, elements, found, problem))
    return Compared(list(held), count, apart)


def stored(reader: Reader) -> Then:
    """What a checkpoint has."""

    def read(name: str, boxes: Sequence[Box]) -> list[Tensor] | None:
        if (tensor := reader.manifest.tensors.get(name)) is None:
            return None
        values = [torch.empty(box.shape, dtype=tensor.dtype) for box in boxes]
        reader.read({name: [Target(*pair) for pair in zip(boxes, values, strict=True)]})
        return values

    return read


def kept(a: Assembly) -> Then:
    """What the state is now, copied to the host."""
    copies = {name: [_flat(values).clone() for _, values in boxes] for name, boxes in _held(a).items()}
    return lambda name, _: copies.get(name)


def _held(a: Assembly) -> _Held:
    found: _Held = {}
    for piece in state_pieces(a):
        found.setdefault(piece.name, []).extend(piece.boxes())
    return {name: boxes for name, boxes in found.items() if boxes}


def _flat(values: Tensor) -> Tensor:
    return values.detach().cpu().contiguous().reshape(-1)


# -- what metrics tell -------------------------------------------------------------------------------------------------


def metrics_of(start: Path, manifest_config: Mapping[str, Any]) -> Path | None:
    """The `metrics.jsonl` of the run that saved a checkpoint, None if it cannot be found."""
    folders_ = [start.resolve().parent.parent]
    if manifest_config.get("checkpoint", {}).get("dir") is not None:  # else another run may be there meanwhile
        folders_.append(Path(manifest_config.get("run_dir") or "."))
    return next((path for folder in folders_ if (path := folder / "metrics.jsonl").is_file()), None)


def compare_metrics(path: Path, steps: Sequence[tuple[int, float, float]]) -> tuple[list[int], list[str]]:
    """(steps that there are lines of, what differs there)."""
    lines = dict(_lines(path))
    seen, apart = [], []
    for step, *now in steps:
        if step not in lines:
            continue
        seen.append(step)
        for name, value in zip(("loss", "grad_norm"), now, strict=True):
            before = lines[step].get(name)
            if before != (value if math.isfinite(value) else None):
                apart.append(f"{name} of step {step}: {value!r} now, {before!r} in {path}")
    return seen, apart


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for text in file:
            with contextlib.suppress(ValueError):  # a line that a run is just writing
                line = json.loads(text)
                if isinstance(line, dict) and line.get("event") == "train":
                    yield line.get("step", 0), line
