"""What is called a regression: rarely where there is none, nearly always where a step is 5 % slower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.errors import ConfigError
from tools.benchmark.sweep.bounds import LEVEL, bounds_of, of_pairs, of_sweeps
from tools.benchmark.sweep.compare import compare, told
from tools.benchmark.table import Row

LAYOUTS, ROUNDS, STEPS = 8, 5, 20


def sweep(
    rng: np.random.Generator,
    slower: Sequence[float] = (),
    drift: float = 0.0,
    noise: float = 0.01,
    pair: str | None = None,
) -> list[Row]:
    """Lines of runs whose steps take 100 ms (less for later layouts), while the machine becomes slower by `drift`."""
    lines = []
    for round_ in range(ROUNDS):
        for number in range(LAYOUTS):
            machine = 1 + drift * (round_ * LAYOUTS + number) / (ROUNDS * LAYOUTS)
            own = (1 + (slower[number] if slower else 0.0)) * np.exp(noise * rng.standard_normal())
            steps = 0.1 / (1 + number) * own * machine * (1 + 0.03 * rng.exponential(size=STEPS))
            yards = 0.01 * machine * (1 + 0.03 * rng.exponential(size=STEPS + 1))
            lines.append(line(number, round_, steps.tolist(), yards.tolist(), pair))
    return lines


def line(number: int, round_: int, steps: list[float], yards: list[float], pair: str | None = None) -> Row:
    facts = {"commit": "a", "code": "b", "torch": "c", "machine": "d", "steps": STEPS, "warmup": 1, "pair": pair}
    return {
        "status": "done", "entry": {"micro": number}, "config_hash": str(number), "round": round_, "ranks": 1,
        "threads": 1, "config": {"train.micro_batch_size": number}, "images_per_second": 8 / float(np.median(steps)),
        "turns": "runs", "step_seconds": steps, "yardstick_seconds": yards, "environment": {"processor": "p"},
        "sweep": facts,
    }  # fmt: skip


@pytest.mark.parametrize("pair", [None, "together"])
def test_of_sweeps_of_one_program_few_report_a_regression(pair: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    rng, trials = np.random.default_rng(0), 100
    alarms = sum(compare(sweep(rng, pair=pair), sweep(rng, pair=pair), 0.0) for _ in range(trials))
    assert alarms <= LEVEL * trials + 2 * (LEVEL * trials) ** 0.5
    assert capsys.readouterr().out


def test_the_level_holds_where_layouts_differ_in_noise() -> None:
    rng, trials, alarms = np.random.default_rng(1), 300, 0
    scale = np.linspace(0.5, 2.0, LAYOUTS)
    for _ in range(trials):
        values = 0.01 * scale[:, None, None] * rng.standard_normal((LAYOUTS, 2, ROUNDS))
        found = {str(i): of_pairs(dict(enumerate(new - old))) for i, (old, new) in enumerate(values)}
        alarms += any(bounds.low > 1 for bounds in bounds_of(found).values())  # type: ignore[arg-type]
    assert alarms <= 2 * LEVEL * trials


@pytest.mark.parametrize(("pair", "drift"), [(None, 0.0), (None, 0.2), ("together", 0.2)])
def test_a_step_slower_by_5_percent_is_found(
    pair: str | None, drift: float, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, trials, found = np.random.default_rng(2), 25, 0
    for _ in range(trials):
        old, new = sweep(rng, pair=pair), sweep(rng, [0, 0, 0.05, 0, 0, 0, 0, 0], drift, pair=pair)
        capsys.readouterr()
        found += compare(old, new, 0.0)
        rows = [text.split() for text in capsys.readouterr().out.splitlines()]
        assert sum(row[-1:] == ["slower"] for row in rows if row and row[0].startswith("micro=")) <= 2
    assert found >= 0.9 * trials, found


@pytest.mark.parametrize("paired", [True, False])
def test_what_disturbs_all_layouts_of_a_round_is_one_witness(paired: bool) -> None:
    rng, trials, alarms = np.random.default_rng(7), 150, 0
    for _ in range(trials):
        values = 0.02 * (rng.standard_normal((2, 1, ROUNDS)) + rng.standard_normal((2, 20, ROUNDS)))
        found = {}
        for i, (old, new) in enumerate(zip(*values, strict=True)):
            sides = dict(enumerate(old)), dict(enumerate(new))
            found[str(i)] = of_pairs(dict(enumerate(new - old))) if paired else of_sweeps(*sides)
        alarms += any(bounds.low > 1 for bounds in bounds_of(found).values())  # type: ignore[arg-type]
    assert alarms <= LEVEL * trials + 2 * (LEVEL * trials) ** 0.5


def test_what_slows_every_layout_is_found_in_noise_that_hides_it_in_each(capsys: pytest.CaptureFixture[str]) -> None:
    rng, trials = np.random.default_rng(6), 20
    alike = [compare(sweep(rng, noise=0.03, pair="x"), sweep(rng, noise=0.03, pair="x")) for _ in range(trials)]
    slow = [
        compare(sweep(rng, noise=0.03, pair="x"), sweep(rng, [0.05] * LAYOUTS, noise=0.03, pair="x")) for _ in alike
    ]
    assert sum(alike) <= 2 and sum(slow) >= 0.9 * trials
    assert "all together" in capsys.readouterr().out


def test_the_machine_becoming_slower_is_no_regression() -> None:
    rng = np.random.default_rng(3)
    alarms = sum(compare(sweep(rng), sweep(rng, drift=0.5)) for _ in range(40))
    assert alarms <= 4


def test_bounds_are_those_of_student() -> None:
    pairs = of_pairs({0: 0.01, 1: 0.02, 2: 0.03})
    assert pairs is not None and (pairs.mean, pairs.freedom) == (pytest.approx(0.02), 2)
    (bounds,) = bounds_of({"a": pairs}).values()
    half = 2.919986 * 0.01 / 3**0.5  # t of 2 degrees of freedom, 95 %
    assert np.log([bounds.low, bounds.ratio, bounds.high]) == pytest.approx([0.02 - half, 0.02, 0.02 + half], abs=1e-6)
    other = of_pairs({0: 0.03, 1: 0.03, 2: 0.0})
    together = bounds_of({"a": pairs, "b": other})["all together"]  # type: ignore[dict-item]
    half = 4.302653 * np.std([0.02, 0.025, 0.015], ddof=1) / 3**0.5  # of the rounds' means; 97.5 %
    assert np.log([together.low, together.ratio]) == pytest.approx([0.02 - half, 0.02], abs=1e-6)
    assert of_pairs({0: 1.0}) is None and of_sweeps({0: 1.0}, {0: 1.0, 1: 2.0}) is None


def test_nothing_in_common_or_too_few_runs() -> None:
    rng = np.random.default_rng(4)
    old = sweep(rng)
    with pytest.raises(ConfigError, match="no layout in common"):
        compare(old, [row for row in sweep(rng) if row["round"] == 0])
    with pytest.raises(ConfigError, match="no layout in common"):
        compare(old, [])


def failed(row: Row) -> Row:
    keys = ("entry", "config_hash", "round", "ranks", "threads", "config", "turns", "sweep")
    return {"status": "failed", **{key: row[key] for key in keys}, "why": "out of memory: all 80 GB"}


def test_a_layout_that_ran_and_fails_is_a_regression(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(8)
    old, new = sweep(rng), sweep(rng)
    fails = [failed(row) if row["config_hash"] == "2" and row["round"] == 0 else row for row in new]
    gone = [row for row in fails if row["config_hash"] != "2" or row["status"] == "failed"]
    for now in (fails, gone, [row for row in gone if row["status"] == "failed"]):
        assert compare(old, now, 0.5) == 1
        said = capsys.readouterr().out
        assert "failed in the new sweep: micro=2: out of memory: all 80 GB" in said and "failed: micro=2 (" in said
    assert "only in the old sweep: micro=2; failed in the new one: out of memory" in said
    assert compare(old, [*fails, *new], 0.5) == 0  # made since
    assert compare(fails, fails, 0.5) == 0 and compare(fails, gone, 0.5) == 1  # now and then; for good
    assert compare(gone, new, 0.5) == 0 and "failed in the old one" in capsys.readouterr().out


def test_what_else_differs_is_told() -> None:
    rng = np.random.default_rng(5)
    old, new = sweep(rng), sweep(rng)
    assert told(old, new) == []
    for row in new:
        row["sweep"] = {**row["sweep"], "commit": "z"}
        row["environment"] = {"processor": "q"}
        if row["config_hash"] == "3":
            row.update(config_hash="x", config={**row["config"], "model.new_key": 1})
    lines = told(old, new)
    assert lines[:2] == ["commit: a -> z", "processor: p -> q"] and len(lines) == 4
    assert "only in the new sweep: micro=3" in lines[3] and "model.new_key is 1, not None" in lines[3]
