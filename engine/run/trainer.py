"""The run: validate, set up, loop."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data import Dataset, build_datasets, describe_datasets
from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.config import MAX_COUNT, Config
from engine.config.classes import class_orders
from engine.config.keys import key_types, value_of
from engine.config.objective_keys import check_labels, check_repeats
from engine.config.objectives import text_shape
from engine.config.stored import check_rows
from engine.config.teachers import found_at
from engine.config.tower_teachers import towers_at
from engine.config.without_effect import without_effect
from engine.device import memory_share, prepare_cpu, set_matmul
from engine.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from engine.frozen import frozen_of
from engine.norm_backward import check_norm_weights
from engine.objectives import Objective, make_objective
from engine.optimizers.schedules import check_schedule
from engine.passes import settle_passes
from engine.recompute_choice import check_budget, settled
from engine.run.agreement import check_agreement, facts_of
from engine.run.attention import AttentionLog, check_attention
from engine.run.device import device_of
from engine.run.elastic import fit, wait_for_the_others
from engine.run.load import Source, source_of, start_from
from engine.run.loop import Loop
from engine.run.metrics import MetricsWriter
from engine.run.predicted import Comparison, predicted
from engine.run.profile import StepProfiler, TimelineRecording
from engine.run.progress import Progress
from engine.run.provenance import provenance
from engine.run.report import startup_report
from engine.run.resume import Resumed, may_resume, resume
from engine.run.run_dir import ATTENTION, RunDir, prepare_run_dir
from engine.run.saving import (
    Saving,
    check_folder,
    facts_for_manifests,
    lock_folders,
    prepare_checkpoints,
    prepare_to_save,
)
from engine.run.step import Stepper
from engine.run.stopping import StopRequests
from engine.run.teachers import load_teachers, with_teachers_of_then
from engine.run.watchdog import watched
from engine.teacher_outputs.shards import stored_at
from parallel import comm, process_group
from parallel.grid import Grid, GridShape, world_axis
from parallel.process_group import World


class Inputs(NamedTuple):
    """What a run is made of before ranks talk: found, and found to be possible, by the same code on every rank."""

    run_dir: Path
    checkpoints: Path
    train_set: Dataset
    eval_set: Dataset
    steps: int
    device: torch.device
    objective: Objective
    source: Source | None

    def after(self, done: Progress, config: Config) -> Inputs:
        """For a run that goes on: epochs are other steps where earlier ones had another number of images."""
        steps = total_steps(config, len(self.train_set), done)
        check_schedule(config.schedule, steps)
        draws = done.samples + (steps - done.step) * config.train.global_batch_size
        check_rows(config, self.train_set, self.eval_set, draws)
        return self._replace(steps=steps)


def pretrain(config: Config, world: World) -> int:
    """Train as `config` says, from the newest checkpoint if there is one. Everything that can be refused is refused
    before ranks talk to each other.

    Returns:
        the exit code: done, or stopped on request.

    Raises:
        ConfigError: what is asked for cannot be. DivergedError: NaN or Inf that skipping did not cure.
        OutputError: what a run must write cannot be written.
        parallel.failures.PeerLostError: another rank is gone.
    """
    began, given = time.monotonic(), config
    found_at.cache_clear()  # teachers of an earlier run of this process may have been trained further
    stored_at.cache_clear()
    towers_at.cache_clear()
    config, world, notes = fit(with_teachers_of_then(config), world)
    config = config.resolve(world.size)
    if world.rank >= world.size:
        wait_for_the_others(config, world)
    run_dir = prepare_run_dir(config.run_dir)
    inputs = inputs_of(config, world, run_dir, prepare_checkpoints(config, run_dir))
    threads, matmul = prepare_cpu(world), set_matmul(config.precision, inputs.device)

    process_group.start(world, inputs.device, config.parallel.timeout)
    check_agreement(facts_of(config, inputs.device, inputs.train_set, inputs.eval_set), world_axis(world))
    grid = grid_of(config, world, inputs.device)
    memory, on_cpu = memory_share(inputs.device, world), inputs.device.type == "cpu"
    config, of_passes = settle_passes(config, grid, memory, on_cpu=on_cpu)
    config, choice = settled(config, grid, inputs.device, memory)
    prediction = predicted(config, choice, grid, memory, on_cpu=on_cpu)
    comparison = None if prediction is None else Comparison(prediction, inputs.device)
    run, *others = lock_folders(config, inputs.run_dir, inputs.checkpoints, grid.world)
    facts = facts_for_manifests(config, grid, inputs.device, inputs.train_set, inputs.eval_set)
    assembly, resumed = _state(config, world, grid, inputs, facts)
    check_norm_weights(assembly)
    inputs = inputs.after(resumed.progress, config)
    notes += [of.note for of in class_orders(config, inputs.train_set.class_names).values() if of.note]
    notes += of_passes + ([] if prediction is None else [prediction.line])
    notes += resumed.notes
    if config.checkpoint.save_interval is not None:
        notes += check_folder(inputs.checkpoints, assembly)
    images = describe_datasets(config.data.kind, inputs.train_set, inputs.eval_set, config.model.sizes.classes or None)
    report = startup_report(assembly, threads=threads, matmul=matmul, images=images)
    writer = None
    if world.rank == 0:
        prepare_to_save(config, inputs.checkpoints, resumed.step)
        writer = _begin(run, config, inputs.steps, grid.shape, config.to_yaml(given), resumed_at=resumed.step)
        if (names := inputs.train_set.class_names) is not None:  # of each label, in their order
            run.write_classes(f"{json.dumps(list(names), indent=0)}\n", writer.say)
        unused = without_effect(config, grid.shape, inputs.device.type, inputs.steps)
        for line in report + notes + [f"no effect: {what}" for what in unused]:
            writer.say(line)
    with StopRequests(config.train, world.rank, began) as requests:
        loop = _loop(assembly, inputs, facts, writer, resumed, requests, comparison)
        with watched(grid, world, inputs.device, inputs.run_dir):
            stopped = loop.run()
        if writer is not None:
            writer.close()
            for locked in (run, *others):
                locked.close()
            _say_farewell(writer, config, loop, stopped)
        comm.barrier(grid.world)  # a rank that has ended has its launcher end the others
        process_group.stop()  # not after a failure: the others may be gone, or waiting
    return EXIT_DONE if stopped is None else EXIT_STOPPED


def inputs_of(config: Config, world: World, run_dir: Path, checkpoints: Path) -> Inputs:
    """Of a resolved configuration, and the folders of the run and its checkpoints. Writes nothing.

    Raises:
        ConfigError: what is asked for cannot be.
    """
    train_set, eval_set = _datasets(config, world)
    steps = total_steps(config, len(train_set))
    check_schedule(config.schedule, steps)
    check_profile(config, steps)
    check_attention(config, eval_set)
    device = device_of(config, world)
    objective = make_objective(config)
    frozen_of(config, objective.layers)  # what it refuses is refused here
    class_orders(config, train_set.class_names)  # likewise
    check_budget(config, config.grid_shape(world.size), memory_share(device, world), on_cpu=device.type == "cpu")
    source = None
    if not may_resume(config, checkpoints):
        source = source_of(config, objective)
        check_rows(config, train_set, eval_set, steps * config.train.global_batch_size)
    return Inputs(run_dir, checkpoints, train_set, eval_set, steps, device, objective, source)


def build(config: Config, world: World, grid: Grid, inputs: Inputs) -> Assembly:
    """A new model on this rank, the means to train it, and its teachers, if it has any. Collective."""
    assembly = assemble(config, grid, inputs.device, device_memory=memory_share(inputs.device, world))
    load_teachers(assembly, inputs.train_set.class_names)
    return assembly


def _state(
    config: Config, world: World, grid: Grid, inputs: Inputs, facts: Mapping[str, Any]
) -> tuple[Assembly, Resumed]:
    """What this rank trains: as an earlier attempt has left it, else from other weights, else new. Collective."""
    steps = partial(total_steps, config, len(inputs.train_set))
    make = partial(build, config, world, grid, inputs)
    assembly, resumed = resume(make, inputs.checkpoints, steps=steps, facts=facts["about"])
    if resumed.manifest is None:
        resumed.notes.extend(start_from(assembly, inputs.source, inputs.train_set.class_names))
        return assembly, resumed
    if inputs.source is not None:
        inputs.source.weights.close()
    for key in ("checkpoint.load", "distillation.start_from"):
        if (value := value_of(config, key)) is not None:
            resumed.notes.append(f"resume: {key} {value} is of no effect in a run that goes on")
    return assembly, resumed


def _loop(
    assembly: Assembly,
    inputs: Inputs,
    facts: Mapping[str, Any],
    writer: MetricsWriter | None,
    resumed: Resumed,
    requests: StopRequests,
    comparison: Comparison | None,
) -> Loop:
    config = assembly.config
    saves, looks = config.checkpoint.save_interval is not None, config.log.attention_interval > 0
    stepper = Stepper(assembly)
    return Loop(
        stepper,
        inputs.train_set,
        inputs.eval_set,
        steps=inputs.steps,
        writer=writer,
        profiler=_profiler(stepper, inputs.run_dir / "profile", writer),
        saving=Saving(assembly, inputs.checkpoints, facts, writer) if saves else None,
        progress=resumed.progress,
        requests=requests,
        comparison=comparison,
        attention=AttentionLog(assembly, inputs.eval_set, inputs.run_dir, writer) if looks else None,
    )


def _profiler(stepper: Stepper, folder: Path, writer: MetricsWriter | None) -> StepProfiler | None:
    a = stepper.assembly
    if a.config.log.profile_steps is None:
        return None
    timeline = TimelineRecording(a, stepper.meter.recorder, folder, None if writer is None else writer.say)
    return StepProfiler(a.config.log.profile_steps, folder, a.grid.world.index, timeline)


def _say_farewell(writer: MetricsWriter, config: Config, loop: Loop, stopped: str | None) -> None:
    folder = writer.path.parent
    writer.say(f"config      {folder / 'config.yaml'}\nmetrics     {writer.path}")
    writer.say(f"picture     python -m tools.plot {shlex.quote(str(folder))}")
    if config.log.attention_interval:
        writer.say(f"attention   {folder / ATTENTION}")
    if config.log.tensorboard:
        writer.say(f"TensorBoard {folder} (tensorboard --logdir {folder})")
    if loop.profiler is not None:
        writer.say(f"traces      {loop.profiler.path.parent} (python -m tools.timeline {shlex.quote(str(folder))})")
    if loop.saving is not None and loop.saving.newest is not None:
        writer.say(f"checkpoint  {loop.saving.newest}")
    if stopped is not None:
        how = "the same command goes on from there"
        if loop.requests is not None and loop.requests.is_at_end(loop.progress.step):
            how = "without that, or with a later one, the same command goes on from there"
        if loop.saving is None:
            how = "nothing was saved (checkpoint.save_interval null)"
        writer.say(f"stopped after step {loop.progress.step} of {loop.steps} ({stopped}): {how}")


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


def total_steps(config: Config, train_images: int, done: Progress | None = None) -> int:
    """Steps of the run. Epochs count as the decimal number that was written: 1.1 is eleven tenths, to the last step.

    done: what a run goes on from, whose steps may have had another number of images.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    step, samples = (0, 0) if done is None else (done.step, done.samples)
    images = Fraction(repr(config.train.epochs)) * train_images * config.data.repeats
    steps = max(1, step + math.ceil((images - samples) / config.train.global_batch_size))
    if steps > MAX_COUNT:
        raise ConfigError(f"train.epochs {config.train.epochs} are {steps} steps: at most {MAX_COUNT} can be")
    return steps


def _datasets(config: Config, world: World) -> tuple[Dataset, Dataset]:
    check_repeats(config)
    sizes = config.model.sizes
    try:
        found = build_datasets(
            config.data,
            image_size=sizes.image,
            channels=sizes.channels,
            num_classes=sizes.classes or None,
            seed=config.train.seed,
            readers=world.local_size,
            text=text_shape(config),
            patch_size=sizes.patch,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_labels(config, found[0].num_classes)
    return found
