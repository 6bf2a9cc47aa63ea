"""The first layer that is not finite, found where one was planted, on one rank and on two."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.run.diagnose import Culprit, Watch, first_culprit, watch
from model import Build, MicroBatch, Stage, build_layers
from parallel.comm import single_axis
from parallel.grid import Grid, GridShape, make_grid
from parallel.pipeline import build_schedule
from parallel.pipeline.execution import PipelineExecutor, TensorSpec
from parallel.process_group import World
from parallel.tensor import attach_sink, softmax_cross_entropy
from tests.distributed import run_ranks
from tests.model.small import TINY, batch_of, real

CONFIG = replace(TINY, depth=3).resolve()
LAYERS = build_layers(CONFIG)  # embed, blocks.0 to blocks.2, head
CUTS = {1: [range(5)], 2: [range(3), range(3, 5)]}
BATCH = 2
NAN = float("nan")


class Factors(torch.autograd.Function):
    """Multiplies by one factor in forward, by another in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.factor, None, None


class Sink:
    """A gradient sink that keeps what it gets."""

    def __init__(self) -> None:
        self.got: dict[nn.Parameter, Tensor] = {}

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        self.add_computed(parameter, lambda: grad_output.t() @ x)

    def add_computed(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        self.got[parameter] = self.got.get(parameter, 0) + product()


def is_second(batch: MicroBatch) -> bool:
    return int(batch.sample_ids[0]) == BATCH


def cross_entropy(outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
    return softmax_cross_entropy(outputs[0], batch.labels, CONFIG.num_classes, single_axis("tensor")).sum()


class Planter:
    """Plants one thing that is not finite, by name; all but the parameter's in the second micro-batch alone."""

    def __init__(self, stage: Stage, batches: Sequence[MicroBatch]) -> None:
        self.stage, self.batches, self.loss = stage, batches, cross_entropy

    def has(self, name: str) -> bool:
        return name in dict(self.stage.named_modules())

    def layer_output(self, name: str, forward: float, backward: float) -> None:
        def change(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return Factors.apply(out, forward, backward) if is_second(args[1]) else out

        if self.has(name):
            self.stage.get_submodule(name).register_forward_hook(change)

    def parameter(self) -> None:
        if self.has("blocks.1"):
            self.stage.get_parameter("blocks.1.mlp.fc1.weight").data[3, 2] = NAN

    def pixel(self) -> None:
        for batch in self.batches:
            if batch.images is not None and is_second(batch):
                batch.images[1, 0, 3, 3] = float("inf")

    def activation(self) -> None:
        self.layer_output("blocks.2", NAN, 1.0)

    def gradient(self) -> None:
        self.layer_output("blocks.1", 1.0, NAN)

    def gradient_behind_the_cut(self) -> None:
        self.layer_output("blocks.2", 1.0, float("inf"))

    def loss_itself(self) -> None:
        self.loss = lambda outputs, batch: cross_entropy(outputs, batch) * (NAN if is_second(batch) else 1.0)

    def gradient_of_the_loss(self) -> None:
        self.loss = lambda outputs, batch: Factors.apply(
            cross_entropy(outputs, batch), 1.0, NAN if is_second(batch) else 1.0
        )

    def bias_gradient(self) -> None:
        steps = iter((1.0, NAN, 1.0))
        if self.has("blocks.1"):
            self.stage.get_parameter("blocks.1.mlp.fc2.bias").register_hook(lambda grad: grad * next(steps))

    def weight_gradient(self) -> None:
        """Both factors of one product are finite, and so is the input's gradient, but the product overflows."""
        if self.has("blocks.0"):
            linear = self.stage.get_submodule("blocks.0.mlp.fc1")
            linear.register_forward_pre_hook(lambda _, args: (Factors.apply(args[0], 1e20, 1e-30), *args[1:]))
            linear.register_forward_hook(lambda _, args, out: Factors.apply(out, 1e-20, 1e30))

    def weight_gradient_in_a_sink(self) -> None:
        for parameter in self.stage.parameters():
            attach_sink(parameter, Sink())
        self.weight_gradient()

    def nothing(self) -> None:
        pass


def nth(micro_batch: int, phase: Any, order: int, layer: str, data_rank: int = 0) -> Culprit:
    return Culprit(micro_batch, phase, order, layer, data_rank)


# places forward: images 0, embed 1, blocks 2 3 4, head 5, loss 6; backward the other way round
EXPECTED = {
    "parameter": nth(0, "activation", 3, "blocks.1"),
    "pixel": nth(1, "activation", 0, "input images"),
    "activation": nth(1, "activation", 4, "blocks.2"),
    "gradient": nth(1, "gradient", 3, "blocks.1"),
    "gradient_behind_the_cut": nth(1, "gradient", 2, "blocks.2"),
    "loss_itself": nth(1, "activation", 6, "loss"),
    "gradient_of_the_loss": nth(1, "gradient", 0, "loss"),
    "bias_gradient": nth(1, "gradient", 3, "blocks.1.mlp.fc2.bias"),
    "weight_gradient": nth(0, "gradient", 4, "blocks.0.mlp.fc1.weight"),
    "weight_gradient_in_a_sink": nth(0, "gradient", 4, "blocks.0.mlp.fc1.weight"),
    "nothing": None,
}


def micro_batches(with_images: bool) -> list[MicroBatch]:
    images = torch.rand(3, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [
        batch_of(list(range(m * BATCH, (m + 1) * BATCH)), images=x if with_images else None)
        for m, x in enumerate(images)
    ]


class Fresh(Sequence[MicroBatch]):
    """Each micro-batch made when it is fetched, as one that is moved to a device. most: how many lived at once."""

    def __init__(self, batches: Sequence[MicroBatch]) -> None:
        self.batches, self.most = batches, 0
        self._alive: set[int] = set()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, m: Any) -> Any:
        fresh = replace(self.batches[m])
        self._alive.add(id(fresh))
        weakref.finalize(fresh, self._alive.discard, id(fresh))
        self.most = max(self.most, len({id(fresh), *self._alive}))
        return fresh


def pipeline(grid: Grid, schedule: str) -> tuple[Stage, PipelineExecutor, list[MicroBatch]]:
    """This rank's stage, its executor, and three micro-batches."""
    axis, build = grid.pipeline, Build(config=CONFIG)
    cuts = CUTS[axis.size]
    own = cuts[axis.index]
    stage = real(Stage([LAYERS[i] for i in own], build))
    boundaries = [(TensorSpec(LAYERS[cut.start - 1].boundary(BATCH, build)),) if cut.start else () for cut in cuts]
    executor = PipelineExecutor(
        build_schedule(schedule, axis.size, 3), {axis.index: stage}, boundaries, axis=axis, device=torch.device("cpu")
    )
    return stage, executor, micro_batches(with_images=own.start == 0)


def search(world: World, plant: str, shape: GridShape, schedule: str = "1f1b") -> Culprit | None:
    """What is found on this rank; in data-parallel layouts it is planted on the last data rank."""
    grid = make_grid(shape, world)
    stage, executor, batches = pipeline(grid, schedule)
    planter = Planter(stage, batches)
    if grid.data.index == grid.data.size - 1:
        getattr(planter, plant)()
    with watch([stage], LAYERS, grid.data.index) as watching:
        executor.run(watching.batches(Fresh(batches)), watching.loss(planter.loss))
    return first_culprit(watching.found, grid.world)


@pytest.mark.parametrize("plant", EXPECTED)
def test_one_rank(plant: str) -> None:
    assert search(World(), plant, GridShape()) == EXPECTED[plant]


@pytest.mark.parametrize(
    ("plant", "schedule"),
    [("parameter", "1f1b"), ("gradient_behind_the_cut", "gpipe"), ("bias_gradient", "1f1b"), ("nothing", "1f1b")],
)
def test_two_pipeline_ranks_agree_and_say_what_one_says(plant: str, schedule: str) -> None:
    assert run_ranks(2, search, plant, GridShape(pipeline=2), schedule) == [EXPECTED[plant]] * 2


def test_the_data_rank_is_told() -> None:
    found = run_ranks(2, search, "pixel", GridShape(data=2))
    assert found == [nth(1, "activation", 0, "input images", data_rank=1)] * 2


def test_afterwards_nothing_is_watched_and_sinks_are_back() -> None:
    stage, executor, batches = pipeline(make_grid(GridShape()), "1f1b")
    sink = Sink()
    for parameter in stage.parameters():
        attach_sink(parameter, sink)
    executor.run(batches, cross_entropy)
    expected, sink.got = sink.got, {}
    with pytest.raises(RuntimeError, match="broken off"), watch([stage], LAYERS) as watching:
        executor.run(watching.batches(batches), watching.loss(cross_entropy))
        raise RuntimeError("broken off")
    assert sink.got.keys() == expected.keys() and all(torch.equal(sink.got[p], expected[p]) for p in expected)
    assert all(p.vitruvius_sink is sink and not p._backward_hooks for p in stage.parameters())  # type: ignore
    for batch in batches:
        assert batch.images is not None
        batch.images.fill_(NAN)
    executor.run(batches, cross_entropy)
    assert watching.found == []


def test_micro_batches_are_not_all_held_at_once() -> None:
    stage, executor, batches = pipeline(make_grid(GridShape()), "1f1b")
    many = Fresh(batches * 8)
    executor = PipelineExecutor(
        build_schedule("1f1b", 1, 24), {0: stage}, [()], axis=executor.axis, device=torch.device("cpu")
    )
    with watch([stage], LAYERS) as watching:
        executor.run(watching.batches(many), watching.loss(cross_entropy))
    assert many.most <= 4


def test_what_comes_first() -> None:
    in_order = [
        nth(0, "activation", 3, "blocks.1"),
        nth(0, "activation", 3, "blocks.1", data_rank=1),
        nth(0, "activation", 4, "blocks.2"),
        nth(0, "gradient", 0, "loss"),
        nth(0, "gradient", 2, "blocks.2"),
        nth(0, "gradient", 2, "blocks.2.mlp.fc1.bias"),
        nth(1, "activation", 1, "embed"),
    ]
    assert all(earlier < later for earlier, later in pairwise(in_order))
    assert first_culprit(in_order[::-1], single_axis("world")) == in_order[0]


def test_a_layer_that_runs_again_in_backward_keeps_its_micro_batch() -> None:
    """As under recomputation."""
    watching, layer = Watch(LAYERS, 0), nn.Module()
    batches = watching.batches(micro_batches(with_images=True))
    layer.forward = lambda x, batch: x * (NAN if is_second(batch) else 1.0)  # type: ignore[method-assign]
    with ExitStack() as until:
        watching.layer(layer, "blocks.1", until)
        for m in (0, 1, 2, 0, 1, 2):
            layer(torch.ones(1), batches[m])
    assert watching.found == [nth(1, "activation", 3, "blocks.1")] * 2


def test_descriptions() -> None:
    assert nth(3, "activation", 18, "blocks.17", data_rank=1).describe() == (
        "blocks.17: activation not finite (micro-batch 3 of data rank 1)"
    )
    told = {name: culprit.describe() for name, culprit in EXPECTED.items() if culprit is not None}
    assert told["pixel"] == "input images not finite (micro-batch 1 of data rank 0)"
    assert told["loss_itself"] == "loss not finite (micro-batch 1 of data rank 0)"
    assert told["gradient_of_the_loss"] == "loss: gradient not finite (micro-batch 1 of data rank 0)"
    assert told["bias_gradient"] == "blocks.1.mlp.fc2.bias: gradient not finite (micro-batch 1 of data rank 0)"
