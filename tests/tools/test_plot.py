"""`python -m tools.plot`: what is in the pictures, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from engine.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from tools import figures
from tools.plot import __main__ as plot
from tools.plot import reduce
from tools.plot.names import grouped_by_seed, names_of, read_keys
from tools.plot.panels import PANELS
from tools.plot.read import RECALLS, read_run
from tools.plot.reduce import envelope, means, smooth

ROOT = Path(__file__).parents[2]
CONFIG = """# ranks: {ranks} = pipeline 1 x data {ranks}
optimizer:
  lr: {lr}
train:
  seed: {seed}
run_dir: {dir}
"""


def train(step: int, **values: Any) -> dict[str, Any]:
    line = {
        "samples": 128 * step, "loss": 10.0 / step, "lr": 1e-3, "grad_norm": 1.0, "loss_scale": 1.0, "skipped_steps": 0,
        "step_time": 0.5, "images_per_second": 256.0, "mfu": None, "peak_memory": 2**30, "data_time": 0.001,
        "new_field": "x", "wall_time": 1000 + 0.5 * step,
    }  # fmt: skip
    return {"event": "train", "step": step, **line, **values}


def evaluation(step: int, **values: Any) -> dict[str, Any]:
    wall = 1000.0 + 0.5 * step
    return {"event": "eval", "step": step, "loss": 1.0, "accuracy": 0.5, "eval_time": 0.0, "wall_time": wall} | values


def write(folder: Path, lines: Iterable[Mapping[str, Any]], **keys: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if keys:
        (folder / "config.yaml").write_text(CONFIG.format(**{"ranks": 1, "lr": 1e-3, "seed": 0, "dir": folder} | keys))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    kept: list[Figure] = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def panel(figure: Figure, name: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == PANELS[name].title)


def curve(figure: Figure, name: str, label: str) -> tuple[list[float], list[float]]:
    """The points of the line with this label."""
    line = next(line for line in panel(figure, name).get_lines() if line.get_label() == label)
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def legends(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_run_is_drawn_beside_its_metrics(
    tmp_path: Path, drawn: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [train(10), evaluation(10), train(20, loss=None, grad_norm=None), {"event": "other", "step": 20}]
    lines += [
        {"event": "bad_step", "step": 21, "wall_time": 1010.4},
        train(30, wall_time=1515),
        train(40, wall_time=1520),
    ]
    lines += [evaluation(45, accuracy=0.75, ema_accuracy=0.8, wall_time=1522.5)]
    lines += [{"event": "save", "step": 45, "saved_step": 40, "blocked_time": 0.1, "wall_time": 1523}]
    run = write(tmp_path / "run", lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 50, "lo')  # the run is writing
    before = dict(matplotlib.rcParams)
    assert plot.main([str(run)]) == EXIT_DONE
    assert dict(matplotlib.rcParams) == before
    assert capsys.readouterr() == (f"{run / 'plot.png'}\n", "")
    (figure,) = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        PANELS[name].title for name in ("loss", "accuracy", "lr", "grad_norm", "speed", "memory")
    ]
    x, y = curve(figure, "loss", "run, training")
    assert x == [10, 20, 30, 40] and y[0] == 1 and math.isnan(y[1])
    assert curve(figure, "accuracy", "run, evaluation") == ([10, 45], [50, 75])
    x, y = curve(figure, "accuracy", "run, evaluation of the averaged weights")
    assert math.isnan(y[0]) and y[1] == 80
    assert curve(figure, "memory", "run, training")[1] == [1, 1, 1, 1]
    assert (panel(figure, "memory").get_ylabel(), panel(figure, "speed").get_ylabel()) == ("GiB", "img/s")
    assert curve(figure, "loss", "_not finite")[0] == curve(figure, "grad_norm", "_not finite")[0] == [20]
    assert curve(figure, "loss", "_saved")[0] == [40] and curve(figure, "loss", "_skipped step")[0] == [21]
    assert curve(figure, "lr", "_resumed")[0] == [21, 21]  # 500 s that no line accounts for
    assert {"training", "evaluation", "not finite", "resumed"} <= set(legends(figure))
    with Image.open(run / "plot.png") as image:
        image.load()
        assert image.size == tuple(round(100 * inches) for inches in figure.get_size_inches())
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "plot.png"]


def test_x_is_images_or_time_of_training(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = [train(step) for step in (10, 20)] + [train(step, wall_time=5000 + 0.5 * step) for step in (30, 40)]
    run = write(tmp_path / "run", [*lines, evaluation(45)])
    for x, label, expected, evaluated in (
        ("images", "images", [1280, 2560, 3840, 5120], 5760),
        ("time", "seconds of training", [5, 10, 15, 20], 22.5),
    ):
        assert plot.main([str(run), "--x", x, "--panels", "loss,accuracy"]) == EXIT_DONE
        assert curve(drawn[-1], "loss", "run, training")[0] == pytest.approx(expected)
        assert curve(drawn[-1], "accuracy", "run, evaluation")[0] == pytest.approx([evaluated])
        assert drawn[-1].axes[-1].get_xlabel() == label
    assert plot.main([str(run), "--from", "20", "--to", "30", "--x", "time", "--panels", "loss"]) == EXIT_DONE
    assert curve(drawn[-1], "loss", "run, training")[0] == pytest.approx([10, 15])


def test_panels_say_something_or_are_asked_for(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = [train(i, loss_scale=2.0**i, skipped_steps=i, mfu=0.4, data_time=0.1, bubble=0.3) for i in range(1, 5)]
    run = write(tmp_path / "run", lines)
    assert plot.main([str(run), "--log"]) == EXIT_DONE
    titles = {axes.get_title(loc="left") for axes in drawn[-1].axes}
    of_evaluation = {"accuracy", "zero_shot", *RECALLS}
    assert titles == {made.title for name, made in PANELS.items() if name not in of_evaluation}
    assert curve(drawn[-1], "mfu", "run, training")[1] == [40] * 4
    assert curve(drawn[-1], "waiting", "run, training")[1] == [20] * 4
    assert panel(drawn[-1], "loss").get_yscale() == panel(drawn[-1], "loss_scale").get_yscale() == "log"
    assert plot.main([str(run), "--panels", "waiting,loss", "--smooth", "3"]) == EXIT_DONE
    assert [axes.get_title(loc="left") for axes in drawn[-1].axes] == ["waiting for images", "loss"]
    assert curve(drawn[-1], "loss", "_raw")[1] == pytest.approx([10, 5, 10 / 3, 2.5])
    assert curve(drawn[-1], "loss", "run, training")[1] == pytest.approx([7.5, 5, 10 / 3, 35 / 12])
    assert "before smoothing" in legends(drawn[-1])
    figures = {"recall_image_to_text@1": 0.25, "recall_text_to_image@1": 0.5, "zero_shot_accuracy": 0.75}
    pairs = write(tmp_path / "pairs", [train(1), {"event": "eval", "step": 1, "wall_time": 1.0, "loss": 2.0} | figures])
    assert plot.main([str(pairs)]) == EXIT_DONE
    assert curve(drawn[-1], "zero_shot", "pairs, evaluation")[1] == [75]
    assert curve(drawn[-1], "image_to_text", "pairs, evaluation")[1] == [25]
    assert curve(drawn[-1], "text_to_image", "pairs, evaluation")[1] == [50]


def test_several_runs_are_called_by_what_differs(
    tmp_path: Path, drawn: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write(tmp_path / name, [train(1), train(2)], lr=lr) for name, lr in (("a", "0.001"), ("b", "1.0e-02"))]
    (no_config := tmp_path / "_c$x$").mkdir()
    (no_config / "metrics.jsonl").write_text(json.dumps(train(1)))  # one line, not ended
    assert plot.main([*map(str, runs), str(no_config / "metrics.jsonl"), "--panels", "loss,lr"]) == EXIT_DONE
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.png'}\n"
    assert legends(drawn[-1])[-3:] == ["lr=0.001", "lr=0.01", "_c$x$"]
    colors = [line.get_color() for line in panel(drawn[-1], "loss").get_lines()]
    assert len(set(colors)) == 3
    again = [str(path) for path in sorted(tmp_path.iterdir())]  # as TMP_PATH/* is, with the picture
    assert str(tmp_path / "comparison.png") in again and plot.main([*again, "--panels", "lr"]) == EXIT_DONE
    many = [write(tmp_path / f"many{i}", [train(1), train(2)], lr=i) for i in range(30)]
    assert plot.main([*map(str, many), "--panels", "loss", "--out", str(tmp_path / "many.png")]) == EXIT_DONE
    assert len({line.get_color() for line in panel(drawn[-1], "loss").get_lines()}) == 30
    with Image.open(tmp_path / "many.png") as image:  # what is drawn keeps its room beside the legend
        assert panel(drawn[-1], "loss").get_window_extent().width > 200
        boxes = [legend.get_window_extent() for legend in drawn[-1].legends]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width and box.y1 <= image.height for box in boxes)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"lr": 1}, {"lr": 1}], ["r0", "r1"]),
        ([{"lr": 1}, {"lr": 1}, {"lr": 2}], ["lr=1 (r0)", "lr=1 (r1)", "lr=2"]),
        ([{"lr": 1, "seed": 1}, {"lr": 2, "seed": 2}], ["lr=1 seed=1", "lr=2 seed=2"]),
        ([{"ranks": 1}, {"ranks": 8}], ["ranks=1", "ranks=8"]),
        ([None, {"lr": 1}], ["r0", "r1"]),
        ([{"dir": "x"}], ["r0"]),
    ],
)
def test_names(tmp_path: Path, configs: Sequence[dict[str, Any] | None], expected: list[str]) -> None:
    folders = [write(tmp_path / f"r{i}", [], **keys or {}) for i, keys in enumerate(configs)]
    assert names_of(folders, [read_keys(folder) for folder in folders]) == expected


def test_names_are_short_where_that_is_clear() -> None:
    folders = [Path("x/run"), Path("y/run")]
    one = {
        "model.preset": "vit_s16",
        "model.width": 384,
        "optimizer.name": "adamw",
        "schedule.name": "rsqrt",
        "a": None,
    }
    two = one | {"model.preset": "vit_b16", "model.width": 768, "optimizer.name": "lamb", "a": [True, 1e-5]}
    assert names_of(folders, [one, two]) == [
        "preset=vit_s16 optimizer.name=adamw a=null",
        "preset=vit_b16 optimizer.name=lamb a=[true,1e-05]",
    ]
    assert names_of(folders, [one, one]) == ["x/run", "y/run"]
    paths = [one | {"data.path": f"/somewhere/{name}"} for name in ("x", "y")]
    assert names_of(folders, paths) == ["path=x", "path=y"]


def test_seeds_are_averaged_with_a_band(
    tmp_path: Path, drawn: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        write(tmp_path / f"{lr}-{seed}", [train(i, loss=seed * i) for i in (1, 2, 3)[: 4 - seed]], lr=lr, seed=seed)
        for lr in (1, 2)
        for seed in (1, 2)
    ]
    assert grouped_by_seed([read_keys(run) for run in runs]) == [[0, 1], [2, 3]]
    assert plot.main([*map(str, runs), "--group-seeds", "--panels", "loss"]) == EXIT_DONE
    assert legends(drawn[-1])[-2:] == ["lr=1 (2 seeds)", "lr=2 (2 seeds)"]
    assert curve(drawn[-1], "loss", "lr=1 (2 seeds), training") == ([1, 2], [1.5, 3])
    assert "the mean of lr=2 (2 seeds) ends after 2 steps" in capsys.readouterr().err
    band = panel(drawn[-1], "loss").collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1, 4)


def test_long_curves_keep_every_peak(tmp_path: Path, drawn: list[Figure]) -> None:
    rng, size = np.random.default_rng(0), 200_000
    x, y = np.arange(1.0, size + 1), rng.normal(size=size)
    y[77_777], y[5], y[-1] = 50, -50, np.nan
    short_x, short_y = envelope(x, y)
    assert len(short_x) == 4 * reduce.COLUMNS and (np.diff(short_x) >= 0).all()
    assert (np.nanmin(short_y), np.nanmax(short_y)) == (-50, 50) and np.isnan(short_y[-1])
    column = ((x - 1) * reduce.COLUMNS / (size - 1)).astype(int)
    for i in (0, 388, 999):  # in each column the same extent as all of its values have
        inside = ((short_x - 1) * reduce.COLUMNS / (size - 1)).astype(int) == i
        assert np.nanmax(short_y[inside]) == np.nanmax(y[column == i])
        assert np.nanmin(short_y[inside]) == np.nanmin(y[column == i])
    assert means(x, y)[1][300] == pytest.approx(y[column == 300].mean())
    y[40_000:60_000] = np.nan
    assert np.isnan(envelope(x, y)[1]).sum() >= 4 * 99  # a gap stays one
    run = write(tmp_path / "run", (train(i, loss=99.0 if i == 3000 else 1.0) for i in range(1, 6001)))
    assert plot.main([str(run), "--panels", "loss"]) == EXIT_DONE
    drawn_x, drawn_y = curve(drawn[-1], "loss", "run, training")
    assert len(drawn_x) <= 4 * reduce.COLUMNS and max(drawn_y) == 99 and drawn_x[-1] == 6000


@pytest.mark.filterwarnings("error")
def test_numbers_and_names_of_any_kind(tmp_path: Path, drawn: list[Figure]) -> None:
    """What fp32 cannot hold was not finite; of what is drawn nothing is said by matplotlib."""
    lines = [train(1, loss=1e308, grad_norm=1e36), train(2, loss=3e38), train(3, loss=1.0)]
    run = write(tmp_path / "\u6570", lines)
    for more in ([], ["--log"]):
        assert plot.main([str(run), *more]) == EXIT_DONE
        x, _ = curve(drawn[-1], "loss", "_not finite")
        assert x == [1] and len(panel(drawn[-1], "grad_norm").get_title(loc="right")) < 20
    nothing = write(tmp_path / "zero", [train(i, loss=0.0, grad_norm=-1.0) for i in (1, 2)])
    assert plot.main([str(nothing), "--log"]) == EXIT_DONE
    assert panel(drawn[-1], "loss").get_yscale() == "linear"


def test_smoothing_leaves_out_what_is_not_known() -> None:
    y = np.array([1.0, np.nan, 3.0, 100.0, 5.0])
    np.testing.assert_allclose(smooth(y, 3), [2, np.nan, 3, 5, 52.5])
    np.testing.assert_allclose(smooth(y, 0.5)[:3], [1, np.nan, (0.5 * 0.5 * 1 + 0.5 * 3) / 0.75])
    np.testing.assert_allclose(smooth(np.full(5, 7.0), 0.99), 7)
    rng = np.random.default_rng(0)
    y = rng.normal(size=300)
    for width in (2, 7, 100, 299, 300, 1000):
        left, right = (width - 1) // 2, width // 2
        expected = [np.median(y[max(0, i - left) : i + right + 1]) for i in range(300)]
        np.testing.assert_allclose(smooth(y, width), expected)


def test_lines_that_nobody_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between others they are left out, and told; later lines of a step that comes again count."""
    run = write(tmp_path / "run", [train(1), train(2, loss=7.0), train(3)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\0\0\0\n" + json.dumps(train(2, loss=8.0)) + "\n")
    read = read_run(run / "metrics.jsonl")
    assert read.damaged == (4,) and read.tables["train"]["loss"].tolist() == [10, 8]
    assert plot.main([str(run), "--panels", "loss"]) == EXIT_DONE
    assert "1 damaged line(s) left out: 4" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_told_in_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    good = write(runs / "good", [train(1)])
    (runs / "saved" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (good / "checkpoints").mkdir()
    no_json = write(tmp_path / "no_json", [])
    (no_json / "metrics.jsonl").write_text("step,loss\n1,2\n")
    cases = {
        tmp_path / "nothing": "No such file",
        runs: str(good),
        runs / "saved": "checkpoints alone",
        good / "checkpoints": f"its run directory, {good}",
        no_json: "line 1: no JSON object",
        write(tmp_path / "early", [{"event": "eval", "step": 1}]): "no training line yet",
        write(tmp_path / "empty", []): "no training line yet",
        write(tmp_path / "text", [train(1), train(2, loss="high")]): "line 2: loss is 'high'",
        write(tmp_path / "huge", [train(1), train(2, samples=10**400)]): "line 2: samples is '1000",
        write(tmp_path / "when", [train(1), train(2, wall_time=None)]): "1 training line(s) have no wall_time",
    }
    for path, says in cases.items():
        with pytest.raises((plot.Refusals, ConfigError)) as caught:
            plot.main([str(path), "--x", "time"])
        (reason,) = caught.value.args
        assert says in reason and str(path) in reason and "\n" not in reason
    with pytest.raises(plot.Refusals) as both:
        plot.main([str(runs), str(good), str(tmp_path / "nothing")])
    assert len(both.value.args) == 2
    argv = [str(good), "--from", "5"]
    with pytest.raises(plot.Refusals, match="steps 1 to 1"):
        plot.main(argv)
    for argv, says in (
        ([str(good), str(good)], "given twice"),
        ([str(good), "--out", str(tmp_path / "no" / "x.png")], "no folder"),
        ([str(good), "--out", str(tmp_path)], ".png"),
        ([str(good), "--out", str(tmp_path / "x.pdf")], "PNG"),
        ([str(good), "--out", "/proc/x.png"], "cannot be written"),
        ([str(good), "--panels", "mfu"], "--panels mfu"),
    ):
        with pytest.raises(ConfigError, match=says):
            plot.main(argv)
    for argv, says in (
        (["--x", "hours"], "--x: invalid choice: 'hours'"),
        (["--panels", "los"], "there is no 'los'"),
        (["--smooth", "1.5"], "--smooth: is 1.5"),
        (["--smooth", "nan"], "--smooth: is nan"),
        (["--from", "-1"], "--from: "),
        (["--from", "3", "--to", "2"], "--from 3 is after --to 2"),
    ):
        with pytest.raises(SystemExit) as left:
            plot.main([str(good), *argv])
        assert left.value.code == EXIT_USAGE and says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    """Whatever matplotlib is set to by its user."""
    run = write(tmp_path / "run", [train(1), train(2)], lr=1)
    (tmp_path / "matplotlibrc").write_text("backend: tkagg\ntext.usetex: true\n")
    program = (
        "import sys; from tools.plot.__main__ import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'matplotlib.pyplot'} & sys.modules.keys(); sys.exit(code)"
    )
    argv = [sys.executable, "-W", "error", "-c", program, str(run), "--panels", "loss"]
    own = os.environ | {"MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=own, check=False)
    assert (done.returncode, done.stdout) == (EXIT_DONE, f"{run / 'plot.png'}\n"), done.stderr
    argv = [sys.executable, "-m", "tools.plot", str(tmp_path)]
    failed = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert failed.returncode == EXIT_USAGE and failed.stderr.startswith("tools.plot: error: ")
    assert failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr
