"""Faults while a run saves and goes on: only what was done since the last complete save is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.checkpoint.manifest import read_manifest
from tests.engine.run.forked import checkpoints, long_run, running, steps_told
from tools.inspect_checkpoint.__main__ import main as inspect_checkpoint

STEPS = 12
EVERY_2 = {
    "train__steps": str(STEPS),
    "checkpoint__save_interval": "2",
    "parallel__zero_stage": "1",
    "parallel__timeout": "20",
}


def weights(run_dir: Path, step: int = STEPS) -> dict[str, tuple[str, ...]]:
    """Checksums of all tensors of a checkpoint, as they were cut."""
    manifest = read_manifest(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: tuple(str(piece.checksums) for piece in t.pieces) for name, t in manifest.tensors.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of 2 ranks that nothing befell; all its checkpoints are there."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running(folder, 2, long_run(folder / "run", **EVERY_2, checkpoint__keep="null")) as run:
        assert run.codes() == [0, 0], run.said()
    yield folder / "run"


def goes_on(run_dir: Path, after: int, undisturbed: Path, **changes: str) -> str:
    """Start the same command again: it takes the step for the last that is done, and ends as if nothing had been.
    Returns what it says.
    """
    with running(run_dir.parent / "again", 2, long_run(run_dir, **EVERY_2 | changes)) as run:
        codes, said = run.codes(), run.said(0)
    assert codes == [0, 0], run.said()
    assert re.findall(r"resume: from \S+, step (\d+) of", said) == ([str(after)] if after else [])
    assert steps_told(run_dir) == list(range(1, STEPS + 1))
    assert weights(run_dir) == weights(undisturbed)
    assert not [name for name in checkpoints(run_dir) if name.endswith((".writing", ".deleted"))]
    return said


# -- killed ------------------------------------------------------------------------------------------------------------

IN_TRAINING = """
from engine.run.step import Stepper
import os
def step(self, *args, step=Stepper.train_step):
    if rank == 1 and self.assembly.optimizer.steps == 6:
        os.kill(os.getpid(), 9)
    return step(self, *args)
