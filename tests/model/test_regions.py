"""Named regions: all that autograd keeps of a block is saved inside them, and whoever runs them decides what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.plan import LiveBytes
from model import Build, build_layers
from model.kernels import Kernels
from model.regions import Keep, Policy, Region
from parallel.fp8 import Fp8Recipe, enable_fp8
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from parallel.tensor import TensorParallel
from tests.distributed import run_ranks
from tests.model.kernels.kernel_cases import needs_cpu_module
from tests.model.small import batch_of, real
from tests.parity.cases import MODELS

IMAGES = 2
# what the blocks of each of the ladder's models are made of, and patch merges
ALL = {"norm", "projection", "qk_norm", "attention", "activation", "output", "residual"}


class Moved:
    """A policy: what autograd would keep is kept as a copy elsewhere, and fetched in backward; all else is refused.

    Args:
        copies: whether it is a copy.
    """

    def __init__(self, copies: bool = True) -> None:
        self.kept: list[tuple[Region, Tensor]] = []
        self.copies = copies

    def run(self, place: str, region: Region, function: Callable[..., Any], *inputs: Any) -> Any:
        def pack(x: Tensor) -> Tensor:
            self.kept.append((region, x))
            if not self.copies or isinstance(x, nn.Parameter):
                return x
            memory = x.untyped_storage().clone()  # all of it, so that strides, and sums along them, stay the same
            return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.size(), x.stride())

        with saved_tensors_hooks(pack, lambda x: x):
            return function(*inputs)


def refuse(x: Tensor) -> Tensor:
    raise AssertionError(f"{tuple(x.shape)} is kept outside of every region")


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def gradients(world: World, model: str, policy: Policy, kernels: Any, fp8: bool) -> dict[str, Tensor]:
    """Of all blocks and patch merges and their inputs, each run on random rows."""
    grid = make_grid(GridShape(tensor=world.size), world)
    config = replace(MODELS[model], drop_path=0.5).resolve()
    build = Build(
        config=config,
        tp=TensorParallel(axis=grid.tensor, sequence_parallel=True),
        kernels=Kernels(kernels),
        policy=policy,
    )
    out, batch = {}, batch_of(list(range(IMAGES)))
    layers = [spec for spec in build_layers(config) if spec.name not in ("embed", "head")]
    for before, spec in zip([layers[0], *layers], layers, strict=False):
        torch.manual_seed(0)
        layer = real(spec.factory(build.at(spec.stage)))
        if fp8:
            enable_fp8([layer], recipe=Fp8Recipe(scaling="current"), device=torch.device("cpu"))
        x = torch.randn(before.boundary(IMAGES, build), requires_grad=True)
        with LiveBytes() as counter, nullcontext() if isinstance(policy, Keep) else saved_tensors_hooks(refuse, refuse):
            y = layer(x, batch)
        if isinstance(policy, Moved) and not policy.copies:
            assert counter.alive <= _storages([y, *(kept for _, kept in policy.kept)]), spec.name
            assert counter.alive
            policy.kept.clear()
        y.square().sum().backward()
        out |= {f"{spec.name}.{name}": p.grad for name, p in layer.named_parameters()} | {spec.name: x.grad}
    grid.close()
    return out


def check(world: World, model: str, kernels: str = "auto", fp8: bool = False) -> set[str]:
    """Moving all that is kept changes no bit of any gradient; the regions in which something was kept."""
    moved = Moved()
    expected, found = (gradients(world, model, policy, kernels, fp8) for policy in (Keep(), moved))
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        assert torch.equal(grad, found[name]), name
    if not fp8:  # which keeps weights in 8 bits, for all micro-batches, beside the nodes
        gradients(world, model, Moved(copies=False), kernels, fp8)
    return {region for region, _ in moved.kept}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_cpu_module), "reference"])
def test_all_that_is_kept_is_kept_in_a_region(model: str, kernels: str) -> None:
    seen = check(World(), model, kernels)
    expected = ALL | ({"merge"} if MODELS[model].stages else set())
    assert seen == expected - (set() if MODELS[model].qk_norm or MODELS[model].position == "rope_2d" else {"qk_norm"})


def all_models(world: World) -> list[set[str]]:
    return [check(world, model) for model in MODELS]


def test_so_it_is_over_tensor_ranks() -> None:
    for seen in run_ranks(2, all_models):
        assert all(regions >= ALL - {"qk_norm"} for regions in seen)


def test_so_it_is_in_fp8() -> None:
    assert check(World(), "parallel", fp8=True) == ALL
