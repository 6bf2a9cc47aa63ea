"""`python -m tools.rerun_step PATH`: run saved steps again, and see whether they give the same bits.

PATH is the folder of a step, of all steps, or of a run. From the folder of a step, steps are run up to the next
checkpoint beside it; else from the last but one to the newest. What they give is compared with that checkpoint, every
tensor bit for bit, and loss and gradient norm with metrics.jsonl. Where there is no other checkpoint, or with --steps
or --times, the same steps are run several times, and the results compared with each other.

Bits are the same in one layout alone: start as many ranks as have saved it, with tools.launch or torchrun. Options of
pretrain_vit.py win over the stored configuration (--data.path, if images have moved). Nothing is written.

Exit codes: 0 all is equal, 1 something differs or is damaged, 2 it cannot be run again so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.assemble import grid_of
from engine.config import Config
from engine.config.cli import parse
from engine.device import prepare_cpu, set_matmul
from engine.errors import EXIT_DONE, EXIT_FAULT, ConfigError
from engine.run.agreement import check_agreement, facts_of
from engine.run.changed import changed_images, changed_keys
from engine.run.launch import run_rank
from engine.run.progress import Progress
from engine.run.rerun import (
    Apart,
    Compared,
    Ran,
    Task,
    Then,
    choose,
    compare_metrics,
    compare_state,
    kept,
    metrics_of,
    opened,
    run_again,
    stored,
)
from engine.run.saving import facts_for_manifests
from engine.run.trainer import Inputs, inputs_of
from parallel import comm, process_group
from parallel.checkpoint.manifest import Manifest
from parallel.checkpoint.read import Reader
from parallel.comm import Axis
from parallel.grid import Grid, world_axis
from parallel.process_group import World
from tools.inspect_checkpoint.text import counted, natural, shown, size
from tools.options import Parser

_SHOWN = 10  # differing tensors
_PROGRAM = "tools.rerun_step"


class _Job(NamedTuple):
    """What the command comes to. start, other: the task's checkpoints, open. last: step to be run. say: on rank 0."""

    config: Config
    world: World
    inputs: Inputs
    task: Task
    start: Reader
    other: Reader | None
    last: int
    say: Callable[[str], None]


def main(argv: Sequence[str], world: World) -> int:
    """Run again, compare, print on rank 0. Returns the exit code.

    Raises:
        ConfigError: it cannot be run again so. CheckpointError: a checkpoint is damaged.
    """
    quiet = contextlib.nullcontext() if world.rank == 0 else contextlib.redirect_stdout(io.StringIO())
    with quiet:
        options, flags = _options(argv)
    say: Callable[[str], None] = (lambda line: print(line, flush=True)) if world.rank == 0 else lambda line: None
    task = choose(options.path, options.against, options.steps, options.times)
    with ExitStack() as stack:
        start = stack.enter_context(opened(task.start))
        other = stack.enter_context(opened(task.against)) if task.against is not None else None
        config = _config(start.manifest, flags, world, options.path)
        inputs = inputs_of(config, world, task.start.parent, task.start.parent)
        inputs = inputs.after(Progress.of(start.manifest.progress), config)
        last = _last(task, start.manifest, None if other is None else other.manifest, inputs.steps)
        well = _run(_Job(config, world, inputs, task, start, other, last, say))
    return EXIT_DONE if well else EXIT_FAULT


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog=_PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a step, of all steps, or of a run")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="a later checkpoint to compare with")
    parser.add_argument("--steps", type=_count, metavar="N", help="run so many, several times (default 1)")
    parser.add_argument("--times", type=_count, metavar="K", help="so often (default 2)")
    options, flags = parser.parse_known_args(argv)
    if options.times == 1:
        raise ConfigError("--times is 1: a single try has nothing to be compared with: give 2 or more")
    return options, flags


def _count(text: str) -> int:
    if text.isdecimal() and len(text) <= 9 and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"is {text}: it must be a number from 1 on")


