"""Objective contrastive: gradients of the whole batch, what is refused, what evaluation says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from data import Batch, DataConfig, TextShape, TrainStream
from engine.assemble import Assembly, assemble
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver
from engine.checkpoint.states import restore, state_pieces
from engine.config import Config, RecomputeConfig, TrainConfig
from engine.config.contrastive import ContrastiveConfig
from engine.config.objectives import text_shape
from engine.errors import ConfigError
from engine.objectives.alike import PROMPT, Alike, text_numbers
from engine.objectives.contrastive import Contrastive
from engine.passes import most_of_one_pass, settle_passes
from engine.plan import peaks, plan_memory
from engine.run.step import Stepper
from model import ImageText, MicroBatch, TextConfig
from parallel.checkpoint.read import Reader
from parallel.config import ParallelConfig
from parallel.contrastive import info_nce
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import small
from tests.parity.cases import Case
from tests.parity.climb import climb, digits

CPU = torch.device("cpu")
TEXT = TextConfig(width=16, depth=1, num_heads=4, context_length=8)


def config_of(world: int = 1, **changes: Any) -> Config:
    groups = {"objective": "contrastive", "text": TEXT, "num_classes": None} | changes
    return small(**groups).resolve(world)


# -- the loss of the whole batch ---------------------------------------------------------------------------------------


def clip(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits, own = scale * left @ right.T, torch.arange(len(left))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def siglip(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(left), dtype=left.dtype) - 1
    return -F.logsigmoid(signs * (scale * left @ right.T + bias)).sum() / len(left)


LOSSES = {"pairs": clip, "pairs_sigmoid": siglip}


@pytest.mark.parametrize("model", LOSSES)
def test_gradients_are_those_of_the_whole_batch(model: str) -> None:
    """Four micro-batches in two passes, against autograd in float64 through both towers at once."""
    config = Case(model, micro_batches=4).config()
    config = replace(config, model=replace(config.model, drop_path=0.0), text=replace(config.text, drop_path=0.0))
    keys = config.contrastive
    plain = ImageText(
        config.model, config.text, embedding=keys.embedding, projection=keys.projection, seed=0, bias=keys.bias,
        temperature=keys.temperature, max_logit_scale=keys.max_logit_scale or 1e9, kernels="reference",
    ).double()  # fmt: skip
    weights: dict[str, Tensor] = {}

    def take(stepper: Stepper) -> None:
        weights.update({name: p.detach().clone() for name, p in stepper.assembly.parameters().items()})

    found = climb(World(), config, before_training=take, steps=1)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    train = config.train
    stream = TrainStream(
        digits(config.model, text=text_shape(config))[0], config=config.data, global_batch_size=train.global_batch_size,
        micro_batch_size=train.global_batch_size, data_rank=0, data_size=1, seed=train.seed,
    )  # fmt: skip
    batch = next(islice(stream.steps(0), 1))[0]
    loss = LOSSES[model](*plain(batch.images.double(), batch.texts), batch.labels)
    loss.backward()
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert found.first_grads.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        ours, theirs = found.first_grads[name].double(), parameter.grad.view(found.first_grads[name].shape)
        assert (ours - theirs).norm() <= 2e-4 * theirs.norm() + 1e-7, name


# -- what is refused ---------------------------------------------------------------------------------------------------

VIEWS = ContrastiveConfig(pairs="views")
REFUSED: dict[str, tuple[Callable[[], Config], str]] = {
    "a key of the other objective": (
        lambda: small(contrastive=ContrastiveConfig(embedding=64)).resolve(1),
        "contrastive.embedding is 64, a key of objective contrastive, but objective is supervised: leave it out",
    ),
    "a text tower without texts": (lambda: small(text=TEXT).resolve(1), "text.width is 16, a key of objective contras"),
    "classes": (lambda: config_of(num_classes=10), "model.num_classes is 10, a key of objective supervised, but obj"),
    "a loss of classes": (
        lambda: config_of(train=TrainConfig(steps=1, global_batch_size=8, loss="sigmoid")),
        "train.loss is sigmoid, a key of objective supervised",
    ),
    "views of pairs": (lambda: config_of(data=DataConfig(views=2)), "data.views is 2, a key of contrastive.pairs vie"),
    "texts beside views": (lambda: config_of(contrastive=VIEWS), "text.width is 16, a key of contrastive.pairs image"),
    "a text tower that is none": (lambda: config_of(text=TextConfig()), "text.width is not set: give it, or a text."),
    "a bias under a softmax": (
        lambda: config_of(contrastive=ContrastiveConfig(bias=-10.0)),
        "contrastive.bias is -10.0, but contrastive.loss infonce has none",
    ),
    "labels with one partner": (
        lambda: config_of(contrastive=ContrastiveConfig(positives="label")),
        "contrastive.positives is label, but contrastive.loss infonce is for one true partner: leave it out, or use",
    ),
    "a queue without keys": (
        lambda: config_of(text=TextConfig(), contrastive=replace(VIEWS, queue=64)),
        "contrastive.queue is 64, but no moving average makes keys: set contrastive.momentum, such as 0.99",
    ),
    "a queue of fewer keys than ranks": (
        lambda: config_of(4, text=TextConfig(), contrastive=replace(VIEWS, momentum=0.9, queue=3)),
        "contrastive.queue is 3, fewer keys than the 4 data-parallel ranks that share them: use 4 or more",
    ),
    "momentum of texts": (
        lambda: config_of(contrastive=ContrastiveConfig(momentum=0.99)),
        "contrastive.momentum is 0.99, but it is for contrastive.pairs views and loss infonce, not for image_text",
    ),
    "an average of texts without memory": (
        lambda: config_of(contrastive=ContrastiveConfig(loss="sigmoid", momentum=0.0)),
        "contrastive.momentum is 0.0, but it is for contrastive.pairs views and loss infonce, not for image_text",
    ),
    "a predictor of fewer features than ranks": (
        lambda: config_of(2, text=TextConfig(), contrastive=replace(VIEWS, momentum=0.9, predictor=1),
                          parallel=ParallelConfig(tensor_parallel_size=2)),
        "contrastive.predictor 1 cannot be split over parallel.tensor_parallel_size 2: use a size of at most 1",
    ),
    "a temperature beyond the bound": (
        lambda: config_of(contrastive=ContrastiveConfig(temperature=0.001)),
        "contrastive.temperature 0.001 is a logit scale of 1000, above contrastive.max_logit_scale 100",
    ),
    "one pair": (
        lambda: config_of(train=TrainConfig(steps=1, global_batch_size=1)),
        "train.global_batch_size is 1: a pair is told from the others of its batch, so use 2 or more",
    ),
    "fewer pairs than ranks": (
        lambda: config_of(8, train=TrainConfig(steps=1, global_batch_size=4)),
        "train.global_batch_size 4 cannot be dealt to 8 data-parallel ranks",
    ),
    "one pass of another schedule": (
        lambda: config_of(
            2, parallel=ParallelConfig(pipeline_parallel_size=2), contrastive=ContrastiveConfig(passes=1)
        ),
        "contrastive.passes is 1, which needs the outputs of all 2 micro-batches before the first backward, but "
        "parallel.schedule 1f1b runs backwards in between: use gpipe",
    ),
    "more stages than layers": (
        lambda: config_of(16, parallel=ParallelConfig(pipeline_parallel_size=16), train=TrainConfig(
            steps=1, global_batch_size=16)),
        "parallel.pipeline_parallel_size 16 is more than the 10 layers of both towers (embeddings, 5 blocks, heads, p",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("ranks", "parallel", "batch", "given", "expected"),
    [
        (1, {}, (8, 8), "auto", 1),  # one micro-batch
        (1, {}, (8, 2), "auto", "auto"),  # memory decides
        (1, {}, (8, 2), 1, 1),
        (2, {"pipeline_parallel_size": 2}, (8, 4), "auto", 2),
        (2, {"pipeline_parallel_size": 2, "schedule": "gpipe"}, (8, 4), "auto", 1),
        (2, {"pipeline_parallel_size": 2, "schedule": "zb_v"}, (8, 4), 2, 2),
    ],
)
def test_passes(ranks: int, parallel: dict[str, Any], batch: tuple[int, int], given: Any, expected: Any) -> None:
    train = TrainConfig(steps=1, global_batch_size=batch[0], micro_batch_size=batch[1])
    asked = {"parallel": ParallelConfig(**parallel), "train": train, "contrastive": ContrastiveConfig(passes=given)}
    config = config_of(ranks, **asked)
    assert config.contrastive.passes == expected
    schedule = config.pipeline(config.grid_shape(ranks)).schedule(batch[0] // batch[1])
    assert schedule.name == ("gpipe" if expected == 1 else parallel.get("schedule", "1f1b"))
    assert config.resolve(ranks) == config, "resolved again, as config.yaml is, it is what it was"
    told = config.to_yaml(small(objective="contrastive", text=TEXT, num_classes=None, **asked))
    assert (f"passes: auto  # here {expected}" in told) == (given == "auto" != expected)


def test_usual_values() -> None:
    keys = config_of(contrastive=ContrastiveConfig(loss="sigmoid")).contrastive
    assert (keys.bias, keys.temperature, keys.max_logit_scale, keys.positives) == (-10.0, 0.1, 0.0, "pair")
    keys = config_of().contrastive
    assert (keys.bias, keys.temperature, keys.max_logit_scale, keys.learn_temperature) == (None, 0.07, 100.0, True)
    keys = config_of(contrastive=ContrastiveConfig(loss="supcon")).contrastive
    assert keys.positives == "label"
    assert text_shape(config_of()) == TextShape(length=8, vocabulary_size=259, end_token=257)
    assert text_shape(small().resolve(1)) is None


# -- evaluation --------------------------------------------------------------------------------------------------------


def a_look(world: World, counts: tuple[int, ...]) -> dict[str, float]:
    """Of six pairs in a plane, dealt unevenly, and of prompts of two classes."""
    grid = make_grid(GridShape(data=world.size), world)
    angles = torch.tensor([0.0, 0.1, 1.5, 1.6, 3.0, 3.1])
    left = torch.stack([angles.cos(), angles.sin()], 1)
    # the captions of the first two images are the same, and those of the last two have changed places
    right = left[[0, 0, 2, 3, 5, 4]]
    texts = torch.tensor([[1, 2], [1, 2], [3, 4], [5, 6], [7, 8], [9, 9]])
    labels = torch.tensor([0, 1, 0, 1, 1, 1])  # the second is not what it looks like
    look = Alike(
        lambda l, r, scale, bias, of, axis: info_nce(l, r, scale, axis), grid, CPU, by_label=False,
        sides=("image", "text"),
    )  # fmt: skip
    first = sum(counts[: world.rank])
    own = torch.arange(first, first + counts[world.rank])
    scale, bias = torch.tensor(10.0), torch.tensor(0.0)
    pad = 4 - len(own)
    index = torch.cat([own, own.new_zeros(pad)])
    ids, weights = torch.cat([own, own.new_full((pad,), -1)]), torch.cat([torch.ones(len(own)), torch.zeros(pad)])
    batch = MicroBatch(images=None, labels=labels[index], sample_ids=ids, weights=weights, texts=texts[index])
    look.add([look.look((left[index], right[index], scale, bias), batch)])
    towards = torch.tensor([0.5, 2.6])[world.rank :: world.size]  # of the classes
    prompts = torch.stack([towards.cos(), towards.sin()], 1)
    batch = MicroBatch(
        images=None, labels=torch.arange(2)[world.rank :: world.size], sample_ids=torch.full((len(prompts),), PROMPT),
        weights=torch.zeros(len(prompts)), texts=torch.zeros(len(prompts), 2, dtype=torch.int64),
    )  # fmt: skip
    look.add([look.look((torch.zeros_like(prompts), prompts, scale, bias), batch)])
    return look.figures(holds_loss=True)


def test_evaluation_finds_partners_and_classes() -> None:
    found = run_ranks(2, a_look, (2, 4))
    assert found[0] == found[1]
    figures = found[0]
    assert figures["recall_image_to_text@1"] == pytest.approx(4 / 6)
    assert figures["recall_text_to_image@1"] == pytest.approx(4 / 6)
    assert figures["zero_shot_accuracy"] == pytest.approx(5 / 6)
    assert figures["images"] == 6 and figures["logit_scale"] == 10.0


def test_texts_have_numbers_of_their_own() -> None:
    texts = torch.tensor([[1, 2, 0], [2, 1, 0], [1, 2, 0], [1, 2, 258], [0, 1, 2]])
    first, second, again, *others = text_numbers(texts).tolist()
    assert first == again and len({first, second, *others}) == 4


# -- passes and keys ---------------------------------------------------------------------------------------------------


def test_memory_decides_how_many_passes() -> None:
    config = config_of(train=TrainConfig(steps=1, global_batch_size=16, micro_batch_size=2))
    grid = make_grid(config.grid_shape(1))
    needed = most_of_one_pass(config, grid.shape, 2.0**30, on_cpu=True)
    budget = config.recompute.budget(2.0**30) / 2.0**30
    for memory, passes, told in (
        (needed * 1.01 / budget, 1, "one, activat"),
        (needed * 0.99 / budget, 2, "two, as acti"),
    ):
        settled, lines = settle_passes(config, grid, memory, on_cpu=True)
        assert settled.contrastive.passes == passes
        assert lines[0].startswith(f"passes: {told}") and f"{needed / 2**20:,.1f} MiB planned" in lines[0]
        assert settle_passes(settled, grid, 1.0, on_cpu=True) == (settled, [])
    two = replace(config, contrastive=replace(config.contrastive, passes=2))
    assert max(peaks(two, grid.shape, 2.0**30, on_cpu=True)) < needed


def test_keys_are_made_by_the_average_and_enter_the_queue() -> None:
    """Two steps by hand: the average's outputs without predictor are the keys; a skipped step leaves both alone."""
    keys = ContrastiveConfig(pairs="views", momentum=0.75, queue=40, predictor=8, embedding=8)
    train = TrainConfig(steps=3, global_batch_size=8, micro_batch_size=4)
    config = config_of(text=TextConfig(), contrastive=keys, train=train, drop_path=0.0)
    a = assemble(config, make_grid(config.grid_shape(1)), CPU)
    stepper, queue, stage = Stepper(a), a.queue, a.stages[0]
    assert queue is not None and a.keys is not None and "predictor.fc1.weight" in a.parameters()

    def batches(step: int, factor: float = 1.0) -> list[Batch]:
        found = []
        for m in range(2):
            images = factor * torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(10 * step + m))
            ids = torch.arange(4).repeat(2) + 4 * m + torch.tensor([0, 2**40]).repeat_interleave(4)
            found.append(Batch(images=images, labels=ids % 10, sample_ids=ids, weights=torch.ones(8)))
        return found

    average = {name: p.detach().clone() for name, p in a.parameters().items()}
    for step in range(2):
        place = queue.position
        with torch.no_grad():
            own = [replace(a.to_device(batch, training=True), keys=True) for batch in batches(step)]
            made = [functional_call(stage, average, ((), batch)) for batch in own]
        expected = torch.stack([torch.cat([y[side] for y in made]) for side in (0, 1)], 1).flatten(0, 1)
        assert not stepper.train_step(batches(step), 0.05).skipped
        assert queue.position == (place + 16) % 40
        assert torch.allclose(queue.keys[place : place + 16], expected, atol=1e-6)
        average = {name: 0.75 * average[name] + 0.25 * p.detach() for name, p in a.parameters().items()}
    before = [queue.keys.clone(), *(x.clone() for x in a.keys.averages)]
    assert stepper.train_step(batches(2, float("nan")), 0.05).skipped
    assert all(map(torch.equal, before, [queue.keys, *a.keys.averages])) and queue.position == 32
    plan = plan_memory(config, GridShape(), 0, 2.0**30)
    assert plan.states["queue of keys"] == 4 * 40 * 8 and plan.states["weight average"] > 0
    names = {piece.name.partition("/")[0] for piece in state_pieces(a)}
    assert names >= {"keys", "contrastive.queue", "keys.updates"}
    assert next(layer.flops for layer in a.layers if layer.name == "predictor") > 0


