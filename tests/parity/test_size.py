"""The rung of realistic size: sums over millions of parameters, and over the rows of whole micro-batches.

What is lost in a sum of many numbers is not seen on the ladder's small models, and can differ between layouts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from model import ModelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.parity.cases import Case
from tests.parity.climb import Climb, climb
from tests.parity.test_ladder import assert_same

# 12.6 M parameters in one bucket: a norm taken as a running fp32 sum is 5e-4 too small there
_WIDE = ModelConfig(
    image_size=8, patch_size=2, in_channels=1, num_classes=10, width=1024, depth=1, num_heads=8, mlp_dim=4096,
    qk_norm=True, bias=False, pool="map", registers=1,
)  # fmt: skip
WIDE = [Case("wide", tensor=2), Case("wide", data=2, zero=3)]
NORM = 1e-6


def wide(world: World, case: Case) -> Climb:
    """Two steps of the wide model in the layout of `case`, a block a bucket."""
    given = replace(case, model="parallel").config()
    config = replace(given, model=_WIDE, parallel=replace(given.parallel, bucket_mib=40.0))
    return climb(world, config.resolve(world.size), steps=2)


def wide_all(world: World) -> list[Climb] | None:
    found = [wide(world, case) for case in WIDE]
    return found if world.rank == 0 else None


@cache
def alone() -> Climb:
    torch.set_num_threads(1)
    return wide(World(), Case("wide"))


def test_the_gradient_norm_of_millions_is_exact() -> None:
    climbed = alone()
    exact = sum(grad.double().square().sum().item() for grad in climbed.first_grads.values()) ** 0.5
    assert sum(grad.numel() for grad in climbed.first_grads.values()) > 1.6e7
    assert climbed.grad_norms[0] == pytest.approx(exact, rel=NORM)


@pytest.mark.slow
def test_layouts_of_millions_equal_one_process() -> None:
    found = run_ranks(2, wide_all, timeout=240)[0]
    assert found is not None
    for ours in found:
        assert_same(ours, alone())
        assert ours.grad_norms == pytest.approx(alone().grad_norms, rel=NORM)