def _config(manifest: Manifest, flags: Sequence[str], world: World, path: Path) -> Config:
    """That of the checkpoint with the flags over it, resolved. Raises ConfigError where its layout is another."""
    saved = manifest.about.get("layout") or {}
    axes = " x ".join(f"{axis} {length}" for axis, length in saved.items())
    if saved and (ranks := math.prod(saved.values())) != world.size:
        launcher = f"python -m tools.launch --nproc-per-node {ranks} -m" if ranks > 1 else "python -m"
        raise ConfigError(
            f"{path} was saved by {counted(ranks, 'rank')} ({axes}), and here {'are' if world.size > 1 else 'is'} "
            f"{world.size}: bits are the same in one layout alone: {launcher} {_PROGRAM} {path}"
        )
    config, only_print = parse(flags, _PROGRAM, stored=manifest.config)
    if only_print:
        raise ConfigError("--print_config is an option of pretrain_vit.py")
    config = replace(config, checkpoint=replace(config.checkpoint, load=None)).resolve(world.size)
    here = asdict(config.grid_shape(world.size))
    if saved and here != saved:
        given = " x ".join(f"{axis} {length}" for axis, length in here.items())
        raise ConfigError(
            f"{path} was saved by {axes}, and {given} is asked for: bits are the same in one layout alone: leave out "
            "options of parallel"
        )
    return config


def _last(task: Task, start: Manifest, other: Manifest | None, steps: int) -> int:
    """The last step to be run."""
    last = start.step + task.steps if other is None else other.step
    if start.step >= steps:
        raise ConfigError(f"{task.start} is of the last step of its run, {steps}: give an earlier checkpoint")
    if last <= start.step:
        raise ConfigError(f"--against {task.against} is of step {last}, and {task.start} of {start.step}: give a later")
    if other is not None:
        check_layouts(task, start.about.get("layout") or {}, other.about.get("layout") or {})
    if last > steps:
        raise ConfigError(f"step {last} is beyond the {steps} of the run: {steps - start.step} are left to be run")
    return last


def check_layouts(task: Task, start: Mapping[str, int], other: Mapping[str, int]) -> None:
    """Raise ConfigError where the run went on in another layout between the two checkpoints."""
    if start and other and start != other:
        axes = [" x ".join(f"{axis} {length}" for axis, length in of.items()) for of in (start, other)]
        raise ConfigError(
            f"{task.start} was saved by {axes[0]}, and {task.against} by {axes[1]}: bits are the same in one layout "
            "alone: give two checkpoints of one, or --steps, which compares tries with each other"
        )


def _run(job: _Job) -> bool:
    """Whether all is equal, on every rank."""
    config, world, inputs, task = job.config, job.world, job.inputs, job.task
    prepare_cpu(world)
    set_matmul(config.precision, inputs.device)
    process_group.start(world, inputs.device, config.parallel.timeout)
    facts = facts_of(config, inputs.device, inputs.train_set, inputs.eval_set)
    of_task = {"checkpoint": str(task.start), "other checkpoint": str(task.against), "last step": str(job.last)}
    check_agreement(facts | of_task, world_axis(world))
    grid = grid_of(config, world, inputs.device)
    well = _compare(job, grid)
    comm.barrier(grid.world)  # a rank that has ended has its launcher end the others
    process_group.stop()
    return well


def _compare(job: _Job, grid: Grid) -> bool:
    config, inputs, task, say = job.config, job.inputs, job.task, job.say
    about = facts_for_manifests(config, grid, inputs.device, inputs.train_set, inputs.eval_set)["about"]
    for line in _warnings(config, job.start.manifest, about):
        say(line)
    say(f"from      {task.start} (step {job.start.manifest.step})")
    notes = list[str]()
    say(f"run       {_span(job.start.manifest.step + 1, job.last)}")

    def again(notes: list[str]) -> Ran:
        return run_again(config, job.world, grid, inputs, task.start, job.last, notes)

    ran = again(notes)
    for line in notes:
        say(f"warning: {line}")
    alike = _compare_metrics(task.start, job.start.manifest, ran, say) if job.world.rank == 0 else True
    metrics: bool = comm.gather_objects(alike, grid.world)[0]
    if (other := job.other) is not None:
        return _tell(ran, stored(other), f"with {task.against}", other.manifest.tensors, grid.world, say) and metrics
    then, at_first = kept(ran.assembly), ran.steps
    del ran  # before there is another
    return _tell_tries(lambda: again([]), then, at_first, task.times, grid.world, say) and metrics


