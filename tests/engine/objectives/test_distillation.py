"""Objective distillation: gradients against plain PyTorch, a run from the command line's side, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from data import DataConfig, EvalStream, build_datasets
from engine.assemble import assemble
from engine.checkpoint.config import CheckpointConfig
from engine.clusters import read_cluster
from engine.config import Config, LogConfig, PrecisionConfig, TrainConfig
from engine.config.classes import ClassOrder, class_order, class_orders, fingerprints
from engine.config.cli import parse
from engine.config.distillation import BETWEEN_IMAGES, DistillationConfig, TeacherConfig
from engine.config.pairs import pairs_of
from engine.errors import ConfigError
from engine.layer_costs import micro_batch
from engine.objectives import make_objective
from engine.optimizers.config import OptimizerConfig
from engine.plan import META, plan_memory, planned, states
from engine.run.agreement import facts_of
from engine.run.load import start_from
from engine.run.report import _tower_lines
from engine.run.step import Stepper
from engine.run.teachers import load_teachers
from engine.run.trainer import pretrain
from engine.step_time import StepModel
from model import ImageText, ModelConfig, StageConfig, TextConfig, VisionTransformer, build_layers, makers
from model.inherit import inherit
from model.matching import token_loss
from parallel.checkpoint.read import Reader
from parallel.config import ParallelConfig
from parallel.grid import GridShape, make_grid, planned_grid
from parallel.process_group import World
from tests.engine.objectives.plain_relations import attended, between, divergence, pooled, rows_of, tokens
from tests.engine.objectives.resting import resting
from tests.engine.recompute.meta_pass import bytes_of_a_pass
from tests.engine.small import MODEL, flags, small
from tests.parity.cases import TAUGHT, Case
from tests.parity.climb import climb, first_batches
from tests.parity.teachers import _MODELS, computed
from tools.benchmark import distillation as benchmark

CPU = torch.device("cpu")


def taught(teacher: Path, world: int = 1, keys: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A resolved configuration."""
    distillation = DistillationConfig(**{"teacher": str(teacher)} | (keys or {}))
    return small(objective="distillation", distillation=distillation, **changes).resolve(world)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than `small`, with smaller patches."""
    path = tmp_path_factory.mktemp("teacher") / "weights"
    VisionTransformer(ModelConfig(**MODEL | {"width": 48, "depth": 7, "patch_size": 2})).save_pretrained(path)
    return path


# -- numbers -----------------------------------------------------------------------------------------------------------


def map_of(model: VisionTransformer, block: int) -> tuple[int, int]:
    """Rows and columns of patches after a block."""
    stages, done = model.sizes.stages, 0
    for stage in stages:
        done += stage.depth
        if block < done:
            return stage.rows, stage.cols
    raise AssertionError(block)


def features(own: Tensor, theirs: Tensor, keys: DistillationConfig) -> Tensor:
    if keys.features == "cosine":
        return 1 - F.cosine_similarity(own, theirs, dim=2).mean()
    a, b = (
        ((x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-5).sqrt()) for x in (own, theirs)
    )
    if keys.features == "smooth_l1":
        far = (a - b).abs()
        return torch.where(far < 1, far.square() / 2, far - 0.5).mean()
    return (a - b).square().mean()


def cosines(x: Tensor) -> Tensor:
    return F.cosine_similarity(x[:, :, None], x[:, None], dim=3)


def scaled(x: Tensor, moments: Tensor | None) -> Tensor:
    """By count, means, sums of squares about them."""
    if moments is None:
        return x
    mean, spread = moments[1:].chunk(2)
    return (x - mean) / (spread.mean() / moments[0]).sqrt()


def response(own: Tensor, theirs: Tensor, keys: DistillationConfig) -> Tensor:
    if "logits" in keys.standardise:
        own, theirs = ((x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True) for x in (own, theirs))
    z, u = own / keys.temperature, theirs / keys.temperature
    if keys.response == "hard":
        return F.cross_entropy(own, theirs.argmax(1))
    if keys.response == "sigmoid":
        p, q = z.sigmoid(), u.sigmoid()
        each = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    else:
        each = F.kl_div(z.log_softmax(1), u.log_softmax(1), log_target=True, reduction="none")
    return keys.temperature**2 * each.sum(1).mean()


@pytest.mark.parametrize("model", TAUGHT)
def test_gradients_are_those_of_plain_pytorch(model: str) -> None:
    """In float64, teachers as models of their own."""
    config = Case(model, micro_batches=2).config()
    config = replace(config, model=replace(config.model, drop_path=0.0))
    plain = VisionTransformer(config.model, seed=0, kernels="reference").double()
    scales, trained = dict[str, Tensor](), dict(plain.named_parameters())

    def take(stepper: Stepper) -> None:
        assert resting(stepper) == (model == "matched_to_two")  # one teacher knows other classes
        held = stepper.assembly.parameters()
        for name in [name for name in held if name.startswith("match.")]:
            trained[name] = torch.nn.Parameter(held[name].detach().double())
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(held[name])
        for number, (name, of) in enumerate(stepper.assembly.moments.items()):
            of.values = scales[name] = (
                torch.rand(len(of.values), generator=torch.Generator().manual_seed(number)).double() + 2
            )

    ours = climb(World(), config, before_training=take, steps=1)
    images, targets = first_batches(config)[0]
    keys, data = config.distillation, config.data
    with rows_of(plain) as mine, attended(plain) as minded, pooled(plain) as embedded:
        own = plain(images.double())
    loss = keys.label_weight * F.cross_entropy(own, targets.double())
    assert (targets.sum(1) == 0).any() == (config.data.labels_per_class is not None)
    several = len(keys.all_teachers)
    for number, (of, share) in enumerate(zip(keys.all_teachers, keys.shares, strict=True)):
        of = computed(of)
        there = _MODELS[of.path]
        shown = replace(there, drop_path=0.0, image_size=of.image_size or there.image_size)
        theirs = VisionTransformer(shown, kernels="reference")
        theirs.load(dict(VisionTransformer.from_pretrained(of.path).named_parameters()), there.resolve())
        pixels = images * data.std[0] + data.mean[0]
        pixels = (pixels - (of.mean or data.mean)[0]) / (of.std or data.std)[0]
        size = shown.resolve().sizes.image
        pixels = pixels if pixels.shape[2:] == size else F.interpolate(pixels, size, mode="bicubic", antialias=True)
        with torch.no_grad(), rows_of(theirs) as his, attended(theirs) as heeded, pooled(theirs) as known:
            logits = theirs.double()(pixels.double())
        if keys.response_weight:
            loss = loss + keys.response_weight * share * response(own, logits, keys)
        pairs = pairs_of(keys, plain.sizes.depth, theirs.sizes.depth) if keys.features_weight else ()
        for kind in set(BETWEEN_IMAGES) & keys.relation_weights.keys():
            loss = loss + keys.relation_weights[kind] * share * between(kind, embedded[0], known[0])
        if keys.embeddings_weight:
            lift = trained.get(f"match.{len(pairs) * several + number}.lift")
            (a,), (b,) = embedded, known
            b = scaled(b, scales.get(f"match.{len(pairs) * several + number}"))
            a = a if lift is None else a @ lift.T
            loss = loss + keys.embeddings_weight * share * (1 - F.cosine_similarity(a, b)).mean()
        for place, (i, j) in enumerate(pairs):
            behind = i == plain.sizes.depth - 1 and plain.sizes.projection is not None
            rows = mine[i + behind]
            match = f"match.{(len(pairs) + bool(keys.embeddings_weight) if behind else place) * several + number}"
            lift = trained.get(f"{match}.lift")
            a, b = rows if lift is None else rows @ lift.T, his[j]
            if (here := map_of(plain, i)) != (other := map_of(theirs, j)):
                b = b.transpose(1, 2).unflatten(2, other)
                b = F.interpolate(b, here, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
            asked = scaled(b, scales.get(match))
            loss = loss + keys.features_weight * share / len(pairs) * features(a, asked, keys)
            classes = plain.sizes.class_tokens * (plain.sizes.class_tokens == theirs.sizes.class_tokens)
            both = [tuple(tokens(x, plain, classes, (here, here)) for x in minded[i])]
            both.append(tuple(tokens(x, theirs, classes, (other, here)) for x in heeded[j]))
            for kind, weight in keys.at_depth.items():
                if kind == "gram":
                    each = (cosines(rows) - cosines(b)).square().mean()
                else:
                    each = divergence(kind, both[0], both[1], keys.relation_heads or 0)
                loss = loss + weight * share / len(pairs) * each
    loss.backward()
    assert ours.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert any(name.startswith("match.") for name in trained) == bool(keys.features_weight or keys.embeddings_weight)
    for name, parameter in trained.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (ours.first_grads[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_a_teacher_in_fp8_hangs_on_no_micro_batch() -> None:
    """Each token has its own scale: with one for a micro-batch, losses would differ by a hundredth. And it rounds."""
    found = []
    for micro_batches, dtype in ((1, "fp8"), (4, "fp8"), (4, "bf16")):
        config = Case("taught", micro_batches=micro_batches).config()
        keys = replace(config.distillation, teacher_dtype=dtype)
        found.append(climb(World(), replace(config, distillation=keys).resolve(1), steps=2).targets)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    for eight, half in zip(found[1][:3], found[2][:3], strict=True):  # of the first step, but for labels
        assert 1e-6 < abs(eight / half - 1) < 0.1


def test_features_by_smooth_l1() -> None:
    own, theirs = (2 * torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))).unbind()
    expected = features(own, theirs, DistillationConfig(features="smooth_l1"))
    torch.testing.assert_close(token_loss(own, theirs, "smooth_l1").mean(), expected)


def test_layers_take_turns(teacher: Path, tmp_path: Path) -> None:
    """Each right behind what of the teacher has the same share of the depth, and given what its own model made."""
    layers = make_objective(taught(teacher)).layers
    names = [layer.name for layer in layers]
    assert [n for n in names if not n.startswith("teacher.")] == [
        layer.name for layer in build_layers(small().resolve(1).model)
    ]
    before = [names[names.index(f"blocks.{i}") - 1] for i in range(4)]
    assert before == ["teacher.blocks.0", "teacher.blocks.2", "teacher.blocks.4", "teacher.blocks.6"]
    last = dict[bool, str]()
    for place, layer in enumerate(layers):
        rows, rides = layer.parted(makers(layers, place))
        assert (rows.name if rows else None) == last.get(layer.is_frozen)
        assert [ride.name for ride in rides] == [name for frozen, name in last.items() if frozen != layer.is_frozen]
        last[layer.is_frozen] = layer.name

    # the student's last block matched with one that is not the teacher's
    layers = make_objective(taught(teacher, keys={"features_weight": 1.0, "pairs": ((3, 1),)})).layers
    names = [layer.name for layer in layers]
    place = names.index("match.0")
    assert names[place - 1] == "blocks.3" and layers[place].rides == ("teacher.blocks.1",)

    # and a projection, which is kept, behind the student's last block
    kept = taught(teacher, keys={"features_weight": 1.0, "lift": "keep"})
    assert kept.model.stages is not None and kept.model.stages[1:] == (
        StageConfig(depth=0, width=48, num_heads=4, mlp_dim=192, window_size=7, grid_size=7, merge=False),
    )
    assert kept.resolve(1) == kept
    assert "no blocks; tokens are projected to width 48 for" in "\n".join(_tower_lines(kept.model, None))
    layers = make_objective(kept).layers
    names = [layer.name for layer in layers]
    assert names[-5:] == ["blocks.3", "merges.0", "match.4", "teacher.head", "head"]
    assert layers[-3].parameters == 0 < layers[names.index("match.2")].parameters

    # which a teacher may have, too: his last block is matched as it is
    VisionTransformer(kept.model).save_pretrained(tmp_path / "kept")
    layers = make_objective(taught(tmp_path / "kept", keys={"features_weight": 1.0})).layers
    assert [layer.name for layer in layers[-5:]] == ["blocks.3", "match.3", "teacher.merges.0", "teacher.head", "head"]
    assert layers[-4].rides == ("teacher.blocks.3",)


def test_a_student_starts_from_chosen_parts_of_its_teacher(tmp_path: Path) -> None:
    """As if the whole teacher had been resized to the student's images and patches."""
    wide = ModelConfig(**MODEL | {"width": 32, "depth": 6, "image_size": (12, 8), "patch_size": 2})
    theirs, path = VisionTransformer(wide, seed=5), tmp_path / "wide"
    theirs.save_pretrained(path)
    config = taught(path, keys={"start_from": "even", "features_weight": 1.0})
    assembly = assemble(config, make_grid(GridShape(), World()), CPU)
    told = "\n".join(start_from(assembly))
    for what in ("blocks 1, 2, 4, 5 of 6; 4 of 8 features of a head, 16 of 32 features, 64 of 128 hidden", "embed.pos"):
        assert what in told, told
    # and of a teacher who has no more to say nothing else is built or run
    alone = taught(path, keys={"start_from": "even", "response_weight": 0.0})
    parts = assemble(alone, make_grid(GridShape(), World()), CPU)
    load_teachers(parts)
    start_from(parts)
    held = assembly.parameters()
    assert all(torch.equal(held[name], weight) for name, weight in parts.parameters().items())
    assert len(parts.layers) == len(build_layers(alone.model)) and "weights alone" in str(parts.objective.describe())
    _, held_out = build_datasets(alone.data, image_size=(8, 8), channels=1, num_classes=10, seed=0)
    stream = EvalStream(held_out, config=alone.data, micro_batch_size=8, data_rank=0, data_size=1)
    assert Stepper(parts).evaluate(stream).keys() == {"loss", "accuracy", "images"}
    parts.grid.close()
    whole = VisionTransformer(replace(wide, image_size=8, patch_size=4), seed=0)
    whole.load(dict(theirs.named_parameters()), wide.resolve())
    found = inherit(whole.config, config.model, "even")
    assert found.keys() == {name for name in held if not name.startswith(("teacher.", "match."))}
    for name, part in found.items():
        assert torch.equal(held[name], part.of(whole.get_parameter(part.source))), name
    assembly.grid.close()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_teacher_takes_its_share_of_the_memory_and_no_more(teacher: Path) -> None:
    """Shards of weights in its own format: no masters, gradients, moments; and the plan is that of the pass."""
    shape = GridShape(data=2, tensor=2)
    parallel = ParallelConfig(tensor_parallel_size=2, zero_stage=3, bucket_mib=1e-3)
    config = taught(teacher, 4, {"teacher_dtype": "bf16"}, parallel=parallel, width=24)
    alone = replace(config, objective="supervised", distillation=DistillationConfig())
    with_it, without = (planned(c, shape, 0, 1e9, on_cpu=True) for c in (config, alone))
    held = {what: size - without.store.memory()[what] for what, size in with_it.store.memory().items()}
    numbers = sum(layer.parameters for layer in with_it.layers if layer.is_frozen)
    assert held["weights"] == pytest.approx(2 * numbers / 4, rel=0.03)
    assert states(with_it)["teacher"] == pytest.approx(2 * numbers / 4, rel=0.03)
    assert not held["masters"] and not held["gradients"]
    assert with_it.optimizer.state_tensors().keys() == without.optimizer.state_tensors().keys()
    at_1 = replace(config, parallel=replace(parallel, zero_stage=1, bucket_mib=64.0))
    assert len(planned(at_1, shape, 0, 1e9, on_cpu=True).store.units) == 1  # student and teacher, reduced at once
    one = replace(taught(teacher), kernels="native")  # the plan is that of the pass, but for losses and their gradient
    assembly = assemble(one, planned_grid(GridShape(), 0), META, device_memory=0.0)
    counted, _ = bytes_of_a_pass(assembly)
    images = micro_batch(assembly).images
    assert images is not None
    assert 0 <= counted + images.nbytes - plan_memory(one, GridShape(), 0, 0.0).activations <= 64


