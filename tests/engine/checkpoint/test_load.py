"""Starting from a checkpoint: the same weights in every layout, resized where they must be, and told truly."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.fit import Geometry, fit, resized
from engine.checkpoint.load import logical_shapes, open_to_load, plan_load
from engine.checkpoint.saver import Saver
from engine.config import Config, OptimizerConfig, PrecisionConfig, TrainConfig
from engine.errors import ConfigError
from engine.objectives import Supervised
from engine.run.load import Source, source_of, start_from
from engine.run.step import Stepper
from model import ModelConfig, StageConfig, VisionTransformer, build_layers
from model.formats.api import open_weights, save_weights
from model.formats.base import Preprocessing
from model.formats.sources import fingerprint, open_source
from model.resize import resize_channels, resize_relative
from parallel.checkpoint.read import Reader
from parallel.config import ParallelConfig
from parallel.process_group import World
from parallel.sharding.boxes import Box
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import small
from tests.engine.test_frozen import frozen

CPU = torch.device("cpu")
PYRAMID: dict[str, Any] = {
    "width": None, "depth": None, "num_heads": None, "patch_size": 2, "pool": "gap",
    "stages": (StageConfig(depth=2, width=16, num_heads=2), StageConfig(depth=2, width=32, num_heads=4)),
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "2d": {"position": "learned_2d", "block": "parallel", "qk_norm": True, "pool": "gap", "patch_size": 2},
    "1d": {"position": "learned_1d", "pool": "cls", "patch_size": 2},
    "map": {"position": "rope_2d", "pool": "map", "registers": 2, "in_channels": 3},
    "pyramid": PYRAMID,
}


@dataclass(frozen=True)
class Case:
    """What is started from which source; which tensors are then of which kind, all others taken."""

    source: str
    changes: dict[str, Any]
    resized: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    which: str = "weights"
    dtype: str = "fp32"
    frozen: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


HEAD = ("head.fc.weight", "head.fc.bias")
ROWS = ("embed.pos_row", "embed.pos_col")
CASES = {
    "all of it": Case("2d", {}, dtype="bf16", frozen=("embed", "blocks.0")),
    "image, patch, classes": Case(
        "2d", {"image_size": (24, 16), "patch_size": 4, "num_classes": 7}, ("embed.weight", *ROWS), HEAD,
        frozen=("embed",),
    ),
    "average, image": Case("2d", {"image_size": 12}, ROWS, which="average"),
    "average of a model whose embedding is frozen here, fp16": Case(
        "2d", {"patch_size": 1}, ("embed.weight", *ROWS), which="average", dtype="fp16", frozen=("embed",)
    ),
    "class token kept": Case("1d", {"image_size": (8, 12)}, ("embed.pos",)),
    "class token gone": Case("1d", {"pool": "gap"}, ("embed.pos",), left=("embed.cls",)),
    "a distillation token": Case(
        "1d", {"image_size": (8, 12), "class_tokens": 2}, ("embed.cls", "embed.pos"), new=("head.fc_distill.",)
    ),
    "class token without a position": Case("1d", {"class_position": False}, ("embed.pos",)),
    "as many positions, another grid": Case("1d", {"image_size": (4, 16)}, ("embed.pos",)),
    "other positions": Case("1d", {"position": "rope_2d"}, left=("embed.pos",)),
    "registers, channels, pooling": Case(
        "map", {"registers": 3, "in_channels": 1, "pool": "gap"}, ("embed.weight",), ("embed.registers",),
        left=("head.pool.",),
    ),
    "deeper": Case("1d", {"depth": 5}, new=("blocks.4.",), frozen=("blocks.4",)),
    "shallower": Case("1d", {"depth": 3}, left=("blocks.3.",)),
    "deeper first stage": Case(
        "pyramid",
        {"stages": (StageConfig(depth=3, width=16, num_heads=2), StageConfig(depth=2, width=32, num_heads=4))},
        new=("blocks.2.",), renamed={"blocks.3.": "blocks.2.", "blocks.4.": "blocks.3."},
    ),
    "wider second stage": Case(
        "pyramid",
        {"stages": (StageConfig(depth=2, width=16, num_heads=2), StageConfig(depth=2, width=48, num_heads=4))},
        new=("merges.0.proj.", "blocks.2.", "blocks.3.", "head.norm.", "head.fc.weight"),
    ),
}  # fmt: skip
P2, T2, C2 = {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}, {"context_parallel_size": 2}
LAYOUTS: tuple[dict[str, Any], ...] = (
    T2 | P2, {"zero_stage": 3, "bucket_mib": 0.001}, T2 | {"zero_stage": 1}, C2 | {"zero_stage": 2},
)  # fmt: skip


def configured(case: Case, folder: Path, layout: dict[str, Any], world: World) -> Config:
    return small(
        **SOURCES["1d" if case.source == "hf" else case.source] | case.changes,
        train=TrainConfig(steps=2, global_batch_size=8, micro_batch_size=2, seed=1),
        parallel=ParallelConfig(**layout),
        optimizer=OptimizerConfig(ema_decay=0.5),
        precision=PrecisionConfig(dtype=case.dtype),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(load=str(folder / case.source), load_weights=case.which),  # type: ignore[arg-type]
    ).resolve(world.size)


def assembled(config: Config, world: World, names: Sequence[str]) -> Assembly:
    objective = Supervised.of(config)
    layers = [replace(s, factory=frozen(s.factory)) if s.name in names else s for s in objective.layers]
    return assemble(config, grid_of(config, world, CPU), CPU, replace(objective, layers=tuple(layers)))


def train_and_save(world: World, folder: Path, name: str, layout: dict[str, Any]) -> None:
    config = replace(configured(Case(name, {}), folder, layout, world), checkpoint=CheckpointConfig())
    config = replace(config, train=replace(config.train, seed=0))
    stepper = Stepper(assembled(config, world, ("embed",) if name == "2d" else ()))
    for step in range(2):
        stepper.train_step(batches_of(stepper, step), 1e-2)
    facts = {"config": {"model": asdict(config.model)}, "about": {}}
    Saver(stepper.assembly, folder / name, CheckpointConfig(), facts).save(2, {}, {})


def train_sources(world: World, folder: Path) -> None:
    for name, layout in zip(SOURCES, LAYOUTS, strict=True):
        train_and_save(world, folder, name, layout)


def as_hf_vit(folder: Path) -> None:
    """The weights of `1d` as transformers has them, with a layer that our model has not."""
    with open_weights(folder / "1d") as weights:
        weights.description = replace(
            weights.description, preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)), labels=tuple("abcdefghij")
        )
        save_weights(weights, folder / "hf", "hf_vit")
    tensors = load_file(folder / "hf/model.safetensors")
    tensors |= {f"vit.pooler.dense.{k}": torch.ones(16, *more) for k, more in (("weight", (16,)), ("bias", ()))}
    save_file(tensors | {"logit_scale": torch.ones(())}, folder / "hf/model.safetensors", {"format": "pt"})


def loaded(world: World, case: Case, folder: Path, layout: dict[str, Any]) -> tuple[Assembly, Source, list[str]]:
    config = configured(case, folder, layout, world)
    a = assembled(config, world, case.frozen)
    source = source_of(config, a.objective)
    assert source is not None
    return a, source, start_from(a, source)


def on_ranks(world: World, folder: Path, expected: dict[str, tuple[dict[str, Tensor], list[str]]]) -> None:
    """The first case in all layouts, others in one: masters, what the model computes with, the average, the report."""
    for number, (name, case) in enumerate(CASES.items()):
        for layout in (LAYOUTS[number % 4],) if number else LAYOUTS:
            a, _, lines = loaded(world, case, folder, layout)
            masters, told = expected[name]
            warning = [line for line in lines if "warning" in line]
            assert [line for line in lines if line not in warning] == told
            assert bool(warning) == any(matches(f"{layer}.weight", case.new) for layer in case.frozen)
            if case.source == "1d":
                of_hf, _, lines = loaded(world, replace(case, source="hf"), folder, layout)
                for ours, theirs in zip(a.store.buckets, of_hf.store.buckets, strict=True):
                    assert torch.equal(ours.master, theirs.master) and torch.equal(ours.weights, theirs.weights)
                of_hf.grid.close()
                assert [told[1], lines[0]] == [lines[1], f"weights from {folder / 'hf'} (hf_vit)"]
            assert a.average is not None and a.average.updates == 0
            for average, master in zip(a.average.averages, a.average._masters, strict=True):
                assert torch.equal(average, master)
            for bucket in a.store.buckets:
                weights = bucket.weights
                if bucket.is_gathered:
                    weights = bucket.gather_start(weights.new_empty(bucket.numel), weights).wait()
                for slot in bucket.slots:
                    local = slot.member.info.layout.local(masters[slot.name])
                    assert torch.equal(slot.view(weights), local.to(bucket.kind.dtype)), (name, slot.name)
            for slot_name, value in a.store.local_values().items():
                layout_of = next(s.member.info.layout for s in a.store.slots if s.name == slot_name)
                assert torch.equal(value.float(), layout_of.local(masters[slot_name]).to(value.dtype).float())
            a.grid.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    run_ranks(4, train_sources, path, timeout=120)
    as_hf_vit(path)
    return path


class Alone(NamedTuple):
    """What one process, in fp32 and with nothing frozen, loads, plans and tells; and the weights without."""

    masters: dict[str, Tensor]
    source: Source
    lines: list[str]
    initial: dict[str, Tensor]


def one_process(case: Case, folder: Path) -> Alone:
    case = replace(case, dtype="fp32", frozen=())
    a, source, lines = loaded(World(), case, folder, {})
    initial = assembled(configured(case, folder, {}, World()), World(), ()).store.local_values()
    return Alone(a.store.local_values(), source, lines, initial)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Alone]:
    return {name: one_process(case, folder) for name, case in CASES.items()}


def matches(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or (p.endswith(".") and name.startswith(p)) for p in prefixes)


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_each_tensor(name: str, folder: Path, alone: dict[str, Alone]) -> None:
    case = CASES[name]
    masters, source, _, initial = alone[name]
    with Reader(folder / case.source / "step-00000002") as reader:
        tensors = reader.manifest.tensors
        stored = {n.removeprefix("weights/"): reader.whole(n) for n in tensors if n.startswith("weights/")}
        if case.which == "average":
            stored |= {n.removeprefix("average/"): reader.whole(n) for n in tensors if n.startswith("average/")}
    kinds = {f.name: f for f in source.plan.fits}
    for key, value in masters.items():
        f = kinds[key]
        assert f.here == value.shape
        if matches(key, case.new):
            assert f.how == "new" and torch.equal(value, initial[key])
            continue
        origin = next((new + key.removeprefix(old) for old, new in case.renamed.items() if key.startswith(old)), key)
        assert f.stored == stored[origin].shape and f.source == origin
        assert f.how == ("resized" if key in case.resized else "taken"), key
        assert f.how == "resized" or torch.equal(value, stored[origin])
    left = {f.name for f in source.plan.fits if f.how == "left out"}
    assert all(matches(key, case.left) for key in left) and bool(left) == bool(case.left)
    assert left == {key for key in stored if key not in {f.source for f in kinds.values() if f.how != "left out"}}


def test_every_layout_loads_the_same(folder: Path, alone: dict[str, Alone]) -> None:
    expected = {name: (found.masters, found.lines) for name, found in alone.items()}
    run_ranks(4, on_ranks, folder, expected, timeout=120)


@pytest.mark.parametrize("name", ["image, patch, classes", "average, image", "class token kept"])
def test_resized_as_the_model_itself_does(name: str, folder: Path, alone: dict[str, Alone]) -> None:
    case = CASES[name]
    masters = alone[name].masters
    there = configured(case, folder, {}, World()).model
    with open_weights(folder / case.source, which=case.which) as opened:  # type: ignore[arg-type]
        trained, weights = opened.description.model, {name: opened.read(name) for name in opened.tensors}
    oracle = VisionTransformer(replace(there, num_classes=trained.num_classes))
    oracle.load(weights, trained)
    for key, value in oracle.named_parameters():
        if key not in case.new:
            torch.testing.assert_close(masters[key], value.detach(), rtol=0, atol=1e-7)


def test_enlarged_patches_give_the_same_outputs(folder: Path) -> None:
    """Images four times as large: the same tokens where each patch is enlarged, so the same logits."""
    case = Case("1d", {"image_size": 16, "patch_size": 4})
    masters, source, _, _ = one_process(case, folder)
    assert {f.name for f in source.plan.fits if f.how != "taken"} == {"embed.weight"}
    small_model, large = (VisionTransformer(configured(c, folder, {}, World()).model) for c in (Case("1d", {}), case))
    large.load(masters)
    small_model.load(one_process(Case("1d", {}), folder)[0])
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tiles = images.view(3, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 1, 2, 2)
    tiles = torch.nn.functional.interpolate(tiles, scale_factor=2, mode="bilinear").view(3, 4, 4, 4, 4)
    enlarged = tiles.transpose(2, 3).reshape(3, 1, 16, 16)
    torch.testing.assert_close(large.logits(enlarged), small_model.logits(images), rtol=1e-4, atol=1e-4)


def test_class_token_that_was_not_there(folder: Path, tmp_path: Path) -> None:
    """Only its row of the positions is new."""
    train_and_save(World(), tmp_path, "1d", {})
    gap = Case("1d", {"pool": "gap"})
    config = replace(configured(gap, folder, {}, World()), checkpoint=CheckpointConfig())
    a = assembled(config, World(), ())
    facts = {"config": {"model": asdict(config.model)}, "about": {}}
    Saver(a, tmp_path / "gap/1d", CheckpointConfig(), facts).save(2, {}, {})
    masters, source, _, initial = one_process(Case("1d", {}), tmp_path / "gap")
    assert torch.equal(masters["embed.pos"][:1], initial["embed.pos"][:1])
    assert torch.equal(masters["embed.pos"][1:], a.store.local_values()["embed.pos"])
    assert [f.name for f in source.plan.fits if f.how == "new"] == ["embed.cls"]


@pytest.mark.parametrize(("before", "now"), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)])
def test_class_tokens_come_first(before: int, now: int) -> None:
    """Those that both models have are taken, with their rows of the positions; those of the patches follow."""
    model = small(position="learned_1d", pool="cls").resolve(1).model
    one = Geometry.of(asdict(model))
    source, target = (replace(one, class_tokens=n, class_rows=n) for n in (before, now))
    patches = one.grid[0] * one.grid[1]
    for name, rest in (("embed.cls", 0), ("embed.pos", patches)):
        if not rest and not (before and now):
            continue  # there is none on one side
        stored = torch.randn(before + rest, 4)
        whole = torch.full((now + rest, 4), torch.nan)
        for box, values in resized(name, stored, source, target):
            whole[box.offset[0] : box.offset[0] + box.shape[0]] = values
        both = min(before, now)
        assert torch.equal(whole[:both], stored[:both]) and whole[both:now].isnan().all()
        assert torch.equal(whole[now:], stored[before:])


def test_relative_positions_of_windows_of_another_size() -> None:
    """Blocks of stages that are deeper or shallower now; a map of 4 x 4 holds no window of 5."""
    stages = (StageConfig(depth=2, width=8, num_heads=2), StageConfig(depth=1, width=8, num_heads=2))
    there = ModelConfig(
        stages=stages, image_size=16, patch_size=2, in_channels=1, num_classes=2, attention="window", window_size=5,
        relative_position=True, position="none", pool="gap",
    )  # fmt: skip
    here = replace(there, stages=(replace(stages[0], depth=1), replace(stages[1], depth=2)), window_size=3)
    wider = replace(there, image_size=32, window_size=4, stages=(stages[0], replace(stages[1], num_heads=4)))

    def fits(target: ModelConfig) -> tuple[dict[str, tuple[str, str | None]], Geometry, Geometry]:
        shapes = [logical_shapes(c.resolve(), build_layers(c.resolve())) for c in (target, there)]
        source, own = (Geometry.of(asdict(c.resolve())) for c in (there, target))
        found = fit(shapes[0], shapes[1], source, own)
        return {f.name: (f.how, f.source) for f in found if "relative" in f.name and f.here}, source, own

    table = "blocks.{}.attn.core.mixer.relative_position".format
    found, source, target = fits(here)
    assert found == {
        table(0): ("resized", table(0)), table(1): ("resized", table(2)), table(2): ("new", None),
    }  # fmt: skip
    assert fits(there)[0] == {table(i): ("taken", table(i)) for i in range(3)}
    assert fits(wider)[0] == {table(i): (how, table(i)) for i, how in enumerate(("resized", "resized", "new"))}
    values = torch.randn(2, 49)
    ((box, values_here),) = resized(table(1), values, source, target)
    assert box == Box((0, 0), (2, 25))
    torch.testing.assert_close(values_here, resize_relative(values, (4, 4), (3, 3)))


@pytest.mark.parametrize(("source", "target"), [(3, 1), (1, 3), (1, 4), (3, 6)])
def test_channels_of_grey_images(source: int, target: int) -> None:
    weight, grey = torch.randn(5, source * 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    got = resize_channels(weight, source, target)
    torch.testing.assert_close(grey.repeat(1, target) @ got.T, grey.repeat(1, source) @ weight.T)


def test_the_report_names_everything_in_few_lines(alone: dict[str, Alone]) -> None:
    lines = alone["image, patch, classes"].lines
    assert any("embed.weight [16, 4] -> [16, 16]" in line for line in lines)
    assert any("head.fc.weight [7, 16] (there [10, 16])" in line for line in lines)
    assert any("model.num_classes 10 -> 7" in line for line in lines)
    assert all(len(found.lines) <= 8 for found in alone.values())
    assert alone["deeper first stage"].lines[-1].strip() == "other than there: model.stages[0].depth 2 -> 3"
    assert any("blocks.0 to blocks.3" in line for line in alone["deeper"].lines)


def test_the_report_of_another_librarys_weights(folder: Path, alone: dict[str, Alone]) -> None:
    found = one_process(Case("hf", {"num_heads": 2, "pool": "gap"}), folder)
    assert found.lines[0] == f"weights from {folder / 'hf'} (hf_vit)"
    assert any("of no use here: 3 tensor(s): logit_scale, vit.pooler.dense (2 tensors)" in line for line in found.lines)
    last = found.lines[-1]
    assert "model.num_heads 4 -> 2" in last and "model.pool cls -> gap" in last
    assert "data.std [0.25] -> [0.5]" in last and "data.mean" not in last
    for name, value in alone["class token gone"].masters.items():
        if name != "embed.pos":
            assert torch.equal(found.masters[name], value), name


def test_sizes_of_images_that_a_file_does_not_say(tmp_path: Path) -> None:
    """Where it is not the run's, it is a square."""
    wide = {"position": "learned_1d", "pool": "gap", "gelu": "tanh", "image_size": (4, 16), "patch_size": 2}
    model = VisionTransformer(small(**wide).resolve(1).model, seed=5)
    model.save_pretrained(tmp_path / "a.npz", "big_vision")
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "b.npz", **arrays)  # without what the other has of it in its comment
    found = []
    for image_size in ((4, 16), (16, 4), 8, 32):
        config = small(**wide | {"image_size": image_size}).resolve(1)
        weights = open_to_load(CheckpointConfig(load=str(tmp_path / "b.npz")), config.model)
        found.append(weights.description.model.image)
        plan = plan_load(weights, config.model, Supervised.of(config).layers, config.data)
        assert plan.of("resized").keys() == ({"embed.pos"} if image_size == 32 else set())
    assert found == [(4, 16), (16, 4), (8, 8), (8, 8)]


