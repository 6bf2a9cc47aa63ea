"""Tar files are indexed ahead, checked and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.tars import picture, sample, shards, write_tar
from tools.prepare_data.__main__ import main


def test_shards_are_indexed_in_parts_checked_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = shards(tmp_path)
    assert main(["index", pattern, "--part", "1/2", "--workers", "1"]) == 0
    assert "5 images in 1 shards" in capsys.readouterr().out
    assert [file.name for file in tmp_path.glob("*.index")] == ["01.tar.index"]
    assert main(["index", pattern, "--workers", "2"]) == 0
    assert "21 images in 3 shards" in (said := capsys.readouterr().out) and "2 indexed now" in said
    assert main(["check", pattern, "--workers", "1"]) == 0 and "3 shards, 0 faults" in capsys.readouterr().out
    assert main(["stats", pattern]) == 0
    said = capsys.readouterr().out
    assert "images per shard 5 to 9, 7 on average" in said and "with .txt 0, with .json 21, with a label 21" in said
    assert "3 classes, images of each:\n  0: 7\n" in said


def test_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "x.tar", [sample(0), ("a/7", {"jpg": picture(3, "jpg")[:100]})])
    assert main(["check", str(path)]) == 1
    assert "sample a/7 cannot be decoded" in (said := capsys.readouterr().out) and "1 faults" in said
    write_tar(path, [sample(0)])
    with pytest.raises(ValueError, match=r"1 shards have changed .* index --again"):
        main(["index", str(path)])
    assert main(["index", str(path), "--again"]) == 0 and main(["check", str(path)]) == 0
    with pytest.raises(ValueError, match=r"too few shards for part 3 of 4"):
        main(["index", str(path), "--part", "3/4"])