def test_a_teacher_is_sent_no_gradients(teacher: Path) -> None:
    """Plans: backwards a boundary has what it has without a teacher."""
    config = taught(teacher, 2, parallel=ParallelConfig(pipeline_parallel_size=2))
    alone = replace(config, objective="supervised", distillation=DistillationConfig())
    cluster = read_cluster(str(Path(__file__).parents[3] / "configs" / "clusters" / "h100_64.yaml"))
    shape, found = GridShape(pipeline=2), []
    for of in (config, alone):
        model, schedule = StepModel.of(of, shape, cluster), of.pipeline(shape).schedule(of.num_micro_batches(shape))
        found.append(model._messages(model.placement(schedule)))
    assert found[0].gradient_bytes == found[1].gradient_bytes == found[1].output_bytes
    assert found[0].output_bytes > found[1].output_bytes  # type: ignore[operator]


# -- a run -------------------------------------------------------------------------------------------------------------


def run(folder: Path, **changes: Any) -> int:
    groups = {"checkpoint": CheckpointConfig(save_interval=2), "log": LogConfig(tensorboard=False, interval=1)}
    return pretrain(small(run_dir=str(folder), **groups | changes), World())


def lines(folder: Path, event: str) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        if json.loads(line)["event"] == event:
            yield json.loads(line)


