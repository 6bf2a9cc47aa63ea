"""The folder of a run: one run at a time, earlier runs' files set aside, nothing lost that could not be written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import pretrain_vit
from engine.config.cli import parse
from engine.errors import EXIT_DONE, EXIT_FAULT, EXIT_USAGE, ConfigError, OutputError
from engine.run.journal import Journal
from engine.run.launch import run_rank
from engine.run.metrics import MetricsWriter
from engine.run.provenance import provenance
from engine.run.run_dir import RunDir, prepare_run_dir, set_aside
from parallel.comm import single_axis
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import flags, small

ONE = single_axis("world")


def claim(folder: Path) -> RunDir:
    return RunDir(prepare_run_dir(str(folder)), ONE)


def train(folder: Path, **changes: str) -> int:
    return run_rank(pretrain_vit.main, flags(run_dir=str(folder), **changes), "pretrain_vit.py")


@contextmanager
def full_disk() -> Iterator[Callable[[int], None]]:
    """A function after which no file of this process can grow beyond so many bytes, until the end of the block: pytest
    may be writing to a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)


# -- before the run ----------------------------------------------------------------------------------------------------


def test_a_run_needs_a_folder(tmp_path: Path) -> None:
    assert prepare_run_dir(str(tmp_path / "a" / "b")).is_dir()
    for missing in (None, "", "  "):
        with pytest.raises(ConfigError, match=r"run_dir is (not set|empty): give the folder .*--run_dir runs/demo"):
            prepare_run_dir(missing)
    (tmp_path / "file").write_text("")
    for below in ("file", "file/run", "zero\0byte", "x" * 300):
        with pytest.raises(ConfigError, match=r"(?s)run_dir .* cannot be written to \(.*\): choose a folder"):
            prepare_run_dir(str(tmp_path / below))


def test_a_full_disk_is_refused_before_the_run(tmp_path: Path) -> None:
    with full_disk() as limit, pytest.raises(ConfigError, match=r"cannot be written to \(File too large\)"):
        limit(1000)
        prepare_run_dir(str(tmp_path))


# -- one run at a time -------------------------------------------------------------------------------------------------

_HOLD = """
import sys, os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from engine.run.run_dir import RunDir
from parallel.comm import single_axis
RunDir(Path(sys.argv[1]), single_axis("world"))
if os.fork() == 0:  # as a data worker that outlives the run
    import time; time.sleep(60)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def _contend(world: World, folder: Path) -> str:
    grid = make_grid(small().grid_shape(world.size), world)
    with pytest.raises(ConfigError) as refused:
        RunDir(folder, grid.world)
    return str(refused.value)


def test_a_folder_in_use_is_refused_on_every_rank_until_its_holder_is_dead(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of the run that holds it\n")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert holder.stdout is not None
    try:
        pid = int(holder.stdout.readline())
        for message in run_ranks(2, _contend, tmp_path):
            assert re.search(
                rf"run_dir {tmp_path} is in use by another run \(process {pid} on .* since .*wait", message
            )
        assert train(tmp_path) == EXIT_USAGE
        assert (tmp_path / "metrics.jsonl").read_text() == "of the run that holds it\n"
        holder.kill()
        holder.wait()
        claim(tmp_path).close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "link":
        (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ConfigError, match=r"cannot be locked .*choose another folder"):
        claim(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


# -- a folder used again -----------------------------------------------------------------------------------------------


def test_what_an_earlier_run_wrote_is_set_aside_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    for seed in (1, 2, 3):
        changed = {"train__seed": str(seed), "checkpoint__resume": "never", "log__tensorboard": "true"}
        assert train(folder, **changed) == EXIT_DONE
        said = capsys.readouterr().out
        assert (f"files of an earlier run were moved to {folder / 'earlier' / str(seed - 1)}" in said) == (seed > 1)
    for seed, place in ((1, folder / "earlier" / "1"), (2, folder / "earlier" / "2"), (3, folder)):
        assert parse(["--config", str(place / "config.yaml")])[0].train.seed == seed
        assert len(list(place.glob("events.out.tfevents.*"))) == 1
        assert len((place / "metrics.jsonl").read_text().splitlines()) == 3


def test_links_and_pipes_are_moved_not_followed(tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("kept")
    run.mkdir()
    (run / "config.yaml").symlink_to(precious)
    (run / "events.out.tfevents.1").symlink_to(tmp_path / "nowhere")
    os.mkfifo(run / "metrics.jsonl")
    (run / "notes.txt").write_text("the user's")
    assert train(run) == EXIT_DONE
    assert precious.read_text() == "kept" and (run / "notes.txt").exists()
    assert (run / "config.yaml").is_file() and not (run / "config.yaml").is_symlink()
    moved = {path.name for path in (run / "earlier" / "1").iterdir()}
    assert moved == {"config.yaml", "metrics.jsonl", "events.out.tfevents.1"}
    assert (run / "earlier" / "1" / "config.yaml").readlink() == precious


def test_what_cannot_be_set_aside_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set_aside(tmp_path) is None
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "earlier").write_text("in the way")
    assert train(tmp_path) == EXIT_FAULT
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "cannot be set aside" in error[0]


def test_the_configuration_tells_where_it_comes_from_and_can_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--data.path", "a\x07b\nc"])
    run = claim(tmp_path)
    config = small().resolve(1)
    text = run.write_config(config.to_yaml(), provenance(GridShape(pipeline=1, data=4, context=1, tensor=2)), print)
    run.close()
    assert (tmp_path / "config.yaml").read_text() == text and yaml.safe_load(text) == yaml.safe_load(config.to_yaml())
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == config
    comments = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("# "))
    assert comments["ranks"] == "8 = pipeline 1 x data 4 x context 1 x tensor 2"
    assert re.match(r"\d+\.\d+", comments["version"]) and re.match(r"[0-9a-f]{40}|unknown", comments["commit"])
    assert comments["command"] == "train --data.path 'a\\x07b\\nc'" and comments["host"] and comments["started"]


# -- during the run ----------------------------------------------------------------------------------------------------


EITHER = pytest.mark.parametrize("goes_on", [False, True], ids=["new", "goes on"])


def journal(folder: Path, goes_on: bool) -> tuple[Journal, list[str]]:
    """One that has written, or goes on after, `one`."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    written = Journal(folder / "log", said.append)
    written.write(b"one\n")
    if goes_on:
        written.close()
        written = Journal(folder / "log", said.append, goes_on=True)
    return written, said


