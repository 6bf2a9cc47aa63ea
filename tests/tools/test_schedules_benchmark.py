"""The table of schedules on paper: its rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from parallel.process_group import World
from tools.benchmark import schedules


def test_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    flags = "--ranks 2,4 --micro-batches 8 --schedule zb_h1,interleaved --virtual-stages 3 --norm 1 --optimizer 2"
    schedules.main([*flags.split(), "--policy", "ready,static", "--jitter", "0,0.3", "--json", str(file)], World())
    rows = json.loads(file.read_text())
    cases = [(r["ranks"], r["schedule"], r["policy"], r["jitter"]) for r in rows]
    names, policies = ("zb_h1", "interleaved"), ("ready", "static")
    assert cases == [(p, n, policy, j) for p in (2, 4) for j in (0, 0.3) for n in names for policy in policies]
    of = dict(zip(cases, rows, strict=True))
    assert of[4, "zb_h1", "static", 0]["step_time"] == 8 * 3 + 3 + 1 + 2  # bubble (p - 1)(F + I - W)
    assert of[4, "zb_h1", "static", 0]["bubble_percent"] == pytest.approx(100 * 3 / 30)
    assert of[4, "zb_h1", "static", 0]["over_1f1b"] == pytest.approx(30 / (8 * 3 + 9 + 3))
    assert (of[4, "zb_h1", "static", 0]["bubble"], of[4, "zb_h1", "static", 0]["messages_per_rank"]) == (3, 12)
    assert of[4, "interleaved", "static", 0]["step_time"] == pytest.approx(8 * 3 + 9 / 3 + 3)
    assert of[4, "zb_h1", "static", 0.3]["slowest_step_time"] > of[4, "zb_h1", "static", 0.3]["step_time"]


def test_the_table_of_docs_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    schedules.main(["--ranks", "4", "--micro-batches", "8"], World())
    assert capsys.readouterr().out in (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()


@pytest.mark.parametrize("flags", ["--ranks 0", "--speed 1,2", "--policy eager", "--schedule none", "--forward=-1"])
def test_what_cannot_be(flags: str) -> None:
    with pytest.raises(ConfigError):
        schedules.main(flags.split(), World())