def test_a_student_of_a_run_goes_on_with_the_same_teacher_alone(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"objective": "distillation", "distillation": DistillationConfig(teacher=str(teacher))}
    assert run(tmp_path / "a", train=TrainConfig(steps=2, global_batch_size=8), **keys) == 0
    told = capsys.readouterr().out
    assert "distillation: response" in told and "of that taught by: " in told and "teacher tower: " in told
    (end,) = lines(tmp_path / "a", "eval")
    assert {"loss", "accuracy", "teacher_accuracy"} <= end.keys()
    with Reader(tmp_path / "a" / "checkpoints" / "step-00000002") as reader:
        assert not [name for name in reader.manifest.tensors if "teacher" in name]
    assert VisionTransformer.from_pretrained(tmp_path / "a")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    moved = tmp_path / "elsewhere"
    moved.symlink_to(teacher)
    longer = TrainConfig(steps=4, global_batch_size=8)
    assert run(tmp_path / "a", train=longer, **keys | {"distillation": DistillationConfig(teacher=str(moved))}) == 0
    assert [line["step"] for line in lines(tmp_path / "a", "train")] == [1, 2, 3, 4]
    other = tmp_path / "other"
    VisionTransformer(ModelConfig(**MODEL), seed=3).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"was taught by weights .*give the teacher of then"):
        run(
            tmp_path / "a",
            train=replace(longer, steps=6),
            **keys | {"distillation": DistillationConfig(teacher=str(other))},
        )
    # and the student is a teacher in turn
    assert run(tmp_path / "b", **keys | {"distillation": DistillationConfig(teacher=str(tmp_path / "a"))}) == 0


def test_a_student_goes_on_with_the_step_that_taught_it(tmp_path: Path) -> None:
    """Though its teacher, a run, has gone on; and it is taught by the average, if that is asked for."""
    path, longer = tmp_path / "teacher", TrainConfig(steps=4, global_batch_size=8)
    averaged = {"optimizer": OptimizerConfig(ema_decay=0.9)}
    assert run(path, train=TrainConfig(steps=2, global_batch_size=8), **averaged) == 0
    keys = DistillationConfig(teacher=str(path), teacher_load_weights="average")
    student = {"objective": "distillation", "distillation": keys}
    assert run(tmp_path / "student", train=TrainConfig(steps=1, global_batch_size=8), **student) == 0
    assert run(path, train=longer, **averaged) == 0
    assert run(tmp_path / "student", train=TrainConfig(steps=2, global_batch_size=8), **student) == 0
    taught_by = yaml.safe_load((tmp_path / "student" / "config.yaml").read_text())["distillation"]["teacher"]
    assert Path(taught_by).name == "step-00000002"
    both = replace(keys, teachers=(TeacherConfig(path="x"), TeacherConfig(path="y")))
    with pytest.raises(ConfigError, match=r"both are set"):
        run(tmp_path / "student", train=longer, **student | {"distillation": both})
    with pytest.raises(ConfigError, match=r"give the teacher of then, of a run the folder of that step"):
        run(
            tmp_path / "student",
            train=longer,
            **student | {"distillation": replace(keys, teacher_load_weights="weights")},
        )
    with Reader(path / "checkpoints" / "step-00000002") as reader:
        average = reader.whole("average/blocks.0.norm1.weight")
    assembly = assemble(
        taught(path / "checkpoints" / "step-00000002", keys={"teacher_load_weights": "average"}),
        make_grid(GridShape(), World()),
        CPU,
    )
    load_teachers(assembly)
    assert torch.equal(assembly.parameters()["teacher.blocks.0.norm1.weight"], average)
    assembly.grid.close()


