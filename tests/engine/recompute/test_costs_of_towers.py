"""Costs of two towers' layers add up to what whole stages hold, wherever the image's embedding rides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pytest
import torch

from engine import layer_costs, objectives
from engine.assemble import assemble
from engine.config import Config, PrecisionConfig, RecomputeConfig, TrainConfig
from engine.layer_costs import micro_batch
from engine.objectives.base import Evaluation, JointLoss, JointObjective
from engine.plan import META, plan_memory
from model import LayerSpec, ModelConfig, Pixels, TextConfig, TowersTeacher, build_taught_towers, build_towers
from parallel.config import ParallelConfig
from parallel.grid import Grid, planned_grid
from tests.engine.recompute.meta_pass import bytes_of_a_pass

IMAGE = ModelConfig(
    width=16, depth=3, num_heads=4, image_size=8, patch_size=2, in_channels=1, drop_path=0.2, num_classes=8
)
TEXT = TextConfig(
    width=24, depth=3, num_heads=4, context_length=7, vocabulary_size=50, end_token=9, drop_path=0.2
).resolve()
TEACHER = TowersTeacher(
    image=replace(IMAGE, width=40, depth=2, image_size=10).resolve(), text=replace(TEXT, width=32, depth=2),
    embedding=48, projection="linear", projection_bias=False, max_logit_scale=100.0, dtype=torch.bfloat16, fp8=True,
    pixels=Pixels(scale=(1.0,), shift=(0.0,), size=(10, 10)),
)  # fmt: skip
MICRO_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class _Towers(JointObjective):
    """Layers without a loss: 11, the image's head in place 4, the pair in place 10; with a teacher his 9 before them,
    and behind each head one that matches its embedding with his."""

    layers: tuple[LayerSpec, ...]
    passes: int = 1
    taught: ClassVar[bool] = False

    @classmethod
    def of(cls, config: Config) -> Self:
        layers = build_towers(config.model, TEXT, embedding=64, bias=-10.0)
        if cls.taught:
            layers = build_taught_towers(layers, config.model, TEXT, TEACHER, embeddings=2.0)
        return cls(layers=tuple(layers))

    def reads_images(self, layers: range) -> bool:
        return any("images" in self.layers[place].reads for place in layers)

    def reads_texts(self, layers: range) -> bool:
        return any("texts" in self.layers[place].reads for place in layers)

    def joint_loss(self, outputs: Any, batches: Any, grid: Grid) -> JointLoss:
        raise NotImplementedError

    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _objective(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(objectives.OBJECTIVES, "supervised", _Towers)
    layer_costs._costs_of.cache_clear()
    yield
    layer_costs._costs_of.cache_clear()


CASES: list[dict[str, Any]] = [
    {"precision": "bf16"},
    *({"pipeline": 2, "cut": cut} for cut in ((5, 6), (4, 7))),  # behind the image's head, before it
    *({"pipeline": 2, "cut": cut, "precision": "bf16", "sets": "qk_norm"} for cut in ((6, 5), (10, 1))),
    {"pipeline": 4, "cut": (3, 3, 3, 2), "schedule": "zb_h1", "sets": "input"},  # a stage that hands it on
    {"pipeline": 2, "cut": (2, 5, 2, 2), "schedule": "zb_v", "sets": "input"},  # two such stages on a rank
    {"pipeline": 2, "schedule": "interleaved", "precision": "bf16"},
    {"pipeline": 3, "cut": (4, 4, 3), "freeze": ("image",), "precision": "bf16", "sets": "norm"},
    {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "sets": "qk_norm+gather", "precision": "bf16"},
    {"pipeline": 2, "context": 2},
    {"data": 2, "zero": 3, "sets": "input"},
    {"pipeline": 2, "taught": True, "precision": "bf16", "cut": (7, 15)},
    {"data": 2, "zero": 3, "taught": True, "sets": "input"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_costs_of_layers_add_up_to_a_pass_of_the_rank(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the losses are, as in test_costs."""
    monkeypatch.setattr(_Towers, "taught", case.get("taught", False))
    sizes = {axis: case.get(axis, 1) for axis in ("pipeline", "data", "context", "tensor")}
    parallel = ParallelConfig(
        **{f"{axis}_parallel_size": size for axis, size in sizes.items() if axis != "data"},
        sequence_parallel=case.get("sequence_parallel", False),
        schedule=case.get("schedule", "1f1b"),
        zero_stage=case.get("zero", 0),
    )
    config = Config(
        model=IMAGE,
        parallel=parallel,
        train=TrainConfig(
            steps=1, global_batch_size=4 * MICRO_BATCHES * sizes["data"], micro_batch_size=4,
            freeze=case.get("freeze", ()),
        ),
        precision=PrecisionConfig(dtype=case.get("precision", "fp32")),
        kernels="native",
    )  # fmt: skip
    shape = config.grid_shape(ranks := sizes["pipeline"] * sizes["data"] * sizes["context"] * sizes["tensor"])
    config = replace(
        config.resolve(ranks),
        parallel=replace(parallel, layers_per_stage=case.get("cut")),
        recompute=RecomputeConfig(policy=case.get("sets", "all")),
    )
    for rank in range(ranks):
        assembly = assemble(config, planned_grid(shape, rank), META, device_memory=0.0)
        kept = sum(products.weight_bytes for products in assembly.row_products)  # which are states
        counted, left = (count - kept for count in bytes_of_a_pass(assembly))
        planned = plan_memory(config, shape, rank, 0.0).activations
        batch = assembly.to_device(micro_batch(assembly), training=True)
        planned -= sum(x.nbytes for x in (batch.images, batch.texts) if x is not None)
        losses = 4 * MICRO_BATCHES * assembly.holds_loss
        assert 0 <= counted - planned <= losses + 8, (rank, counted, planned)
        assert left == losses
