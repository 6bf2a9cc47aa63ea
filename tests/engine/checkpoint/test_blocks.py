"""Files written in blocks have the bytes they were given, on every kind of disk, and errors of the disk are raised."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from parallel.checkpoint import blocks
from parallel.checkpoint.blocks import BLOCK_BYTES, BlockFile

SIZES = (0, 1, mmap.PAGESIZE, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, 9 * BLOCK_BYTES + mmap.PAGESIZE)
real_pwrite = os.pwrite


def check(path: Path) -> None:
    values = np.random.default_rng(0).integers(256, size=sum(SIZES), dtype=np.uint8)
    with BlockFile(path, sum(SIZES)) as file:
        for end, size in zip(np.cumsum(SIZES), SIZES, strict=True):
            assert file.size == end - size
            file.write(values[end - size : end])
        file.sync()
        assert file.size == len(values)
    assert path.read_bytes() == values.tobytes()


def test_all_bytes_in_order(tmp_path: Path) -> None:
    check(tmp_path / "file")
    with pytest.raises(FileExistsError):
        BlockFile(tmp_path / "file", 1)
    with BlockFile(tmp_path / "empty", 0) as file:
        file.sync()
    assert (tmp_path / "empty").stat().st_size == 0


@pytest.mark.parametrize("direct", [True, False])
def test_what_the_disk_has_taken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Where blocks go through the page cache, they are flushed now and then: else only fsync would write."""
    flushed, taken, blocks_ = [], [], 9
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (flushed.append(file), real(file))[1])
    monkeypatch.setattr(blocks, "_FLUSHED_BYTES", 4 * BLOCK_BYTES)
    with BlockFile(tmp_path / "file", blocks_ * BLOCK_BYTES, taken.append) as file:
        if not direct or not file._direct:
            file._set_direct(direct := False)
        file.write(np.zeros(blocks_ * BLOCK_BYTES, np.uint8))
        file.sync()
    assert sum(taken) == blocks_ * BLOCK_BYTES and len(flushed) == (0 if direct else 2)


def test_a_disk_that_wants_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def pwrite(file: int, data: memoryview, at: int) -> int:
        if blocks.fcntl.fcntl(file, blocks.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_pwrite(file, data[: len(data) // 2 + 1], at)  # and takes less than it is given

    monkeypatch.setattr(os, "pwrite", pwrite)
    check(tmp_path / "file")
    assert refused


def test_a_disk_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: BlockFile, on: bool) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(BlockFile, "_set_direct", refuse)
    check(tmp_path / "file")


@pytest.mark.parametrize("size", [100, 20 * BLOCK_BYTES])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    def pwrite(file: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"), BlockFile(tmp_path / "file", 1) as file:
        file.write(np.zeros(size, np.uint8))
        file.sync()
