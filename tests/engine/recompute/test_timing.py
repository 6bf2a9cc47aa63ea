"""Times of layers and regions: priced by a cluster file and measured alike, and what save sets cost of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.clusters import Cluster, read_cluster
from engine.clusters.pricing import Pricer
from engine.recompute.save_sets import LADDER, save_set
from engine.recompute.timing import META, Timing
from model import Build, Precision, build_layers
from model.kernels import Kernels
from parallel import comm
from parallel.grid import GridShape, planned_grid
from parallel.tensor import TensorParallel, products
from tests.parity.cases import MODELS

CPU = torch.device("cpu")
CLUSTER = read_cluster(str(Path(__file__).parents[3] / "configs" / "clusters" / "h100_64.yaml"))
GRID = planned_grid(GridShape(tensor=2), 0)


def timing(model: str, *, tensor: int = 1, dtype: torch.dtype = torch.float32) -> Timing:
    config = replace(MODELS[model], drop_path=0.5).resolve()
    tp = TensorParallel(
        axis=GRID.tensor if tensor == 2 else planned_grid(GridShape(), 0).tensor, sequence_parallel=True
    )
    build = Build(config=config, tp=tp, kernels=Kernels("reference"), precision=Precision(dtype=dtype))
    return Timing(layers=build_layers(config), build=build, batch_size=2)


def all_layers_alike(cluster: Cluster) -> Cluster:
    """Where a collective is computed beside as long as it takes, and nothing else takes longer."""
    return replace(cluster, within_node=replace(cluster.within_node, overlap=1.0))


@pytest.mark.parametrize("model", ["parallel", "kinds"])
def test_regions_that_run_again_are_found_without_running(model: str) -> None:
    """What the meta device tells is what happens on this one; nothing is run again in vain, more with each step."""
    of = timing(model)
    times = of.priced(CLUSTER, GRID.meter.where)
    for index, spec in enumerate(of.layers):
        layer = times[spec.name]
        for name in ("norm", "fc1", "qk_norm-qkv", "input") if layer.regions else ():
            assert layer.again(name) == of.run_again(index, save_set(name), CPU), (spec.name, name)
        ladder = [layer.recompute_seconds(name) for name in LADDER]
        assert ladder == sorted(ladder) and ladder[0] == 0
        assert bool(layer.regions) == (ladder[-1] > 0)
        assert sum(layer.regions.values()) <= sum(layer.forward.values()) * (1 + 1e-9)
    again = {region for _, region in times["blocks.0"].again("input")}
    assert again.isdisjoint({"output", "residual"}) == (model == "parallel")  # without drop-path


def test_fc1_alone_is_a_part_of_the_projection_that_it_shares() -> None:
    layer = timing("parallel").priced(CLUSTER, GRID.meter.where)["blocks.0"]
    config = MODELS["parallel"].resolve().sizes.stages[0]
    share = config.mlp / (config.mlp + 3 * config.width)
    assert layer.again("fc1")["", "projection"] == pytest.approx(share)
    assert layer.again("qkv")["", "projection"] == 1


def test_measured_times_have_the_same_regions() -> None:
    """In half precision, whose weight gradients are added to wider sums."""
    of = timing("parallel", dtype=torch.bfloat16)
    measured, priced = of.measured(CPU, runs=1), of.priced(CLUSTER, GRID.meter.where)
    assert measured["blocks.1"] is measured["blocks.2"]
    for name, layer in measured.items():
        assert layer.regions.keys() == priced[name].regions.keys()
        assert layer.again("input") == priced[name].again("input")
        assert all(sum(spent.values()) > 0 for spent in (layer.forward, layer.backward, layer.backward_input))
        assert sum(layer.regions.values()) <= sum(layer.forward.values())


def test_collectives_hide_behind_the_products_of_weights_alone() -> None:
    """And a split backward has none to hide behind."""
    config = replace(MODELS["parallel"], drop_path=0.0, width=2048, mlp_dim=8192).resolve()
    build = replace(timing("parallel", tensor=2).build, config=config, precision=Precision(dtype=torch.bfloat16))
    of = Timing(layers=build_layers(config), build=build, batch_size=512)
    layer = of.priced(all_layers_alike(CLUSTER), GRID.meter.where)["blocks.0"]
    assert 0 < layer.backward["tensor"] < 0.6 * layer.backward_input["tensor"]
    assert layer.forward["tensor"] == pytest.approx(layer.backward_input["tensor"], rel=0.01)
    assert layer.regions["", "gather"] > 0
    assert layer.recompute_seconds("all+gather") == pytest.approx(layer.regions["", "gather"])
    alone = Timing(layers=of.layers, build=replace(build, tp=timing("parallel").build.tp), batch_size=512)
    whole = alone.priced(CLUSTER, GRID.meter.where)["blocks.0"]
    assert "tensor" not in whole.forward
    for what in ("products", "memory", "attention"):
        parts = whole.backward_input.get(what, 0) + whole.backward_weight.get(what, 0)
        assert whole.backward[what] == pytest.approx(parts)


def test_each_operator_has_its_price() -> None:
    x, w, g = (torch.empty(shape, dtype=torch.bfloat16, device=META) for shape in ((512, 256), (128, 256), (512, 128)))
    with Pricer(CLUSTER) as pricer:
        products.linear(x, w), products.input_gradient(g, w), products.weight_gradient(g, x)
        expected = sum(
            CLUSTER.product(kind, *sizes, "bf16")
            for kind, sizes in (
                ("forward", (512, 128, 256)), ("input_gradient", (512, 256, 128)), ("weight_gradient", (128, 256, 512)),
            )
        )  # fmt: skip
        assert dict(pricer.spent) == {"products": pytest.approx(expected)}
        pricer.spent.clear()
        x.view(256, 512).t(), x.detach(), torch.empty_like(x)
        assert not pricer.spent
        x + x
        x.copy_(x)
        x.add_(x)
        three, two = (
            CLUSTER.over_memory("plain", 3 * x.nbytes, "bf16"),
            CLUSTER.over_memory("plain", 2 * x.nbytes, "bf16"),
        )
        assert dict(pricer.spent) == {"memory": pytest.approx(2 * three + two)}
        pricer.spent.clear()
        q = torch.empty(2, 4, 256, 64, dtype=torch.bfloat16, device=META, requires_grad=True)
        products.attention(q, q, q).sum().backward()
        both = sum(CLUSTER.attend(kind, 2 * 4 * 256 * 256 * 64, 256, "bf16") for kind in ("forward", "backward"))
        assert pricer.spent["attention"] == pytest.approx(both)


def test_what_is_computed_between_start_and_wait_hides_a_collective() -> None:
    x = torch.empty(2**20, device=META)
    with Pricer(all_layers_alike(CLUSTER)) as pricer, pricer.listening(GRID.meter.where):
        comm.all_reduce(x, GRID.tensor)
        alone = pricer.spent.pop("tensor")
        assert alone == pytest.approx(CLUSTER.collective("all_reduce", x.nbytes, (0, 1)))
        pending = comm.all_reduce_start(x, GRID.tensor)
        pricer.spend("products", alone / 4)
        pending.wait()
        assert pricer.spent["tensor"] == pytest.approx(alone * 3 / 4)
    assert GRID.meter.where.listener is None
