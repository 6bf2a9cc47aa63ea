"""The rung of realistic size: sums over millions of parameters, and over the rows of whole micro-batches.

What is lost in a sum of many numbers is not seen on the ladder's small models, and can differ between layouts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from model import ModelConfig
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.parity.cases import Case
from tests.parity.climb import Climb, climb
from tests.parity.test_ladder import assert_same, relative

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


# -- rows --------------------------------------------------------------------------------------------------------------

_LONG = ModelConfig(
    image_size=8, patch_size=1, in_channels=1, num_classes=10, width=32, depth=2, num_heads=4, mlp_dim=64,
    attention="linear, full", linear_conv=3, global_tokens=0, qk_norm=True, bias=True, pool="gap", registers=1,
    position="learned_1d", layer_scale=0.5,
)  # fmt: skip
IMAGES = 776  # of 65 tokens: 50,440 rows in one micro-batch
ROWS = {"bf16": 0.06, "fp16": 0.01}  # what activations in these formats do to gradients, however many rows there are
LAYOUTS = [Case("long"), Case("long", tensor=2, sequence_parallel=True)]


def long(world: World, case: Case, kernels: Any) -> dict[str, Tensor]:
    """The first gradients of a step of many rows."""
    given = replace(case, model="mixed").config()
    train = replace(given.train, global_batch_size=IMAGES, micro_batch_size=IMAGES, loss="softmax")
    config = replace(given, model=_LONG, train=train, kernels=kernels)
    return climb(world, config.resolve(world.size), steps=1).first_grads


def long_all(world: World) -> dict[str, dict[str, Tensor]]:
    return {dtype: long(world, replace(LAYOUTS[1], precision=dtype), "reference") for dtype in ROWS}


def far(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> dict[str, float]:
    return {name: d for name, grad in exact.items() if (d := relative(found[name], grad)) > limit}


exact_long = cache(lambda: long(World(), LAYOUTS[0], "reference"))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", ROWS)
def test_sixteen_bits_keep_what_many_rows_add_up_to(dtype: str, kernels: str) -> None:
    assert far(long(World(), replace(LAYOUTS[0], precision=dtype), kernels), exact_long(), ROWS[dtype]) == {}


@pytest.mark.slow
def test_sixteen_bits_keep_what_many_rows_add_up_to_on_tensor_ranks() -> None:
    for dtype, found in run_ranks(2, long_all, timeout=120)[0].items():
        assert far(found, exact_long(), ROWS[dtype]) == {}
