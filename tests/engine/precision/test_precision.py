"""Number formats: which combinations are refused, which layer gets which, and that every model trains in each."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import log
from typing import Any

import pytest
import torch

from engine.assemble import assemble
from engine.assembly import Assembly
from engine.config import Config, OptimizerConfig, PrecisionConfig, TrainConfig
from engine.errors import ConfigError
from engine.precision.precision import check_precision
from engine.run.step import Stepper, StepResult
from parallel.config import ParallelConfig
from parallel.grid import make_grid
from parallel.pipeline.execution import TensorSpec
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.run.test_loop import batches
from tests.engine.small import small
from tests.parity.cases import LOSSES, MODELS, Case
from tests.parity.climb import climb

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, dict[str, Any], list[str]]] = [
    # the group, its keys, and what the message must name: the value, the cause and the cure
    (
        ParallelConfig,
        {"zero_stage": 3, "reduce_gradients": "step"},
        ["reduce_gradients is step", "zero_stage 3", "auto"],
    ),
    (
        ParallelConfig,
        {"zero_stage": 2, "reduce_gradients": "step"},
        ["reduce_gradients is step", "zero_stage 2", "auto"],
    ),
    (
        ParallelConfig,
        {"zero_stage": 1, "reduce_gradients": "micro_batch"},
        ["is micro_batch at zero_stage 1", "stage 2"],
    ),
    (
        ParallelConfig,
        {"zero_stage": 2, "reshard_after_forward": "always"},
        ["reshard_after_forward is always", "at zero_stage 2 weights are not gathered", "use zero_stage 3"],
    ),
    (
        ParallelConfig,
        {"reshard_after_forward": "never"},
        ["reshard_after_forward is never", "at zero_stage 0", "leave"],
    ),
    (ParallelConfig, {"gather_memory": 64}, ["gather_memory is 64", "at zero_stage 0", "use zero_stage 3"]),
    (
        ParallelConfig,
        {"zero_stage": 3, "gather_memory": 64, "reshard_after_forward": "always"},
        ["gather_memory 64 has no effect", "reshard_after_forward always", "use auto"],
    ),
    (ParallelConfig, {"zero_stage": 3, "gather_memory": -1}, ["gather_memory is -1", "0 MiB or more"]),
    (ParallelConfig, {"bucket_mib": 0.0}, ["bucket_mib is 0.0", "positive"]),
    *(
        (
            PrecisionConfig,
            {"dtype": dtype, key: value},
            [f"{key} {value} has no effect", f"dtype {dtype}", "use dtype fp16"],
        )
        for dtype in ("fp32", "bf16", "fp8")
        for key, value in (
            ("initial_loss_scale", 8.0),
            ("min_loss_scale", 2.0),
            ("loss_scale_window", 5),
            ("hysteresis", 1),
        )
    ),
    *(
        (
            PrecisionConfig,
            {"dtype": dtype, key: value},
            [f"{key} {value} has no effect", f"dtype {dtype}", "use dtype fp8"],
        )
        for dtype in ("fp32", "bf16", "fp16")
        for key, value in (
            ("fp8_recipe", "current"),
            ("fp8_format", "e4m3"),
            ("fp8_history", 2),
            ("fp8_margin", 1),
            ("fp8_backend", "native"),
        )
    ),
    (PrecisionConfig, {"dtype": "fp16", "hysteresis": 0}, ["hysteresis is 0", "at least 1"]),
    (
        PrecisionConfig,
        {"dtype": "fp16", "initial_loss_scale": 0.5},
        ["initial_loss_scale is 0.5", "min_loss_scale (1.0)"],
    ),
    (PrecisionConfig, {"dtype": "fp16", "loss_scale_window": 0}, ["loss_scale_window is 0", "at least 1"]),
    (PrecisionConfig, {"dtype": "fp16", "min_loss_scale": 0.0}, ["min_loss_scale is 0.0", "at least 2^-24"]),
    (PrecisionConfig, {"dtype": "fp8", "fp8_history": 0}, ["fp8_history is 0", "1 or more"]),
    (PrecisionConfig, {"dtype": "fp8", "fp8_margin": -1}, ["fp8_margin is -1", "0 or more"]),
    (PrecisionConfig, {"dtype": "fp8", "fp8_margin": 33}, ["fp8_margin is 33", "at most 32"]),
    (PrecisionConfig, {"dtype": "bf16", "high_last_blocks": -1}, ["high_last_blocks is -1", "0 or more"]),
    *(
        (PrecisionConfig, {key: value}, ["precision.high_* has no effect", "dtype fp32", "highest"])
        for key, value in (("high_layers", ("norms",)), ("high_first_blocks", 1), ("high_last_blocks", 1))
    ),
    (OptimizerConfig, {"momentum": 0.9}, ["momentum 0.9 has no effect", "name adamw", "use betas"]),
    (OptimizerConfig, {"name": "lamb", "momentum": 0.9}, ["momentum 0.9 has no effect", "name lamb", "leave it out"]),
    (OptimizerConfig, {"name": "muon", "momentum": 1.0}, ["momentum is 1.0", "below 1"]),
    (OptimizerConfig, {"ema_decay": 1.0}, ["ema_decay is 1.0", "below 1"]),
    (OptimizerConfig, {"layer_decay": 0.0}, ["layer_decay is 0.0", "above 0", "at most 1"]),
    (OptimizerConfig, {"layer_decay": 1.5}, ["layer_decay is 1.5", "at most 1"]),
]


@pytest.mark.parametrize(("group", "keys", "parts"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_combinations_that_cannot_be_are_refused(group: Any, keys: dict[str, Any], parts: list[str]) -> None:
    prefix = {ParallelConfig: "parallel", PrecisionConfig: "precision", OptimizerConfig: "optimizer"}[group]
    with pytest.raises(ValueError, match=rf"^{prefix}\.[^\n]+$") as caught:
        group(**keys)
    for part in parts:
        assert part in str(caught.value)


def test_more_high_blocks_than_there_are() -> None:
    def config(first: int, last: int) -> Config:
        return small(precision=PrecisionConfig(dtype="bf16", high_first_blocks=first, high_last_blocks=last))

    config(3, 1).resolve(1)
    with pytest.raises(ConfigError, match=r"high_first_blocks and high_last_blocks are 5 .* 4 blocks .* use fewer"):
        config(3, 2).resolve(1)


@pytest.mark.parametrize(
    ("dtype", "capability", "message"),
    [
        ("bf16", (7, 5), "precision.dtype is bf16, which T4 (compute capability 7.5) does not have: use fp16 or fp32"),
        ("fp16", (5, 2), "precision.dtype is fp16, which T4 (compute capability 5.2) does not have: use fp32"),
        (
            "fp8",
            (8, 0),
            "precision.dtype is fp8: cuda (T4, compute capability 8.0) has no FP8 matrix units, which come with "
            "8.9 (Ada, Hopper, Blackwell): use bf16, which it has",
        ),
        ("bf16", (8, 0), None),
        ("fp16", (7, 5), None),
        ("fp32", (3, 0), None),
        ("fp8", (9, 0), None),
    ],
)
def test_devices_that_lack_a_format(
    dtype: Any, capability: tuple[int, int], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "T4")
    config, device = PrecisionConfig(dtype=dtype), torch.device("cuda")
    if message is None:
        check_precision(config, device)
        return
    with pytest.raises(ConfigError) as caught:
        check_precision(config, device)
    assert str(caught.value) == message
    check_precision(config, torch.device("cpu"))  # which has all


def test_transformer_engine_needs_a_gpu() -> None:
    config = PrecisionConfig(dtype="fp8", fp8_backend="transformer_engine")
    with pytest.raises(ConfigError, match=r"^precision.fp8_backend transformer_engine: .*cpu: use a GPU; or .* native"):
        check_precision(config, torch.device("cpu"))


# -- which weight is in which format -----------------------------------------------------------------------------------


def assembled(config: Config, world: World | None = None) -> Assembly:
    world = world or World()
    config = config.resolve(world.size)
    return assemble(config, make_grid(config.grid_shape(world.size), world), torch.device("cpu"))


def names_in(assembly: Assembly, dtype: torch.dtype) -> set[str]:
    """Parameters that the model is given in this format."""
    for slot in assembly.store.slots:
        assert slot.parameter.dtype == slot.member.kind.dtype == assembly.parameters()[slot.name].dtype
    return {slot.name for slot in assembly.store.slots if slot.parameter.dtype == dtype}


NORMS = {
    *(f"blocks.{i}.norm{j}.{leaf}" for i in range(4) for j in (1, 2) for leaf in ("weight", "bias")),
    *(f"head.{path}norm.{leaf}" for path in ("", "pool.") for leaf in ("weight", "bias")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "layers", "norms"),
    [
        ({}, (), False),
        ({"high_layers": ("embed",)}, ("embed",), False),
        ({"high_layers": ("head",)}, ("head",), False),
        ({"high_layers": ("norms",)}, (), True),
        ({"high_first_blocks": 1}, ("blocks.0",), False),
        ({"high_last_blocks": 2}, ("blocks.2", "blocks.3"), False),
        (
            {"high_layers": ("embed", "norms", "head"), "high_first_blocks": 1, "high_last_blocks": 1},
            ("embed", "blocks.0", "blocks.3", "head"),
            True,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "low"), [("bf16", BF16), ("fp16", FP16), ("fp8", BF16)])
def test_what_stays_in_fp32(dtype: Any, low: torch.dtype, keys: Any, layers: tuple[str, ...], norms: bool) -> None:
    a = assembled(small(precision=PrecisionConfig(dtype=dtype, **keys)))
    everything = {slot.name for slot in a.store.slots}
    assert everything > NORMS
    edge = [layer for layer in layers if layer.startswith("blocks.")]
    kept = [layer for layer in layers if dtype != "fp8" or layer not in edge]  # under fp8, edge blocks are in bf16
    high = {name for name in everything if name.startswith(tuple(f"{layer}." for layer in kept))}
    assert names_in(a, FP32) == high | (NORMS if norms else set())
    assert names_in(a, low) == everything - names_in(a, FP32)
    if a.fp8 is not None:
        in_fp8 = {name.split(".")[1] for name in a.fp8.states}
        assert in_fp8 == {str(i) for i in range(4) if f"blocks.{i}" not in edge}
        assert all(name.startswith("blocks.") for name in a.fp8.states)
        assert len(a.fp8.states) == 4 * len(in_fp8)  # qkv, proj, fc1, fc2
    assert (a.fp8 is not None) == (dtype == "fp8")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_there_is_one_fp32_copy_of_the_weights(dtype: Any, stage: Any) -> None:
    """On one rank, where nothing is shared out: masters are 4 bytes per element beside 2 for the model's."""
    config = small(precision=PrecisionConfig(dtype=dtype), parallel=ParallelConfig(zero_stage=stage))
    a = assembled(config)
    held, elements = a.store.memory(), sum(bucket.numel for bucket in a.store.buckets)
    assert elements >= sum(slot.numel for slot in a.store.slots)
    wide = dtype == "fp32"
    assert held["weights"] == elements * (4 if wide else 2)
    assert held["masters"] == (0 if wide else elements * 4)
    assert held["gradients"] == elements * 4
    for bucket in a.store.buckets:
        assert (bucket.master.data_ptr() == bucket.weights.data_ptr()) == wide
        assert torch.equal(bucket.master.to(bucket.kind.dtype), bucket.weights)
    for array in (*a.optimizer.fragments.spans, *a.optimizer.fragments.fragments):
        assert array.weight.dtype == array.grad.dtype == FP32 and (array.model_weight is None) == wide


