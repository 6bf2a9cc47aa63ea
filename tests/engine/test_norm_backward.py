"""Norms that are differentiated from what they give: less is kept, gradients are near; refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble
from engine.config import Config, RecomputeConfig, TrainConfig
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.layer_costs import LayerCosts
from engine.norm_backward import check_norm_kernels, check_norm_weights
from engine.plan import META
from engine.recompute import SAVE_SETS
from model import Build, ModelConfig, build_layers
from model.kernels import Kernels
from parallel.config import ParallelConfig
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.engine.small import small
from tests.model.kernels.kernel_cases import needs_cpu_module
from tests.model.small import batch_of, real
from tests.parity.cases import MODELS

OUTPUT = RecomputeConfig(norm_backward="output")
CPU, IMAGES = torch.device("cpu"), 2


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        (ModelConfig(preset="vit_b16", qk_norm=True), 19.09, 17.09),
        (ModelConfig(preset="vit_22b"), 18.04, 17.04),
    ],
    ids=["vit_b16", "vit_22b"],
)
def test_what_a_block_keeps_is_what_the_page_says(model: ModelConfig, before: float, after: float) -> None:
    """In units of its rows, its input among it."""
    train = TrainConfig(steps=1, global_batch_size=8, micro_batch_size=8)
    for recompute, expected in ((RecomputeConfig(), before), (OUTPUT, after)):
        config = Config(model=model, train=train, recompute=recompute, kernels="native").resolve(1)
        sizes = config.model.sizes
        costs = LayerCosts.of(config, GridShape(), 0)
        rows = 8 * 4 * sizes.stages[0].width * build_layers(config.model)[1].output[0]
        assert costs.cost(2, SAVE_SETS["all"]).kept / rows == pytest.approx(expected, abs=0.005)
        kept_norms = costs.cost(2, SAVE_SETS["norm"]).kept / rows  # nothing is saved where they are dropped
        assert kept_norms == pytest.approx({19.09: 13.08, 18.04: 12.04}[before], abs=0.005)


@needs_cpu_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["parallel", "sequential"])
def test_gradients_differ_by_rounding(model: str, dtype: torch.dtype) -> None:
    """Each norm's output is rounded once more where it is read: far less than the roundings of a whole pass, which
    tests/parity/test_formats.py derives.
    """
    config = MODELS[model].resolve()
    specs = [spec for spec in build_layers(config) if spec.name.startswith("blocks")]
    found = list[dict[str, Tensor]]()
    for from_output in (False, True):
        build = Build(config=config, kernels=Kernels("native"), norm_from_output=from_output)
        x = torch.arange(IMAGES * build.tokens.count * config.sizes.stages[0].width).sin().view(-1, 32).to(dtype)
        x.requires_grad_()
        layers = torch.nn.ModuleDict({str(i): real(spec.factory(build)) for i, spec in enumerate(specs)}).to(dtype)
        for name, parameter in layers.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        y = x
        for layer in layers.values():
            y = layer(y, batch_of(list(range(IMAGES))))
        y.float().square().mean().backward()
        assert x.grad is not None
        found.append({"": x.grad, **{name: p.grad for name, p in layers.named_parameters() if p.grad is not None}})
    noise = sqrt(2 * 20 * len(specs) / 12) * torch.finfo(dtype).eps
    floor = max(g.norm() for g in found[0].values()) / 64
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])
    for name, exact in found[0].items():
        assert (found[1][name] - exact).norm() <= noise * (exact.norm() + floor), name


def test_it_is_refused_where_it_cannot_be() -> None:
    for kernels in ("reference", "apex"):
        with pytest.raises(ConfigError, match=f"norm_backward output needs .* kernels is {kernels}: take "):
            check_norm_kernels(small(recompute=OUTPUT, kernels=kernels), CPU)
    with pytest.raises(ConfigError, match="needs compiled kernels, which are not there for meta"):
        check_norm_kernels(small(recompute=OUTPUT), META)
    config = small(recompute=OUTPUT).resolve(1)
    assembly = assemble(config, make_grid(GridShape(), World()), CPU)
    check_norm_weights(assembly)
    name, weight = next((n, p) for n, p in assembly.parameters().items() if "blocks.2.norm" in n)
    weight.data[3] = -1e-5
    with pytest.raises(ConfigError, match=rf"of which {name} has one of 1e-05: they must be at least 0.001"):
        check_norm_weights(assembly)
    check_norm_weights(replace(assembly, frozen=replace(assembly.frozen, passes=(1, 1, 1, 1, 3, 3))))  # as a teacher's
    assembly.grid.close()


def test_where_it_saves_nothing_is_told() -> None:
    rows = small(recompute=OUTPUT, parallel=ParallelConfig(tensor_parallel_size=2))
    dropped = small(recompute=replace(OUTPUT, policy="selective"))
    for config, shape, told in (
        (rows, GridShape(tensor=2), 1),
        (dropped, GridShape(), 1),
        (small(recompute=OUTPUT), GridShape(), 0),
    ):
        lines = without_effect(config.resolve(shape.world_size), shape, "cpu", 1)
        assert sum(line.startswith("recompute.norm_backward output: saves nothing: ") for line in lines) == told