def test_classes_go_by_their_names(tmp_path: Path) -> None:
    """A teacher whose run has others, or others in another order."""
    model, names = VisionTransformer(ModelConfig(**MODEL), seed=3), [f"class {n}" for n in range(10)]
    path = tmp_path / "teacher" / "checkpoints" / "step-00000000"
    path.parent.mkdir(parents=True)
    model.save_pretrained(path)
    (tmp_path / "teacher" / "classes.json").write_text(json.dumps(names))
    config, backwards = taught(path, keys={"start_from": "first"}), names[:3:-1]
    assembly = assemble(config, make_grid(GridShape(), World()), CPU)
    load_teachers(assembly, backwards)
    start_from(assembly, classes=backwards)
    order = [9, 8, 7, 6, 5, 4, 0, 1, 2, 3]  # what the data has no names for comes last
    for name in ("head.fc.weight", "head.fc.bias", "blocks.3.norm1.weight"):
        given, held = model.get_parameter(name), assembly.parameters()
        given = given[order] if "fc" in name else given
        assert torch.equal(held[name], given) and torch.equal(held[f"teacher.{name}"], given), name
    assembly.grid.close()
    with pytest.raises(
        ConfigError, match=r"class 0 of the data is class 1, which is class 1 of .* no class dog, so tha"
    ):
        class_orders(config, ["class 1", "dog"])
    assert "calls class 1 class 1, the data dog: taken" in class_orders(config, ["class 0", "dog"])["teacher"].note
    for theirs, said in ((("a", "b", "a"), "calls class 1 b"), (("a",), "has no name for class 1")):
        assert f"x {said}, the data c: taken to be the same" in class_order("x", theirs, ("a", "c"), 3).note
    assert class_orders(config, names[:4])["teacher"] == class_orders(config, None)["teacher"] == ClassOrder()
    by_order = {tuple(given): fingerprints(config, given) for given in (names, names[:4], backwards, names[::-1])}
    assert by_order[tuple(names)] == by_order[tuple(names[:4])] == fingerprints(config, None)
    assert len(set(by_order.values())) == 3  # another order of classes is another teacher to a run that goes on


