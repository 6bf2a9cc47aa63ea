"""This engine as a program of `tools.benchmark.peer_programs`, in the layout that its flags give."""

from __future__ import annotations

import torch

from data import Batch
from engine.assemble import assemble, grid_of
from engine.device import choose_device, memory_share, prepare_cpu, set_matmul
from engine.recompute_choice import settled
from engine.run.step import Stepper
from parallel import process_group
from parallel.process_group import read_world
from tools.benchmark.bench import read_config
from tools.benchmark.peer_programs import Step, Task


def vitruvius(task: Task) -> Step:
    """What engine.run.trainer sets up, fed with the images that the others get."""
    stepper = stepper_of(task)
    batches = own_batches(task, stepper)
    return lambda number: stepper.train_step(batches[number % len(batches)], task.lr).loss


def stepper_of(task: Task) -> Stepper:
    """The engine on this rank. Collective."""
    world = read_world()
    config = read_config([*task.flags, "--precision.dtype", task.dtype]).resolve(world.size)
    device = choose_device("cpu", world)
    prepare_cpu(world)
    set_matmul(config.precision, device)
    process_group.start(world, device, config.parallel.timeout)
    grid = grid_of(config, world, device)
    config, _ = settled(config, grid, device, memory_share(device, world))
    return Stepper(assemble(config, grid, device))


def own_batches(task: Task, stepper: Stepper) -> list[list[Batch]]:
    """This rank's images of each batch, in micro-batches."""
    size = stepper.assembly.config.train.micro_batch_size
    assert size is not None
    return [
        [Batch(x, y, sample_ids=torch.arange(len(y)), weights=torch.ones(len(y)))
         for x, y in zip(images.split(size), labels.split(size), strict=True)]
        for images, labels in task.own_batches()
    ]  # fmt: skip
