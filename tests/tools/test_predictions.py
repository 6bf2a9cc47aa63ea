"""Predictions against runs: what is drawn, what is compared, and that a run is measured as it was predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.plan import plan_memory
from parallel.process_group import World
from tools.benchmark import predictions
from tools.benchmark.draws import Draw, draw
from tools.benchmark.predictions import measure, read, row, summary

TINY = Draw(
    number=0,
    ranks=2,
    keys={
        "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.mlp_dim": 512, "model.image_size": 128,
        "model.patch_size": 16, "model.attention": "full", "model.block": "sequential", "train.micro_batch_size": 32,
        "train.global_batch_size": 128, "parallel.pipeline_parallel_size": 2, "recompute.policy": "norm",
    },
)  # fmt: skip


def test_draws_go_by_seed_and_number_and_can_be_run() -> None:
    drawn = [draw(0, number) for number in range(2)]
    draw.cache_clear()
    assert [draw(0, number) for number in (1, 0)] == drawn[::-1]
    assert draw(1, 0).keys != drawn[0].keys
    for one in drawn:
        assert one.config.resolve(one.ranks) != replace(one, keys={**one.keys, "train.seed": 1}).config.resolve(
            one.ranks
        )


def measured(peak: int, shared: int = 0) -> dict[str, Any]:
    of_rank = {
        "peak_bytes": peak,
        "shared_bytes": shared,
        "tensor_bytes": 1,
        "heap_bytes": 1,
        "seconds": [3.0, 1.0, 2.0],
    }
    return {"ranks": [of_rank, {**of_rank, "peak_bytes": peak // 2}]}


def test_of_all_ranks_the_worst_counts() -> None:
    config = TINY.config.resolve(2)
    plans = [plan_memory(config, config.grid_shape(2), rank, 2**34, on_cpu=True) for rank in range(2)]
    found = row(TINY, measured(plans[0].peak + 2**20, 2**20))
    assert found["rank"] == 1 and found["measured_seconds"] == 2.0
    assert found["error_percent"] == pytest.approx(100 * (plans[1].peak / (plans[0].peak // 2 - 2**19) - 1), rel=0.05)
    errors = [{**found, "error_percent": error} for error in (-3.0, 1.0, -7.0)]
    assert "3.0 % in the median, 7.0 % at most" in summary(errors)
    times = [{**found, "measured_seconds": a, "predicted_seconds": b} for a, b in ((1, 1.1), (2, 2.4), (3, 2.3))]
    assert "10.0 %" not in summary(times) and "20.0 % in the median, Kendall's tau 0.33" in summary(times)


def test_a_file_of_other_draws_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read(file, 0) == {}
    line = {"seed": 0, "number": 1, "commit": "", "keys": dict(draw(0, 1).keys), "ranks": []}
    file.write_text(json.dumps(line) + "\n")
    assert read(file, 0) == {1: line}
    for wrong in ("{", "3", json.dumps({**line, "seed": 1}), json.dumps({**line, "keys": {}}), json.dumps({"seed": 0})):
        file.write_text(wrong + "\n")
        with pytest.raises(ConfigError, match="line 1"):
            read(file, 0)


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launcher"):
        predictions.main(["--json", str(tmp_path / "x")], World(rank=0, size=2, local_rank=0, local_size=2))
    with pytest.raises(ConfigError):
        predictions.main(["--json", str(tmp_path / "no" / "x")], World())


@pytest.mark.slow
def test_a_run_takes_what_was_predicted() -> None:
    ranks = measure(TINY, 1)
    found = row(TINY, {"ranks": ranks})
    assert [len(rank["seconds"]) for rank in ranks] == [1, 1]
    assert found["predicted_MiB"] > 30
    config = TINY.config.resolve(2)
    states = plan_memory(config, config.grid_shape(2), found["rank"], 2**34, on_cpu=True).states
    tensors = found["predicted_MiB"] - states["libraries"] / 2**20
    assert tensors == pytest.approx(found["live_tensors_MiB"], rel=0.05)
    assert -2 < found["measured_MiB"] - tensors < 25, found
    assert found["heap_MiB"] > 0.9 * found["measured_MiB"]
