"""The run: validate, set up, loop."""

from __future__ import annotations

import json
import math
from fractions import Fraction

from data import Dataset, build_datasets, describe_datasets
from engine.assemble import assemble, grid_of
from engine.config import MAX_COUNT, Config
from engine.config.keys import key_types, value_of
from engine.device import choose_device, memory_share, prepare_cpu, set_matmul
from engine.errors import ConfigError
from engine.frozen import frozen_of
from engine.objectives import make_objective
from engine.optimizers.schedules import check_schedule
from engine.precision.precision import check_kernels, check_precision
from engine.run.agreement import check_agreement, facts_of
from engine.run.elastic import fit, wait_for_the_others
from engine.run.load import source_of, start_from
from engine.run.loop import Loop
from engine.run.metrics import MetricsWriter
from engine.run.profile import StepProfiler
from engine.run.provenance import provenance
from engine.run.report import startup_report
from engine.run.run_dir import RunDir, prepare_run_dir
from engine.run.step import Stepper
from engine.run.watchdog import watched
from model.kernels import Kernels
from parallel import process_group
from parallel.grid import GridShape, world_axis
from parallel.process_group import World


def pretrain(config: Config, world: World) -> None:
    """Train as `config` says. Everything that can be refused is refused before ranks talk to each other.

    Raises:
        ConfigError: what is asked for cannot be. DivergedError: NaN or Inf that skipping did not cure.
        parallel.failures.PeerLostError: another rank is gone.
    """
    given = config
    config, world, notes = fit(config, world)
    config = config.resolve(world.size)
    if world.rank >= world.size:
        wait_for_the_others(config, world)
    run_dir = prepare_run_dir(config.run_dir)
    train_set, eval_set = _datasets(config, world)
    steps = total_steps(config, len(train_set))
    check_schedule(config.schedule, steps)
    check_profile(config, steps)
    device = choose_device(config.device, world)
    check_precision(config.precision, device)
    check_kernels(Kernels(config.kernels), device)
    threads, matmul = prepare_cpu(world), set_matmul(config.precision, device)
    objective = make_objective(config)
    frozen_of(config, objective.layers)  # what it refuses is refused here
    source = source_of(config, objective)

    process_group.start(world, device, config.parallel.timeout)
    check_agreement(facts_of(config, device, train_set, eval_set), world_axis(world))
    grid = grid_of(config, world, device)
    run = RunDir(run_dir, grid.world)
    assembly = assemble(config, grid, device, objective, device_memory=memory_share(device, world))
    images = describe_datasets(config.data.kind, train_set, eval_set, config.model.sizes.classes)
    report = startup_report(assembly, threads=threads, matmul=matmul, images=images)
    report += start_from(assembly, source)
    writer = None
    if world.rank == 0:
        writer = _begin(run, config, steps, grid.shape, config.to_yaml(given))
        if train_set.class_names is not None:  # of each label, in their order
            run.write_classes(f"{json.dumps(list(train_set.class_names), indent=0)}\n", writer.say)
        for line in report + notes + [f"no effect: {what}" for what in config.without_effect(grid.shape, device.type)]:
            writer.say(line)
    traced = config.log.profile_steps
    profiler = StepProfiler(traced, run_dir / "profile", world.rank) if traced else None
    loop = Loop(Stepper(assembly), train_set, eval_set, steps=steps, writer=writer, profiler=profiler)
    with watched(grid, world, device, run_dir):
        loop.run()
    if writer is not None:
        writer.close()
        run.close()
        writer.say(f"config      {run_dir / 'config.yaml'}\nmetrics     {writer.path}")
        if config.log.tensorboard:
            writer.say(f"TensorBoard {run_dir} (tensorboard --logdir {run_dir})")
        if profiler is not None:
            writer.say(f"traces      {profiler.path.parent}")
    process_group.stop()  # not after a failure: the others may be gone, or waiting


def _begin(
    run: RunDir, config: Config, steps: int, shape: GridShape, as_yaml: str, *, resumed_at: int | None = None
) -> MetricsWriter:
    """Nothing can be refused any more: begin to write, or go on after step `resumed_at`."""
    traced, origin = config.log.profile_steps, provenance(shape)
    if resumed_at is None:
        notes = run.clear()
    else:
        notes = run.go_on(resumed_at, traces=traced is not None and traced[1] > resumed_at)
        origin |= {"resumed": f"after step {resumed_at}"}
    writer = MetricsWriter(
        run.path,
        steps=steps,
        global_batch_size=config.train.global_batch_size,
        tensorboard=config.log.tensorboard,
        resumed_at=resumed_at,
    )
    text = run.write_config(as_yaml, origin, writer.say)
    writer.describe(text, {key: value_of(config, key) for key in key_types()})
    for note in notes:
        writer.say(note)
    return writer


def check_profile(config: Config, steps: int) -> None:
    """Raise ConfigError where steps to be traced are not part of the run."""
    traced = config.log.profile_steps
    if traced is not None and traced[1] > steps:
        raise ConfigError(f"log.profile_steps {list(traced)} reaches beyond the {steps} steps of the run: lower it")


def total_steps(config: Config, train_images: int) -> int:
    """Steps of the run. Epochs count as the decimal number that was written: 1.1 is eleven tenths, to the last step."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    steps = max(1, math.ceil(Fraction(repr(config.train.epochs)) * train_images / config.train.global_batch_size))
    if steps > MAX_COUNT:
        raise ConfigError(f"train.epochs {config.train.epochs} are {steps} steps: at most {MAX_COUNT} can be")
    return steps


def _datasets(config: Config, world: World) -> tuple[Dataset, Dataset]:
    sizes = config.model.sizes
    try:
        return build_datasets(
            config.data,
            image_size=sizes.image,
            channels=sizes.channels,
            num_classes=sizes.classes,
            seed=config.train.seed,
            readers=world.local_size,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