def test_a_timm_file_alone(folder: Path, tmp_path: Path, alone: dict[str, Alone]) -> None:
    """Without its config.json: heads, pooling and the like are the run's."""
    with open_weights(folder / "1d") as weights:
        save_weights(weights, tmp_path / "timm", "timm")
    config = small(**SOURCES["1d"]).resolve(1)
    file = (tmp_path / "timm/model.safetensors").rename(tmp_path / "model.safetensors")
    weights = open_to_load(CheckpointConfig(load=str(file)), config.model)
    assert weights.kind == "timm" and plan_load(weights, config.model, Supervised.of(config).layers, config.data).fits
    for name, value in alone["shallower"].masters.items():
        assert torch.equal(weights.read(name), value), name


def test_files_of_one_length_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """Ranks compare what they have found without reading all of it."""
    shutil.copytree(folder / "hf", tmp_path / "a")
    assert fingerprint(open_source(tmp_path / "a")) == fingerprint(open_source(folder / "hf"))
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})
    assert (tmp_path / "a/model.safetensors").stat().st_size == (folder / "hf/model.safetensors").stat().st_size
    assert fingerprint(open_source(tmp_path / "a")) != fingerprint(open_source(folder / "hf"))


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(folder: Path, changes: dict[str, Any], path: Path, which: str = "weights") -> str:
    config = configured(Case("1d", changes, which=which), folder, {}, World())
    config = replace(config, checkpoint=replace(config.checkpoint, load=str(path)))
    with pytest.raises(ConfigError) as error:
        source_of(config, Supervised.of(config))
    return str(error.value)


