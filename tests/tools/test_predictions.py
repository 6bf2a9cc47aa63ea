"""Predictions against runs: what is drawn, what is compared, and that a run is measured as it was predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.clusters import read_cluster
from engine.errors import ConfigError
from engine.plan import plan_memory
from engine.step_time import predict_step
from parallel.grid import GridShape
from parallel.process_group import World
from tools.benchmark import predictions
from tools.benchmark.bench import read_config
from tools.benchmark.draws import Draw, draw, named, rival
from tools.benchmark.prediction_errors import predict_seconds, repeated, row, summary, together
from tools.benchmark.predictions import measure, read
from tools.benchmark.table import Row

CLUSTER = replace(read_cluster("configs/clusters/h100_64.yaml"), nodes=1, devices_per_node=2)
TINY = Draw(
    name="0",
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
        assert one.config.resolve(one.ranks) == read_config(one.flags).resolve(one.ranks)


def test_rivals_differ_in_layout_alone() -> None:
    rivals = [rival(0, number) for number in range(4)]
    assert [named(0, one.name) for one in rivals] == rivals
    configs = [one.config.resolve(2) for one in rivals]
    assert len({(one.model, one.precision, one.train.global_batch_size) for one in configs}) == 1
    assert len({str(one.keys) for one in rivals}) == 4


def measured(peak: int, shared: int = 0, policy: str = "norm", counts: list[int] | None = None) -> dict[str, Row]:
    chosen = {"policy": policy, "ahead": "never", "layers_per_stage": counts}
    of_rank = {"peak_bytes": peak, "shared_bytes": shared, "tensor_bytes": 1, **chosen}
    times = {"seconds": [3.0, 1.0, 2.0], "cpu_seconds": [1.0], **chosen}
    return {
        "memory": {"ranks": [of_rank, {**of_rank, "peak_bytes": peak // 2}]},
        "time": {"ranks": [times, {**times, "seconds": [1.0]}]},
    }


def test_of_all_ranks_the_worst_counts_with_what_the_run_has_chosen() -> None:
    config = replace(TINY, keys={**TINY.keys, "recompute.policy": "full"}).config.resolve(2)
    config = replace(
        config,
        recompute=replace(config.recompute, ahead="never"),
        parallel=replace(config.parallel, layers_per_stage=(2, 4)),
    )
    plans = [plan_memory(config, config.grid_shape(2), rank, 2**34, on_cpu=True) for rank in range(2)]
    found = row(TINY, measured(plans[0].peak + 2**20, 2**20, "full", [2, 4]), CLUSTER)
    assert found["rank"] == 1 and found["measured_seconds"] == 2.0
    assert found["memory_error_percent"] == pytest.approx(100 * (plans[1].peak / (plans[0].peak // 2 - 2**19) - 1))
    assert found["predicted_seconds"] == predict_step(config, config.grid_shape(2), CLUSTER).seconds
    assert row(TINY, {}, None)["predicted_MiB"] is row(TINY, {}, None)["measured_seconds"] is None


def test_ranks_that_share_cores_take_all_their_work() -> None:
    config = TINY.config.resolve(2)
    alone = predict_seconds(config, config.grid_shape(2), CLUSTER)
    step = predict_step(config, config.grid_shape(2), CLUSTER)
    assert alone == step.seconds
    both = predict_seconds(config, config.grid_shape(2), replace(CLUSTER, devices_per_node=1))
    work = 2 * (step.seconds - step.parts["bubble"])
    assert work < both < 1.01 * work  # one core, idle while a message is under way alone
    six = GridShape(pipeline=2, data=3)
    config = replace(TINY, keys={**TINY.keys, "train.global_batch_size": 3 * 128}).config.resolve(6)
    step = predict_step(config, six, replace(CLUSTER, devices_per_node=6))
    work = 6 * (step.seconds - step.parts["bubble"])
    for devices in (2, 4):  # of the first and the last actions of a step there are three
        shared = predict_seconds(config, six, replace(CLUSTER, devices_per_node=devices))
        assert max(step.seconds, work / devices) < shared < step.seconds * 6 / devices


def test_errors_and_ranks_of_predictions_are_told() -> None:
    def of(name: str, error: float, predicted: float, seconds: float, shares: bool = False) -> Row:
        return {
            "draw": name, "predicted_MiB": 1.0, "memory_error_percent": error, "predicted_seconds": predicted,
            "measured_seconds": seconds, "time_error_percent": 100 * (predicted / seconds - 1), "shares": shares,
        }  # fmt: skip

    rows = [of("0", -3, 1.1, 1), of("1", 1, 2.4, 2), of("rival 0", -7, 2.3, 3), of("rival 1", 2, 2.5, 2.5)]
    memory, time, first = summary(rows)
    assert "4 configurations, error 2.5 % in the median, 7.0 % at most" in memory
    assert "15.0 % in the median, 23.3 % at most, Kendall's tau 0.33" in time
    assert "rival 0 of 2" in first and "1.200" in first and "rival 1; Kendall's tau -1.00" in first
    with_shared = list(summary([*rows, of("2", 0, 9, 10, True)]))
    assert with_shared[1] == time and "5 configurations" in with_shared[2] and "tau 0.60" in with_shared[2]


def test_steps_count_at_the_pace_of_the_cluster_file() -> None:
    """Where the probe takes twice as long as by the file, steps would have taken half as long."""
    lines = measured(1)
    usual = CLUSTER.product("forward", 1024, 512, 512, "fp32") - CLUSTER.launch_seconds
    for rank, probes in zip(lines["time"]["ranks"], ([1.0, 1.0, 9.0], [2.0, 2.0, 3.0]), strict=True):
        rank |= {"seconds": [4.0, 6.0, 8.0], "probe_seconds": [usual * probe for probe in probes]}
    found = row(TINY, {"time": lines["time"]}, CLUSTER)
    assert found["measured_seconds"] == 6 and found["paced_seconds"] == pytest.approx(3)
    assert found["paced_error_percent"] == pytest.approx(100 * (found["predicted_seconds"] / 3 - 1))
    rows = [{**found, "draw": f"rival {n}", "paced_seconds": 3.0 + n, "predicted_seconds": 1.0 + n} for n in range(2)]
    _, paced, first, paced_first = summary(rows)
    assert "at the pace of the cluster file: 2 configurations" in paced
    assert "1.000" in first and "(at the pace of the cluster file)" in paced_first


def test_times_are_measured_twice() -> None:
    """Steps of both count, if save sets are the same, and the first tell how far the second can be known."""
    first, again = {"0": measured(1), "1": measured(1)}, {"0": measured(1), "1": measured(1)}
    again["0"]["time"]["ranks"][0]["seconds"] = [5.0, 6.0, 7.0]
    both = together(first["0"], again["0"])["time"]["ranks"]
    assert both[0]["seconds"] == [3.0, 1.0, 2.0, 5.0, 6.0, 7.0] and both[1]["cpu_seconds"] == [1.0, 1.0]
    assert together(first["0"], {}) == first["0"]
    other = measured(1, policy="full")
    assert together(first["0"], other) == first["0"]
    first["1"]["time"]["ranks"][0]["seconds"] = [3.0]
    (line,) = repeated(first, again)
    assert "2 configurations, error 58.3 % in the median, 66.7 % at most, Kendall's tau -1.00" in line
    assert not list(repeated(first, {}))


def test_a_file_of_other_draws_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read(file, 0) == {}
    keys = dict(rival(0, 1).keys)
    line = {"seed": 0, "draw": "rival 1", "kind": "time", "commit": "", "keys": keys, "ranks": [{}]}
    file.write_text(json.dumps(line) + "\n")
    assert read(file, 0) == {"rival 1": {"time": line}}
    changed: tuple[dict[str, Any], ...] = ({"seed": 1}, {"keys": {}}, {"draw": "x"}, {"kind": "heat"}, {"ranks": []})
    for wrong in ("{", "3", *(json.dumps({**line, **change}) for change in changed), json.dumps({"seed": 0})):
        file.write_text(wrong + "\n")
        with pytest.raises(ConfigError, match="line 1"):
            read(file, 0)


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launcher"):
        predictions.main(["--json", str(tmp_path / "x")], World(rank=0, size=2, local_rank=0, local_size=2))
    with pytest.raises(ConfigError):
        predictions.main(["--json", str(tmp_path / "no" / "x")], World())
    with pytest.raises(ConfigError, match="names as in the table"):
        predictions.main(["--json", str(tmp_path / "x"), "--only", "rivals 3"], World())


@pytest.mark.slow
def test_a_run_takes_what_was_predicted() -> None:
    ranks = measure(TINY, None)
    found = row(TINY, {"memory": {"ranks": ranks}}, None)
    assert found["predicted_MiB"] > 30
    config = TINY.config.resolve(2)
    states = plan_memory(config, config.grid_shape(2), found["rank"], 2**34, on_cpu=True).states
    tensors = found["predicted_MiB"] - states["libraries"] / 2**20
    assert tensors == pytest.approx(found["live_tensors_MiB"], rel=0.05)
    assert -2 < found["measured_MiB"] - tensors < 25, found
    times = measure(replace(TINY, ranks=1, keys={**TINY.keys, "parallel.pipeline_parallel_size": 1}), 2)
    assert all(len(rank["seconds"]) == len(rank["cpu_seconds"]) == len(rank["probe_seconds"]) == 2 for rank in times)
