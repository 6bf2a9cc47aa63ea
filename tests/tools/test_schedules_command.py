"""`python -m tools.schedules`: its table, the file that it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import EXIT_USAGE
from parallel.pipeline import build_schedule
from tools import schedules


def test_the_table_of_docs_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `docs/pipelines.md` has it, row by row."""
    schedules.main(["--ranks", "4", "--micro-batches", "8", "--json", str(tmp_path / "rows.json")])
    table = capsys.readouterr().out
    assert table in (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    rows = {row["schedule"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert (rows["1f1b"]["bubble"], rows["1f1b"]["peak_activations"], rows["1f1b"]["messages_per_rank"]) == (9, 4, 12)
    assert (rows["zb_v"]["bubble"], rows["zb_v"]["peak_activations"], rows["zb_v"]["messages_per_rank"]) == (1.5, 4, 24)


def test_a_printed_file_is_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedules.main(["--ranks", "2", "--micro-batches", "3", "--schedule", "zb_v", "--csv"])
    (tmp_path / "my.csv").write_text(capsys.readouterr().out)
    assert build_schedule(str(tmp_path / "my.csv"), 2, 3).ranks == build_schedule("zb_v", 2, 3).ranks
    schedules.main(
        ["--ranks", "2", "--micro-batches", "3", "--schedule", str(tmp_path / "my.csv"), "--times", "1,1,0.5"]
    )
    assert "my.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--ranks", "0", "--micro-batches", "8"],
            "a pipeline of 0 ranks with 8 micro-batches: both must be at least 1",
        ),
        (["--ranks", "99999", "--micro-batches", "8888"], "their product is at most 4000000"),
        (["--ranks", "2", "--micro-batches", "8", "--schedule", "zb"], "unknown pipeline schedule 'zb'"),
        (["--ranks", "2", "--micro-batches", "8", "--schedule", "no.csv"], "parallel.schedule no.csv cannot be read"),
        (["--ranks", "2", "--micro-batches", "8", "--virtual-stages", "1"], "parallel.virtual_stages is 1"),
        (["--ranks", "2", "--micro-batches", "8", "--times", "1,1"], "--times: is 1,1: give the times of F, I and W"),
        (["--ranks", "2", "--micro-batches", "8", "--times", "1,nan,1"], "--times: is nan: it must be a time"),
        (["--ranks", "2", "--micro-batches", "8", "--latency", "-1"], "--latency: is -1: it must be a time"),
        (["--ranks", "2", "--micro-batches", "8", "--csv"], "--csv prints one schedule: name it with --schedule"),
    ],
)
def test_bad_options(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        schedules.main(argv)
    assert caught.value.code == EXIT_USAGE and says in capsys.readouterr().err
