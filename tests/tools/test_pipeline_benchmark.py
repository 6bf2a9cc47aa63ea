"""The benchmark of schedules and of the executor, small: it runs, says all it should, and refuses what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from parallel.process_group import World
from tools.benchmark import pipeline
from tools.benchmark.sleepers import Case


def _rows(tmp_path: Path, *options: str) -> list[dict]:
    pipeline.main([*options, "--ranks", "2", "--rounds", "1", "--json", str(tmp_path / "rows.json")], World())
    rows: list[dict] = json.loads((tmp_path / "rows.json").read_text())
    return rows


def test_stages_that_sleep(tmp_path: Path) -> None:
    names = ["--schedule", "1f1b,zb_v", "--micro-batches", "4", "--policy", "static,ready", "--jitter", "0,0.3"]
    rows = _rows(tmp_path, *names, "--ms", "2,2,2")
    assert len(rows) == 8
    for row in rows:
        assert row["step_ms"] >= row["simulated_ms"] > 0
        assert 0 < row["bubble_ms"] < row["step_ms"]
        assert (row["formula_ms"] is None) == (row["jitter"] > 0)
        assert row["over_static_1f1b"] > 0
    assert [row["formula_ms"] for row in rows[:3:2]] == [6, 1], "(p-1)(F+I+W) and (p-1)F/2"
    assert [row["simulated_ms"] for row in rows[:3:2]] == pytest.approx([30, 25]), "4 micro-batches of 6 ms, and that"


def test_the_executor_against_torch_s(tmp_path: Path) -> None:
    rows = _rows(tmp_path, "--against", "torch", "--micro-batches", "4", "--policy", "ready", "--passes", "1")
    assert [row["actions_per_rank"] for row in rows[::5]] == [8, 16, 24]
    ours = [(f"vitruvius {policy}", by) for by in ("shared memory", "gloo") for policy in ("static", "ready")]
    assert [(row["program"], row["carrier"]) for row in rows[:5]] == [*ours, ("torch", "gloo")]
    for row in rows:
        assert row["us_per_action"] > 0 and row["cpu_us_per_action"] > 0 and row["over_static"] > 0


def test_memory_is_that_of_a_case_alone(tmp_path: Path) -> None:
    """What two stages keep of a micro-batch: 1 MiB each."""
    sizes = ["--stage", "linear", "--rows", "1024", "--width", "256", "--passes", "1", "--carrier", "shared_memory"]
    rows = _rows(
        tmp_path, "--against", "torch", "--memory", "--schedule", "interleaved", "--micro-batches", "4", *sizes
    )
    assert [row["program"] for row in rows] == ["vitruvius static", "torch"]
    for row in rows:
        assert 4 < row["grown_MiB"] < 100


def test_formulas() -> None:
    """Where a formula is given, the simulator agrees, and it is that of the papers."""
    for name, m in (("gpipe", 3), ("1f1b", 5), ("interleaved", 8), ("zb_h1", 8), ("zb_h2", 8), ("zb_v", 8)):
        case = Case(schedule=name, ranks=4, micro_batches=m)
        timeline = case.simulated()
        assert case.formula is not None
        assert sum(timeline.bubble) / 4 == pytest.approx(case.formula)
    assert Case(schedule="interleaved", ranks=4, micro_batches=9).formula is None
    assert Case(schedule="zb_v", ranks=4, micro_batches=8, forward=0.02).formula is None


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        ([], World(rank=0, size=2, local_rank=0, local_size=2), "without a launcher"),
        (["--schedule", "zbv"], World(), "zbv.*zb_v"),
        (["--schedule", "zb_h1", "--against", "torch"], World(), "zb_h1.*1f1b, interleaved, zb_v"),
        (["--micro-batches", "8,many"], World(), "--micro-batches 8,many"),
        (["--micro-batches", "0"], World(), "0"),
        (["--ms", "1,2"], World(), "three numbers"),
        (["--ms", "1,2,-3"], World(), "-0.003"),
        (["--speed", "1,1"], World(), "2 entries for 4 ranks"),
        (["--against", "torch", "--carrier", "gloo,mail"], World(), "gloo,mail.*shared_memory"),
        (["--policy", "eager"], World(), "eager.*static,ready"),
        (["--rounds", "0"], World(), "--rounds 0"),
        (["--schedule", "interleaved", "--virtual-stages", "1"], World(), "2 or more"),
        (["--schedule", "zb_v", "--virtual-stages", "3"], World(), "--virtual-stages 3 has no effect on zb_v"),
    ],
)
def test_mistakes_are_told_before_ranks_start(options: list[str], world: World, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.main(options, world)