def test_targets_add_up_to_the_loss_in_every_format(tmp_path: Path, teacher: Path) -> None:
    """Scaled or not; of a teacher in a format of its own."""
    keys = DistillationConfig(
        teacher=str(teacher), features_weight=2.0, features="smooth_l1", teacher_dtype="bf16", relations_weight=5.0,
        relations=("gram", "queries", "keys:3", "values", "maps", "distances", "angles:2"), embeddings_weight=0.5,
        standardise=("features", "embeddings", "logits"), lift="keep",
    )  # fmt: skip
    losses, norms = {}, {}
    for dtype in ("fp32", "bf16", "fp16", "fp8"):
        scale = {"initial_loss_scale": 2.0**10} if dtype == "fp16" else {}
        precision = PrecisionConfig(dtype=dtype, **scale)  # type: ignore[arg-type]
        groups = {"precision": precision, "log": LogConfig(tensorboard=False, interval=2)}
        for stop in (1, None):  # it goes on within an interval
            train = TrainConfig(steps=2, global_batch_size=8, stop_step=stop)
            run(tmp_path / dtype, objective="distillation", distillation=keys, train=train, **groups)
        (line,) = lines(tmp_path / dtype, "train")
        targets = [line[f"loss_{name}"] for name in keys.weights]
        assert len(targets) == 11
        assert sum(targets) == pytest.approx(line["loss"], rel=1e-6) and min(targets) > 0
        losses[dtype], norms[dtype] = targets, line["grad_norm"]
    for dtype in ("bf16", "fp16", "fp8"):
        assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.05)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)  # of a loss that arises scaled
    student = VisionTransformer.from_pretrained(tmp_path / "fp32")  # without what it learnt through, but for the last
    assert [(stage.width, stage.depth) for stage in student.sizes.stages] == [(16, 4), (48, 0)]


