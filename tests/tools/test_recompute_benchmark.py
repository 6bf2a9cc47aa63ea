"""The benchmark of what is computed again: that torch's ways do what they are called, who dominates, a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import ConfigError
from parallel.process_group import World
from tests.tools.test_peers import FLAGS, small
from tools.benchmark import recompute
from tools.benchmark.eager_vit import EagerSizes, EagerViT
from tools.benchmark.front import Point, at_every_budget, verdicts
from tools.benchmark.recompute_theirs import ATTENTION, PRODUCTS, WAYS, Checkpointed
from tools.benchmark.resident import give_back, resident_bytes


class Counted(TorchDispatchMode):
    """Products and attentions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in PRODUCTS
        self.attentions += func in ATTENTION
        return func(*args, **(kwargs or {}))


def test_torchs_ways_compute_again_what_they_say_and_no_bit_differs() -> None:
    torch.manual_seed(0)
    depth = 4
    model = EagerViT(EagerSizes.of(small(depth=depth).model.sizes))
    images = torch.randn(2, 3, 32, 32)
    found = {}
    for way in WAYS:
        run = Checkpointed(model, way)
        model.zero_grad()
        with Counted() as counted:
            run(images).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[way] = counted.products, counted.attentions, gradients
    products, attentions, kept = found["none"]
    assert attentions == depth
    # of a block's four products the last is not wanted again, whose output goes into a sum
    again = {"every_4th": 1, "every_3rd": 2, "every_2nd": 2, "full": 4}
    for way, blocks in again.items():
        assert found[way][1] - attentions == blocks, way
        assert 3 * blocks <= found[way][0] - products <= 4 * blocks, way
    for way in ("selective", "selective_every_2nd", "selective_attention"):
        assert found[way][1] == attentions, way
    assert found["selective"][0] == products
    assert depth <= found["selective_every_2nd"][0] - products <= 2 * depth
    assert 3 * depth <= found["selective_attention"][0] - products <= 4 * depth
    for way, (_, _, gradients) in found.items():
        assert all(map(torch.equal, gradients, kept)), way


def test_a_point_is_dominated_by_one_that_takes_neither_more_memory_nor_more_time() -> None:
    def point(name: str, memory: float, *seconds: float) -> Point:
        return Point(name=name, is_ours=name.startswith("our"), seconds=seconds, memory={"m": memory})

    ours = [point("our_small", 1, 3.0, 3.0, 9.0), point("our_large", 2, 2.0, 2.0, 2.0)]
    theirs = [
        point("a", 1.5, 3.1, 3.1, 3.1),
        point("b", 2, 1.9, 2.5, 2.5),
        point("c", 3, 1.9, 1.9, 2.1),
        point("d", 0.5, 9, 9, 9),
    ]
    assert verdicts([*ours, *theirs], "m") == {"a": "our_small", "b": "our_large", "c": None, "d": None}


def test_at_each_budget_the_fastest_within_it_count() -> None:
    def point(name: str, memory: float, seconds: float) -> Point:
        return Point(name=name, is_ours=name.startswith("our"), seconds=(seconds,), memory={"m": memory})

    points = [point("our_small", 1, 3.0), point("our_large", 2, 2.0), point("a", 2, 4.0), point("b", 3, 2.5)]
    assert "2 of the 2 budgets" in at_every_budget(points, "m") and "0.50 to 0.80" in at_every_budget(points, "m")
    said = at_every_budget([*points, point("c", 4, 1.6), point("d", 0.5, 9.0)], "m")
    assert "2 of the 4 budgets" in said and "not at 0 MiB, 4 MiB" in said


def test_half_of_the_memory() -> None:
    def point(name: str, memory: float, seconds: float) -> Point:
        return Point(name=name, is_ours=name != "torch", seconds=(seconds,), memory={"activations": memory})

    points = [point("none", 100, 1.0), point("norm", 60, 1.0), point("fc1", 50, 1.1), point("full", 10, 1.375)]
    said = recompute.at_half([*points, point("torch", 40, 1.0)])
    assert "fc1" in said and "1.100 of its time" in said and "1.250 times the throughput of full" in said
    assert "no way" in recompute.at_half(points[:2])


def test_what_a_while_takes_is_seen_after_memory_was_given_back() -> None:
    torch.ones(2**22)  # freed, and perhaps kept by the allocator
    before = give_back()
    x = torch.ones(2**22)
    del x
    assert 2**24 <= resident_bytes("VmHWM") - before < 1.5 * 2**24


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    flags = [
        "--rounds",
        "1",
        "--ranks",
        "2",
        "--train.global_batch_size",
        "4",
        *FLAGS,
        "--json",
        str(tmp_path / "r.json"),
    ]
    memory = tmp_path / "memory.jsonl"
    flags += ["--ours", "input, norm; auto 0.5", "--theirs", "full", "--memory", str(memory)]
    recompute.main([*flags, "--memory-only"], World())
    assert not (tmp_path / "r.json").exists()
    before = memory.read_text()
    recompute.main([*flags, "--picture", str(tmp_path / "r.png")], World())
    assert memory.read_text() == before and before.count("\n") == 3
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["program"], row["way"]) for row in rows] == [
        ("ours", "input, norm"),
        ("ours", "auto 0.5"),
        ("theirs", "full"),
    ]
    for row in rows:
        assert row["largest_loss_difference"] < 1e-4
        assert (
            row["step_time_ms"] > 0 and row["activations_MiB"] > 0 and row["above_imports_MiB"] > row["activations_MiB"]
        )
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--theirs", "half"], "half"), (["--ours", "none; fc3"], "fc3"), (["--picture", "front.jpg"], "png"),
        (["--ours", "auto 1.5"], "1.5"), (["--memory", str(Path(__file__))], "line 1"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_starts(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recompute.main([*options, "--train.global_batch_size", "4", *FLAGS], World())
