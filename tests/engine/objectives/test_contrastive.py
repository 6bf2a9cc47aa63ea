"""Objective contrastive: gradients of the whole batch, passes, keys, what a run starts from."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from data import Batch, DataConfig, TrainStream
from engine.assemble import assemble
from engine.assembly import Assembly
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver
from engine.checkpoint.states import restore, state_pieces
from engine.config import LogConfig, RecomputeConfig, TrainConfig, plain
from engine.config.contrastive import ContrastiveConfig
from engine.config.objectives import text_shape
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.objectives import make_objective
from engine.objectives.contrastive import Contrastive
from engine.passes import most_of_one_pass, settle_passes
from engine.plan import peaks, plan_memory
from engine.run.load import report_lines, source_of
from engine.run.step import Stepper
from engine.run.trainer import pretrain
from model import ImageText, MicroBatch, ModelConfig, TextConfig, VisionTransformer
from parallel.checkpoint.read import Reader
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.objectives.pairs import TEXT, config_of
from tests.engine.objectives.resting import resting
from tests.engine.small import MODEL, small
from tests.parity.cases import Case
from tests.parity.climb import climb, digits
from tools.evaluate.stored import stored_keys

CPU = torch.device("cpu")


# -- the loss of the whole batch ---------------------------------------------------------------------------------------


def clip(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits, own = scale * left @ right.T, torch.arange(len(left))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def siglip(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(left), dtype=left.dtype) - 1
    return -F.logsigmoid(signs * (scale * left @ right.T + bias)).sum() / len(left)


LOSSES = {"pairs": clip, "pairs_sigmoid": siglip, "pairs_taught": clip}


def mimicking(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of logits."""
    ways = (ours, theirs), (ours.T, theirs.T)
    each = (F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean") for a, b in ways)
    return sum(each, start=torch.zeros((), dtype=ours.dtype)) / 2


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
        assert resting(stepper) == (keys.teacher is not None)
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
    trained = dict(plain.named_parameters())
    left, right, *numbers = plain(batch.images.double(), batch.texts)
    loss = LOSSES[model](left, right, *numbers, batch.labels)
    if keys.teacher is not None:
        teacher = ImageText.from_pretrained(keys.teacher, kernels="reference").double()
        shown = F.interpolate(batch.images, (10, 10), mode="bicubic", antialias=True)
        with torch.no_grad():
            a, b, scale, _ = teacher(shown.double(), batch.texts)
        loss = loss + keys.affinity_weight * mimicking(numbers[0] * left @ right.T, scale * a @ b.T)
        for side, (own, theirs) in enumerate(((left, a), (right, b))):
            lift = trained[f"match.{side}.lift"] = torch.nn.Parameter(weights[f"match.{side}.lift"].double())
            near = F.cosine_similarity(own @ lift.T, theirs).mean()
            loss = loss + keys.embeddings_weight / 2 * (1 - near)
    loss.backward()
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert found.first_grads.keys() == trained.keys()
    for name, parameter in trained.items():
        ours, theirs = found.first_grads[name].double(), parameter.grad.view(found.first_grads[name].shape)
        assert (ours - theirs).norm() <= 2e-4 * theirs.norm() + 1e-7, name


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
    auto, none = (RecomputeConfig(policy=policy, norm_backward="output") for policy in ("auto", "none"))
    less = [most_of_one_pass(replace(config, recompute=r), grid.shape, 2.0**30, on_cpu=True) for r in (auto, none)]
    assert less[0] == less[1] < needed


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


def test_a_run_starts_from_both_towers_or_from_one(tmp_path: Path) -> None:
    """Of a contrastive checkpoint; what is other than there is told, of the text tower, too."""
    saved = config_of()
    a = assemble(saved, make_grid(saved.grid_shape(1)), CPU)
    Saver(a, tmp_path, CheckpointConfig(), {"config": plain(asdict(saved)), "about": {}}).save(1, {}, {})
    load = CheckpointConfig(load=str(tmp_path))
    for config, changes, new in (
        (config_of(text=replace(TEXT, pool="last"), checkpoint=load), "text.pool eos -> last", set()),
        (small(checkpoint=load).resolve(1), "model.num_classes 0 -> 10", {"head.fc.weight", "head.fc.bias"}),
        (config_of(checkpoint=load, image_size=16), "model.image_size 8 -> 16", set()),
    ):
        source = source_of(config, make_objective(config))
        assert source is not None
        source.weights.close()
        assert changes in source.plan.changes and ("text." in source.plan.changes) == ("text." in changes)
        assert source.plan.of("new").keys() == new
        assert next(report_lines(source)) == f"weights from {tmp_path / 'step-00000001'} (step 1)"
    load = CheckpointConfig(load=str(tmp_path / "bare.safetensors"))  # of open_clip, which says nothing of texts
    config = config_of(
        norm_eps=1e-5, pre_norm=True, patch_bias=False, pool="cls", position="learned_1d", in_channels=3, gelu="quick",
        text=replace(TEXT, gelu="quick"), checkpoint=load,
    )  # fmt: skip
    model = ImageText(config.model, config.text, embedding=config.contrastive.embedding)
    model.save_pretrained(tmp_path / "clip", "open_clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "bare.safetensors")
    source = source_of(config, make_objective(config))
    assert source is not None
    source.weights.close()
    assert {name.partition(".")[0] for name in source.plan.of("new")} == {"text", "pair"}
    why = list(report_lines(source))[1]
    assert "without the text tower" in why and "no open_clip_config.json beside it" in why and "--towers" not in why


def test_a_student_of_two_towers_goes_on_with_the_same_teacher_alone(tmp_path: Path) -> None:
    image = ModelConfig(**MODEL | {"num_classes": None, "width": 24, "depth": 2, "image_size": 12})
    for seed, name in enumerate(("teacher", "other")):
        ImageText(image, replace(TEXT, width=24), embedding=10, seed=seed).save_pretrained(tmp_path / name)
    ImageText(image, replace(TEXT, context_length=9), embedding=10).save_pretrained(tmp_path / "long")
    VisionTransformer(ModelConfig(**MODEL)).save_pretrained(tmp_path / "alone")

    def run(name: str, steps: int, **keys: Any) -> None:
        contrastive = ContrastiveConfig(embedding=12, teacher=str(tmp_path / name), embeddings_weight=2.0, **keys)
        config = small(
            objective="contrastive", text=TEXT, num_classes=None, data=DataConfig(), contrastive=contrastive,
            train=TrainConfig(steps=steps, global_batch_size=64, micro_batch_size=32), run_dir=str(tmp_path / "run"),
            checkpoint=CheckpointConfig(save_interval=1), log=LogConfig(tensorboard=False, interval=1),
        )  # fmt: skip
        assert pretrain(config, World()) == 0

    run("teacher", 1, teacher_dtype="fp8")
    run("teacher", 2, teacher_dtype="fp8")
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in told if line["event"] == "train"]
    assert [line["step"] for line in trained] == [1, 2]
    for line in trained:
        targets = [line[f"loss_{name}"] for name in ("pairs", "affinity", "embeddings")]
        assert sum(targets) == pytest.approx(line["loss"], rel=1e-6) and min(targets) > 0
    with Reader(tmp_path / "run" / "checkpoints" / "step-00000002") as reader:
        saved = reader.manifest.config
        assert not [name for name in reader.manifest.tensors if "teacher" in name]
    assert ImageText.from_pretrained(tmp_path / "run")(torch.zeros(2, 1, 8, 8), torch.zeros(2, 8).long())[0].shape == (
        2,
        12,
    )
    kept = stored_keys(saved, None, None, {})["contrastive"]  # what evaluates it needs no teacher
    assert "embedding" in kept and not {"teacher", "teacher_dtype", "embeddings_weight"} & kept.keys()
    for name, message in (
        ("other", r"was taught by weights .*give the teacher of then"),
        ("long", r"long has text\.context_length 9 and the student 8, and both read the same tokens: set"),
        (
            "alone",
            r"alone has no text tower: take a checkpoint of objective contrastive with texts, or use objective d",
        ),
        ("none", r"contrastive\.teacher: .*none"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(name, 3)
    for keys in ({"affinity_weight": 3.0}, {"embeddings_weight": 1.0}, {"teacher_dtype": "bf16"}):
        with pytest.raises(ConfigError, match=r"it is for a contrastive\.teacher, and there is none: leave it out"):
            config_of(contrastive=ContrastiveConfig(**keys))
    with pytest.raises(ConfigError, match=r"it is for pairs image_text, and there are views: leave it out"):
        config_of(text=TextConfig(), contrastive=ContrastiveConfig(pairs="views", teacher=str(tmp_path / "teacher")))
    with pytest.raises(ValueError, match=r"embeddings_weight is -1\.0: it must be 0 or more"):
        ContrastiveConfig(embeddings_weight=-1.0)
    with pytest.raises(ConfigError, match=r"affinity_weight and embeddings_weight are 0, so nothing is to be as"):
        ContrastiveConfig(affinity_weight=0.0, teacher="x").resolve()


def test_what_has_no_effect_is_told_of_the_blocks_of_both_towers() -> None:
    blocks = sum(".blocks." in layer.name for layer in Contrastive.of(config_of()).layers)
    config = config_of(recompute=RecomputeConfig(policy=f"all * {blocks}", ahead="never"))
    assert "recompute.ahead never: nothing is dropped" in without_effect(config, GridShape(), "cpu", 1)


def test_the_last_stage_has_the_texts_to_tell_equal_ones() -> None:
    objective = Contrastive.of(config_of(text=replace(TEXT, pool="last")))
    assert objective.reads_texts(range(len(objective.layers) - 1, len(objective.layers)))
