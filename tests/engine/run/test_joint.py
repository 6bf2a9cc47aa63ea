"""Steps whose loss is over all micro-batches at once: in two passes or one, by any schedule, the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from data import Batch
from engine.assemble import assemble
from engine.config import Config, OptimizerConfig, PrecisionConfig, RecomputeConfig, TrainConfig
from engine.objectives.base import Evaluation, JointLoss, JointObjective, Keys, Outputs
from engine.run.joint import HeldBatches
from engine.run.step import Stepper, StepResult
from model import LayerSpec, MicroBatch, build_layers
from parallel import comm
from parallel.config import ParallelConfig
from parallel.grid import Grid, make_grid
from parallel.pipeline import build_schedule
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import small

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Apart(JointObjective):
    """Logits of all images of a step away from their mean: log of the sum over images of exp(logit - mean), by class.

    spoil: makes the loss, or its gradients, what it is asked to, for the second micro-batch.
    """

    layers: tuple[LayerSpec, ...]
    passes: int
    images: int
    spoil: str = ""

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(layers=tuple(build_layers(config.model)), passes=2, images=config.train.global_batch_size)

    def joint_loss(
        self, outputs: Sequence[Outputs], batches: Sequence[MicroBatch], grid: Grid, keys: Keys | None = None
    ) -> JointLoss:
        assert all(batch.images is None for batch in batches)
        ids = torch.cat([batch.sample_ids for batch in batches])
        assert ids.tolist() == sorted(ids.tolist())  # the order of micro-batches, whatever the schedule's
        rows = torch.cat([y.double() for (y,) in outputs])
        everyone = comm.all_gather_rows(rows, grid.data)
        with torch.enable_grad():
            leaf = everyone.requires_grad_()
            loss = (leaf - leaf.mean(0)).logsumexp(0).sum() / 7
            (grad,) = torch.autograd.grad(loss, leaf)
        own = grad[grid.data.index * len(rows) :][: len(rows)]
        parts = [part.to(y.dtype) for part, (y,) in zip(own.split([len(y) for (y,) in outputs]), outputs, strict=True)]
        if self.spoil == "gradient":
            parts[1] = parts[1] * float("nan")
        share = loss.detach().float() / grid.data.size * (float("nan") if self.spoil == "loss" else 1)
        return JointLoss(share, [(part,) for part in parts])

    def evaluation(self, grid: Grid, device: torch.device) -> Evaluation:
        raise NotImplementedError


def batches(first: int, count: int, size: int, poisoned: int = -1) -> list[Batch]:
    found = []
    for m in range(count):
        ids = torch.arange(first + m * size, first + (m + 1) * size)
        images = torch.stack([torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(int(i))) for i in ids])
        images = images * (float("inf") if m == poisoned else 1)
        found.append(Batch(images=images, labels=ids % 10, sample_ids=ids, weights=torch.ones(size)))
    return found


def config_of(world: int, micro: int | None, batch: int = 16, **changes: Any) -> Config:
    train = TrainConfig(steps=3, global_batch_size=batch, micro_batch_size=micro)
    groups = {"train": train, "optimizer": OptimizerConfig(eps=1e-5), "drop_path": 0.2} | changes
    return small(**groups).resolve(world)


def train(
    world: World, config: Config, passes: int = 2, schedule: str | None = None, steps: int = 3
) -> tuple[list[StepResult], dict[str, Tensor], dict[str, Tensor]]:
    """Results of some steps, and the gradients of the last and the weights after it that this rank holds."""
    grid = make_grid(config.grid_shape(world.size), world)
    a = assemble(config, grid, CPU, replace(Apart.of(config), passes=passes))
    if schedule is not None:
        a = replace(a, schedule=build_schedule(schedule, 1, a.schedule.num_micro_batches))
    stepper, count = Stepper(a), a.schedule.num_micro_batches
    size = config.train.micro_batch_size
    assert size is not None
    results = []
    for step in range(steps):
        own = batches(100 * step + grid.data.index * count * size, count, size)
        results.append(stepper.train_step(own, 1e-3))
    return results, a.store.local_values("sums"), a.store.local_values()


def alike(found: Any, expected: Any) -> None:
    (ours, grads, weights), (theirs, their_grads, their_weights) = found, expected
    assert ours == theirs
    assert all(torch.equal(grads[name], their_grads[name]) for name in their_grads)
    assert all(torch.equal(weights[name], their_weights[name]) for name in their_weights)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
def test_one_pass_gives_the_bits_of_two(dtype: Any) -> None:
    config = config_of(1, 4, precision=PrecisionConfig(dtype=dtype))
    two = train(World(), config)
    assert not two[0][-1].skipped and two[0][0].loss != two[0][1].loss
    alike(train(World(), config, passes=1, schedule="gpipe"), two)
    policy = replace(config, recompute=RecomputeConfig(policy="full"))
    alike(train(World(), policy), two)


def test_micro_batches_do_not_change_the_loss() -> None:
    """What they are cut into matters to no gradient but by rounding."""
    whole = train(World(), config_of(1, 16), passes=1)
    cut = train(World(), config_of(1, 2))
    for ours, theirs in zip(cut[0], whole[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for name, grad in whole[1].items():
        assert (cut[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name


def test_batches_are_read_once() -> None:
    class Counting(list[Batch]):
        asked = 0

        def __getitem__(self, m: Any) -> Any:
            self.asked += 1
            return super().__getitem__(m)

    found = Counting(batches(0, 4, 2))
    size = sum(
        x.nbytes for x in (found[0].images, found[0].labels, found[0].sample_ids, found[0].weights) if x is not None
    )
    for most, twice in ((4 * size, 0), (2 * size, 2), (0, 4)):
        found.asked = 0
        held = HeldBatches(found, most)
        assert [held[m].sample_ids[0] for m in (0, 1, 2, 3, 0, 1, 2, 3)] == [0, 2, 4, 6] * 2
        assert found.asked == 4 + twice and len(held) == 4


@pytest.mark.parametrize(
    ("spoil", "poisoned", "culprit"),
    [
        ("", 2, "input images not finite (micro-batch 2 of data rank 0)"),
        ("loss", -1, "loss of the whole batch not finite (share of data rank 0)"),
        ("gradient", -1, "loss: gradient not finite (micro-batch 1 of data rank 0)"),
    ],
)
def test_what_spoils_a_step_is_named(spoil: str, poisoned: int, culprit: str) -> None:
    """An image makes the loss, and all gradients, NaN: it is what comes first all the same."""
    config = config_of(1, 4)
    objective = replace(Apart.of(config), spoil=spoil)
    stepper = Stepper(assemble(config, make_grid(config.grid_shape(1)), CPU, objective))
    result = stepper.train_step(batches(0, 4, 4, poisoned), 1e-3)
    assert result.bad and result.culprit == culprit


def every_schedule(world: World) -> list[Any]:
    found = []
    for schedule, policy, precision in (
        ("1f1b", "static", "fp32"), ("gpipe", "static", "fp32"), ("zb_h1", "ready", "fp32"), ("zb_v", "static", "fp32"),
        ("interleaved", "ready", "fp32"), ("gpipe", "ready", "fp32"),
    ):  # fmt: skip
        parallel = ParallelConfig(
            pipeline_parallel_size=2, schedule=schedule, schedule_policy=policy, zero_stage=1, bucket_mib=0.001
        )  # type: ignore[arg-type]
        config = config_of(world.size, None, parallel=parallel, precision=PrecisionConfig(dtype=precision))  # type: ignore
        found.append(train(world, config, passes=1 if schedule == "gpipe" else 2, steps=2))
    return found


def test_every_schedule_gives_the_same() -> None:
    """Data and pipeline ranks; one pass where the schedule keeps all forwards. Norms are summed in other orders."""
    whole = train(World(), config_of(1, 16), passes=1, steps=2)
    ranks = run_ranks(4, every_schedule)
    for results in zip(*ranks, strict=True):
        for ours, theirs in zip(results[0][0], whole[0], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
            assert 0 < (ours.bubble or 0) < 1
        held = {name: value for rank in results for name, value in rank[2].items()}
        assert held.keys() == whole[2].keys()
        far = {name for name, value in whole[2].items() if (held[name] - value).norm() > 1e-5 * value.norm() + 1e-7}
        assert not far