Stepper.train_step = step
"""
WHILE_IT_WRITES = """
from engine.checkpoint import saver
import os
def write(path, items, metadata, tell, write=saver.write_file):
    if rank == 1 and "step-00000006" in str(path):
        write(path, items[: len(items) // 2], metadata, tell)
        os.kill(os.getpid(), 9)
    return write(path, items, metadata, tell)
saver.write_file = write
"""
BEFORE_THE_RENAME = """
from engine.checkpoint import folder as folders
import os
def sync(folder, sync=folders.sync):
    if "step-00000006.writing" in str(folder):
        os.kill(os.getpid(), 9)
    return sync(folder)
folders.sync = sync
"""


@pytest.mark.slow
@pytest.mark.parametrize("later", ["false", "true"], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("planted", "killed", "newest"),
    [(IN_TRAINING, 1, (4, 6)), (WHILE_IT_WRITES, 1, (4,)), (BEFORE_THE_RENAME, 0, (4,))],
    ids=["in training", "while it writes", "before the rename"],
)
def test_a_rank_is_killed(
    planted: str, killed: int, newest: tuple[int, ...], later: str, tmp_path: Path, undisturbed: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = long_run(run_dir, **EVERY_2, checkpoint__async_save=later)
    with running(tmp_path, 2, argv, planted=planted) as run:
        codes = run.codes()
    assert codes[killed] == -9 and codes[1 - killed] == 1, run.said()
    whole = [int(name[5:]) for name in checkpoints(run_dir) if re.fullmatch(r"step-\d+", name)]
    assert whole[-1] in newest
    goes_on(run_dir, whole[-1], undisturbed, checkpoint__async_save=later)


# -- no room -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=350k", "none", place], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("later", ["false", "true"], ids=["sync", "async"])
def test_a_disk_that_is_full_ends_the_run_and_it_goes_on_when_there_is_room(
    later: str, disk: Path, undisturbed: Path
) -> None:
    run_dir = disk.with_name("run")
    keys = {"checkpoint__async_save": later, "checkpoint__keep": "9", "checkpoint__dir": str(disk)}
    with running(disk.parent, 2, long_run(run_dir, **EVERY_2, **keys)) as run:
        assert run.codes() == [1, 1], run.said()
    told = re.findall(r"prog: .*", run.said())
    assert len(told) == 1, run.said()
    assert re.match(
        r"prog: checkpoint step-0000000\d cannot be written to \S+: rank \d: No space left on device.*make room",
        told[0],
    )
    assert sorted(path.name for path in disk.glob("step-*")) == ["step-00000002"]
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    (run_dir / "checkpoints").symlink_to(disk)
    goes_on(run_dir, 2, undisturbed, **keys)


@pytest.mark.slow
def test_a_folder_that_is_full_read_only_or_not_shared_is_refused_at_the_start(disk: Path) -> None:
    def refused(planted: str = "") -> str:
        argv = long_run(disk.with_name("run"), **EVERY_2, checkpoint__dir=str(disk))
        with running(disk.parent, 2, argv, planted=planted) as run:
            assert run.codes() == [2, 2], run.said()
        (told,) = re.findall(r"prog: error: .*", run.said())
        assert "step " not in run.said()
        return str(told)

    (disk / "other").write_bytes(bytes(200_000))
    assert re.search(r"a checkpoint takes 0.2 MB, and \S+ has 0.\d MB free: make room", refused())
    (disk / "other").unlink()
    elsewhere = f"""
if rank == 1:
    import ctypes, subprocess
    from engine.run import saving
    saving._PATIENCE = 0.5
    assert ctypes.CDLL(None).unshare(0x20000) == 0  # this process has mounts of its own
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", {str(disk)!r}], check=True)
"""
    assert re.search(r"is not one folder for all ranks: rank 1 cannot see .* give a checkpoint.dir", refused(elsewhere))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert re.search(r"checkpoint.dir \S+ cannot be written to \(Read-only file system\): choose", refused())


# -- damaged -----------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "flipped": [(12, "rank-00001.safetensors", flip)],
    "cut off": [(12, "rank-00000.safetensors", cut)],
    "missing": [(12, "rank-00001.safetensors", Path.unlink)],
    "manifest": [(12, "manifest.json", flip)],
    "no manifest": [(12, "manifest.json", Path.unlink)],
    "two in a row": [(12, "rank-00000.safetensors", flip), (10, "manifest.json", cut)],
    "all": [(step, "rank-00001.safetensors", flip) for step in range(2, STEPS + 1, 2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_ones_are_named_and_the_one_before_is_taken(name: str, tmp_path: Path, undisturbed: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    for step, file, damage in DAMAGES[name]:
        damage(run_dir / "checkpoints" / f"step-{step:08d}" / file)
    whole = STEPS - 2 * len(DAMAGES[name])
    if not whole:
        with running(tmp_path, 2, long_run(run_dir, **EVERY_2, checkpoint__resume="must")) as run:
            assert run.codes() == [2, 2] and run.said().count("prog: error: checkpoint.resume is must, and no") == 1
    said = goes_on(run_dir, whole, undisturbed, checkpoint__keep="null")
    for step, file, _ in DAMAGES[name]:
        assert re.search(rf"warning: \S+step-{step:08d} is damaged: .*{file}", said), said
        if whole:
            assert f"step-{step:08d}.damaged" in checkpoints(run_dir)
    assert len(re.findall("warning: .* is damaged: ", said)) == len(DAMAGES[name])
    if not whole:
        assert "the run starts anew" in said and len(list((run_dir / "earlier/1/checkpoints").iterdir())) == 6


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_write_that_hangs_beside_training_is_found(tmp_path: Path) -> None:
    planted = """
from engine.checkpoint import saver
import time
if rank == 1:
    saver.write_file = lambda *args: time.sleep(600)
"""
    argv = long_run(tmp_path / "run", **EVERY_2 | {"parallel__timeout": "5"}, checkpoint__async_save="true")
    with running(tmp_path, 2, argv, planted=planted) as run:
        assert run.codes() == [1, 1]
    assert re.search(r"prog: the run hangs: .*rank 1 is at step 4, saving a checkpoint", run.said()), run.said()
    assert steps_told(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.slow
def test_readers_and_deletion_do_not_disturb_each_other(tmp_path: Path) -> None:
    argv = long_run(tmp_path / "run", checkpoint__save_interval="1", checkpoint__keep="1")
    codes = []
    with running(tmp_path, 2, argv) as run:
        run.wait_for(2)
        while len(codes) < 30:
            codes.append(inspect_checkpoint([str(tmp_path / "run")]))
        run.kill(15, 0)
        assert run.codes() == [3, 3], run.said()
    assert codes.count(0) > 5 and set(codes) <= {0, 2}
    assert inspect_checkpoint([str(tmp_path / "run")]) == 0
