"""What a run must not go on from, or not with: damage that is no damage, checkpoints of others, states mixed up."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import pretrain_vit
from engine.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USAGE
from engine.run.launch import run_rank
from engine.run.resume import _is_ours
from parallel.checkpoint import manifest as manifests
from parallel.checkpoint.place import name_of
from parallel.checkpoint.read import Reader
from tests.engine.small import flags


def train(folder: Path, until: int | None = None, **changes: str) -> int:
    given = {"train__steps": "8", "checkpoint__save_interval": "2", "checkpoint__keep": "null"} | changes
    if until is not None:
        given["train__stop_step"] = str(until)
    return run_rank(pretrain_vit.main, flags(run_dir=str(folder), **given), "pretrain_vit.py")


def reseal(folder: Path, **changes: object) -> None:
    """Change keys of a manifest, its checksum made right again."""
    path = folder / manifests.FILE
    values = json.loads(path.read_text()) | changes
    del values["checksum"]
    body = json.dumps(values)[:-1]
    path.write_text(f"{body}{manifests._SEAL}{manifests.checksum(body.encode())}{manifests._END}")


def flip(folder: Path, name: str) -> None:
    """A bit of a tensor."""
    with Reader(folder) as reader:
        piece = reader.manifest.tensors[name].pieces[0]
        path = folder / reader.manifest.files[piece.file].name
    data = bytearray(path.read_bytes())
    data[piece.start] ^= 1
    path.write_bytes(data)


def test_nothing_of_a_damaged_checkpoint_is_left_in_the_state(tmp_path: Path) -> None:
    frozen = {"train__freeze": "blocks.0"}
    assert train(tmp_path / "a", 2, **frozen) == EXIT_STOPPED
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert train(tmp_path / "a", 4) == EXIT_STOPPED  # which has moments of blocks.0, as that of step 2 has not
    flip(tmp_path / "a" / "checkpoints" / name_of(4), "optimizer.steps")  # is read last
    assert train(tmp_path / "a", 5) == train(tmp_path / "b", 5) == EXIT_STOPPED
    with (
        Reader(tmp_path / "a" / "checkpoints" / name_of(5)) as one,
        Reader(tmp_path / "b" / "checkpoints" / name_of(5)) as other,
    ):
        assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
        assert all(one.whole(name).equal(other.whole(name)) for name in one.manifest.tensors)


def test_a_pyramid_is_not_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its stages are groups of keys in a list."""
    keys = {"model__patch_size": "2"} | {f"model__{name}": "null" for name in ("width", "depth", "num_heads")}
    stages = "[{{depth: {}, width: 16, num_heads: 4}}, {{depth: 1, width: 32, num_heads: 4}}]"
    for until in (2, 4):
        assert train(tmp_path, until, model__stages=stages.format(1), **keys) == EXIT_STOPPED
    assert "changed since" not in capsys.readouterr().out
    assert train(tmp_path, model__stages=stages.format(2), **keys) == EXIT_USAGE
    assert "is of another model: blocks.1." in capsys.readouterr().err


def test_what_is_not_damaged_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    assert train(tmp_path, 4) == EXIT_STOPPED
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    kept = (folder / name_of(4) / manifests.FILE).read_text()
    reseal(folder / name_of(4), format_version=2)
    assert train(tmp_path) == EXIT_USAGE and "format version 2" in capsys.readouterr().err
    (folder / name_of(4) / manifests.FILE).write_text(kept)
    assert train(tmp_path, data__repeats="3", train__global_batch_size="24") == EXIT_USAGE
    assert "has drawn 32 images, no multiple of it" in capsys.readouterr().err

    def locked_out(path: Path) -> Reader:
        raise manifests.UnreadableError(f"{path} cannot be read (Permission denied)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.run.resume.Reader", lambda path, threads: locked_out(path))
        assert train(tmp_path) == EXIT_FAULT
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Permission denied" in error and "nothing was changed" in error
    assert sorted(path.name for path in folder.iterdir()) == before
    assert train(tmp_path) == EXIT_DONE


