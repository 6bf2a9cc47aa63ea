"""The folder of all checkpoints: what is listed is complete wherever a process ends; what is kept; in what order."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import folder as folders
from engine.checkpoint.config import CheckpointConfig
from parallel.checkpoint import place
from parallel.checkpoint.manifest import FILE, CheckpointError, NoCheckpointError
from parallel.checkpoint.read import Reader
from tests.engine.checkpoint.making import in_child, make, tensors, write

KILLED = 77
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "os.scandir"}


def complete(folder: Path) -> list[int]:
    """The steps that are listed, each found to be all there."""
    steps = place.steps_in(folder)
    for step in steps:
        with Reader(folder / place.name_of(step), threads=1) as reader:
            reader.verify()
            assert reader.manifest.step == step
            assert all(torch.equal(reader.whole(name), values) for name, values in tensors().items())
    return steps


def killed_at(number: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work, ended before its system call of that number that opens or changes a file or folder."""

    def until() -> None:
        count = itertools.count()

        def see(event: str, arguments: Any) -> None:
            if event in CALLS and next(count) == number:
                os._exit(KILLED)

        sys.addaudithook(see)
        work()

    return until


def at_every_point(folder: Path, prepare: Callable[[], object], work: Callable[[], object]) -> list[list[int]]:
    """The steps that are listed after each place where the work was killed; and after all of it, at the end."""
    found = []
    for number in itertools.count():
        prepare()
        code = in_child(killed_at(number, work))
        found.append(complete(folder))
        if code != KILLED:
            assert code == 0
            return found
    raise AssertionError


def test_killed_while_it_is_saved(tmp_path: Path) -> None:
    make(tmp_path, 1, tensors())

    def prepare() -> None:
        """What a run does that starts again; what the last one left may lie there."""
        folders.delete(tmp_path / place.name_of(2))

    found = at_every_point(tmp_path, prepare, lambda: make(tmp_path, 2, tensors()))
    assert len(found) > 6 and found[0] == [1] and found[-1] == [1, 2]
    assert all(steps in ([1], [1, 2]) for steps in found)
    folders.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("what", ["delete", "prune", "set_damaged_aside"])
