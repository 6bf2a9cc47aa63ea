"""The moving average of the weights, and learning rates and decays that differ by layer and group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble
from engine.config import Config, LogConfig, OptimizerConfig, PrecisionConfig, TrainConfig
from engine.run.step import Stepper
from engine.run.trainer import pretrain
from parallel.config import ParallelConfig
from parallel.grid import make_grid
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.run.test_loop import batches
from tests.engine.small import small
from tests.parity.climb import logical

DECAY, STEPS = 0.9, 4


def stepper_of(config: Config, world: World | None = None) -> Stepper:
    world = world or World()
    config = config.resolve(world.size)
    return Stepper(assemble(config, make_grid(config.grid_shape(world.size), world), torch.device("cpu")))


# -- the average -------------------------------------------------------------------------------------------------------


def _average(world: World, stage: Any, dtype: Any) -> float:
    """The largest distance of the average from the formula, in float64, relative to a weight of 1."""
    config = small(
        optimizer=OptimizerConfig(ema_decay=DECAY, lr=0.01),
        parallel=ParallelConfig(zero_stage=stage, bucket_mib=0.001),
        precision=PrecisionConfig(dtype=dtype),
        train=TrainConfig(steps=STEPS, global_batch_size=8),
    )
    stepper = stepper_of(config, world)
    a = stepper.assembly
    assert a.average is not None
    started = {name: value.double() for name, value in logical(a, "master").items()}
    moment = {name: torch.zeros_like(value) for name, value in started.items()}
    for step in range(STEPS):
        share = 8 // world.size
        assert not stepper.train_step(batches(seed=10 * step + world.rank, size=share), 0.01).skipped
        for name, value in logical(a, "master").items():
            moment[name] = DECAY * moment[name] + (1 - DECAY) * value.double()
    expected = {name: value / (1 - DECAY**STEPS) for name, value in moment.items()}
    before = kept(stepper)
    weights = logical(a, "master")
    with a.average.applied():
        averages = logical(a, "master")
        if stage < 3:
            _assert_the_model_has(stepper, averages)
    _assert_same(kept(stepper), before)
    if stage < 3:
        _assert_the_model_has(stepper, weights)
    # and with an evaluation in between, whose numbers are those of the average
    apart = stepper.evaluate_average(batches(seed=99, size=8))
    _assert_same(kept(stepper), before)
    assert stepper.evaluate(batches(seed=99, size=8))["loss"] != apart["loss"]
    assert averages.keys() == expected.keys()
    assert max(float((expected[n] - v).abs().max()) for n, v in started.items()) > 5e-3  # it has moved
    return max(float((averages[n].double() - v).abs().max() / (1 + v.abs().max())) for n, v in expected.items())


def _assert_the_model_has(stepper: Stepper, values: dict[str, Tensor]) -> None:
    for slot in stepper.assembly.store.slots:
        own = slot.member.info.layout.local(values[slot.name])
        assert torch.equal(slot.parameter.detach(), own.to(slot.parameter.dtype)), slot.name


def kept(stepper: Stepper) -> list[Tensor]:
    a = stepper.assembly
    assert a.average is not None
    state = [t for tensors in a.optimizer.state_tensors().values() for t in tensors]
    of_buckets = [t for bucket in a.store.buckets for t in (bucket.master, bucket.weights)]
    return [t.clone() for t in (*of_buckets, *state, *a.average.averages)]


def _assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)] == []


def _averages(world: World, ways: list[tuple[int, str]]) -> list[float]:
    return [_average(world, *way) for way in ways]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_average_follows_its_formula(dtype: str) -> None:
    assert _average(World(), 0, dtype) < 2e-7  # some roundings of fp32 in 4 steps


def test_the_average_follows_its_formula_on_two_ranks() -> None:
    ways = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in (0, 1, 3)]
    for distances in run_ranks(2, _averages, ways, timeout=120):
        assert all(distance < 2e-7 for distance in distances), dict(zip(ways, distances, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_the_start_of_the_average_has_no_part_in_it(decay: float) -> None:
    """Weights that rise from 0 to 1 in each element: Adam's corrected moment of them, which starts from nothing."""
    stepper = stepper_of(small(optimizer=OptimizerConfig(ema_decay=decay)))
    average, masters = stepper.assembly.average, [bucket.master for bucket in stepper.assembly.store.buckets]
    assert average is not None
    moment = 0.0
    for step in range(1, 401):
        weight = 1 - 0.99**step  # 98 % of the way after 400 steps
        for master in masters:
            master.fill_(weight)
        average.update()
        moment = decay * moment + (1 - decay) * weight
        expected = moment / (1 - decay**step)
        if step in (1, 2, 50, 400):
            for values in average.averages:
                assert values.min().item() == values.max().item() == pytest.approx(expected, rel=1e-5)
    assert average.updates == 400 and expected > 0.75  # uncorrected, 0.03 at a decay of 0.9999