def shares_of_the_scale(world: World) -> tuple[float, float]:
    """Of two data ranks, of which one wants a larger scale, and the other, by more, a smaller one."""
    config = config_of(2, contrastive=ContrastiveConfig(embedding=8), train=TrainConfig(steps=1, global_batch_size=8))
    grid, objective = make_grid(config.grid_shape(2), world), Contrastive.of(config)
    rows = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(world.rank)), dim=1)
    outputs = rows, rows if world.rank else rows.flip(0), torch.tensor(10.0), torch.tensor(0.0)
    batch = MicroBatch.of_images(torch.empty(4, 1, 8, 8))
    own = objective.pair_loss(*outputs, batch.labels, grid.data).scale
    return objective.joint_loss([outputs], [batch], grid).gradients[0][2].item(), own.item()


def test_data_ranks_agree_on_the_sign_of_the_scales_gradient() -> None:
    """At its bound the sign decides whether a gradient counts: that of the sum, not of a rank's share."""
    (first, one), (second, other) = run_ranks(2, shares_of_the_scale)
    assert one * other < 0 and first == second == pytest.approx((one + other) / 2, rel=1e-6)


def test_a_queue_of_another_length_begins_anew(tmp_path: Path) -> None:
    """And with it the place of its next key; all else is what was saved."""

    def made(length: int) -> Assembly:
        keys = ContrastiveConfig(pairs="views", momentum=0.75, queue=length, embedding=8)
        config = config_of(text=TextConfig(), contrastive=keys, train=TrainConfig(steps=3, global_batch_size=8))
        return assemble(config, make_grid(config.grid_shape(1)), CPU)

    saved, longer = made(40), made(48)
    assert saved.queue is not None and longer.queue is not None
    saved.queue.push(F.normalize(torch.randn(16, 8), dim=1))
    saved.parameters()["image.embed.weight"].data.fill_(0.5)
    Saver(saved, tmp_path, CheckpointConfig(), {"config": {}, "about": {}}).save(1, {}, {})
    before = longer.queue.keys.clone()
    with Reader(tmp_path / "step-00000001") as reader:
        restore(longer, reader)
    assert torch.equal(longer.queue.keys, before) and longer.queue.position == 0
    assert bool((longer.parameters()["image.embed.weight"] == 0.5).all())


def test_what_has_no_effect_is_told_of_the_blocks_of_both_towers() -> None:
    blocks = sum(".blocks." in layer.name for layer in Contrastive.of(config_of()).layers)
    config = config_of(recompute=RecomputeConfig(policy=f"all * {blocks}", ahead="never"))
    assert "recompute.ahead never: nothing is dropped" in config.without_effect(GridShape(), "cpu", 1)


def test_the_last_stage_has_the_texts_to_tell_equal_ones() -> None:
    objective = Contrastive.of(config_of(text=replace(TEXT, pool="last")))
    assert objective.reads_texts(range(len(objective.layers) - 1, len(objective.layers)))
