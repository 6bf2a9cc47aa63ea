"""The memory that is planned on the meta device against what a step on this machine makes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import assemble as assembly
from engine.assemble import assemble, grid_of, sharding_policy
from engine.config import Config, OptimizerConfig, PrecisionConfig, TrainConfig
from engine.plan import LiveBytes, plan_memory, states
from engine.recompute.config import RecomputeConfig
from engine.run.step import Stepper
from model.kernels import reference
from parallel.config import ParallelConfig
from parallel.process_group import World
from parallel.tensor import products
from tests.distributed import run_ranks
from tests.engine.precision.test_scaled import batches_of
from tests.engine.small import flags, small
from tests.model.kernels.kernel_cases import needs_cpu_module
from tests.parity.covering import covering
from tools import plan

CPU = torch.device("cpu")
MEMORY = 1e12

# wide enough for activations to outweigh what is made besides: losses, norms, counts
MODELS: dict[str, dict[str, Any]] = {
    "sequential": {"block": "sequential"},
    "parallel block, class token": {"block": "parallel", "pool": "cls"},
    "shifted windows, masked": {"attention": "shifted_window", "window_size": 4},
    "global tokens": {"attention": "global_tokens", "window_size": 4, "global_tokens": 2},
    "linear": {"attention": "linear"},
    "two class tokens, outer norms, quick": {
        "block": "sequential",
        "pool": "cls",
        "class_tokens": 2,
        "pre_norm": True,
        "norm_after_pool": True,
        "gelu": "quick",
        "patch_bias": False,
    },
    "gated": {"mlp": "swiglu", "norm": "rmsnorm", "block": "sequential"},
}


def config_of(
    model: dict[str, Any], dtype: Any = "fp32", world: int = 1, *, train: TrainConfig | None = None, **parallel: Any
) -> Config:
    sizes = {"width": 128, "depth": 3, "num_heads": 4, "image_size": 24, "patch_size": 2}
    return small(
        **sizes | model,
        train=train or TrainConfig(steps=1, global_batch_size=8),
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(ema_decay=0.9),
        parallel=ParallelConfig(**parallel),
    ).resolve(world)


def made_by_a_step(config: Config, world: World) -> tuple[dict[str, int], int]:
    """Bytes that live for the whole run, and the most that a step holds beside them, its images included."""
    stepper = Stepper(assemble(config, grid_of(config, world, CPU), CPU, device_memory=MEMORY))
    batches = batches_of(stepper, 0)
    held = states(stepper.assembly)
    with LiveBytes() as counter:
        stepper.train_step(batches, 1e-3)
    images = batches[0].images
    return held, counter.peak + (0 if images is None else images.nbytes)


@pytest.fixture
def without_detours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs, which plans are for, nothing goes through fp32."""
    monkeypatch.setattr(reference, "_sums_in_its_own_type", lambda x: False)
    monkeypatch.setattr(products, "_cpu_flags", lambda: frozenset({"avx512_bf16", "amx_bf16"}))


WAYS = covering(
    product(MODELS, ("fp32", "bf16"), ("native", "reference")),
    lambda way: dict(zip(("model", "dtype", "kernels"), way, strict=True)),
)


@needs_cpu_module
@pytest.mark.usefixtures("without_detours")
@pytest.mark.parametrize(("model", "dtype", "kernels"), WAYS)
def test_a_step_holds_what_was_planned(model: str, dtype: str, kernels: Any) -> None:
    check_a_step(replace(config_of(MODELS[model], dtype), kernels=kernels))


@needs_cpu_module
@pytest.mark.usefixtures("without_detours")
@pytest.mark.parametrize("sets", ["qk_norm", "qkv", "input"])
@pytest.mark.parametrize("model", ["sequential", "parallel block, class token", "gated"])
def test_a_step_that_computes_again_holds_what_was_planned(model: str, sets: str) -> None:
    config = config_of(MODELS[model], "bf16" if sets == "qkv" else "fp32")
    check_a_step(replace(config, kernels="native", recompute=RecomputeConfig(policy=sets)))


def check_a_step(config: Config) -> None:
    planned = plan_memory(config, config.grid_shape(1), 0, MEMORY)
    held, most = made_by_a_step(config, World())
    assert held == planned.states
    assert most == pytest.approx(planned.activations, rel=0.01)


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor_parallel_size": 2},
    "stages": {"pipeline_parallel_size": 2},
    "sharded gradients": {"zero_stage": 2},
    "sharded weights": {"zero_stage": 3, "reshard_after_forward": "always", "bucket_mib": 0.1},
}