def test_an_average_of_nothing_yet_is_the_initial_weights() -> None:
    stepper = stepper_of(small(optimizer=OptimizerConfig(ema_decay=0.9999)))
    assert stepper.evaluate_average(batches()) == stepper.evaluate(batches())
    assert stepper.train_step(batches(float("nan")), 1e-3).skipped
    assert stepper.assembly.average is not None and stepper.assembly.average.updates == 0
    assert stepper.evaluate_average(batches()) == stepper.evaluate(batches())


def evaluated(folder: Path, decay: float | None) -> dict[str, Any]:
    config = small(
        run_dir=str(folder),
        train=TrainConfig(steps=3, global_batch_size=8),
        optimizer=OptimizerConfig(ema_decay=decay, lr=0.01),
        log=LogConfig(tensorboard=False),
    )
    pretrain(config, World())
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line["event"] == "eval")


def test_the_average_is_evaluated_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, kept_last, slow = (evaluated(tmp_path / str(decay), decay) for decay in (None, 0.0, 0.99))
    assert {"event", "step", "loss", "accuracy", "images"} <= plain.keys()
    assert slow.keys() - plain.keys() == {"ema_loss", "ema_accuracy"}
    # an average that forgets all but the last is the weights; and keeping one changes nothing else
    assert (kept_last["ema_loss"], kept_last["ema_accuracy"]) == (plain["loss"], plain["accuracy"])
    assert slow["loss"] == plain["loss"] and slow["ema_loss"] != slow["loss"] and 0 <= slow["ema_accuracy"] <= 1
    assert f"EMA loss {slow['ema_loss']:.3f} | EMA accuracy " in capsys.readouterr().out


# -- rates by layer and group ------------------------------------------------------------------------------------------


def first_update(lr: float, lr_factor: float, **optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(initial weights, how far the first step moves them)."""
    s = stepper_of(small(optimizer=OptimizerConfig(eps=1e-20, **optimizer)))
    before = logical(s.assembly, "master")
    s.train_step(batches(seed=1), lr, lr_factor)
    return before, {name: value - before[name] for name, value in logical(s.assembly, "master").items()}


DEPTHS = {"embed": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "blocks.3": 4, "head": 5}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_each_layer_learns_at_a_fraction_of_the_rate_of_the_next(layer_decay: float) -> None:
    """Adam's first step without decay is the rate in every element that has a gradient at all."""
    _, moved = first_update(1e-2, 1.0, weight_decay=0.0, layer_decay=layer_decay)
    for layer, depth in DEPTHS.items():
        steps = torch.cat([v.abs().flatten() for name, v in moved.items() if name.startswith(f"{layer}.")])
        expected = 1e-2 * layer_decay ** (5 - depth)
        assert steps[steps > 0].median().item() == pytest.approx(expected, rel=1e-3), layer
        assert steps.max().item() == pytest.approx(expected, rel=1e-3), layer


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize(("by", "rate"), [("lr", 1e-3 * 0.25), ("schedule", 0.25)])
def test_decay_is_multiplied_by_the_rate_or_by_the_schedule_alone(by: str, rate: float, layer_decay: float) -> None:
    """What decay adds to the first step is -rate * decay * weight, by group; rates by layer hold for decay, too."""
    keys: dict[str, Any] = {"decay_by": by, "layer_decay": layer_decay}
    before, without = first_update(1e-3 * 0.25, 0.25, weight_decay=0.0, **keys)
    _, decayed = first_update(1e-3 * 0.25, 0.25, weight_decay=4.0, head_weight_decay=8.0, **keys)
    decays = {"blocks.2.attn.qkv.weight": (3, 4.0), "head.fc.weight": (5, 8.0), "embed.weight": (0, 4.0)}
    for name, (depth, decay) in decays.items():
        expected = -rate * layer_decay ** (5 - depth) * decay * before[name]
        # the difference of two small steps, each added to a weight with an error of 2^-24 of it
        allowed = 2.0**-22 * before[name].abs().max().item()
        assert torch.allclose(decayed[name] - without[name], expected, rtol=1e-3, atol=allowed), name
        assert expected.abs().max() > 20 * allowed
    for name in ("blocks.2.norm1.weight", "blocks.2.attn.qkv.bias", "embed.pos_row"):
        assert name not in before or torch.equal(decayed[name], without[name]), name