def _tell_tries(
    again: Callable[[], Ran],
    then: Then,
    at_first: Sequence[tuple[int, float, float]],
    times: int,
    world: Axis,
    say: Callable[[str], None],
) -> bool:
    """Whether other tries give what the first did. Collective."""
    well = True
    for number in range(2, times + 1):
        ran = again()
        well = _tell(ran, then, f"try {number} with try 1", [], world, say) and well
        for now, before in zip(ran.steps, at_first, strict=True):
            if repr(now) != repr(before):
                say(f"DIFFERENT loss and gradient norm of step {now[0]}: {now[1:]} now, {before[1:]} at first")
                well = False
        del ran
    return well


def _span(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _warnings(config: Config, manifest: Manifest, about: Mapping[str, Any]) -> list[str]:
    """What may change bits, and is not as it was when the checkpoint was saved."""
    before, here = manifest.about.get("machine") or {}, about["machine"]
    lines = [
        f"warning: {name} {'is' if name != 'threads' else 'are'} {shown(value)}, and {shown(before[name])} when it was "
        "saved: bits may differ for that"
        for name, value in here.items()
        if name in before and before[name] != value
    ]
    if changed := changed_keys(config, manifest, but=lambda key: key == "checkpoint.load"):
        lines.append(f"warning: other than when it was saved: {'; '.join(changed)}")
    return lines + changed_images(manifest, about)[:1]  # nothing is evaluated


def _compare_metrics(start: Path, manifest: Manifest, ran: Ran, say: Callable[[str], None]) -> bool:
    path = metrics_of(start, manifest.config)
    seen, apart = ([], []) if path is None else compare_metrics(path, ran.steps)
    if seen:
        lines = f"{counted(len(seen), 'line')} of {path}"
        say(f"compared  loss and gradient norm of {_span(seen[0], seen[-1])} with {lines}")
    else:
        say("compared  no loss: no metrics.jsonl has a line of these steps")
    for line in apart[:_SHOWN]:
        say(f"DIFFERENT {line}")
    return not apart


def _tell(
    ran: Ran, then: Then, what: str, stored_names: Iterable[str], world: Axis, say: Callable[[str], None]
) -> bool:
    """Compare what each rank holds with what it was; whether all is equal. Collective.

    Args:
        what: is compared, for people. stored_names: of tensors that there must be.
    """
    everywhere: list[Compared] = comm.gather_objects(compare_state(ran.assembly, then), world)
    names = {name for here in everywhere for name in here.names}
    apart: dict[str, list[Apart]] = {}
    every = names | set(stored_names)
    for name in sorted(every, key=lambda name: (not name.startswith("weights/"), natural(name))):
        if found := [tensor for here in everywhere for tensor in here.apart if tensor.name == name]:
            apart[name] = found
        elif name not in names:
            apart[name] = []
    count = sum(here.bytes for here in everywhere)
    say(f"compared  {what}: {counted(len(names), 'tensor')}, {size(count)} on {counted(world.size, 'rank')}")
    if not apart:
        say("equal     every bit is the same")
        return True
    say(f"DIFFERENT {counted(len(apart), 'tensor')}")
    for name, found in list(apart.items())[:_SHOWN]:
        say(f"  {shown(name)}: {_difference(found)}")
    if len(apart) > _SHOWN:
        say(f"  and {len(apart) - _SHOWN} more")
    return False


def _difference(apart: Sequence[Apart]) -> str:
    """Of one tensor, on the ranks where it is not the same."""
    if not apart:
        return "nothing of it is here"
    first, ranks = apart[0], ", ".join(str(tensor.rank) for tensor in apart[:8]) + ", ..." * (len(apart) > 8)
    where = f"; on ranks {ranks}" if len(apart) > 1 else ""
    if first.problem:
        return f"{first.problem}{where or f'; on rank {ranks}'}"
    found = first.found
    assert found.first is not None and found.values is not None
    now, before = found.values
    most = "" if found.largest is None else f", largest difference {found.largest:.3g}"
    of = f"{found.count:,} of {first.held:,} element{'s' * (first.held != 1)} of rank {first.rank}"
    return f"{of}, first {list(found.first)}: {now:.9g} now, {before:.9g} then{most}{where}"


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], _PROGRAM))