def gather_buffers(world: World) -> int:
    """How many, where rank 1 has a device of twice the memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "sharding_policy", lambda *args, **_: sharding_policy(*args, on_cpu=False))
        config = config_of({}, world=2, zero_stage=3, bucket_mib=0.1)
        made = assemble(config, grid_of(config, world, CPU), CPU, device_memory=17e6 * (1 + world.rank))
    return len(made.store.gatherer.buffers)


def made_by_steps(world: World) -> tuple[dict[str, tuple[dict[str, int], int]], int]:
    made = {name: made_by_a_step(config_of({}, world=2, **layout), world) for name, layout in LAYOUTS.items()}
    return made, gather_buffers(world)


def test_ranks_hold_what_was_planned() -> None:
    found = run_ranks(2, made_by_steps)
    assert [buffers for _, buffers in found] == [2, 2]
    for rank, (made, _) in enumerate(found):
        for name, (held, _) in made.items():
            config = config_of({}, world=2, **LAYOUTS[name])
            planned = plan_memory(config, config.grid_shape(2), rank, MEMORY, on_cpu=True)
            assert planned.states.pop("libraries") == 4 * 2**20
            assert held == planned.states, (name, rank)
            on_gpus = plan_memory(config, config.grid_shape(2), rank, MEMORY).states  # where what arrives needs room
            assert held["reduction buffers"] <= on_gpus["reduction buffers"]


def test_code_made_for_16_bit_products_goes_by_their_shapes() -> None:
    """Blocks alike share it, whether weights are there or shared out; a pipeline rank has that of its own layers."""

    def libraries(dtype: str = "bf16", world: int = 1, depth: int = 4, **parallel: Any) -> list[int]:
        config = config_of({"block": "sequential", "depth": depth}, dtype, world=world, **parallel)
        shape = config.grid_shape(world)
        return [plan_memory(config, shape, n, MEMORY, on_cpu=True).states["libraries"] for n in range(world)]

    [bits_32], [alone] = libraries("fp32"), libraries()
    assert bits_32 == 4 * 2**20 and alone == libraries("fp16", depth=5)[0]
    code = alone - bits_32
    assert code % (3 * 504 * 1024) == 0 and code > 3 * 504 * 1024 * 6  # patches, four in a block, head
    assert libraries(world=2, zero_stage=3) == [alone, alone]
    cut = [rank - bits_32 for rank in libraries(world=2, pipeline_parallel_size=2)]
    assert max(cut) < code < sum(cut)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_every_layout_can_be_planned(axis: str, model: str) -> None:
    """A rank of two has about half the activations of one."""
    alone = config_of(MODELS[model], train=TrainConfig(steps=1, global_batch_size=8, micro_batch_size=8))
    whole = plan_memory(alone, alone.grid_shape(1), 0, MEMORY).activations
    config = config_of(MODELS[model], world=2, train=alone.train, **{f"{axis}_parallel_size": 2})
    for rank in range(2):
        planned = plan_memory(config, config.grid_shape(2), rank, MEMORY)
        assert 0.3 * whole < planned.activations < 0.75 * whole, planned


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per ZeRO stage, each with less that lives on, and whether it fits; native kernels are no obstacle."""
    rows = tmp_path / "rows.json"
    own = ["--ranks", "8", "--gpu-memory", "1", "--json", str(rows)]
    plan.main([*own, *flags(kernels="native", model__num_classes="1000")])
    table = json.loads(rows.read_text())
    assert [row["zero_stage"] for row in table] == [0, 1, 2, 3]
    lasting = [row["weights_GB"] + row["gradients_GB"] + row["optimizer_state_GB"] for row in table]
    assert lasting == sorted(lasting, reverse=True) and lasting[0] == pytest.approx(8 * lasting[3], rel=0.01)
    assert all(row["fits"] == (row["peak_GB"] <= 1) for row in table)
    assert "zero_stage" in capsys.readouterr().out
    plan.main([*own, "--stages", "1", *flags(parallel__pipeline_parallel_size="2", parallel__schedule="zb_h1")])
    row = json.loads(rows.read_text())[0]
    assert (row["schedule"], row["stages_of_rank"], row["micro_batches_alive"]) == ("zb_h1", 1, 2)
    assert 0.05 < row["bubble"] < 0.4