def test_a_checkpoint_that_was_renamed_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    assert train(tmp_path, 4) == EXIT_STOPPED
    shutil.copytree(folder / name_of(2), folder / name_of(6))
    assert train(tmp_path, 5) == EXIT_STOPPED
    said = capsys.readouterr().out
    assert "says that it is of step 2" in said and f"from {folder / name_of(4)}, step 4 of 8" in said


def test_progress_of_other_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, 4) == EXIT_STOPPED
    newest = tmp_path / "checkpoints" / name_of(4)
    progress = json.loads((newest / manifests.FILE).read_text())["progress"]
    reseal(newest, progress=progress | {"of_a_later_version": 1})
    assert train(tmp_path, 5) == EXIT_STOPPED
    reseal(tmp_path / "checkpoints" / name_of(5), progress=progress | {"samples": "many"})
    assert train(tmp_path, 6) == EXIT_STOPPED
    assert "samples is 'many'" in capsys.readouterr().out


def test_foreign_files_are_in_nobodys_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (name_of(2), f"{name_of(4)}.writing", f"{name_of(2)}.deleted", f"{name_of(4)}.damaged"):
        (folder / name).write_text("mine")
    assert train(tmp_path, checkpoint__keep="1") == EXIT_DONE
    assert [path.name for path in sorted(folder.glob("step-*")) if path.is_dir()] == [name_of(8)]
    assert "warning" not in capsys.readouterr().out


def test_the_folder_of_checkpoints_is_locked_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "a", 2) == EXIT_STOPPED
    capsys.readouterr()
    child = os.fork()  # record locks are of a process
    if child == 0:
        import fcntl
        import time

        file = os.open(tmp_path / "a" / "checkpoints" / ".lock", os.O_RDWR)
        fcntl.lockf(file, fcntl.LOCK_EX)
        (tmp_path / "held").touch()
        time.sleep(60)
    try:
        while not (tmp_path / "held").exists():
            pass
        assert train(tmp_path / "b", checkpoint__dir=str(tmp_path / "a" / "checkpoints")) == EXIT_USAGE
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert "checkpoint.dir" in (error := capsys.readouterr().err) and "in use by another run" in error
    assert train(tmp_path / "b", checkpoint__dir="") == EXIT_USAGE
    assert "checkpoint.dir is empty" in capsys.readouterr().err


def test_a_link_to_a_larger_disk_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert train(tmp_path / "run", 2, checkpoint__resume="never") == EXIT_STOPPED
    assert (tmp_path / "run" / "checkpoints").is_symlink() and (tmp_path / "disk" / name_of(2)).is_dir()
    assert (tmp_path / "disk" / "earlier" / "1" / name_of(2)).is_dir()


def test_checkpoints_are_known_by_the_launchers_of_their_ranks(tmp_path: Path) -> None:
    assert train(tmp_path, 2) == EXIT_STOPPED
    folder = tmp_path / "checkpoints" / name_of(2)
    about = json.loads((folder / manifests.FILE).read_text())["about"]
    assert about["launchers"] == [] and not _is_ours(folder, {"launchers": []})
    reseal(folder, about=about | {"launchers": ["a", "b"]})
    assert _is_ours(folder, {"launchers": ["b", "c"]}) and not _is_ours(folder, {"launchers": ["c"]})


def test_a_checkpoint_of_another_order_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, 2) == EXIT_STOPPED
    folder = tmp_path / "checkpoints" / name_of(2)
    about = json.loads((folder / manifests.FILE).read_text())["about"]
    del about["order of samples"]  # as earlier versions wrote it
    reseal(folder, about=about)
    assert train(tmp_path, 4) == EXIT_USAGE
    assert "images in another order (a shuffled array, and this run has Feistel, 16 rounds)" in capsys.readouterr().err