def test_a_teacher_of_other_classes_or_none_teaches_what_needs_none(tmp_path: Path) -> None:
    """An image tower of two, or alone, whose projection has as many features as there are classes; a classifier. The
    student starts from their weights, but for those."""
    image = ModelConfig(**MODEL | {"width": 24, "depth": 5, "num_classes": None})
    text = TextConfig(width=16, depth=1, num_heads=2, context_length=8)
    ImageText(image, text, embedding=10).save_pretrained(tmp_path / "both")
    tower = VisionTransformer.from_pretrained(tmp_path / "both")
    tower.save_pretrained(tmp_path / "tower")
    seven = VisionTransformer(replace(image, num_classes=7))
    with torch.no_grad():
        for name, parameter in seven.named_parameters():
            if not name.startswith("head.fc."):
                parameter.copy_(tower.get_parameter(name))
    seven.save_pretrained(tmp_path / "seven")
    keys = DistillationConfig(
        response_weight=0.0, features_weight=1.0, embeddings_weight=1.0, relations=("gram", "distances"),
        relations_weight=1.0, start_from="even",
    )  # fmt: skip
    found = []
    for name in ("both", "tower", "seven"):
        own = replace(keys, teacher=str(tmp_path / name))
        run(tmp_path / f"of_{name}", objective="distillation", distillation=own, log=LogConfig(tensorboard=False))
        (line,), (end,) = (list(lines(tmp_path / f"of_{name}", event)) for event in ("train", "eval"))
        assert "accuracy" in end and "teacher_accuracy" not in end
        found.append({key: value for key, value in line.items() if "loss" in key} | {"norm": line["grad_norm"]})
    assert found[0] == found[1] == found[2] and len(found[0]) == 8
    for name, has in (("both", "10 features of an embedding"), ("seven", "7 classes")):
        with pytest.raises(ConfigError, match=rf"{has} and the student 10 classes.*response_weight to 0 and match"):
            taught(tmp_path / name, keys={"features_weight": 1.0})


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({"teacher": None}, {}, r"give either distillation\.teacher, a checkpoint, or distillation\.teachers.*neither"),
        ({"teacher": "/nowhere"}, {}, r"distillation\.teacher: .*/nowhere"),
        ({}, {"num_classes": 7}, r"has 10 classes and the student 7.*set model\.num_classes to 10"),
        ({}, {"in_channels": 3}, r"takes images of 1 channel\(s\) and the student of 3: set model\.in_channels to 1"),
        ({"teacher_mean": (0.1, 0.2)}, {}, r"the mean of the pixels.*give one number, or one for each of 1 channels"),
        ({"teacher_std": (0.0,)}, {}, r"the std of the pixels.*above 0"),
        ({"teacher_image_size": -2}, {}, r"cannot be shown images of -2"),
        ({"response_weight": 0.0, "label_weight": 0.0}, {}, r"all 0: nothing is learnt"),
        ({"response_weight": 0.0}, {}, r"is 1\.0 and all other .* nothing is asked of .*, use objective sup"),
        (
            {"response_weight": 0.0, "start_from": "even", "teacher_dtype": "fp8"}, {},
            r"has dtype fp8, but he is shown no image, as nothing but his weights is asked of him",
        ),
        ({"response_weight": 0.0, "temperature": 3.0}, {}, r"temperature is 3\.0, but .*response_weight is 0"),
        ({"response": "hard", "temperature": 3.0}, {}, r"temperature is 3\.0, but .*response hard looks at"),
        ({"response_weight": 0.0, "response": "sigmoid"}, {}, r"response is sigmoid, but .*response_weight is 0"),
        ({"temperature": 0.0}, {}, r"distillation\.temperature is 0\.0: it must be above 0"),
        ({"label_weight": -1.0}, {}, r"distillation\.label_weight is -1\.0: it must be 0 or more"),
        ({"lift": "keep"}, {}, r"lift is keep, but features_weight, .* of gram are 0, so nothing is compared behind"),
        ({"features_weight": 1.0, "lift": "keep"}, {"width": 48}, r"lift is keep, but .* is 48 wide, as the teacher's"),
        (
            {"features_weight": 1.0, "lift": "keep", "start_from": "even"}, {},
            r"lift is keep and start_from even: a student that starts .*leave start_from out, or leave lift out",
        ),
        (
            {"features_weight": 1.0, "lift": "keep", "pairs": ((0, 1), (2, 3))}, {},
            r"pairs has no pair with the student's last block, 3, so nothing is compared behind",
        ),
        ({"features_weight": 1.0, "pairs": "even:5"}, {}, r"pairs is even:5: give even:1 to even:4, as"),
        ({"features_weight": 1.0, "pairs": ((0, 7),)}, {}, r"has \[0, 7\], but the teacher has no block 7.*0 to 6"),
        ({"features_weight": 1.0, "pairs": ((4, 0),)}, {}, r"has \[4, 0\], but the student has no block 4.*0 to 3"),
        ({"features_weight": 1.0, "pairs": ((1, 3), (2, 2))}, {}, r"\[1, 3\] before \[2, 2\]: pairs must rise in both"),
        ({"pairs": "even:2"}, {}, r"pairs is even:2, but .*features_weight is 0 and so is relations_weight"),
        ({"relations_weight": 1.0, "relations": ("angles",), "pairs": "even:2"}, {}, r"pairs is even:2, but"),
        ({"passes": 2}, {}, r"passes is 2, but distillation\.relations has neither distances nor angles"),
        (
            {"relations_weight": 1.0, "relations": ("distances", "angles")},
            {"train": TrainConfig(steps=1, global_batch_size=2)},
            r"global_batch_size is 2, in which there is no triplet of images .* angles: use 3 or more",
        ),
        ({"standardise": ("labels",)}, {}, r"standardise has labels: give some of features, embeddings, logits"),
        ({"standardise": ("features",)}, {}, r"standardise has features, but distillation\.features_weight is 0"),
        ({"standardise": ("logits",), "response": "sigmoid"}, {}, r"standardise has logits, but .*response is sigmoid"),
        ({"embeddings_weight": 1.0, "pairs": "even:2"}, {}, r"pairs is even:2, but"),
        ({"relations": ("queries",)}, {}, r"relations is \('queries',\), but .*relations_weight is 0"),
        ({"relations_weight": 1.0, "relations": ("gram", "gram:2")}, {}, r"give each kind once"),
        ({"relations_weight": 1.0, "relations": ("heads",)}, {}, r"has 'heads': give some of gram, queries, keys"),
        ({"relations_weight": 1.0, "relations": ("keys:0",)}, {}, r"has 'keys:0': .*a weight above 0 behind it"),
        ({"relations_weight": 1.0, "relation_heads": 2}, {}, r"relation_heads is 2, but .*queries, keys, .* has none"),
        ({"relations_weight": 1.0, "relations": ("keys",), "relation_heads": 0}, {}, r"it must be 1 or more"),
        (
            {"relations_weight": 1.0, "relations": ("keys",), "relation_heads": 5}, {},
            r"16 features of the student's .*cannot be cut into 5 heads: set .* a divisor of 16 and 48, such as 16",
        ),
        (
            {"relations_weight": 1.0, "relations": ("maps",)}, {"num_heads": 2},
            r"pairs \[0, 1\]: the student's block has 2 heads and the teacher's 4, .* or 4 heads",
        ),
        (
            {"relations_weight": 1.0, "relations": ("maps",)}, {"attention": "linear"},
            r"the student's block has linear attention and the teacher's full; maps are compared where each token sees",
        ),
        ({}, {"parallel": ParallelConfig(tensor_parallel_size=8)}, r"of the teacher num_heads 4 cannot be split"),
        ({"start_from": "last"}, {}, r"start_from is last: give first, even, or a list"),
        ({"start_from": (0, 1)}, {}, r"start_from \[0, 1\], from .*: 2 blocks of the teacher are given for the .* 4"),
        (
            {"start_from": "even"},
            {"stages": (StageConfig(depth=4, width=16, num_heads=4),) * 2}
            | dict.fromkeys(("width", "depth", "num_heads", "mlp_dim")),
            r"start_from even, from .*: the student has 2 stages, the teacher 1: give it as many",
        ),
        ({"start_from": "even"}, {"block": "parallel"}, r"model\.block is parallel, .*or leave start_from out"),
        ({"start_from": "even"}, {"checkpoint": CheckpointConfig(load="x")}, r"is even and checkpoint\.load x: a stud"),
        (
            {"label_weight": 0.0}, {"data": DataConfig(labels_per_class=5)},
            r"data\.labels_per_class is 5, but distillation\.label_weight is 0",
        ),
        ({}, {"objective": "supervised"}, r"distillation\.teacher is .*a key of objective distillation"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(teacher: Path, keys: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    world = 8 if "parallel" in changes else 1
    with pytest.raises((ConfigError, ValueError), match=message):
        given = DistillationConfig(**{"teacher": str(teacher)} | keys)
        small(
            **{"objective": "distillation", "distillation": given, "num_heads": world if world > 1 else 4} | changes
        ).resolve(world)


def test_other_weights_than_were_agreed_on_are_refused(tmp_path: Path) -> None:
    """Of a run that goes on, or is thinned out, between a student's start and its first step."""
    path = tmp_path / "weights"
    VisionTransformer(ModelConfig(**MODEL)).save_pretrained(path)
    assembly = assemble(taught(path), make_grid(GridShape(), World()), CPU)
    load_teachers(assembly)
    rmtree(path)
    with pytest.raises(ConfigError, match=r"no longer what it was when this run began .* does not exist"):
        load_teachers(assembly)
    VisionTransformer(ModelConfig(**MODEL), seed=3).save_pretrained(path)
    with pytest.raises(ConfigError, match=r"no longer what it was when this run began"):
        load_teachers(assembly)
    assembly.grid.close()


def test_teachers_may_lie_elsewhere_on_each_host(tmp_path: Path, teacher: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(teacher)
    sets = build_datasets(small().data, image_size=(8, 8), channels=1, num_classes=10, seed=0)

    def facts(path: Path, weight: float) -> list[dict[str, str]]:
        two = TeacherConfig(path=str(path)), TeacherConfig(path=str(teacher), weight=weight)
        configs = taught(path), taught(path, keys={"teacher": None, "teachers": two})
        return [facts_of(config, CPU, *sets) for config in configs]

    assert facts(moved, 3.0) == facts(teacher, 3.0)
    assert facts(moved, 3.0)[1] != facts(teacher, 2.0)[1]


def test_teachers_are_one_or_a_list(teacher: Path) -> None:
    two = (TeacherConfig(path=str(teacher)), TeacherConfig(path=str(teacher), weight=3.0))
    assert taught(teacher, keys={"teacher": None, "teachers": two}).distillation.shares == (0.25, 0.75)
    for keys, message in (
        ({"teachers": two}, r"both are set"),
        ({"teacher": None, "teachers": two, "teacher_dtype": "bf16"}, r"_dtype is bf16.*give each its own dtype"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            taught(teacher, keys=keys)
    with pytest.raises(ValueError, match=r"the weight of x is 0\.0: it must be above 0"):
        DistillationConfig(teachers=(TeacherConfig(path="x", weight=0.0),))


def test_keys_are_read_from_a_file(tmp_path: Path, teacher: Path) -> None:
    """Lists of groups and of pairs; what is written is read as the same."""
    two = [{"path": str(teacher), "weight": 3.0, "mean": [0.5]}, {"path": str(teacher), "image_size": [8, 8]}]
    keys = {"teachers": two, "features_weight": 1.0, "pairs": [[0, 2], [3, 6]]}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"objective": "distillation", "distillation": keys}))
    config, _ = parse([*flags(), "--config", str(file)], "test")
    assert config.distillation.pairs == ((0, 2), (3, 6)) and config.distillation.shares == (0.75, 0.25)
    assert config.distillation.all_teachers[1] == TeacherConfig(path=str(teacher), image_size=(8, 8))
    resolved = config.resolve(1)
    file.write_text(resolved.to_yaml())
    assert parse(["--config", str(file)], "test")[0].distillation == resolved.distillation
    given = [*flags(), "--config", str(file), "--distillation.pairs"]
    assert parse([*given, "[[1, 2], [2, 6]]"], "test")[0].distillation.pairs == ((1, 2), (2, 6))
    kinds = ["--distillation.relations", "keys:2, angles", "--distillation.relations_weight", "3"]
    found = parse([*flags(), "--config", str(file), *kinds], "test")[0].distillation
    assert found.relation_weights == {"keys": 6.0, "angles": 3.0} and found.at_depth == {"keys": 6.0}
    with pytest.raises(ConfigError, match=r"pairs.*\[\[0, 1, 2\]\]"):
        parse([*given, "[[0, 1, 2]]"], "test")[0].resolve(1)


def test_the_benchmark_shows_all_the_same_images(teacher: Path) -> None:
    keys = {"distillation__teacher": str(teacher), "distillation__teacher_image_size": "12"}
    with pytest.raises(ConfigError, match=r"teacher is shown images of \(12, 12\) and the student of \(8, 8\)"):
        benchmark.main([*flags(**keys), "--rounds", "1"], World())
