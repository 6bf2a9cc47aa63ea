"""`python -m tools.evaluate --checkpoint PATH --task TASK`: what a checkpoint's model is worth.

In one process, or as many as a layout wants: `python -m tools.launch --nproc-per-node 4 -m tools.evaluate ...
--parallel.tensor_parallel_size 2`, torchrun or srun. Figures are the same in every layout; nothing is written but the
file of `--json`.

Exit codes: 0 done, 2 it cannot be evaluated so.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data.config import is_of
from engine.assemble import grid_of
from engine.device import describe, memory_share, prepare_cpu, set_matmul
from engine.errors import EXIT_DONE, ConfigError
from engine.run.agreement import check_agreement, facts_of
from engine.run.device import device_of
from engine.run.launch import run_rank
from model.formats.shown import describe as describe_shown
from model.formats.shown import shown_by
from parallel import comm, process_group
from parallel.grid import Grid, world_axis
from parallel.process_group import World
from tools.evaluate.images import Images, check_images, images_of
from tools.evaluate.options import OF_TEXTS, PROGRAM, parse_options
from tools.evaluate.source import Source, load, sources_of
from tools.evaluate.tasks import RUN, Figures, Job, check_neighbours
from tools.evaluate.texts import prompts_of
from tools.evaluate.towers import IMAGE, TEXT, TowerWeights


def main(argv: Sequence[str], world: World) -> int:
    """Evaluate, and tell on rank 0. Returns the exit code. All that can be refused is, before ranks talk.

    Raises:
        ConfigError: the checkpoint cannot be evaluated so.
    """
    began = time.perf_counter()
    quiet = contextlib.nullcontext() if world.rank == 0 else contextlib.redirect_stdout(io.StringIO())
    with quiet:
        options, flags = parse_options(argv)
    say: Callable[[str], None] = (lambda line: print(line, flush=True)) if world.rank == 0 else lambda line: None
    sources = sources_of(options, flags, world)
    source, texts = sources[IMAGE], options.task in OF_TEXTS
    config = source.config
    device = device_of(config, world)
    images = images_of(config, world, _classes(source, features=options.task != "supervised"), texts=texts)
    check_images(images, options.task, config)
    if options.task == "knn":
        check_neighbours(options, len(images.train))
    if options.task == "zero_shot":
        prompts_of(images.test)

    prepare_cpu(world)
    set_matmul(config.precision, device)
    process_group.start(world, device, config.parallel.timeout)
    facts = facts_of(config, device, images.train, images.test)
    check_agreement({"checkpoint": source.weights.identity} | facts, world_axis(world))
    grid = grid_of(config, world, device)
    for line in _introduction(source, options.weights, grid, device, images):
        say(line)
    memory = memory_share(device, world)
    job = Job(
        options, load(source, grid, device, memory), images, lambda: load(sources[TEXT], grid, device, memory), say
    )  # fmt: skip
    with torch.no_grad():
        figures = RUN[options.task](job)
    if "accuracy" in figures:
        say(f"accuracy    {figures['accuracy']:.2%}")
    if options.json is not None and world.rank == 0:
        about = _about(source, options.task, options.weights, grid, images)
        _write(Path(options.json), about | {"seconds": time.perf_counter() - began} | figures)
    comm.barrier(grid.world)  # a rank that has ended has its launcher end the others
    process_group.stop()
    return EXIT_DONE


def _classes(source: Source, *, features: bool) -> int | None:
    """How many the model can tell apart, where that matters: for its own classifier, and for random labels."""
    if isinstance(source.weights, TowerWeights) or (features and source.config.data.kind != "synthetic"):
        return None
    return source.weights.description.model.num_classes or None


def _introduction(source: Source, which: str, grid: Grid, device: torch.device, images: Images) -> list[str]:
    step = "" if source.step is None else f", step {source.step}"
    counts = f"{len(images.train)} training and {len(images.test)} held-out images of {images.classes} classes"
    layout = " x ".join(f"{axis} {size}" for axis, size in asdict(grid.shape).items())
    data = source.config.data
    lines = [
        f"checkpoint  {source.weights.path} ({source.weights.kind}{step}){', moving average' * (which == 'average')}",
        f"layout      {layout}; {source.config.precision.dtype}; {describe(device)}",
        f"images      {data.kind}: {counts}",
    ]
    own = source.weights.description.preprocessing
    if own is not None and is_of(data.kind, "eval_transform"):
        here = replace(shown_by(asdict(data)), mean=own.mean, std=own.std)
        lines.append(f"shown       {describe_shown(here)}{f' (there: {describe_shown(own)})' if here != own else ''}")
    if source.plan.changed:
        lines.append(f"other than there: {source.plan.changes}")
    if resized := source.plan.of("resized"):
        lines.append(f"resized     {', '.join(resized)}")
    return lines


def _about(source: Source, task: str, which: str, grid: Grid, images: Images) -> dict[str, Any]:
    return {
        "task": task,
        "checkpoint": str(source.weights.path),
        "kind": source.weights.kind,
        "step": source.step,
        "weights": which,
        "layout": asdict(grid.shape),
        "precision": source.config.precision.dtype,
        "data": source.config.data.kind,
        "classes": images.classes,
        "train_images": len(images.train),
        "images": len(images.test),
    }


def _write(path: Path, figures: Figures) -> None:
    try:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], PROGRAM))