def damaged_copy(folder: Path, to: Path, old: bytes = b"{", new: bytes = b"{") -> Path:
    """Of the checkpoint `1d`, `old` replaced where it comes first in the manifest."""
    shutil.copytree(folder / "1d/step-00000002", to)
    manifest = to / "manifest.json"
    before, found, after = manifest.read_bytes().partition(old)
    assert found
    manifest.write_bytes(before + new + after)
    return to


def test_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(folder, {}, tmp_path / "none")
    assert "is no checkpoint" in refused(folder, {}, tmp_path)


def test_manifests_that_are_of_no_use(folder: Path, tmp_path: Path) -> None:
    at = damaged_copy(folder, tmp_path / "a", b'"F32"', b'"F23"')
    assert "its checksum is wrong" in refused(folder, {}, at)
    at = damaged_copy(folder, tmp_path / "b", b'"format_version": 1', b'"format_version": 2')
    assert "format version 2" in refused(folder, {}, at)


def test_no_average(folder: Path, tmp_path: Path) -> None:
    config = configured(Case("1d", {}), folder, {}, World())
    config = replace(config, optimizer=OptimizerConfig().resolve(), checkpoint=CheckpointConfig())
    facts = {"config": {"model": asdict(config.model)}, "about": {}}
    Saver(assembled(config, World(), ()), tmp_path, CheckpointConfig(), facts).save(1, {}, {})
    assert "no moving average" in refused(folder, {}, tmp_path, "average")


