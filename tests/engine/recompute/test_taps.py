"""q, k and v that come out of blocks are differentiated rightly, whatever is kept, and however a backward is split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.recompute import LADDER, Recompute, save_set
from engine.run.step import Stepper
from model import Build, Stage, build_layers
from model.regions import Keep
from model.taps import tapped, tapping
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from parallel.tensor import TensorParallel
from tests.distributed import run_ranks
from tests.model.small import batch_of, real
from tests.parity.cases import MODELS, Case
from tests.parity.climb import climb
from tests.parity.test_ladder import relative

IMAGES, WEIGHT = 2, 0.01
BESIDE = ("qk_norm-qkv", "all-attention", "input+gather", "all+offload", "fc1+offload")


def relation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A loss of all three."""
    return WEIGHT * ((q * k).sum() + v.square().sum())


class Attached(torch.autograd.Function):
    """Hands q, k and v on; backward adds the gradients of `relation`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        return grads[0] + WEIGHT * k, grads[1] + WEIGHT * q, grads[2] + 2 * WEIGHT * v


def attach(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return Attached.apply(q, k, v)


class Held:
    """Keeps what it is given, with its graph."""

    def __init__(self) -> None:
        self.found = list[tuple[Tensor, Tensor, Tensor]]()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.found.append((q, k, v))
        return q, k, v


def gradients(world: World, model: str, name: str, way: str) -> dict[str, Tensor]:
    """Of all blocks of a model as one stage, of their input, with a loss of what they give and of q, k and v."""
    grid = make_grid(GridShape(tensor=world.size), world)
    config = replace(MODELS[model], drop_path=0.5).resolve()
    specs = [spec for spec in build_layers(config) if spec.name not in ("embed", "head")]
    policy = Keep() if name == "all" else Recompute({spec.name: save_set(name) for spec in specs})
    tp = TensorParallel(axis=grid.tensor, sequence_parallel=True)
    build = Build(config=config, tp=tp, policy=policy)
    stage, held = real(Stage(specs, build)), Held()
    torch.manual_seed(0)
    x = torch.randn(specs[0].boundary(IMAGES, build), requires_grad=True)
    with tapping(stage, {} if way == "none" else dict.fromkeys(tapped(stage), attach if way == "attached" else held)):
        (y,) = stage((x,), batch_of(list(range(IMAGES))))
    loss = y.square().sum() + sum((relation(*found) for found in held.found), torch.zeros(()))
    del y
    held.found.clear()
    loss.backward()
    grid.close()
    assert x.grad is not None
    return {n: p.grad for n, p in stage.named_parameters() if p.grad is not None} | {"input": x.grad}


def check(world: World, model: str, names: tuple[str, ...]) -> None:
    """The same bits under every save set; the same gradients either way, and others than without the loss."""
    kept = {way: gradients(world, model, "all", way) for way in ("attached", "held", "none")}
    for n, gradient in kept["held"].items():
        assert relative(kept["attached"][n], gradient) < 1e-5, (model, n)
    assert sum(relative(kept["none"][n], gradient) > 1e-3 for n, gradient in kept["held"].items()) > 3
    for name in names:
        for way in ("attached", "held"):
            found = gradients(world, model, name, way)
            assert all(torch.equal(found[n], gradient) for n, gradient in kept[way].items()), (model, name, way)


@pytest.mark.parametrize(
    ("model", "names"),
    [("parallel", (*LADDER[1:], *BESIDE)), ("kinds", BESIDE), ("swin", ("qk_norm", "input+offload"))],
)
def test_under_every_save_set(model: str, names: tuple[str, ...]) -> None:
    check(World(), model, names)


CASES = [  # with R ahead of backward where ranks wait
    Case("parallel", pipeline=2, micro_batches=4, schedule="zb_h1", recompute="full"),
    Case("parallel", pipeline=2, micro_batches=4, schedule="zb_v", recompute="selective"),
    Case("parallel", tensor=2, sequence_parallel=True, micro_batches=2, recompute="attention+gather, all+offload, qkv"),
]


def put_taps(stepper: Stepper) -> None:
    """On every attention layer of every stage of this rank, for good."""
    for stage in stepper.assembly.stages.values():
        for place in tapped(stage).values():
            place.tap = attach


def over_ranks(world: World) -> list[dict[str, Tensor]]:
    check(world, "heads", ("qkv", "input+gather"))
    return [climb(world, case.config(), put_taps, steps=1).first_grads for case in CASES]


def test_over_ranks_as_in_one_process() -> None:
    one = CASES[0].one_process.config()
    expected = climb(World(), one, put_taps, steps=1).first_grads
    plain = climb(World(), one, steps=1).first_grads
    assert sum(relative(plain[name], gradient) > 1e-2 for name, gradient in expected.items()) > 10
    for case, found in zip(CASES, run_ranks(2, over_ranks)[0], strict=True):
        worst = {name: relative(found[name], gradient) for name, gradient in expected.items()}
        assert max(worst.values()) < 1e-4, (case, worst)
