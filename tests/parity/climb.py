"""Trains one case and reports its numbers in logical (unsharded) form."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, Dataset, EvalStream, TextShape, TrainStream, build_datasets
from data.datasets import ArrayDataset
from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.config import Config
from engine.config.objectives import text_shape
from engine.optimizers.schedules import factor
from engine.recompute_choice import TooLittleError, check_budget, settled
from engine.run.decode_sharing import decode_sharing
from engine.run.load import start_from
from engine.run.prompts import prompt_batches
from engine.run.step import Stepper
from engine.run.teachers import load_teachers
from model import ModelConfig
from parallel import comm
from parallel.grid import Grid
from parallel.process_group import World
from parallel.sharding.gather import Buffer, Gatherer
from tests.parity.cases import STEPS, Case

CPU = torch.device("cpu")
MANY_THREADS = 40
EVAL_IMAGES = 19  # which no number of ranks or micro-batches divides


@cache
def digits(
    model: ModelConfig, text: TextShape | None = None, labels: int | None = None, variable_resolution: float = 0.0
) -> tuple[Dataset, Dataset]:
    """The training set, and a few held-out images, with captions where there is a text tower; labels of each class."""
    usual = Case("parallel").config().data
    config = replace(usual, labels_per_class=labels, variable_resolution=variable_resolution)
    sizes = model.sizes
    train, held_out = build_datasets(
        config, image_size=sizes.image, channels=1, num_classes=10, seed=0, text=text, patch_size=sizes.patch
    )
    assert isinstance(held_out, ArrayDataset)
    few = ArrayDataset(held_out.images[:EVAL_IMAGES], held_out.labels[:EVAL_IMAGES], 10)
    few.captions, few.texts, few.resolution = held_out.captions, held_out.texts, held_out.resolution
    return train, few


@dataclass(kw_only=True)
class Climb:
    """What is compared between layouts.

    Attributes:
        targets: the loss of each, step by step, where they are told.
        first_grads: before clipping, and without the loss scale.
        average: the evaluation of the moving average, if one is kept.
        fp8: of each rank of the world, its linears' histories and scales.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    first_grads: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    evaluation: tuple[float, float, int] = (0.0, 0.0, 0)
    average: tuple[float, float, int] = (0.0, 0.0, 0)
    skipped: int = 0
    fp8: list[dict[str, Tensor]] = field(default_factory=list)


def evaluated(figures: dict[str, float]) -> tuple[float, float, int]:
    """(loss, accuracy, images); of pairs the sum of all shares."""
    shares = sum(value for name, value in figures.items() if name.startswith(("accuracy", "recall", "zero_shot")))
    return figures["loss"], shares, int(figures["images"])


def logical(assembly: Assembly, what: str) -> dict[str, Tensor]:
    """`master` or `sums` of every parameter of the whole model, put together from all ranks. Collective."""
    layouts = {slot.name: slot.member.info.layout for slot in assembly.store.slots}
    local = assembly.store.local_values(what)  # collective
    # as arrays, since pickling a tensor takes thirty times as long
    own = {name: (layouts[name], value.float().numpy()) for name, value in local.items()}
    full: dict[str, Tensor] = {}
    for part in comm.gather_objects({} if assembly.grid.data.index else own, assembly.grid.world):
        for name, (layout, value) in part.items():
            if name not in full:
                full[name] = torch.full(layout.shape, float("nan"))
            layout.place(full[name], torch.from_numpy(value.copy()))
    return full


def poison(gatherer: Gatherer) -> None:
    """Fill every buffer with NaN when its unit is forgotten, and go on with another: nobody may look there again."""
    choose = gatherer._dispensable

    def fresh(keep: int) -> Buffer:
        buffer = choose(keep)
        if buffer.holds is not None and buffer.arriving:
            gatherer._land(buffer.holds.index)
        buffer.memory.fill_(255)
        buffer.memory = torch.empty_like(buffer.memory)
        gatherer._views.clear()
        return buffer

    gatherer._dispensable = fresh  # type: ignore[method-assign]


