"""The table of schedules on paper: its rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import EXIT_USAGE, ConfigError
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


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--speed 1,2", "speed has 2 entries for 4 ranks"),
        ("--policy eager", "'eager': choose one of static, ready"),
        ("--schedule none", "none"),
        ("--schedule none.txt", "a file that ends in .csv"),
        ("--schedule {folder}/one.csv", "has 1 row,"),
        ("--virtual-stages 3 --schedule zb_v,1f1b", "--virtual-stages 3 has no effect on zb_v, 1f1b"),
        ("--virtual-stages 1 --schedule interleaved", "--virtual-stages is 1, but interleaved holds several"),
    ],
)
def test_what_cannot_be(flags: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("0F0,0B0")
    with pytest.raises(ConfigError) as refusal:
        schedules.main(flags.format(folder=tmp_path).split(), World())
    assert reason in str(refusal.value) and "parallel." not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--ranks 0", "0 is not a whole number, 1 to"),
        ("--ranks 4,x", "x is not a whole number"),
        ("--forward=-1", "-1 is not a number, 0 to"),
        ("--forward 1e308", "1e308 is not a number, 0 to 1e+18"),
        ("--jitter 0,1e200", "1e200 is not a number, 0 to 10"),
        ("--speed 1e-308", "1e-308 is not a number, 1e-09 to"),
        ("--seeds 0", "0 is not a whole number"),
        ("--forward 0 --input 0 --weight 0", "together must be 1e-09 or more"),
        ("--json {folder}/none/a.json", "there is no folder"),
        ("--json {folder}", "is a folder"),
    ],
)
def test_what_is_told_before_any_work(
    flags: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(schedules, "_rows")
    with pytest.raises(SystemExit) as end:
        schedules.main(flags.format(folder=tmp_path).split(), World())
    assert end.value.code == EXIT_USAGE and reason in capsys.readouterr().err
