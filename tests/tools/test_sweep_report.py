"""Lines of a sweep's file that are wrong, and its picture."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from engine.errors import ConfigError
from tests.tools.test_sweep_compare import line
from tools import figures
from tools.benchmark.sweep.file import failures, read_lines
from tools.benchmark.sweep.report import report, rows_of
from tools.benchmark.table import Row


def done(number: int, **entry: Any) -> Row:
    row = line(number, 0, [0.1, 0.2], [0.01] * 3)
    more = {
        "step_cpu_seconds": [0.1, 0.2], "yardstick_cpu_seconds": [0.01] * 3, "environment": {"threads": 1},
        "grid_p_d_c_t": "1x2x1x1", "global_batch": 8, "peak_memory_MiB_per_rank": 100.0, "tflops_per_device": 1.0,
        "mfu": None, "mfu_of_measured_gemm": 0.5, "communication_share": 0.0,
    }  # fmt: skip
    more["sweep"] = {**row["sweep"], **dict.fromkeys(("config", "grid", "ranks", "threads"))}
    return {**row, **more, "entry": {**row["entry"], **entry}}


def failed(row: Row) -> Row:
    return {**row, "status": "failed", "why": "no luck"}


@pytest.mark.parametrize(
    "change",
    [
        {"sweep": 1}, {"sweep": {}}, {"entry": []}, {"status": "tired"}, {"status": []}, {"round": None},
        {"ranks": True}, {"step_seconds": []}, {"step_seconds": [0.1, 0.0]}, {"step_seconds": [0.1, float("nan")]},
        {"environment": {}}, {"step_seconds": [0.1]}, {"images_per_second": "fast"}, {"config_hash": 3},
        {"status": "failed"},
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_by_its_number(change: Row, tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    file.write_text(json.dumps(done(1)) + "\n")
    assert len(read_lines(file)) == 1
    file.write_text("".join(json.dumps(row) + "\n" for row in (done(1), {**done(2), **change})))
    with pytest.raises(ConfigError, match="line 2 is not that of a sweep") as caught:
        read_lines(file)
    assert "\n" not in str(caught.value)


def test_what_has_been_made_since_has_not_failed() -> None:
    one, two = done(1), done(2)
    assert failures([failed(one), two, one, failed(two)]) == [failed(two)]
    assert failures([one, failed({**one, "round": 1})]) == [failed({**one, "round": 1})]


def test_the_picture_has_long_names_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        figures, "save", lambda figure, path, save=figures.save: (drawn.append(figure), save(figure, path))
    )
    kinds = ["full", "window"] * 20
    rows = [
        done(n, sequence=True, **{"model.attention": [*kinds[:20], kind, *kinds]}) for n, kind in enumerate(kinds[:2])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report([*rows, failed(done(7))], tmp_path / "long.png")
        report([rows[0], done(3), failed(done(7))], tmp_path / "short.png")
    said = capsys.readouterr().out
    assert '1. is micro=0 sequence=true model.attention=["full","window",' in said and "True" not in said
    assert re.search(r"[ \n]1\. micro=0 sequence=true model\.", said)
    for figure, count in zip(drawn, (3, 3), strict=True):
        axes = figure.axes[0]
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(set(labels)) == count and max(map(len, labels)) < 110 and "micro=7" in labels[-1]
        assert [text.get_text() for text in axes.texts][-1] == "failed" and len(axes.patches) == count - 1
        assert figure.axes[0].get_position().width > 0.2
    assert rows_of([failed(done(7))]) == []
