"""Cluster files: what is wrong in one is said with its cure, and what they give times for grows with the work."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from engine.clusters import Cluster, read_cluster
from engine.clusters.cluster import PASSES, Collective, Number
from engine.errors import ConfigError

FOLDER = Path(__file__).parents[3] / "configs" / "clusters"
FILES = sorted(FOLDER.glob("*.yaml"))
H100 = FOLDER / "h100_64.yaml"


def changed(tmp_path: Path, change: Callable[[Any], object]) -> str:
    """A copy of a file with something wrong."""
    values = yaml.safe_load(H100.read_text())
    change(values)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values, default_flow_style=True))
    return str(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("launch"), "the field launch is missing"),
        (lambda c: c["memory"].pop("source"), "the field memory.source is missing: add where the figures are from"),
        (lambda c: c["within_node"]["all_gather"].pop("latency_us"), "within_node.all_gather.latency_us is missing"),
        (lambda c: c["products"]["rates"]["bf16"].pop("forward"), "products.rates.bf16.forward is missing"),
        (lambda c: c.pop("between_nodes"), "nodes is 8, but the field between_nodes"),
        (lambda c: c.update(node=3), "there is no field node: did you mean nodes?"),
        (lambda c: c.update(file="x"), "there is no field file"),
        (lambda c: c["host"].update(gb_per_sec=3), "no field host.gb_per_sec: did you mean host.gb_per_second?"),
        (lambda c: c["peak"]["tflops"].update(bf15=3), "no field peak.tflops.bf15: did you mean peak.tflops.bf16?"),
        (lambda c: c.update(device_type="gpu"), "device_type is 'gpu': it must be cpu or cuda"),
        (lambda c: c.update(nodes=0), "nodes is 0: it must be a whole number from 1 to 1e+06"),
        (lambda c: c.update(nodes=1.5), "nodes is 1.5"),
        (lambda c: c.update(nodes=True), "nodes is True"),
        (lambda c: c["memory"].update(gb=-80), "memory.gb is -80: it must be a number from 1e-06 to 1e+09"),
        (lambda c: c["memory"].update(gb=10**400), "memory.gb is 1000"),
        (lambda c: c["memory"].update(gb=1e300), "memory.gb is 1e+300"),
        (lambda c: c["host"].update(gb_per_second=1e-300), "host.gb_per_second is 1e-300"),
        (lambda c: c["memory"].update(gb="80GB"), "memory.gb is '80GB'"),
        (lambda c: c["memory"].update(gb=float("nan")), "memory.gb is nan"),
        (lambda c: c["memory"].update(source=""), "memory.source is ''"),
        (lambda c: c["within_node"].update(overlap=1.1), "within_node.overlap is 1.1: it must be a number from 0 to 1"),
        (lambda c: c["within_node"].update(message=3), "within_node.message is 3: it must hold the fields latency_us"),
        (lambda c: c["attention"]["rates"].update(bf16={"forward": [], "backward": 3}), "bf16.forward is []"),
        (lambda c: c["attention"].update(rates={}), "attention.rates is {}: it must have one of fp32"),
        (
            lambda c: c["attention"]["rates"]["bf16"].update(backward=[[256, 3], [64, 2]]),
            "attention.rates.bf16.backward is [[256, 3], [64, 2]]: the first numbers of its points must ascend",
        ),
        (
            lambda c: c["attention"]["rates"]["bf16"].update(backward=[[64, 3], [256, 0]]),
            "attention.rates.bf16.backward[1] is 0: it must be a number from 1e-06",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_its_field(tmp_path: Path, change: Callable[[Any], object], says: str) -> None:
    file = changed(tmp_path, change)
    with pytest.raises(ConfigError) as caught:
        read_cluster(file)
    assert says in str(caught.value) and file in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for file, says in ((str(tmp_path / "none.yaml"), "cannot be read"), ("", "--cluster is empty")):
        with pytest.raises(ConfigError, match=says):
            read_cluster(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_times_grow_with_the_work(file: Path) -> None:
    """Of every file that is shipped: more of anything never takes less time, and no rate is above the peak."""
    cluster = read_cluster(str(file))
    sizes = [2**i for i in range(5, 16)]
    for number, rates in cluster.products.rates.items():
        for kind in ("forward", "input_gradient", "weight_gradient"):
            curve = getattr(rates, kind)
            assert max(rate for _, rate in curve.points) < cluster.peak.tflops[number]
            ascends([cluster.product(kind, n, n, n, number) for n in sizes])
            ascends([cluster.product(kind, n, 1024, 1024, number) for n in sizes])
    for number in cluster.attention.rates:
        for kind in ("forward", "backward"):
            ascends([cluster.attend(kind, n * n * 64, n, number) for n in sizes])
    for number in cluster.passes.rates:
        for kind in PASSES:
            ascends([cluster.over_memory(kind, n * n, number) for n in sizes])
    for kind in get_args(Collective):
        for ranks in ((0, 1), range(8), range(0, 64, 8), range(0, 64, 4), range(64)):
            ascends([cluster.collective(kind, n * n, ranks) for n in sizes])
            assert cluster.collective(kind, 2**20, [3]) == 0 or kind == "message"
    assert set(cluster.products.rates) <= set(get_args(Number))


def ascends(times: list[float]) -> None:
    assert all(a < b for a, b in itertools.pairwise(times)), times


def test_collectives_go_by_where_the_ranks_are() -> None:
    cluster = read_cluster(str(H100))
    near, far = cluster.within_node.all_gather.gb_per_second, cluster.between_nodes
    assert far is not None
    size = 2**30
    within = cluster.collective("all_gather", size, range(8))
    assert within == pytest.approx(7 * size / near / 1e9, rel=1e-3)
    assert cluster.collective("reduce_scatter", 8 * size, range(8)) == pytest.approx(within, rel=1e-3)
    one_each = cluster.collective("all_gather", size, range(0, 64, 8))
    assert one_each == pytest.approx(7 * size / far.all_gather.gb_per_second / 1e9, rel=1e-3)
    two_each = cluster.collective("all_gather", size, range(0, 64, 4))
    assert two_each == pytest.approx(15 * size / (2 * far.all_gather.gb_per_second) / 1e9, rel=1e-3)
    assert cluster.overlap((0, 1)) == cluster.within_node.overlap


def test_more_nodes_than_are_described(tmp_path: Path) -> None:
    def one_node(c: Any) -> None:
        c.update(nodes=1)
        del c["between_nodes"]

    cluster = read_cluster(changed(tmp_path, one_node))
    assert cluster.collective("all_reduce", 4, range(8)) > 0
    with pytest.raises(ConfigError, match="between_nodes"):
        cluster.of_ranks(16).collective("all_reduce", 4, range(16))
    with pytest.raises(ConfigError, match=r"products.rates has nothing of fp8"):
        read_cluster(str(FOLDER / "a100_64.yaml")).product("forward", 8, 8, 8, "fp8")


def test_a_device_of_one_has_a_place_for_each_rank() -> None:
    assert Cluster.of_ranks(read_cluster(str(H100)), 4096).nodes == 512
