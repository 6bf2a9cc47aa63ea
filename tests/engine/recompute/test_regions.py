"""What a save set drops is computed again: the same bits, no collective twice but those it says, and less is kept."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.plan import LiveBytes
from engine.recompute import LADDER, SAVE_SETS, Recompute, save_set
from model import Build, Stage, build_layers
from model.kernels import Kernels
from model.regions import Keep, Policy, Region
from parallel.fp8 import Fp8Recipe, enable_fp8
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from parallel.tensor import ColumnParallelLinear, TensorParallel
from tests.distributed import run_ranks
from tests.model.kernels.kernel_cases import needs_cpu_module
from tests.model.small import batch_of, real
from tests.parity.cases import MODELS

IMAGES = 2
COLLECTIVES_AGAIN = {"attention", "output"}  # beside gathers: those of attention over ranks and of the output


class Counted:
    """Counts how often each region runs, in forward and again."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.runs = policy, Counter[tuple[str, str]]()

    def run(self, place: str, region: Region, function: Callable[..., Any], *inputs: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.runs[place, region] += 1
            return function(*args)

        if hasattr(function, "part"):
            counted.part = function.part  # type: ignore[attr-defined]
        return self.policy.run(place, region, counted, *inputs)


class Run:
    """All blocks and patch merges of a model, each on random rows, under a policy.

    Attributes:
        gradients: by name, those of weights and inputs. kept: bytes alive after forward. runs: of each region.
        calls: collectives in forward and backward, by kind.
    """

    def __init__(
        self,
        world: World,
        model: str,
        name: str = "all",
        *,
        kernels: Any = "auto",
        fp8: bool = False,
        drop_path: float = 0.5,
    ) -> None:
        grid = make_grid(GridShape(tensor=world.size), world)
        config = replace(MODELS[model], drop_path=drop_path).resolve()
        specs = [spec for spec in build_layers(config) if spec.name not in ("embed", "head")]
        policy = Counted(Keep() if name == "all" else Recompute({spec.name: save_set(name) for spec in specs}))
        tp = TensorParallel(axis=grid.tensor, sequence_parallel=True)
        build = Build(config=config, tp=tp, kernels=Kernels(kernels), policy=policy)
        self.gradients, self.kept, batch = dict[str, Tensor](), 0, batch_of(list(range(IMAGES)))
        grid.meter.calls.clear()
        for before, spec in zip([specs[0], *specs], specs, strict=False):
            torch.manual_seed(0)
            layer = real(spec.factory(build.at(spec.stage)))
            if fp8:
                enable_fp8([layer], recipe=Fp8Recipe(scaling="current"), device=torch.device("cpu"))
            x = torch.randn(before.boundary(IMAGES, build), requires_grad=True)
            with LiveBytes() as counter:
                y = layer(x, batch)
                self.kept += counter.now
            y.square().sum().backward()
            self.gradients |= {f"{spec.name}.{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
            assert x.grad is not None
            self.gradients[spec.name] = x.grad
            del x, y, counter
        if isinstance(policy.policy, Recompute):
            assert not policy.policy.dropped_now
        self.runs, self.calls = policy.runs, Counter(grid.meter.calls)
        grid.close()


def check(kept: Run, found: Run, name: str) -> None:
    """The same gradients, nothing kept in vain, and each region again at most once, if it was dropped."""
    assert kept.gradients.keys() == found.gradients.keys()
    for parameter, gradient in kept.gradients.items():
        assert torch.equal(gradient, found.gradients[parameter]), (name, parameter)
    for (place, region), times in found.runs.items():
        branch = place.rsplit(".", 1)[-1]
        most = 2 if save_set(name).dropped("" if branch.isdigit() else branch, region) else 1
        assert times <= most, (name, place, region, times)
    assert any(times == 2 for times in found.runs.values()) or not name.startswith(("norm", "input"))


def test_names() -> None:
    assert all(save_set(name) == of and of.name == name for name, of in SAVE_SETS.items())
    assert save_set("all-attention").drops == {"attention"}
    assert save_set("qk_norm-fc1").name == "fc1"
    assert save_set("qk_norm-fc1+gather+offload").name == "fc1+gather+offload"
    assert len(SAVE_SETS) == 36
    for wrong in ("full", "norm-fc2", "-norm", "", "all+offload+gather"):
        with pytest.raises(ValueError, match="take"):
            save_set(wrong)


@pytest.mark.parametrize("model", MODELS)
def test_every_save_set_gives_the_same_bits(model: str) -> None:
    kept = Run(World(), model)
    beside = ["qk_norm-qkv", "fc1-attention-output", "all+offload", "qk_norm+offload", "input+offload"]
    runs = {name: Run(World(), model, name) for name in (*LADDER[1:], *beside)}
    for name, found in runs.items():
        check(kept, found, name)
    bytes_kept = [kept.kept, *(runs[name].kept for name in LADDER[1:])]
    assert bytes_kept == sorted(bytes_kept, reverse=True), bytes_kept
    assert bytes_kept[-1] < 0.3 * bytes_kept[0]
    assert bytes_kept[1] < bytes_kept[0]


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_cpu_module), "reference"])
def test_with_either_kind_of_kernels_and_in_fp8(kernels: str) -> None:
    for model, fp8 in (("parallel", True), ("kinds", False), ("swin", False)):
        kept = Run(World(), model, kernels=kernels, fp8=fp8)
        for name in ("norm", "qkv", "input", "all+offload", "fc1+offload"):
            check(kept, Run(World(), model, name, kernels=kernels, fp8=fp8), name)


