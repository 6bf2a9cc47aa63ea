"""What is taken of a folder and what is not; one process of a host scans, the others read."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import DataConfig, build_datasets, describe_datasets, listing, sharing
from data.listing import Listing, scan
from data.sharing import scan_once


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Two classes, 5 images, and whatever else one finds in folders."""
    root = tmp_path / "photos"
    for name in ("bee/b.png", "bee/a.JPG", "ant/2024/may/x.tiff", "ant/2024/y.gif", "ant/z.webp"):
        touch(root / name)
    for name in ("bee/._a.JPG", "bee/.DS_Store", "__MACOSX/bee/._b.png", ".git/x.png"):
        touch(root / name)
    for name in ("bee/notes.txt", "ant/2024/Thumbs.db", "readme.md", "cover.png"):
        touch(root / name)
    os.mkfifo(root / "bee" / "pipe.png")
    (root / "bee" / "gone.png").symlink_to("nowhere.png")
    (root / "bee" / "loop.png").symlink_to("loop.png")
    (root / "round").symlink_to("round")
    (root / "ant" / "2024" / "up").symlink_to(root / "ant")
    (root / "ant" / "linked.png").symlink_to(root / "bee" / "b.png")
    return root


def test_images_at_any_depth_are_taken_and_the_rest_is_counted(messy: Path) -> None:
    found = scan(str(messy), "data.path")
    files = [found.file(i) for i in range(len(found))]
    ants = ["2024/may/x.tiff", "2024/y.gif", "linked.png", "z.webp"]
    assert files == [f"{messy}/ant/{name}" for name in ants] + [f"{messy}/bee/a.JPG", f"{messy}/bee/b.png"]
    assert found.classes == ("ant", "bee") and found.labels.tolist() == [0] * 4 + [1] * 2
    assert found.left_out == {
        "hidden": 4,
        "not named as images": 2,
        "beside the class folders": 2,
        "no regular files": 1,
        "broken links": 3,
        "links to a folder that they lie in": 1,
    }
    assert found.describe().startswith(
        f"6 images of 2 classes in {messy}; left out: 2 beside the class folders, 3 broken"
    )


def test_names_are_bytes_and_paths_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [b"\xff\xfe.png", "größe.png".encode(), b"a b.png", b"1.png"]
    (tmp_path / "c").mkdir()
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path / "c") + b"/" + name)).touch()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    found = scan(f"~/{tmp_path.name}", "data.path")
    assert {os.fsencode(Path(found.file(i)).name) for i in range(4)} == set(names)
    assert all(Path(found.file(i)).is_file() for i in range(4))


def test_a_file_takes_few_bytes(tmp_path: Path) -> None:
    for i in range(2000):
        touch(tmp_path / f"n{i % 2}" / f"n01440764_{i:05}.JPEG")
    found = scan(str(tmp_path), "data.path")
    held = [value for value in vars(found).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) <= 40 * 2000
    assert found.fingerprint == scan(str(tmp_path), "data.path").fingerprint
    (tmp_path / "n0" / "n01440764_00000.JPEG").rename(tmp_path / "n0" / "n01440764_99999.JPEG")
    assert found.fingerprint != scan(str(tmp_path), "data.path").fingerprint


def test_what_cannot_be_read_is_refused(messy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(By a stand-in for the file system: root may read everything.)"""
    scandir = os.scandir

    def locked(path: Any) -> Any:
        if str(path).rstrip("/").endswith("2024"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", locked)
    with pytest.raises(ValueError, match=r"data\.path=.*2024.* cannot be read \(Permission denied\): make it readable"):
        scan(str(messy), "data.path")
    with pytest.raises(ValueError, match=r"data\.path=~nobody-here/x cannot be found"):
        scan("~nobody-here/x", "data.path")


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    for name in ("train/ant/a.png", "val/ant/b.png"):
        touch(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"has the folders train, val, which are parts of a data set .* data\.val_path"
    ):
        scan(str(tmp_path), "data.path")


def test_the_report_tells_counts_and_a_model_with_too_many_classes(folder: Path) -> None:
    touch(folder / "ant" / "list.txt")
    config = DataConfig(kind="image_folder", path=str(folder))
    train, held_out = build_datasets(config, image_size=8, channels=3, num_classes=1000, seed=0)
    lines = describe_datasets("image_folder", train, held_out, 1000)
    assert lines[0] == f"data: image_folder, {len(train)} training and {len(held_out)} held-out images"
    assert lines[1] == f"  18 images of 3 classes in {folder}; left out: 1 not named as images"
    assert lines[2].startswith("  JPEGs are decoded by ")
    assert "1000 classes" in lines[3] and "images of 3" in lines[3] and len(lines) == 4
    assert len(describe_datasets("image_folder", train, held_out, 3)) == 3
    assert train.class_names == ("ant", "bee", "cat")


# -- one scans, the others read ----------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The host's temporary directory. Nothing may be left there."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.iterdir())


def rank(path: str, scans: Any, results: Any) -> None:
    def slowly(*args: str) -> Listing:
        with scans.get_lock():
            scans.value += 1
        time.sleep(0.3)
        return scan(*args)

    sharing.scan = slowly  # type: ignore[attr-defined]
    try:
        found = scan_once(path, "data.path", 3)
        shared = all(isinstance(array.base, np.memmap) for array in (found.names, found.ends, found.labels))
        results.put((found.fingerprint, [found.file(i) for i in range(len(found))], shared))
    except ValueError as error:
        results.put(str(error))


def run_ranks(path: Path) -> tuple[list[Any], int]:
    """What 3 processes found, and how many of them scanned."""
    context = multiprocessing.get_context("fork")
    scans, results = context.Value("i", 0), context.Queue()
    ranks = [context.Process(target=rank, args=(str(path), scans, results)) for _ in range(3)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    return found, scans.value


def test_one_process_of_a_host_scans(messy: Path, temporary: Path) -> None:
    expected = scan(str(messy), "data.path")
    for _ in range(2):
        found, scans = run_ranks(messy)
        assert scans == 1 and sum(shared for _, _, shared in found) == 2
        for fingerprint, files, _ in found:
            assert fingerprint == expected.fingerprint and files == [expected.file(i) for i in range(len(expected))]
        touch(messy / "bee" / f"{len(expected)}.png")  # the next run sees it
        expected = scan(str(messy), "data.path")
    shutil.rmtree(messy)
    messages, _ = run_ranks(messy)
    assert all("is not a folder" in message for message in messages)


def test_what_another_run_left_is_not_believed(messy: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scan_once(str(messy), "data.path", 3)
    touch(messy / "ant" / "new.png")
    assert len(scan_once(str(messy), "data.path", 3)) == len(before)  # of the same run
    monkeypatch.setattr(sharing, "_STARTED", time.time() + 60)
    assert len(scan_once(str(messy), "data.path", 1)) == len(before) + 1
    assert len(list(temporary.iterdir())) == 1
    assert len(scan_once(str(messy), "data.path", 3)) == len(before) + 1  # a third that started late: all is removed


def test_without_a_temporary_directory_of_its_own_each_scans(messy: Path, temporary: Path) -> None:
    expected = scan(str(messy), "data.path").fingerprint
    assert scan_once(str(messy), "data.path", 2).fingerprint == expected
    place = next(temporary.iterdir())
    place.chmod(0o777)  # somebody else could have written here
    assert scan_once(str(messy), "data.path", 2).fingerprint == expected
    assert place.exists()
    shutil.rmtree(place)
    shutil.copy("/dev/null", place)  # a file in its place
    assert scan_once(str(messy), "data.path", 2).fingerprint == expected
    place.unlink()