# -- runs --------------------------------------------------------------------------------------------------------------

EDGES = PrecisionConfig(dtype="bf16", high_layers=("embed", "norms", "head"), high_first_blocks=1, high_last_blocks=1)


def _two_stages(world: World, precision: PrecisionConfig) -> tuple[list[StepResult], list[TensorSpec], set[str]]:
    train = TrainConfig(steps=3, global_batch_size=8, micro_batch_size=8)
    parallel = ParallelConfig(pipeline_parallel_size=world.size)
    a = assembled(small(train=train, parallel=parallel, precision=precision), world)
    stepper = Stepper(a)
    results = [stepper.train_step(batches(seed=seed), 1e-3) for seed in range(3)]
    return results, [spec for boundary in a.boundaries for spec in boundary], names_in(a, FP32)


@pytest.mark.parametrize(
    ("precision", "boundary"),
    [(EDGES, BF16), (replace(EDGES, high_first_blocks=4, high_last_blocks=0), FP32)],
    ids=["bf16 between", "fp32 between"],
)
def test_a_pipeline_with_wide_layers_at_its_ends(precision: PrecisionConfig, boundary: torch.dtype) -> None:
    alone, _, wide = _two_stages(World(), precision)
    found = run_ranks(2, _two_stages, precision)
    for results, specs, _ in found:
        assert [spec.dtype for spec in specs] == [boundary]
        assert not any(result.skipped for result in results)
        # what is sent is what the next layer would have been given: the same numbers, in sums of another order
        assert [r.loss for r in results] == pytest.approx([r.loss for r in alone], rel=1e-3)
        assert [r.grad_norm for r in results] == pytest.approx([r.grad_norm for r in alone], rel=2e-2)
    assert found[0][2] | found[1][2] == wide and not found[0][2] & found[1][2]


@cache
def losses(model: str, dtype: str, steps: int = 3) -> tuple[list[float], int]:
    torch.set_num_threads(1)
    found = climb(World(), Case(model, precision=dtype).config(), steps=steps)
    return found.losses, found.skipped


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_in_every_format(model: str, dtype: str) -> None:
    """A loss is off by the rounding of logits: a machine epsilon of bf16, and of e4m3 a sixteenth (many terms in each
    product, and 16 images, average it out).
    """
    bound = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp8": 2.0**-7}[dtype]
    (found, skipped), (wide, _) = losses(model, dtype), losses(model, "fp32")
    assert skipped == 0 and len(found) == 3
    assert found == pytest.approx(wide, rel=bound)
    assert found != wide
    assert LOSSES[model] == "sigmoid" or found[0] == pytest.approx(log(10), rel=0.1)


def test_the_models_are_those_of_the_ladder() -> None:
    kinds = {kind for model in MODELS.values() for stage in model.resolve().sizes.stages for kind in stage.kinds}
    assert kinds == {"full", "window", "shifted_window", "grid", "linear", "global_tokens", "causal"}