def over_ranks(world: World) -> None:
    for model in ("parallel", "kinds", "pyramid", "heads"):
        kept = Run(world, model)
        names = list(SAVE_SETS)[1:] if model == "parallel" else ["norm+gather", "qkv", "attention+gather", "input"]
        for name in names:
            found = Run(world, model, name)
            check(kept, found, name)
            again = Counter({kind: n for kind, n in (found.calls - kept.calls).items() if n})
            drops = SAVE_SETS[name].drops
            if not drops & COLLECTIVES_AGAIN and "gather" not in drops and MODELS[model].qk_norm_over != "width":
                assert not again, (model, name, again)
            if "gather" in drops:
                gathers = sum(region == "gather" for _, region in found.runs.elements()) - sum(
                    region == "gather" for _, region in kept.runs.elements()
                )
                assert gathers > 0, (model, name)


def test_over_tensor_ranks_collectives_come_once_but_for_what_is_gathered_again() -> None:
    run_ranks(2, over_ranks)


def test_of_a_product_that_is_one_with_another_only_its_part_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    part, wanted = ColumnParallelLinear.part, list[slice]()

    def noted(self: ColumnParallelLinear, columns: slice, *args: Any) -> Tensor | None:
        wanted.append(columns)
        return part(self, columns, *args)

    monkeypatch.setattr(ColumnParallelLinear, "part", noted)
    qkv = 3 * (MODELS["parallel"].width or 0)
    kept, fc1, both = (Run(World(), "parallel", name) for name in ("qk_norm", "fc1", "qkv"))
    assert wanted == [slice(qkv, qkv + (MODELS["parallel"].mlp_dim or 0))] * 3
    assert kept.kept > fc1.kept > both.kept


@pytest.mark.parametrize("model", ["parallel", "sequential"])
def test_drop_path_has_nothing_more_computed_again(model: str) -> None:
    never, often = (Run(World(), model, "input", drop_path=rate).runs for rate in (0.0, 0.5))
    more = {place.split(".")[-1] + " " + region for place, region in often - never}
    assert not never - often
    assert more == ({"attn residual"} if model == "sequential" else set())  # no product, which is there in either
    again = {region for (_, region), times in often.items() if times == 2}
    assert "projection" in again and ("output" in again) == (model == "sequential"), again


@pytest.mark.parametrize("model", MODELS)
def test_what_is_noted_is_wanted_as_long_as_backward_asks_for_it(model: str) -> None:
    """Whatever else backward keeps of a region: weights, drop-path's factors."""
    config = replace(MODELS[model], drop_path=0.5).resolve()
    specs = [spec for spec in build_layers(config) if spec.name not in ("embed", "head")]
    policy = Recompute({spec.name: SAVE_SETS["input"] for spec in specs})
    build = Build(config=config, policy=policy)
    stage = real(Stage(specs, build))
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_("scale" not in name)
    x = torch.randn(specs[0].boundary(IMAGES, build), requires_grad=True)
    counts = []
    for ahead in (False, True):
        policy.ran_again.clear()
        with policy.noting() as calls:
            (y,) = stage((x,), batch_of(list(range(IMAGES))))
        for call in calls if ahead else ():
            call.again(lambda _: None)
        before = policy.ran_again.total()
        y.sum().backward()
        assert policy.ran_again.total() == before or not ahead
        counts.append(policy.ran_again.copy())
    assert counts[0] == counts[1] and counts[0]


def test_nothing_is_left_when_backward_never_comes() -> None:
    config = MODELS["parallel"].resolve()
    specs = [spec for spec in build_layers(config) if spec.name.startswith("blocks")]
    policy = Recompute({spec.name: SAVE_SETS["input"] for spec in specs})
    layer = real(specs[0].factory(Build(config=config, policy=policy)))
    x = torch.randn(specs[0].boundary(IMAGES, Build(config=config)), requires_grad=True)
    with LiveBytes() as counter:
        y = layer(x, batch_of(list(range(IMAGES))))
        del y
        gc.collect()
        assert counter.now == 0
    assert not policy.dropped_now


@pytest.mark.parametrize("model", ["parallel", "sequential", "pyramid"])
def test_blocks_one_after_the_other_are_computed_again_one_by_one(model: str) -> None:
    """What a block gives to the next is kept, so backward never holds more than one block beside the inputs of all."""
    config = MODELS[model] if MODELS[model].stages else replace(MODELS[model], depth=6)
    specs = [spec for spec in build_layers(config.resolve()) if spec.name not in ("embed", "head")]
    most, gradients = dict[str, int](), dict[str, Tensor]()
    for name in ("all", "input"):
        build = Build(config=config.resolve(), policy=Recompute({spec.name: SAVE_SETS[name] for spec in specs}))
        stage = real(Stage(specs, build)).requires_grad_(False)
        x = torch.arange(math.prod(specs[0].boundary(IMAGES, build))).sin().view(specs[0].boundary(IMAGES, build))
        with LiveBytes() as counter:
            (y,) = stage((x.requires_grad_(),), batch_of(list(range(IMAGES))))
            y.backward(torch.ones_like(y))
        assert x.grad is not None
        most[name], gradients[name] = counter.peak, x.grad
    assert torch.equal(gradients["all"], gradients["input"])
    assert most["input"] < 0.5 * most["all"], most