def climb(
    world: World,
    config: Config,
    before_training: Callable[[Stepper], None] | None = None,
    steps: int = STEPS,
    first: int = 0,
    after_training: Callable[[Stepper], None] | None = None,
    given: Grid | None = None,
) -> Climb:
    """Train for some steps and evaluate; the same result on every rank.

    Args:
        first: steps that were done before. given: the grid, if it is made already.
    """
    grid = given or grid_of(config, world, CPU)
    assembly = assemble(_settled(config, grid), grid, CPU)
    load_teachers(assembly)
    start_from(assembly)
    assert config.parallel.shared_memory or assembly.post.carrier == "gloo", assembly.post.carrier
    poison(assembly.store.gatherer)
    stepper = Stepper(assembly)
    if before_training is not None:
        before_training(stepper)
    data = config.data
    train_set, eval_set = digits(config.model, text_shape(config), data.labels_per_class, data.variable_resolution)
    place: dict[str, Any] = {
        "config": config.data,
        "micro_batch_size": config.train.micro_batch_size,
        "data_rank": grid.data.index,
        "data_size": grid.data.size,
        "with_images": assembly.holds_images,
        "with_texts": assembly.holds_texts,
    }
    circle = decode_sharing(assembly, None)
    size = config.train.global_batch_size
    stream = TrainStream(train_set, global_batch_size=size, seed=config.train.seed, circle=circle, **place)
    out = Climb()
    update = assembly.optimizer.update

    def recording(*, lr: float, grad_factor: float, decay_factor: float | None = None) -> None:
        """Keeps the first gradients as they are before clipping, which some forms of the optimizer do in place."""
        if not out.first_grads:
            scale = assembly.scaler.scale if assembly.scaler else 1.0
            out.first_grads = {name: sums / scale for name, sums in logical(assembly, "sums").items()}
        update(lr=lr, grad_factor=grad_factor, decay_factor=decay_factor)

    assembly.optimizer.update = recording  # type: ignore[method-assign]
    for batches in islice(stream.steps(first), steps):
        part = factor(config.schedule, assembly.optimizer.steps, STEPS)
        result = stepper.train_step(batches, config.optimizer.lr * part, part)
        out.losses.append(result.loss)
        out.grad_norms.append(result.grad_norm)
        out.targets += result.targets.values()
        out.skipped += result.skipped
    if (again := assembly.recompute) is not None:  # a comparison with nothing computed again would compare nothing
        assert again.ran_again or all(of.drops <= {"gather"} for of in again.sets.values())
        sends = any(of.offloads and "output" not in of.drops for of in again.sets.values())
        assert again.offload.sent or not sends  # a stage's own input stays
    out.parameters = logical(assembly, "master")
    held_out = [*EvalStream(eval_set, circle=circle, **place), *prompt_batches(eval_set, **place)]
    out.evaluation = evaluated(stepper.evaluate(held_out))
    if assembly.average is not None:
        out.average = evaluated(stepper.evaluate_average(held_out))
    if assembly.fp8 is not None:
        out.fp8 = comm.gather_objects(assembly.fp8.state_dict(), grid.world)
    if after_training is not None:
        after_training(stepper)
    if given is None:
        close(grid)
    return out


def _settled(config: Config, grid: Grid) -> Config:
    """With recompute.policy auto what it chooses, where there is room for a little more than the least. Collective."""
    if not config.recompute.is_auto:
        return config

    def within(budget: int) -> Config:
        return replace(config, recompute=replace(config.recompute, memory_budget=budget))

    try:
        check_budget(within(1), grid.shape, 2.0**30, on_cpu=True)
    except TooLittleError as error:
        least = error.smallest
    return settled(within(least * 101 // 100), grid, CPU, 2.0**30)[0]


def close(grid: Grid) -> None:
    """Give it back. Collective."""
    grid.close()
    if len(list(Path("/proc/self/task").iterdir())) > MANY_THREADS:  # of groups that wait for the garbage collector
        gc.collect()


def first_batches(config: Config) -> list[tuple[Tensor, Tensor]]:
    """(images, targets [B, classes]) of each whole global batch of a run with one data-parallel rank."""
    train = config.train
    stream = TrainStream(
        digits(config.model, labels=config.data.labels_per_class)[0],
        config=config.data,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.global_batch_size,
        data_rank=0,
        data_size=1,
        seed=train.seed,
    )
    batches = [step[0] for step in islice(stream.steps(0), STEPS)]
    return [(b.images, targets(b, config)) for b in batches if b.images is not None]


def targets(batch: Batch, config: Config) -> Tensor:
    """Probabilities of classes, [B, classes]; of images without a label 0."""
    known = (batch.labels >= 0)[:, None]
    hot = F.one_hot(batch.labels.clamp(min=0), config.model.sizes.classes).float() * known
    if batch.other_labels is not None and batch.own_shares is not None:
        shares = batch.own_shares[:, None]
        hot = shares * hot + (1 - shares) * F.one_hot(batch.other_labels, config.model.sizes.classes)
    smoothing = config.train.label_smoothing
    return (1 - smoothing) * hot + known * smoothing / config.model.sizes.classes


def climb_all(
    world: World,
    cases: Iterable[Case],
    steps: int = STEPS,
    config_of: Callable[[Case], Config] = Case.config,
) -> dict[Case, Climb] | None:
    """Every case one after the other on the same processes, those that can on one grid; rank 0 returns the results.

    Collective.
    """
    results: dict[Case, Climb] = {}
    for _, alike in groupby(sorted(cases, key=grid_key), grid_key):
        configs = {case: config_of(case) for case in alike}
        grid = grid_of(next(iter(configs.values())), world, CPU)
        results |= {case: climb(world, config, steps=steps, given=grid) for case, config in configs.items()}
        close(grid)
    return results if world.rank == 0 else None


def grid_key(case: Case) -> tuple[int, int, int, int, bool]:
    """What the grid goes by."""
    return case.pipeline, case.data, case.context, case.tensor, case.shared_memory