@EITHER
@pytest.mark.parametrize("harm", ["file deleted", "file renamed", "folder deleted", "folder renamed"])
def test_what_is_deleted_or_renamed_is_written_anew(tmp_path: Path, harm: str, goes_on: bool) -> None:
    written, said = journal(folder := tmp_path / "run", goes_on)
    harmed = folder / "log" if harm.startswith("file") else folder
    if harm.endswith("renamed"):
        harmed.rename(tmp_path / "other")
    else:
        harmed.unlink() if harmed.is_file() else shutil.rmtree(harmed)
    written.write(b"two\n")
    written.close()
    assert (folder / "log").read_text() == "one\ntwo\n"
    assert len(said) == 1 and "was deleted or renamed during the run" in said[0]


@EITHER
def test_what_is_deleted_after_the_last_line_is_there_at_the_end(tmp_path: Path, goes_on: bool) -> None:
    written, _ = journal(tmp_path / "run", goes_on)
    written.path.unlink()
    written.close()
    assert written.path.read_text() == "one\n"


@EITHER
def test_another_file_of_that_name_is_not_touched(tmp_path: Path, goes_on: bool) -> None:
    written, _ = journal(tmp_path / "run", goes_on)
    written.path.unlink()
    written.path.write_text("of another run\n")
    for end in (lambda: written.write(b"two\n"), written.close):
        with pytest.raises(OutputError, match="was replaced by another file during the run"):
            end()
    assert written.path.read_text() == "of another run\n"
    with pytest.raises(OutputError, match="cannot be made: File exists"):
        Journal(written.path, print)


@EITHER
def test_a_full_disk_is_told_once_and_lines_are_written_when_there_is_room(tmp_path: Path, goes_on: bool) -> None:
    written, said = journal(tmp_path / "run", goes_on)
    with full_disk() as limit:
        limit(6)
        for line in (b"two\n", b"three\n"):
            written.write(line)
        assert written.path.read_text() == "one\ntw" and len(said) == 1
        assert re.search(r"log cannot be written: File too large; .* kept and tried again", said[0])
        limit(100)
        written.write(b"four\n")
        assert written.path.read_text() == "one\ntwo\nthree\nfour\n"
        limit(20)
        written.write(b"five\n")
        with pytest.raises(OutputError, match="log is not complete: File too large"):
            written.close()


def test_a_run_that_could_not_write_its_metrics_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricsWriter.train
    with full_disk() as limit:

        def fill(self: MetricsWriter, step: int, values: Any) -> None:
            limit(self.path.stat().st_size + 10)
            writer(self, step, values)

        monkeypatch.setattr(MetricsWriter, "train", fill)
        changed = {"log__tensorboard": "true", "train__steps": "2", "log__interval": "1"}
        assert train(tmp_path, checkpoint__save_interval="null", **changed) == EXIT_FAULT
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and "is not complete: File too large" in shown.err
    assert shown.out.count("metrics.jsonl cannot be written") == 1


def test_a_folder_deleted_during_the_run_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, evaluation = tmp_path / "run", MetricsWriter.evaluation

    def delete(self: MetricsWriter, step: int, values: Any) -> None:
        shutil.rmtree(folder)
        evaluation(self, step, values)

    monkeypatch.setattr(MetricsWriter, "evaluation", delete)
    assert train(folder, log__tensorboard="true") == EXIT_DONE
    lines = [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == ["train", "eval", "save"]
    assert (folder / "config.yaml").exists() and list(folder.glob("events.out.tfevents.*"))


def test_a_console_that_is_gone_is_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "pretrain_vit.py", *flags(run_dir=str(tmp_path), train__steps="3", log__interval="1")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    error = done.stderr.splitlines()
    assert (
        done.returncode == EXIT_FAULT and len(error) == 1 and "the console cannot be written to: No space" in error[0]
    )