def test_another_librarys_that_is_of_no_use(folder: Path, tmp_path: Path) -> None:
    assert "only such a one has a moving average" in refused(folder, {}, folder / "hf", "average")
    assert "another model" in refused(folder, {"width": 24}, folder / "hf")
    shutil.copytree(folder / "hf", tmp_path / "torn")
    with (tmp_path / "torn/model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    assert "no whole safetensors file" in refused(folder, {}, tmp_path / "torn")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "is of none of the kinds" in refused(folder, {}, tmp_path / "other.safetensors")


def test_another_model(folder: Path) -> None:
    text = refused(folder, {"width": 24, "depth": 12}, folder / "1d")
    lines = text.splitlines()
    assert "another model" in lines[0] and lines[-1].endswith("more") and len(lines) == 12
    assert "model.width 16 -> 24" in lines[0]
    assert lines[1].strip() == "embed.weight: [16, 4] in the checkpoint, [24, 4] here"


def with_damage(world: World, folder: Path, path: Path) -> str:
    config = configured(Case("1d", {}), folder, P2 | T2, world)
    config = replace(config, checkpoint=replace(config.checkpoint, load=str(path)))
    a = assembled(config, world, ())
    source = source_of(config, a.objective)
    assert source is not None
    try:
        start_from(a, source)
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_damage_is_told_by_all(folder: Path, tmp_path: Path) -> None:
    """Of a tensor that two of the ranks read."""
    with Reader(folder / "1d/step-00000002") as reader:
        piece = reader.manifest.tensors["weights/head.fc.bias"].pieces[0]
        name = reader.manifest.files[piece.file].name
    at = damaged_copy(folder, tmp_path / "c")
    data = bytearray((at / name).read_bytes())
    data[piece.start] ^= 1
    (at / name).write_bytes(data)
    found = run_ranks(4, with_damage, folder, at)
    assert len(set(found)) == 1 and "head.fc.bias" in found[0] and "checkpoint.load" in found[0]
