"""`tools.plan --measure`: what it measures makes a cluster file that can be read; wrong options are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.clusters import read_cluster
from engine.errors import EXIT_USAGE, ConfigError
from parallel.process_group import World
from tests.distributed import run_ranks
from tools.plan import measure, rates, wires

CPU = torch.device("cpu")


def links(world: World) -> dict[str, Any]:
    return wires.measure_links(world, CPU, 1)


def test_a_machine_becomes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("_SHAPES", ((32, 16, 16), (64, 32, 32))), ("_KEYS", (16, 32)), ("_MEGABYTES", (0.1, 1.0))):
        monkeypatch.setattr(rates, name, few)
    own = rates.measure_device(CPU, 1)
    every = run_ranks(2, links)
    assert every[0] == every[1], "ranks disagree"
    monkeypatch.setattr(measure, "measure_device", lambda device, rounds: copy.deepcopy(own))
    monkeypatch.setattr(measure, "measure_links", lambda world, device, rounds: every[0])
    file, found = tmp_path / "this.yaml", measure.describe(World(), CPU, 1)
    measure.write(file, found | {"name": "mine", "devices_per_node": 2}, "measured")
    cluster = read_cluster(str(file))
    assert set(cluster.products.rates) == set(cluster.passes.rates) == {"fp32", "bf16", "fp16", "fp8"}
    assert cluster.passes.rates["fp32"].cast is None
    for number, of in cluster.passes.rates.items():
        assert of.copy and of.strided and of.reduction and (of.cast or number == "fp32")
    assert cluster.passes.rates["bf16"].norm.points[1][0] == pytest.approx(5 / 3, rel=1e-2)  # MB that it moves
    assert cluster.products.rates["fp32"].forward.points[0][0] == pytest.approx(1 / (1 / 32 + 2 / 16), rel=1e-3)
    assert cluster.between_nodes is not None and "TCP" in cluster.between_nodes.source
    assert 0 < cluster.collective("all_gather", 1 << 20, (0, 1)) < 1
    assert (
        0 < cluster.product("forward", 64, 32, 32, "bf16") < 1 and 0 < cluster.attend("backward", 10**6, 16, "fp16") < 1
    )
    assert cluster.launch_seconds < 0.01


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        measure.main(["--measure"], World())
    assert caught.value.code == EXIT_USAGE and "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measure.main(["--measure", "--out", str(tmp_path / "a.yaml"), "--rounds", "0"], World())
    with pytest.raises(ConfigError, match="there is no folder"):
        measure.main(["--measure", "--out", str(tmp_path / "none" / "this.yaml")], World())