def test_killed_while_it_is_deleted(tmp_path: Path, what: str) -> None:
    work: Mapping[str, Callable[[], object]] = {
        "delete": lambda: folders.delete(tmp_path / place.name_of(1)),
        "prune": lambda: folders.prune(tmp_path, CheckpointConfig(keep=1)),
        "set_damaged_aside": lambda: folders.set_damaged_aside(tmp_path, after=2),
    }
    ends = {"delete": [2, 3], "prune": [3], "set_damaged_aside": [1, 2]}

    def prepare() -> None:
        for step in {1, 2, 3} - set(place.steps_in(tmp_path)):
            make(tmp_path, step, tensors())

    found = at_every_point(tmp_path, prepare, work[what])
    assert len(found) >= 2 and found[0] == [1, 2, 3] and found[-1] == ends[what]
    assert all(set(ends[what]) <= set(steps) for steps in found)
    folders.clean(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".damaged")}
    assert left == {place.name_of(step) for step in ends[what]}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the new name is there before anyone is told: folders are synced, too."""
    seen: list[str] = []
    sync, rename = os.fsync, os.rename

    def see_sync(file: int) -> None:
        seen.append(str(Path(f"/proc/self/fd/{file}").readlink().relative_to(tmp_path)))
        sync(file)

    def see_rename(source: Any, to: Any) -> None:
        seen.append("rename")
        rename(source, to)

    monkeypatch.setattr(os, "fsync", see_sync)
    monkeypatch.setattr(os, "rename", see_rename)
    make(tmp_path / "checkpoints", 5, tensors())
    temporary = "checkpoints/step-00000005.writing"
    files = {f"{temporary}/{name}" for name in ("rank-00000.safetensors", "rank-00001.safetensors", FILE)}
    assert set(seen[:3]) == files
    assert seen[3:] == [temporary, "rename", "checkpoints", "."]


def test_a_file_system_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(22, "Invalid argument")))
    folders.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        folders.sync(tmp_path)


# -- which there are ---------------------------------------------------------------------------------------------------


def test_names_and_order(tmp_path: Path) -> None:
    """By number, also beyond eight digits; what only looks like one is none."""
    steps = [0, 99_999_999, 100_000_000, 9_999_999_999, 7]
    for step in steps:
        (tmp_path / place.name_of(step)).mkdir()
    for name in (
        "step-1", "step-000000100", "step-00000002.writing", "step-00000003.deleted", "step-00000004.damaged",
        "step-0000000\u0665", "step-00000006 ", "Step-00000008", "step--0000001",
    ):  # fmt: skip
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-00000010").symlink_to("nowhere")
    (tmp_path / "step-00000011").symlink_to("step-00000011")
    assert place.steps_in(tmp_path) == sorted(steps)
    assert place.newest(tmp_path).name == "step-9999999999"


def test_what_a_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run/checkpoints"
    make(folder, 3, tensors())
    newest = make(folder, 20, tensors())
    for path in (newest, folder, folder.parent):
        assert place.newest(path) == newest
    assert place.newest(folder / "step-00000003").name == "step-00000003"
    (newest / FILE).unlink()
    assert place.newest(newest) == newest  # damaged, but it is what is meant
    odd = tmp_path / "step-00000001"
    make(odd / "checkpoints", 2, tensors())  # a run of that name
    assert place.newest(odd).name == "step-00000002"
    monkeypatch.chdir(newest)
    assert place.newest(Path()).resolve() == newest


def test_a_path_that_means_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    (tmp_path / "circle").symlink_to("circle")
    for name in ("empty", "empty/checkpoints", "file", "none", "none/none"):
        with pytest.raises(NoCheckpointError, match=name):
            place.newest(tmp_path / name)
    for name in ("circle", "file/step-00000001", "x" * 300, "a\0b"):
        with pytest.raises(CheckpointError):
            place.newest(tmp_path / name)
    assert place.steps_in(tmp_path / "none") == []


# -- which are kept ----------------------------------------------------------------------------------------------------


def steps_kept(tmp_path: Path, figures: Mapping[int, Mapping[str, float]], **keys: Any) -> list[int]:
    for step, evaluation in figures.items():
        make(tmp_path, step, {"weights/a": torch.ones(2)}, files=1, evaluation=evaluation)
    gone, _ = folders.prune(tmp_path, CheckpointConfig(**keys))
    left = place.steps_in(tmp_path)
    assert sorted(left + gone) == sorted(figures)
    return left


TEN: dict[int, Mapping[str, float]] = {step: {} for step in range(10, 110, 10)}


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"keep": None}, list(TEN)),
        ({"keep": 1}, [100]),
        ({"keep": 3}, [80, 90, 100]),
        ({"keep": 99}, list(TEN)),
        ({"keep": 1, "keep_every": 40}, [40, 80, 100]),
        ({"keep": 2, "keep_every": 7}, [70, 90, 100]),
        ({"keep": 1, "keep_best": 5}, [100]),
    ],
)
def test_the_newest_and_every_so_many(tmp_path: Path, keys: dict[str, Any], left: list[int]) -> None:
    assert steps_kept(tmp_path, TEN, **keys) == left


@pytest.mark.parametrize(
    ("figures", "left"),
    [
        ({1: {"accuracy": 0.9, "loss": 9.0}, 2: {"accuracy": 0.5, "loss": 0.1}, 3: {}}, [1, 3]),
        ({1: {"loss": 0.2}, 2: {"loss": 0.1}, 3: {"loss": 0.3}}, [2, 3]),
        ({1: {"loss": 0.2}, 2: {"loss": 0.2}, 3: {}}, [2, 3]),
        ({1: {"loss": 0.2}, 2: {"loss": float("nan")}, 3: {}}, [1, 3]),
        ({1: {"accuracy": float("nan"), "loss": 0.2}, 2: {"seconds": 3.0}, 3: {}}, [1, 3]),
        ({1: {"accuracy": 0.1}, 2: {"loss": 0.0}, 3: {}}, [1, 3]),
        ({1: {}, 2: {}, 3: {"loss": 1.0}}, [3]),
    ],
)
def test_the_best(tmp_path: Path, figures: Mapping[int, Mapping[str, float]], left: list[int]) -> None:
    assert steps_kept(tmp_path, figures, keep=1, keep_best=1) == left


def test_the_best_of_those_that_can_be_read(tmp_path: Path) -> None:
    make(tmp_path, 1, tensors(), evaluation={"loss": 0.1})
    (tmp_path / "step-00000001" / FILE).write_bytes(b"")
    for step, loss in ((2, 0.5), (3, 0.7)):
        make(tmp_path, step, tensors(), evaluation={"loss": loss})
    assert folders.prune(tmp_path, CheckpointConfig(keep=1, keep_best=1)) == ([1], []) and complete(tmp_path) == [2, 3]


def test_what_is_read_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step, tensors())
    with Reader(tmp_path / "step-00000001") as one, Reader(tmp_path / "step-00000001"):
        assert folders.prune(tmp_path, CheckpointConfig(keep=1)) == ([2], [1])
        assert torch.equal(one.whole("weights/a"), tensors()["weights/a"])
    assert folders.prune(tmp_path, CheckpointConfig(keep=1)) == ([1], [])


def test_what_cannot_be_opened_can_be_deleted(tmp_path: Path) -> None:
    for step, change in enumerate((Path.unlink, lambda path: (path.unlink(), path.mkdir()))):
        path = make(tmp_path, step, tensors())
        change(path / FILE)
        assert folders.delete(path) and not list(tmp_path.iterdir())
    path = make(tmp_path / "elsewhere", 7, tensors())
    (tmp_path / path.name).symlink_to(path)
    assert folders.delete(tmp_path / path.name) and complete(path.parent) == [7]
    assert [left.name for left in tmp_path.iterdir()] == ["elsewhere"]
    assert not folders.delete(tmp_path / "step-00000099")


def test_what_is_left_of_an_earlier_save_is_no_part_of_a_new_one(tmp_path: Path) -> None:
    temporary, _ = write(tmp_path, 1, tensors(), files=3)
    assert (temporary / "rank-00002.safetensors").exists()
    path = make(tmp_path, 1, tensors(), files=1)
    assert sorted(file.name for file in path.iterdir()) == [FILE, "rank-00000.safetensors"]
